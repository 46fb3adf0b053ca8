"""Sequence parallelism: shards of a sequence, and the collectives that put them together again.

Under Ulysses each of n ranks holds one of n equal shards of the sequence and all heads. An all-to-all exchanges them for
the whole sequence and one n-th of the heads, attention runs, and another all-to-all goes back. A graph shows the program
of one rank alone. That it holds shard r of a sequence is taken from two facts that must agree: the tokens were cut from
the whole as piece r of n, and r and n are this rank and the number of ranks in the group of the exchange. The other
ranks run the same program, and so hold the other pieces.
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

from torch import distributed, fx

from .indexing import SLICES, number, slicing
from .names import name_of
from .op import Op, Result, Shards
from .reshaping import bundled, reshape, unbundled
from .sizes import multiply, same, size_of
from .tokens import (
    MIXED,
    Axes,
    Axis,
    Factor,
    axis_size,
    claims,
    concatenate,
    cut,
    factors,
    mixed,
    ordered,
)

PIECES = frozenset(["chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk"])
UNPROVEN = "an exchange of shards that are not proven to be the ranks' in order"
_COLLECTIVE = ("_c10d_functional::", "_c10d_functional_autograd::")
_LAYOUT = frozenset(
    ["view", "reshape", "flatten", "unflatten", "permute", "transpose", "contiguous", "clone", "getitem", "chunk", "split",
     "unbind", "cat", "to", "squeeze", "unsqueeze", "movedim", "view_as", "reshape_as", "type_as", "detach",
     "_c10d_functional::wait_tensor"]
)  # fmt: skip


def note_shards(op: Op, result: Result) -> None:
    """Remember what equal pieces were cut from: a piece does not tell what the others are."""
    if (op.name not in PIECES and op.name not in SLICES) or not _several_ranks():
        return
    axes = op.tokens()
    if op.name in PIECES and isinstance(result, list) and axes:
        dim = op.dim(2, len(axes))
        for index, piece in enumerate(result):
            _note(op.shards, axes[dim], piece[dim], len(result), index)
    elif op.name in SLICES and isinstance(result, tuple):
        for axis, (source, item) in zip(result, slicing(op) or (), strict=False):
            if source is None or not isinstance(item, builtins.slice) or item.step not in (None, 1):
                continue
            start, length, whole = number(item.start, op.lengths), axis_size(axis), axis_size(axes[source])
            if start is None or not (start.static and length.static and whole.static) or start.hint < 0:
                continue
            if length.hint and not (start.hint % length.hint or whole.hint % length.hint):
                _note(op.shards, axes[source], axis, whole.hint // length.hint, start.hint // length.hint)


def _several_ranks() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _note(shards: Shards, whole: Axis, piece: Axis, count: int, index: int) -> None:
    length = axis_size(piece)
    if count < 2 or not same(multiply([size_of(count), length]), axis_size(whole)):
        return
    start = multiply([size_of(index), length])
    if cut(whole, start, length, "") != piece:
        return
    known = shards.setdefault((piece, count, index), whole)
    if known != whole:
        shards[piece, count, index] = None  # of two sequences: not known which


def whole_of(local: Axis, count: int, rank: int, shards: Shards) -> Axis | None:
    """The tokens of all ranks one after another, of which this rank holds ``local``; None where that is not proven."""
    whole = shards.get((local, count, rank))
    if whole is not None:
        return whole
    # Several sequences, each in shards: text and video, for example.
    wholes = [shards.get(((segment,), count, rank)) for segment in local]
    if len(local) < 2 or None in wholes:
        return None
    pieces: list[Axis] = []
    for index in range(count):
        for part in wholes:
            assert part is not None
            length = size_of(axis_size(part).hint // count)
            pieces.append(cut(part, multiply([size_of(index), length]), length, ""))
    return concatenate(pieces)


def all_to_all(op: Op) -> Axes:
    """Piece q of the first dimension goes to rank q; what came from rank q stands at place q."""
    axes, group = op.tokens(), group_of(op, 3)
    even = all(_equal(op.arg(place, *names)) for place, *names in _SPLITS)
    if not axes or group is None or not even:
        return _lost(op)
    return _from_ranks(op, axes, *group)


_SPLITS = ((1, "output_split_sizes"), (2, "input_split_sizes"))


def all_gather(op: Op) -> Axes:
    """The tensors of all ranks, one after another in the first dimension."""
    axes, group = op.tokens(), group_of(op, 2)
    return _lost(op) if not axes or group is None else _from_ranks(op, axes, *group, gathered=True)


def _from_ranks(op: Op, axes: Axes, count: int, rank: int, gathered: bool = False) -> Axes:
    sizes = op.sizes
    if not sizes[0].static or sizes[0].hint % count:
        return _lost(op)
    each = [size_of(sizes[0].hint // count), *sizes[1:]]
    rest = axes if gathered else reshape(axes, [size_of(count), *each], op.label)[1:]
    source = f"{op.label} ranks"
    ranks: Axis = ((Factor(size_of(count), None, source),),)
    received = [_received(axis, count, rank, source, op.shards) for axis in rest]
    return reshape((ranks, *received), sizes, op.label)


def _received(axis: Axis, count: int, rank: int, source: str, shards: Shards) -> Axis:
    """What an axis holds at every rank: where tokens stand depends on whose they are, anything else is alike."""
    if not ordered(axis):
        return axis
    found = []
    for factor in bundled(axis)[0]:
        alone = unbundled(((factor,),))
        found.append(_stands_for(alone, count, rank, source, shards) if ordered(alone) else factor)
    return (tuple(found),)


def _stands_for(axis: Axis, count: int, rank: int, source: str, shards: Shards) -> Factor:
    whole = whole_of(axis, count, rank, shards)
    if whole is None:
        return Factor(axis_size(axis), MIXED, UNPROVEN)
    shards[whole, 1, 0] = whole
    return Factor(axis_size(axis), MIXED, f"{source}' shards", bundle=(source, whole))


def has_some_heads(tokens: Axis, shards: Shards) -> bool:
    """True where the sequence was put together from those of several ranks, which share out the heads instead."""
    return (tokens, 1, 0) in shards


def _lost(op: Op) -> Axes:
    return tuple(mixed(op.tokens(), size, UNPROVEN) for size in op.sizes)


def _equal(splits: object) -> bool:
    return not splits or (isinstance(splits, Sequence) and len({str(size) for size in splits}) == 1)


def group_of(op: Op, place: int) -> tuple[int, int] | None:
    """Number of ranks in the group of a collective, and which of them this process is; None where it is unknown."""
    name = op.arg(place, "group_name", "group")
    if not isinstance(name, str):
        return None
    from torch.distributed import distributed_c10d

    resolve: Any = distributed_c10d._resolve_process_group
    try:
        group = resolve(name)
    except (RuntimeError, ValueError):
        return None
    return group.size(), group.rank()


def is_shard(axis: Axis, shards: Shards) -> bool:
    """True for video tokens of which other ranks may hold the rest."""
    if any(factor.source == UNPROVEN for factor in factors(axis)):
        return True
    return claims(axis) and any(piece == axis for piece, count, _ in shards if count > 1)


def comes_from_ranks(node: fx.Node, *, exchanged: bool) -> bool:
    """True where only views and copies lie between a collective and the node; not an all-to-all unless ``exchanged``."""
    seen, front = {node}, [node]
    while front:
        at = front.pop()
        name = name_of(at) if at.op in ("call_function", "call_method") else ""
        if name.startswith(_COLLECTIVE) and not name.endswith("wait_tensor"):
            if exchanged or name not in ALL_TO_ALL:
                return True
            continue
        if at is node or name in _LAYOUT:
            front += [x for x in at.all_input_nodes if x not in seen]
            seen.update(at.all_input_nodes)
    return False


ALL_TO_ALL = frozenset(f"{library}all_to_all_single" for library in _COLLECTIVE)
RULES = {
    **dict.fromkeys(ALL_TO_ALL, all_to_all),
    **dict.fromkeys((f"{library}all_gather_into_tensor" for library in _COLLECTIVE), all_gather),
}
