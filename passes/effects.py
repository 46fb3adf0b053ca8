"""What happens to a graph's tensors beside the values that flow: writes, and results that nobody needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import fx

from .names import name_of
from .reading import Unread, argument, called
from .sizes import memory_of, value_of

_EFFECTS = frozenset(["setitem", "register_hook", "retain_grad", "backward"])


def is_live(node: fx.Node) -> bool:
    """True where the node's result or effect reaches the graph's output."""
    seen, front = {node}, [node]
    while front:
        at = front.pop()
        if at.op == "output" or mutates(at):
            return True
        front += [user for user in at.users if user not in seen]
        seen.update(at.users)
    return False


def mutates(node: fx.Node) -> bool:
    """True for what writes to a tensor, or does anything else that is no result; operators unknown here may."""
    schemas = _schemas(node)
    if schemas:
        return any(schema.is_mutable for schema in schemas)
    name = called(node)
    if isinstance(node.target, torch._ops.HigherOrderOperator):  # its graph may
        return True
    return name in _EFFECTS or node.kwargs.get("out") is not None or "::" in name or name.endswith("_")


def check_undisturbed(
    tensors: Iterable[fx.Node], since: fx.Node, until: fx.Node, writers: Iterable[fx.Node] | None = None
) -> None:
    """Raise :class:`Unread` where one of the tensors may be written to between two nodes: it is read at the second."""
    if writer := is_disturbed(tensors, since, until, writers):
        raise Unread(f"{name_of(writer)} writes to what the attention reads, between its products")


def is_disturbed(
    tensors: Iterable[fx.Node], since: fx.Node, until: fx.Node, writers: Iterable[fx.Node] | None = None
) -> fx.Node | None:
    """The first node after ``since`` and before ``until`` that may write to one of the tensors.

    ``writers`` are all nodes of the graph that :func:`mutates` is true of, in order; else the nodes between are read.
    """
    memory = {place for node in tensors for place in _places(node)}
    if not memory:
        return None
    between = _mutating(since, until) if writers is None else (node for node in writers if since < node < until)
    for node in between:
        touched = {place for given in _written(node) for place in _places(given)}
        # Some tensors, as under vmap, do not tell where they lie.
        if memory & touched or None in memory or None in touched:
            return node
    return None


def _mutating(since: fx.Node, until: fx.Node) -> Iterator[fx.Node]:
    node = since.next
    while node is not until:
        if mutates(node):
            yield node
        node = node.next


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that a node may write to."""
    name, out = called(node), node.kwargs.get("out")
    schemas = _schemas(node)
    if len(schemas) == 1:
        given = schemas[0].arguments
        places = [i for i, x in enumerate(given) if x.alias_info is not None and x.alias_info.is_write]
        written = [argument(node, i, given[i].name) for i in places]
    elif isinstance(node.target, torch._ops.HigherOrderOperator) or "::" in name or name.startswith("_"):
        return node.all_input_nodes
    else:
        written = [out if out is not None else argument(node, 0, "input", "self")]
    found: list[fx.Node] = []
    fx.map_arg(written, found.append)  # type: ignore[arg-type,type-var]
    return found


def _schemas(node: fx.Node) -> list[torch.FunctionSchema]:
    """The schema of an operator, or those of all its overloads."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return [target._schema]
    if isinstance(target, torch._ops.OpOverloadPacket):
        return [getattr(target, name)._schema for name in target.overloads()]
    return []


def _places(node: fx.Node) -> set[int | None]:
    """Where the node's tensors lie in memory."""
    value = value_of(node)
    tensors = value if isinstance(value, (tuple, list)) else [value]
    return {memory_of(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor)}
