"""What the implementations of the backward are given."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .attend_lists import Lists
from .partition import Geometry


class Inputs(NamedTuple):
    """One group of samples and heads; ``delta`` is the sum of ``dout * out`` over a row, less the gradient of ``lse``."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor
    lists: Lists
    geometry: Geometry
    scale: float
    masked: int  # 1 if each sample has a list of keys of its own, else 0

    @property
    def group(self) -> int:
        """Heads of queries that share keys and values."""
        return self.q.shape[1] // self.k.shape[1]
