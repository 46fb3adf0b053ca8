"""Recorded launches inside a package: attention of fixed sizes by the very kernels that the optimized model runs.

Inductor can take in a Triton kernel, but no Gluon, no tensor descriptor and no cooperative launch, and so not the kernel
for Hopper. Each attention of fixed sizes is therefore run once on invented inputs and recorded, as in ``kernels.launches``.
The package's own C++ code includes the recorded plans as tables, with the compiled kernels, and ``replay.hpp``, which does
the launches by the CUDA driver. Nothing that the launches depend on is in the inputs' values.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._prims_common import compute_required_storage_length, make_contiguous_strides_for

from ..kernels import implementations, ops
from ..kernels.launches import POINTER_ALIGNMENT, Plan, Plans, Recording, Step, is_dynamic
from .program import options_of

DYNAMIC = "its sizes are dynamic"
RUNTIME = Path(__file__).with_name("replay.hpp")

_LIBRARY = torch.library.Library("vmoba", "FRAGMENT")
_SCHEMAS = {
    "replay_select": "(Tensor q, Tensor k, Tensor key_mask, int rows, int words, int plan) -> Tensor",
    "replay_attention": "(Tensor q, Tensor k, Tensor v, Tensor selected, Tensor key_mask, int plan) -> (Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


@torch.library.register_fake("vmoba::replay_select", lib=_LIBRARY)
def _select_fake(q, k, key_mask, rows, words, plan):
    return q.new_empty((q.shape[0], q.shape[1], rows, words), dtype=torch.int32)


@torch.library.register_fake("vmoba::replay_attention", lib=_LIBRARY)
def _attention_fake(q, k, v, selected, key_mask, plan):
    return ops._attention_fake(q, k, v, selected, key_mask, scale=1.0)


# While Inductor compiles the package, which it runs once in Python to choose among its own kernels.
_compiling: ContextVar[Replays] = ContextVar("plans of the package that is compiled")


def _replay(*args: Any) -> Any:
    *inputs, number = args
    tensors, replays = [x for x in inputs if isinstance(x, Tensor)], _compiling.get()
    for x, expected in zip(tensors, replays.inputs[number], strict=True):
        pairs = zip(x.shape, x.stride(), expected.shape, expected.stride(), strict=True)
        if x.numel() and any(size != wanted or (size > 1 and stride != given) for size, stride, wanted, given in pairs):
            raise RuntimeError(
                f"Inductor hands a tensor {list(x.shape)} with strides {x.stride()} to a VMoBA operator whose launches were"
                f" recorded for {list(expected.shape)} and {expected.stride()}"
            )
    tensors = [_aligned(x) for x in tensors]
    with torch.cuda.device_of(tensors[0]):
        return replays.plans[number].replay([x.data_ptr() for x in tensors])


for _name in _SCHEMAS:
    _LIBRARY.impl(_name, _replay, "CUDA")

_HANDLES = "AtenTensorHandle q, AtenTensorHandle k, "
_DECLARATIONS = {
    torch.ops.vmoba.replay_select.default: "aoti_torch_cuda_replay_select("
    f"{_HANDLES}AtenTensorHandle key_mask, int64_t rows, int64_t words, int64_t plan, AtenTensorHandle* selected)",
    torch.ops.vmoba.replay_attention.default: "aoti_torch_cuda_replay_attention("
    f"{_HANDLES}AtenTensorHandle v, AtenTensorHandle selected, AtenTensorHandle key_mask, int64_t plan,"
    " AtenTensorHandle* out, AtenTensorHandle* lse)",
}


class NotReplayable(Exception):
    """Launches that the driver alone cannot do again."""


def _lacks_memory(error: RuntimeError) -> bool:
    """Of the GPU; PyTorch has an error for it, and Triton has none."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


