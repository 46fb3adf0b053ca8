"""What an operator is called, however the graph spells it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import fx

_OPERATORS = {"truediv": "div", "floordiv": "floor_divide", "and_": "bitwise_and", "or_": "bitwise_or", "inv": "neg",
              "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}  # fmt: skip
_IN_PLACE = {
    "iadd": "add_", "isub": "sub_", "imul": "mul_", "itruediv": "div_", "ifloordiv": "floor_divide_", "ipow": "pow_",
    "iand": "bitwise_and_", "ior": "bitwise_or_", "ixor": "bitwise_xor_",
}  # fmt: skip
_TRUSTED = ("torch", "_operator", "operator", "builtins", "math")


def name_of(node: fx.Node) -> str:
    """The operator's name, one and the same for a function, a tensor method and an aten overload.

    Operators from elsewhere keep the name of their library: another's ``roll`` need not be a roll.
    """
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return _schema_name(target._schema.name)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return _schema_name(target._qualified_op_name)
    if isinstance(target, str):
        name = target
    elif target is getattr and isinstance(node.args[1], str):  # a property, such as mT
        name = node.args[1]
    else:
        name = getattr(target, "__name__", str(target))
        library = getattr(target, "__module__", None)
        if library is not None and library.split(".")[0] not in _TRUSTED:
            return f"{library}::{name}"
    return _plain(name)


def _plain(name: str) -> str:
    """``__and__`` and ``and_`` are ``bitwise_and``."""
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
    return _OPERATORS.get(name) or _IN_PLACE.get(name, name)


def _schema_name(qualified: str) -> str:
    library, _, name = qualified.partition("::")
    return _plain(name) if library in ("aten", "prims") else qualified


@lru_cache(maxsize=4096)
def is_elementwise(name: str) -> bool:
    """True where ATen tags the operator as pointwise, in place or not."""
    packet = getattr(torch.ops.aten, name.rstrip("_"), None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())
