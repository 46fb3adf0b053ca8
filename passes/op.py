"""A graph node as the rules see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx

from .sizes import Lengths, Size, replaced, shape_of
from .tokens import Axes, Axis, unknowns

Result = Axes | list[Axes]
# What a piece of a sequence was cut from, by the piece, the number of equal pieces and its place; None: of several.
Shards = dict[tuple[Axis, int, int], Axis | None]


@dataclass(frozen=True)
class Op:
    """One node as a rule sees it: its name, arguments, result sizes and the axes of its tensor arguments."""

    node: fx.Node
    name: str
    axes_of: Callable[[fx.Node], Axes | None]
    scope: str = ""
    lengths: Lengths = field(default_factory=dict)
    shards: Shards = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The node's name, unique over all graphs: subgraphs use the same names again."""
        return self.scope + self.node.name

    def arg(self, index: int, *names: str, default: object = None) -> object:
        """A positional argument, or the first of ``names`` given by keyword."""
        if index < len(self.node.args):
            return self.node.args[index]
        return next((self.node.kwargs[name] for name in names if name in self.node.kwargs), default)

    def tokens(self, index: int = 0, *names: str) -> Axes:
        """Axes of a tensor argument; none for anything else, such as a number."""
        value = self.arg(index, *(names or ("input", "self")))
        return (self.axes_of(value) if isinstance(value, fx.Node) else None) or ()

    def dims(self, index: int, rank: int, *names: str) -> list[int]:
        """Dimension numbers, given as one argument, as a list or as the rest of the arguments; never negative."""
        value = self.arg(index, *(names or ("dim", "dims")))
        if not isinstance(value, (tuple, list)):
            value = self.node.args[index:] if index < len(self.node.args) else [value]
        return [dim % rank for dim in value if isinstance(dim, int) and not isinstance(dim, bool)] if rank else []

    def dim(self, index: int, rank: int, *names: str, default: int = 0) -> int:
        value = self.arg(index, *(names or ("dim",)), default=default)
        return value % rank if isinstance(value, int) and rank else default

    @property
    def sizes(self) -> list[Size]:
        return [replaced(size, self.lengths) for size in shape_of(self.node) or []]

    def unknown(self) -> Axes:
        return unknowns(self.sizes, self.label)
