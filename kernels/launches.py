"""What an operator allocates and launches, and how the same is done again at a fraction of the cost.

One forward makes some twenty launches, the portable kernels a hundred and more. Triton looks at every argument of every
launch, tens of microseconds each time, though nothing that it finds depends on what the tensors hold: only on the key of
:class:`Plans`. The first call with a key therefore runs as it is written and is recorded: which compiled kernels ran on
which grids, and where each pointer lies, in an input, in an output or in scratch memory. Later calls allocate the
outputs and one piece of scratch memory, fill in the addresses and call the compiled kernels themselves.

What is recorded reaches memory through its inputs and its :class:`Work` alone, and launches kernels through it alone: an
operation of torch's own would be missed. A call whose launches use any other memory is never replayed, nor is one
whose result was not made by :meth:`Work.output`. Launch hooks, which profilers set, see every launch: while there are
some, nothing is replayed.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 512  # bytes, as PyTorch aligns what it allocates
POINTER_ALIGNMENT = 16  # bytes: what Triton compiles a kernel for

Result = Tensor | tuple[Tensor, ...]

# Compute capability that work is recorded for, where it is not that of a GPU at hand.
TARGET: ContextVar[tuple[int, int] | None] = ContextVar("TARGET", default=None)


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Of what the launches are for."""
    return TARGET.get() or torch.cuda.get_device_capability(device)


