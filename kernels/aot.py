"""The portable forward as data: which kernels run on which buffers, for a GPU that need not be there.

:func:`record_select` and :func:`record_attention` run the operators' own host code on tensors without memory and write
down a :class:`Chain`: values (inputs, scratch memory, results) and calls (kernel, compile-time values, numbers, grid).
``aot_ptx`` makes PTX of it, ``aot_driver`` runs it with the CUDA driver alone, and a chain goes to JSON and back.

Runtimes such as TensorRT know functions of tensors only. A chain is therefore in static single assignment: a call takes
values and makes new ones; what it changes in place is a new value that *aliases* an input. Whatever a call reads is an
input of it, so an order that respects these dependencies is right: no call writes over what another has still to read,
which :func:`check_order` proves. Results that start as zeros are made by a call of their own.

All samples and heads are done at a time, since no such runtime passes a pointer into the middle of a tensor: the lists of
pairs take as much memory as they need (:func:`scratch_bytes`), while packed keys and partial results stay bounded.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attend, implementations
from .launches import TARGET, Result, Work
from .partition import Geometry

Capability = tuple[int, int]

# What kernels do with the pointers that they do not merely read; ``aot_ptx`` holds it against the compiled code.
# "write": stored to. Where an earlier call wrote the buffer, what this one leaves alone stays as it is.
# "renew": stored to, and whoever reads the buffer afterwards reads nothing that was there before.
# "update": read and written, or counted up; an earlier call has written it.
# Any other word is the compile-time value without which the pointer is not used at all.
ROLES: dict[str, dict[str, str]] = {
    "fill_zeros": {"X": "write"},
    "_add_pieces": {"mask": "MASKED", "sums": "write", "counts": "write", "own": "write"},
    "_join_pieces": {"terms": "write", "sizes": "write"},
    "mean_query": {"out": "write", "own": "write"},
    "plain_bits": {"words": "write"},
    "_select_rows": {"words": "write"},
    "gate_range": {"low": "write", "high": "write", "other_sum": "write", "own_sum": "write", "coarse": "update"},
    "find_bracket": {"ints": "write", "numbers": "write"},
    "gate_histogram": {"above_count": "renew", "above_sum": "renew", "fine": "update"},
    "find_cut": {"fine": "update", "ints": "update", "numbers": "update"},
    "gate_bits": {"words": "write", "ties": "write", "listed": "write", "lengths": "update"},
    "take_last": {"words": "update"},
    "list_keys": {"MASK": "HAS_MASK", "KEYS": "write", "SPAN": "write"},
    "count_pairs": {"COUNT": "write", "PLACE": "write"},
    "scan_groups": {"COUNT": "update", "TOTAL": "write"},
    "cut_chunks": {"START": "write", "CUT": "write", "TOTALS": "write"},
    "list_tiles": {"TILES": "write", "CHUNKS": "write", "FIRST_CHUNK": "write", "TOTALS": "update", "DONE": "write"},
    "scatter_entries": {"PLACE": "update", "ENTRIES": "write"},
    "pack_keys": {"PACKED_K": "renew", "PACKED_V": "renew"},
    "attend_tiles": {"PART": "renew", "PART_LSE": "renew"},
    "merge_chunks": {"OUT": "write", "LSE": "write"},
    "refuse": {"OUT": "write", "LSE": "write"},
    "list_queries": {"QUERIES": "write"},
    "list_blocks": {"BLOCKS": "renew", "COUNT": "renew"},
    "order_tiles": {"ORDER": "renew"},
    "attend_queries": {"OUT": "write", "LSE": "write"},
}

_POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip
_ZEROS_BLOCK = 1024


@dataclass(frozen=True)
class Value:
    """What a tensor holds between two calls: shape, and the name of its torch dtype."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return self.numel * getattr(torch, self.dtype).itemsize

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Port:
    """An input or an output of a call: the kernel's parameter for it (none: ""), and the number of the value.

    ``alias`` is, for an output that is an input changed in place, the number of that input among the call's inputs.
    """

    parameter: str
    value: int
    alias: int = -1