class Replays:
    """The plans of one package, each once however many layers share it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.plans: list[Plan] = []
        self.inputs: list[tuple[Tensor, ...]] = []  # of each plan, without memory
        self._known: dict[Hashable, int | str] = {}  # the number of a plan, or why there is none

    def exchange(self, node: fx.Node) -> str:
        """Have ``node``, a select or an attention, do recorded launches; why it must do without, empty if it need not.

        Raises:
            ValueError: the named implementation cannot run. RuntimeError: a launch fails.
        """
        inputs = [arg for arg in node.args if isinstance(arg, fx.Node)]
        values, sizes = [arg.meta["val"] for arg in inputs], node.args[len(inputs) :]
        tensors = all(isinstance(x, Tensor) for x in values)
        layouts = [n for x in values for n in (*x.shape, *x.stride(), x.storage_offset())] if tensors else []
        if not tensors or any(is_dynamic(n) for n in (*sizes, *layouts)):
            return DYNAMIC
        taken = [x if _suits(x) else x.clone(memory_format=torch.contiguous_format) for x in values]
        number = self._number(node, taken, sizes)
        if isinstance(number, str):
            return number
        for position, (source, x, before) in enumerate(zip(inputs, taken, values, strict=True)):
            if x is not before:
                clone, contiguous = torch.ops.aten.clone.default, torch.contiguous_format
                with node.graph.inserting_before(node):
                    inputs[position] = node.graph.call_function(clone, (source,), {"memory_format": contiguous})
                inputs[position].meta = source.meta | {"val": x}
        selects = node.target is torch.ops.vmoba.select.default
        shape = node.meta["val"].shape[2:] if selects else ()
        replays = torch.ops.vmoba
        node.target = replays.replay_select.default if selects else replays.replay_attention.default
        node.args, node.kwargs = (*inputs, *shape, number), {}
        return ""

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """The operators run in Python, with these plans, in this context."""
        token = _compiling.set(self)
        try:
            yield
        finally:
            _compiling.reset(token)

    def kernels(self) -> list[str]:
        """Names of the kernels that the plans launch."""
        return sorted({step.compiled.metadata.name for plan in self.plans for step in plan.steps})

    def declarations(self, folder: Path) -> dict[Any, list[str]]:
        """What Inductor's generated code holds of the operators, by operator; files that it includes go to ``folder``."""
        if not self.plans:
            return {}
        tables = folder / "plans.hpp"
        tables.write_text(_Tables(self.plans, self.inputs).text(folder))
        hidden = '__attribute__((visibility("hidden"))) AOTITorchError '
        declared = {op: [hidden + text] for op, text in _DECLARATIONS.items()}
        # Ahead of the declarations, which it holds as well. Inductor puts each of these into extern "C" { extern ...; }.
        next(iter(declared.values())).insert(0, f'"C++" {{\n#include "{tables}"\n}}')
        return declared

    def _number(self, node: fx.Node, values: Sequence[Tensor], sizes: Sequence[Any]) -> int | str:
        """Of the plan for ``node``, or why there is none."""
        key = Plans.key((node.target, *sizes, *sorted(node.kwargs.items())), values, range(0, 16 * len(values), 16))
        if key not in self._known:
            try:
                plan, layouts = self._record(node, values, sizes)
                _Tables([plan], [layouts])
            except NotReplayable as error:
                self._known[key] = str(error)
            except RuntimeError as error:
                if not _lacks_memory(error):
                    raise
                self._known[key] = "its launches were not recorded, for which too little of the GPU's memory is free"
            else:
                self._known[key] = len(self.plans)
                self.plans.append(plan)
                self.inputs.append(layouts)
        return self._known[key]

    def _record(self, node: fx.Node, values: Sequence[Tensor], sizes: Sequence[Any]) -> tuple[Plan, tuple[Tensor, ...]]:
        geometry, options, found = ops._geometry(*sizes), options_of(node), list[tuple[Recording, Any]]()

        def record(compute: Any, _: Hashable, *inputs: Tensor) -> Any:
            recording = Recording(inputs)
            result = compute(recording)
            found.append((recording, recording.plan(result)))
            return result

        # Of random inputs: what is measured and listed must be real, whatever it is.
        tensors = [_invented(x, self.device) for x in values]
        with torch.cuda.device(self.device), torch.no_grad():
            if node.target is torch.ops.vmoba.select.default:
                q, k, mask = tensors
                implementations.select(q, k, mask, geometry, run=record, **options)
            else:
                q, k, v, selected, mask = tensors
                rule = {name: options[name] for name in ("pool", "threshold", "topk", "tile")}
                words = torch.ops.vmoba.select(q, k, mask, *sizes, mode="topk" if rule["topk"] else "threshold", **rule)
                selected = words.as_strided(selected.shape, selected.stride())
                implementations.attention(q, k, v, selected, mask, geometry, run=record, **options)
        recording, plan = found[0]
        if plan is None:
            raise NotReplayable(recording.problem)
        return plan, tuple(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in tensors)