class Work:
    """Memory and launches of one call of an operator; given to every function that allocates or launches."""

    takes_descriptors = True  # tensor descriptors as arguments of launches, not plain pointers alone
    takes_parts = True  # pointers into the middle of inputs and outputs
    memory_factor = 1  # how much more scratch memory than usual, where few launches count for more

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def output(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """What the operator returns; the result is its outputs in the order in which they were made."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Scratch memory."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Scratch memory that holds zeros when the operator begins."""
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def part(self, x: Tensor, *which: slice) -> Tensor:
        """Some samples of an input, or some heads of them."""
        return part_of(x, *which)

    def as_bytes(self, mask: Tensor) -> Tensor:
        """A bool tensor as uint8."""
        return mask.view(torch.uint8)

    @contextmanager
    def section(self) -> Iterator[None]:
        """Scratch memory taken inside serves again behind it."""
        yield

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Run ``kernel`` over ``grid``; nothing for an empty grid, which CUDA refuses."""
        if all(grid):
            kernel[grid](*args, **options)


def is_dynamic(size: int) -> bool:
    """Whether a size is a symbol, of which a traced graph must hold for every value."""
    return isinstance(size, torch.SymInt)


def part_of(x: Tensor, *which: slice) -> Tensor:
    """``x[which]``, or ``x`` itself where that is all of it."""
    whole = all(s.start in (None, 0) and s.stop in (None, n) for s, n in zip(which, x.shape, strict=False))
    return x if whole else x[which]


class Place(NamedTuple):
    """A byte of an area: of an input, of scratch memory, of zeros or of an output, numbered in this order."""

    area: int
    offset: int


class Step(NamedTuple):
    """A launch: ``args`` but for those that move, of which ``moving`` has (position, number of the value)."""

    run: Callable[..., None]
    grid: tuple[int, int, int]
    function: int
    metadata: Any
    args: list[Any]
    moving: list[tuple[int, int]]
    compiled: Any  # Triton's, for those who launch it by other means


class Address:
    """Memory as the base of a tensor descriptor: Triton asks for its address alone."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class Plan:
    """A recorded call. Holds no tensor, and nothing in it changes: several threads may replay it at a time."""

    device: torch.device
    outputs: tuple[tuple[torch.Size, torch.dtype], ...]
    single: bool  # the result is one tensor, not a tuple
    scratch_bytes: int
    zero_bytes: int
    places: tuple[Place, ...]  # of the values that move
    descriptors: tuple[tuple[int, Any], ...]  # values that are tensor descriptors: their number, and all but the base
    steps: tuple[Step, ...]

    def replay(self, inputs: Sequence[int]) -> Result:
        """The call again, for inputs at these addresses, on the current stream."""
        device = self.device
        made = tuple([torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.outputs])
        scratch = torch.empty(self.scratch_bytes, dtype=torch.uint8, device=device)
        zeros = torch.zeros(self.zero_bytes, dtype=torch.uint8, device=device) if self.zero_bytes else scratch
        areas = [*inputs, scratch.data_ptr(), zeros.data_ptr(), *[x.data_ptr() for x in made]]
        values: list[Any] = [areas[area] + offset for area, offset in self.places]
        for number, descriptor in self.descriptors:
            moved = copy.copy(descriptor)
            moved.base = Address(values[number])
            values[number] = moved
        stream = current_stream(device)
        for run, (x, y, z), function, metadata, args, moving, _ in self.steps:
            filled = args.copy()
            for position, value in moving:
                filled[position] = values[value]
            run(x, y, z, stream, function, metadata, None, None, None, *filled)
        return made[0] if self.single else made


class Recording(Work):
    """Work that is done as ever, and noted down for a :class:`Plan`."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__(inputs[0].device)
        self.problem = ""  # why the call cannot be replayed
        self._inputs: dict[int, Place] = {}  # by address
        for area, x in enumerate(inputs):
            self._know(x, Place(area, 0))
        self._scratch, self._zeros, self._first_output = range(len(inputs), len(inputs) + 3)
        self._own: list[tuple[Tensor, Place]] = []  # allocated here, and kept: addresses stay unique
        self._outputs: list[Tensor] = []
        self._used = self._scratch_bytes = self._zero_bytes = 0
        self._values: dict[tuple[Place, str], tuple[int, Any]] = {}  # number, and the descriptor if it is one
        self._steps: list[Step] = []

    def output(self, *shape: int, dtype: torch.dtype) -> Tensor:
        made = super().output(*shape, dtype=dtype)
        self._own.append((made, Place(self._first_output + len(self._outputs), 0)))
        self._outputs.append(made)
        return made

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        made = super().empty(*shape, dtype=dtype)
        self._own.append((made, Place(self._scratch, self._used)))
        self._used += _aligned_bytes(made)
        self._scratch_bytes = max(self._scratch_bytes, self._used)
        return made

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        made = super().zeros(*shape, dtype=dtype)
        self._own.append((made, Place(self._zeros, self._zero_bytes)))
        self._zero_bytes += _aligned_bytes(made)  # filled once, as the call begins: never used again
        return made

    def part(self, x: Tensor, *which: slice) -> Tensor:
        part, place = super().part(x, *which), self._inputs.get(x.data_ptr())
        if place is not None:
            self._know(part, Place(place.area, place.offset + part.data_ptr() - x.data_ptr()))
        return part

    @contextmanager
    def section(self) -> Iterator[None]:
        used, kept = self._used, len(self._own)
        yield
        self._used = used
        # Zeros stay, so that what is allocated later does not come to lie at their addresses.
        self._own[kept:] = [(x, place) for x, place in self._own[kept:] if place.area != self._scratch]

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if not all(grid):
            return
        compiled = kernel[grid](*args, **options)
        if not hasattr(compiled, "packed_metadata"):  # it ran in the interpreter, say
            self.problem = f"{kernel} was not compiled"
            return
        parameters = kernel.signature.parameters
        bound = kernel.signature.bind(*args, **{name: x for name, x in options.items() if name in parameters})
        bound.apply_defaults()
        values, moving = list(bound.arguments.values()), []
        for position, value in enumerate(values):
            is_descriptor = hasattr(value, "block_shape")  # of Triton or of Gluon
            if isinstance(value, Tensor) or is_descriptor:
                values[position] = 0
                if is_descriptor or value.numel():
                    moving.append((position, self._number(value)))
            elif isinstance(value, (tuple, list)) or hasattr(value, "data_ptr"):
                self.problem = f"argument {list(parameters)[position]} of {kernel} may hold pointers"
        x, y, z = (*grid, 1, 1)[:3]
        self._steps.append(
            Step(compiled.run, (x, y, z), compiled.function, compiled.packed_metadata, values, moving, compiled)
        )

    def plan(self, result: Result) -> Plan | None:
        """What was recorded; None where it cannot be replayed, see ``problem``."""
        returned = (result,) if isinstance(result, Tensor) else tuple(result)
        if len(returned) != len(self._outputs) or any(x is not y for x, y in zip(returned, self._outputs, strict=True)):
            self.problem = self.problem or "the result is not made of the outputs"
        if self.problem:
            return None
        return Plan(
            self.device, tuple((x.shape, x.dtype) for x in self._outputs), isinstance(result, Tensor),
            self._scratch_bytes, self._zero_bytes, tuple(place for place, _ in self._values),
            tuple((number, x) for number, x in self._values.values() if x is not None), tuple(self._steps),
        )  # fmt: skip

    def _know(self, x: Tensor, place: Place) -> None:
        """Note where an input lies. Two that begin at one address always do, which the key tells."""
        if x.numel() and self._inputs.setdefault(x.data_ptr(), place).offset != place.offset:
            self.problem = "inputs overlap"

    def _number(self, x: Any) -> int:
        """Of the value that a tensor's pointer, or a tensor descriptor, is at replay."""
        descriptor, tensor = None, x
        if not isinstance(x, Tensor):
            descriptor, tensor = copy.copy(x), x.base
            descriptor.base = None
        key = (self._place(tensor), repr(descriptor))
        return self._values.setdefault(key, (len(self._values), descriptor))[0]

    def _place(self, x: Tensor) -> Place:
        address = x.data_ptr()
        if address in self._inputs:
            return self._inputs[address]
        for own, (area, offset) in self._own:
            within = address - own.data_ptr()
            if 0 <= within < own.numel() * own.element_size():
                return Place(area, offset + within)
        self.problem = "a kernel works on memory that is neither an input nor of this work"
        return Place(0, 0)


class Plans:
    """The plans of a process, by everything that the launches depend on; the least recently used one goes first."""

    def __init__(self, limit: int = 256) -> None:
        self.limit = limit
        self.plans: OrderedDict[Hashable, Plan | None] = OrderedDict()  # None: not to be replayed
        self._lock = Lock()

    def run(self, options: Hashable, inputs: Sequence[Tensor], compute: Callable[[Work], Result]) -> Result:
        """``compute``, recorded or replayed.

        ``options`` holds whatever else the launches depend on: the name of the operator, geometry, numbers.
        """
        addresses = [x.data_ptr() for x in inputs]
        key = self.key(options, inputs, addresses)
        with self._lock:
            known = key in self.plans
            if known:
                self.plans.move_to_end(key)
                plan = self.plans[key]
        if not known:  # several threads may get here; their plans are equal
            recording = Recording(inputs)
            result = compute(recording)
            self._keep(key, recording.plan(result))
            return result
        if plan is None or launches_are_observed():
            return compute(Work(inputs[0].device))
        return plan.replay(addresses)

    @staticmethod
    def key(options: Hashable, inputs: Sequence[Tensor], addresses: Sequence[int]) -> Hashable:
        """Equal where the launches are the same but for the addresses."""
        tensors = tuple([
            (x.dtype, x.shape, x.stride(), x.device, address % POINTER_ALIGNMENT)
            for x, address in zip(inputs, addresses, strict=True)
        ])  # fmt: skip
        distinct = len(set(addresses)) == len(addresses)
        return options, tensors, None if distinct else tuple(map(addresses.index, addresses))

    def _keep(self, key: Hashable, plan: Plan | None) -> None:
        with self._lock:
            self.plans[key] = plan
            while len(self.plans) > self.limit:
                self.plans.popitem(last=False)


def current_stream(device: torch.device) -> int:
    from triton.runtime import driver

    return driver.active.get_current_stream(device.index)


def launches_are_observed() -> bool:
    from triton import knobs

    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any([getattr(hook, "calls", hook) for hook in hooks])


def _aligned_bytes(x: Tensor) -> int:
    return math.ceil(x.numel() * x.element_size() / ALIGNMENT) * ALIGNMENT
