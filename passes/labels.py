"""What the dimensions of an attention's tensors stand for: each is a product of labels, such as batch times head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .sizes import ONE, Size, multiply, quotient, same
from .tokens import Axis

Dims = tuple[tuple[str, ...], ...]

QUERIES, KEYS, CHANNELS, VALUES = "queries", "keys", "channels", "values"


@dataclass
class Labels:
    """Sizes of the labels, and which were split into an outer and an inner one when a dimension was."""

    sizes: dict[str, Size] = field(default_factory=dict)
    parts: dict[str, tuple[str, str]] = field(default_factory=dict)

    def leaves(self, names: Sequence[str]) -> list[str]:
        found = []
        for name in names:
            found.extend(self.leaves(self.parts[name]) if name in self.parts else [name])
        return found

    def split(self, name: str, outer: Size, inner: Size) -> tuple[str, str]:
        first, second = f"{name}/0", f"{name}/1"
        self.parts[name] = first, second
        self.sizes |= {first: outer, second: inner}
        return first, second

    def grouped(self, name: str, groups: Size) -> str:
        """The groups of a label, each of several of its positions."""
        if name not in self.parts:
            self.split(name, groups, quotient(self.sizes[name], groups))
        return self.parts[name][0]

    def size(self, names: Sequence[str]) -> Size:
        return multiply([self.sizes[name] for name in names])

    def reshape(self, dims: Dims, sizes: Sequence[Size], fixed: Sequence[str]) -> Dims | None:
        """The dims after a row-major reshape to ``sizes``; None where it cuts through one of the ``fixed`` labels."""
        queue = self.leaves([name for names in dims for name in names])
        result = []
        for size in sizes:
            taken: list[str] = []
            while not same(self.size(taken), size):
                if not queue:
                    return None
                name = queue.pop(0)
                whole = self.size([*taken, name])
                if whole.hint <= size.hint:
                    taken.append(name)
                    continue
                rest = size.hint // max(1, self.size(taken).hint)
                if name in fixed or rest <= 1 or self.sizes[name].hint % rest:
                    return None
                outer = quotient(size, self.size(taken))
                first, second = self.split(name, outer, quotient(self.sizes[name], outer))
                taken.append(first)
                queue.insert(0, second)
            result.append(tuple(taken))
        # What is left can only be of size one, as is what a size of one has skipped.
        return tuple(result) if same(self.size(queue), ONE) else None

    def split_as(self, name: str, axis: Axis) -> None:
        """Split a label as the tokens' types know its dimension: batch and heads that were folded together."""
        if len(axis) == 1:
            wide = [factor.size for factor in axis[0] if factor.size != ONE]
            if len(wide) == 2 and same(multiply(wide), self.sizes[name]):
                self.split(name, *wide)