def _suits(x: Tensor) -> bool:
    """Whether the operators' own code hands ``x`` to the launches as it is.

    What is expanded is not: Inductor may well write it out, and the launches would be for strides of 0.
    """
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
        return False
    return x.stride(-1) == 1 if x.dtype.is_floating_point else x.is_contiguous()


def _aligned(x: Tensor) -> Tensor:
    """``x``, or a copy where it begins between the addresses that launches are recorded for.

    Whether it does is known in a call alone: Inductor lays out tensors as it likes and leaves out copies to other addresses.
    """
    if x.data_ptr() % POINTER_ALIGNMENT == 0 or not x.numel():
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _invented(x: Tensor, device: torch.device) -> Tensor:
    """Random numbers, or ones, in the layout of ``x``, whose elements may share memory."""
    made = torch.ones(compute_required_storage_length(x.shape, x.stride(), 0), dtype=x.dtype, device=device)
    if x.dtype.is_floating_point:
        made.normal_(generator=torch.Generator(device).manual_seed(0))  # the caller's stays as it is
    return made.as_strided(x.shape, x.stride())


class _Tables:
    """Plans as C++; the cubins as files beside it, which the assembler takes in."""

    def __init__(self, plans: Sequence[Plan], inputs: Sequence[Sequence[Tensor]]) -> None:
        self.kernels: dict[tuple[Any, ...], int] = {}  # cubin, name, threads, shared memory, cooperative -> number
        self.plans = [self._plan(plan, layouts) for plan, layouts in zip(plans, inputs, strict=True)]

    def text(self, folder: Path) -> str:
        """The tables; the cubins go to ``folder``."""
        images, rows = [], []
        for (cubin, name, *numbers), number in self.kernels.items():
            file = folder / f"{number}.cubin"
            file.write_bytes(cubin)
            images.append(
                f'__asm__(".pushsection .rodata\\n.balign 64\\nvmoba_image_{number}:\\n.incbin \\"{file}\\"\\n'
                f'.popsection\\n");\nextern "C" __attribute__((visibility("hidden"))) const unsigned char'
                f" vmoba_image_{number}[];"
            )
            rows.append(_list([f'"{name}"', f"vmoba_image_{number}", *map(str, numbers)]))
        # A function for each plan: in one for all, a compiler would put every launch of them on the stack at a time.
        functions = [f"Plan plan_{number}() {{\n  return {plan};\n}}" for number, plan in enumerate(self.plans)]
        return "\n".join(
            [
                f'#include "{RUNTIME}"',
                *images,
                "namespace vmoba_replay {\nnamespace {",
                _table("Kernel", "kernels", rows),
                *functions,
                _table("Plan", "plans", [f"plan_{number}()" for number in range(len(self.plans))]),
                "}  // namespace\n}  // namespace vmoba_replay\n",
            ]
        )

    def _plan(self, plan: Plan, inputs: Sequence[Tensor]) -> str:
        places = [f"{{{place.area}, {place.offset}}}" for place in plan.places]
        described = dict(plan.descriptors)
        maps: list[str] = []
        launches = [self._launch(step, described, maps) for step in plan.steps]
        layouts = [_layout(x.dtype, x.shape, x.stride()) for x in inputs]
        outputs = [_layout(dtype, shape, make_contiguous_strides_for(shape)) for shape, dtype in plan.outputs]
        parts = [_list(layouts), _list(outputs), str(plan.scratch_bytes), str(plan.zero_bytes)]
        return _list([*parts, _list(places), _list(maps), _list(launches)])

    def _launch(self, step: Step, described: Mapping[int, Any], maps: list[str]) -> str:
        metadata, moving = step.compiled.metadata, dict(step.moving)
        if (
            metadata.num_ctas != 1
            or metadata.launch_pdl
            or metadata.global_scratch_size
            or metadata.profile_scratch_size
        ):
            raise NotReplayable(f"{metadata.name} has clusters, dependent launches or scratch memory of Triton's")
        descriptions, arguments = iter(metadata.tensordesc_meta or ()), list[str]()
        signature = step.compiled.src.signature
        for position, ((name, kind), value) in enumerate(zip(signature.items(), step.args, strict=True)):
            if kind == "constexpr":
                continue
            if kind.startswith("tensordesc"):
                description = next(descriptions, None)
                if description is None:
                    raise NotReplayable(f"{name} of {metadata.name} is a tensor descriptor that is no tensor map")
                number = moving[position]
                descriptor = described[number]
                arguments.append(f"{{Argument::MAP, {len(maps)}}}")
                maps.append(_map(number, descriptor, description))
                arguments += [_bits(n, "i32") for n in descriptor.shape] + [_bits(n, "i64") for n in descriptor.strides]
            elif position in moving:
                arguments.append(f"{{Argument::PLACE, {moving[position]}}}")
            else:  # a pointer to nothing is 0
                arguments.append(_bits(value, "i64" if kind.startswith("*") else kind))
        facts = 32 * metadata.num_warps, metadata.shared, int(bool(metadata.launch_cooperative_grid))
        kernel = self.kernels.setdefault((step.compiled.asm["cubin"], metadata.name, *facts), len(self.kernels))
        return _list([str(kernel), *map(str, step.grid), _list(arguments)])