@dataclass(frozen=True)
class Call:
    """One launch. ``types`` has all parameters of the kernel but those of ``constants``, in their order."""

    kernel: str  # "module:name"
    constants: dict[str, Any]
    types: dict[str, str]
    numbers: dict[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    grid: tuple[int, int, int]
    options: dict[str, int]  # num_warps, num_stages, maxnreg

    @property
    def name(self) -> str:
        return self.kernel.rpartition(":")[2]


@dataclass(frozen=True)
class Chain:
    """The launches of one operator. The first values are its inputs, in the order of ``inputs``."""

    capability: Capability
    inputs: tuple[str, ...]
    outputs: tuple[int, ...]  # values
    values: tuple[Value, ...]
    calls: tuple[Call, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Chain:
        data = json.loads(text)
        calls = tuple(
            Call(**call | {
                "inputs": tuple(Port(**port) for port in call["inputs"]),
                "outputs": tuple(Port(**port) for port in call["outputs"]),
                "grid": tuple(call["grid"]),
            })
            for call in data["calls"]
        )  # fmt: skip
        values = tuple(Value(tuple(value["shape"]), value["dtype"]) for value in data["values"])
        return cls(tuple(data["capability"]), tuple(data["inputs"]), tuple(data["outputs"]), values, calls)


@triton.jit(do_not_specialize=["count"])
def fill_zeros(X, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(X + at, tl.zeros([BLOCK], tl.int32), mask=at < count)


class Recorder(Work):
    """Work whose tensors have no memory and whose launches are written down."""

    takes_descriptors = False
    takes_parts = False
    memory_factor = 4  # a third of the calls, each of which is a layer of an engine

    def __init__(self, **inputs: Tensor) -> None:
        super().__init__(torch.device("meta"))
        self.names = tuple(inputs)
        self.values: list[Value] = []
        self.calls: list[Call] = []
        self._kept: list[Tensor] = []  # so that no other storage comes to lie where theirs are
        self._current: dict[int, int] = {}  # storage -> its value
        self._zeros: set[int] = set()  # storages that nobody has filled yet
        self._changed: dict[int, int] = {}  # value that the call being noted makes -> its storage
        for x in inputs.values():
            if not x.is_contiguous():
                raise ValueError("recorded inputs are contiguous: no runtime hands on the strides of a view")
            self._current[_storage(self._keep(x))] = self._value(x)

    def output(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self._keep(super().output(*shape, dtype=dtype))

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self._keep(super().empty(*shape, dtype=dtype))

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        made = self._keep(super().empty(*shape, dtype=dtype))
        self._zeros.add(_storage(made))
        return made

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if all(grid):
            self._note(kernel, grid, *args, **options)

    def chain(self, result: Result, capability: Capability) -> Chain:
        """What was recorded, ``result`` being what the operator returned."""
        returned = (result,) if isinstance(result, Tensor) else tuple(result)
        outputs = tuple(self._current[_storage(x)] for x in returned)
        made = Chain(capability, self.names, outputs, tuple(self.values), tuple(self.calls))
        check_order(made)
        return made

    def _note(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        function = kernel.fn
        parameters = inspect.signature(function).parameters
        bound = inspect.signature(function).bind(*args, **{k: v for k, v in options.items() if k in parameters})
        roles = ROLES.get(function.__name__)
        if roles is None:
            raise NotImplementedError(f"ROLES does not say what kernel {function.__name__} writes")
        constants: dict[str, Any] = {}
        types: dict[str, str] = {}
        numbers: dict[str, int] = {}
        inputs: list[Port] = []
        outputs: list[Port] = []
        for name, x in bound.arguments.items():
            role = roles.get(name, "read")
            if "constexpr" in str(parameters[name].annotation) or isinstance(x, float):
                constants[name] = x
            elif isinstance(x, Tensor):
                if role not in ("read", "write", "renew", "update") and not bound.arguments[role]:
                    constants[name] = None
                    continue
                types[name] = _POINTERS[x.dtype]
                self._connect(x, name, role, inputs, outputs)
            elif -(2**31) <= x < 2**31:
                types[name], numbers[name] = "i32", int(x)
            else:  # runtimes pass integers of 32 bits
                constants[name] = int(x)
        for port in outputs:
            self._current[self._changed.pop(port.value)] = port.value
        if not inputs:  # runtimes want one: any that is there
            inputs.append(Port("", 0))
        x, y, z = (*grid, 1, 1)[:3]
        kept = {k: v for k, v in options.items() if k not in parameters}
        self.calls.append(
            Call(f"{function.__module__}:{function.__name__}", constants, types, numbers, tuple(inputs), tuple(outputs),
                 (x, y, z), kept)
        )  # fmt: skip

    def _connect(self, x: Tensor, name: str, role: str, inputs: list[Port], outputs: list[Port]) -> None:
        """The ports of one pointer."""
        storage = _storage(x)
        if x.storage_offset() or not x.is_contiguous() or x.untyped_storage().nbytes() != x.numel() * x.element_size():
            raise ValueError(f"{name}: a launch that is recorded works on whole tensors, not on a part of one")
        if storage in self._zeros:
            self._zeros.remove(storage)
            count = x.numel() * x.element_size() // 4
            grid = (triton.cdiv(count, _ZEROS_BLOCK),)
            self._note(fill_zeros, grid, x.view(torch.int32), count, BLOCK=_ZEROS_BLOCK, num_warps=4)
            self.values[self._current[storage]] = _describe(x)
        known = self._current.get(storage)
        if known is None and role not in ("write", "renew"):
            raise ValueError(f"{name} is read before anything is written to it")
        if known is not None and role != "renew":
            inputs.append(Port(name, known))
        if role in ("write", "renew", "update"):
            if known is not None and known < len(self.names):
                raise ValueError(f"{name} is an input of the operator and would be written to")
            in_place = known is not None and role != "renew"
            made = self._value(x) if known is None or not in_place else self._again(known)
            outputs.append(Port("", made, len(inputs) - 1) if in_place else Port(name, made))
            self._changed[made] = storage

    def _keep(self, x: Tensor) -> Tensor:
        self._kept.append(x)
        return x

    def _value(self, x: Tensor) -> int:
        self.values.append(_describe(x))
        return len(self.values) - 1

    def _again(self, value: int) -> int:
        self.values.append(self.values[value])
        return len(self.values) - 1


def _describe(x: Tensor) -> Value:
    return Value(tuple(x.shape), str(x.dtype).removeprefix("torch."))


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def check_order(chain: Chain) -> None:
    """RuntimeError unless every call that reads a value is done before another changes it in place, in any valid order."""
    maker: dict[int, int] = {}
    before: list[set[int]] = []  # calls that must be done before each call
    readers: dict[int, list[int]] = {}
    for number, call in enumerate(chain.calls):
        done: set[int] = set()
        for port in call.inputs:
            if port.value in maker:
                done |= {maker[port.value]} | before[maker[port.value]]
            readers.setdefault(port.value, []).append(number)
        before.append(done)
        for port in call.outputs:
            maker[port.value] = number
    for number, call in enumerate(chain.calls):
        for port in call.outputs:
            if port.alias >= 0:
                late = [i for i in readers[call.inputs[port.alias].value] if i != number and i not in before[number]]
                if late:
                    name = chain.calls[late[0]].name
                    raise RuntimeError(f"{call.name} may change a buffer before {name} has read it")


def scratch_bytes(chain: Chain) -> int:
    """Most bytes of values other than inputs and outputs at a time: calls in order, each value freed after its last use."""
    last = {port.value: i for i, call in enumerate(chain.calls) for port in (*call.inputs, *call.outputs)}
    root = list(range(len(chain.values)))  # the value whose memory this one is
    for call in chain.calls:
        for port in call.outputs:
            if port.alias >= 0:
                root[port.value] = root[call.inputs[port.alias].value]
    for value, number in list(last.items()):
        last[root[value]] = max(last[root[value]], number)
    own = {root[value] for value in chain.outputs} | set(range(len(chain.inputs)))
    live = most = 0
    for number, call in enumerate(chain.calls):
        live += sum(
            chain.values[p.value].bytes for p in call.outputs if root[p.value] == p.value and p.value not in own
        )
        most = max(most, live)
        live -= sum(chain.values[v].bytes for v, end in last.items() if end == number and root[v] == v and v not in own)
    return most


def record_select(
    q: Sequence[int], kv_heads: int, dtype: torch.dtype, geometry: Geometry, *, capability: Capability, masked: bool = False,
    pool: str, mode: str, threshold: float, topk: int, tile: int = 0,
) -> Chain:  # fmt: skip
    """The chain of ``vmoba::select`` for ``q`` [B, H, S, D]: inputs q, k (and key_mask if ``masked``), output selected.

    Raises:
        ValueError: the portable kernels do not take these sizes; the reason is the operator's own.
    """
    tensors = _inputs(q, kv_heads, dtype, geometry, masked)
    rule: dict[str, Any] = {"pool": pool, "mode": mode, "threshold": threshold, "topk": topk, "tile": tile}
    q_, k, _, mask = tensors.values()
    with _recording(capability, q=q_, k=k, key_mask=mask) as run:
        made: Any = implementations.select(q_, k, mask, geometry, implementation="triton", run=run, **rule)
    return made


def record_attention(
    q: Sequence[int], kv_heads: int, dtype: torch.dtype, geometry: Geometry, *, capability: Capability, masked: bool = False,
    scale: float, threshold: float, topk: int, pool: str, tile: int = 0,
) -> Chain:  # fmt: skip
    """The chain of ``vmoba::attention``: inputs q, k, v, selected (and key_mask if ``masked``), outputs out and lse.

    Raises:
        ValueError: as :func:`record_select`; or the pairs of all samples pass 2**31.
    """
    tensors = _inputs(q, kv_heads, dtype, geometry, masked)
    shape = (*q[:2], geometry.by_tile(tile).num_video, geometry.num_words)
    selected = torch.empty(shape, dtype=torch.int32, device="meta")
    share = implementations._share(geometry, threshold, topk)
    pairs = 0 if tile else q[0] * attend.pair_capacity(geometry, q[1], share)
    if pairs >= 2**31:
        raise ValueError(
            f"a recorded attention does all samples and heads at a time and takes fewer than 2**31 pairs of a query and a"
            f" box, not {pairs}: use larger blocks, fewer samples or granularity='tile'"
        )
    q_, k, v, mask = tensors.values()
    with _recording(capability, q=q_, k=k, v=v, selected=selected, key_mask=mask) as run:
        made: Any = implementations.attention(
            q_, k, v, selected, mask, geometry,
            scale=scale, threshold=threshold, topk=topk, implementation="triton", tile=tile, pool=pool, run=run,
        )  # fmt: skip
    return made


def _inputs(
    q: Sequence[int], kv_heads: int, dtype: torch.dtype, geometry: Geometry, masked: bool
) -> dict[str, Tensor]:  # fmt: skip
    batch, heads, tokens, head_dim = q
    if tokens != geometry.num_tokens:
        raise ValueError(f"q has {tokens} tokens, and the grid and the condition tokens make {geometry.num_tokens}")
    if heads % kv_heads:
        raise ValueError(f"{kv_heads} heads of keys do not divide {heads} heads of queries")
    if batch * heads > attend.MAX_GRID:
        raise ValueError(f"a recorded operator takes up to {attend.MAX_GRID} heads of all samples, not {batch * heads}")

    def new(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    k, v = (new(batch, kv_heads, tokens, head_dim, dtype=dtype) for _ in range(2))
    mask = new(*((batch, tokens) if masked else (0,)), dtype=torch.bool)
    return {"q": new(*q, dtype=dtype), "k": k, "v": v, "key_mask": mask}


@contextmanager
def _recording(capability: Capability, **inputs: Tensor) -> Iterator[Any]:
    """What the operators' front door calls in place of its own ``_run``."""
    work = Recorder(**{name: x for name, x in inputs.items() if x.numel()})

    def run(compute: Any, options: Hashable, *tensors: Tensor) -> Chain:
        return work.chain(compute(work), capability)

    token = TARGET.set(capability)
    try:
        yield run
    finally:
        TARGET.reset(token)