_FORMATS = {"fp32": "<f", "f32": "<f", "fp64": "<d", "i1": "<?"}


def _bits(value: Any, kind: str) -> str:
    """An argument that is passed as it is: its bytes, the lowest first, as a number."""
    if kind in _FORMATS:
        number = int.from_bytes(struct.pack(_FORMATS[kind], value), "little")
    elif kind[0] in "iu" and kind[1:].isdigit():
        number = int(value) % 2 ** int(kind[1:])
    else:
        raise NotReplayable(f"an argument has the type {kind}")
    return f"{{Argument::BITS, {number}u}}"


def _map(place: int, descriptor: Any, description: Mapping[str, Any]) -> str:
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    if description["fp4_padded"] or getattr(descriptor, "round_f32_to_tf32", False) or descriptor.strides[-1] != 1:
        raise NotReplayable("a tensor map is of a kind that is not recorded")
    size = description["elem_size"]
    return _list([
        str(place),
        f"static_cast<CUtensorMapDataType>({TMA_DTYPE_DEVICE_TO_HOST[description['elem_type']]})",
        f"static_cast<CUtensorMapSwizzle>({description['swizzle']})",
        f"static_cast<CUtensorMapFloatOOBfill>({int(descriptor.padding == 'nan')})",
        _list([str(n) for n in reversed(descriptor.shape)]),
        _list([str(n * size) for n in reversed(descriptor.strides[:-1])]),
        _list([str(n) for n in reversed(description["block_size"])]),
    ])  # fmt: skip


def _layout(dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[int]) -> str:
    name = str(dtype).removeprefix("torch.")
    return _list([f"aoti_torch_dtype_{name}()", _list(list(map(str, sizes))), _list(list(map(str, strides)))])


def _list(parts: Sequence[str]) -> str:
    return "{" + ", ".join(parts) + "}"


def _table(kind: str, name: str, rows: Sequence[str]) -> str:
    """A function that returns the rows, as a constant vector."""
    body = ",\n    ".join(rows)
    kind = f"const std::vector<{kind}>"
    return f"{kind}& {name}() {{\n  static {kind} all = {{\n    {body}}};\n  return all;\n}}"
