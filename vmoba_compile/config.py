"""The configuration of the rewrite: a frozen, checked value that goes to JSON and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import torch

from . import profit
from .blocks import SCHEMES, Block, Triple, default_block
from .kernels.api import check_selection

FLOAT_MASKS = ("dense", "padding")

BlockSpec = Mapping[str, Any]


@dataclass(frozen=True)
class VMoBAConfig:
    """Choices of the VMoBA rewrite (arXiv 2506.23858).

    Args:
        threshold: share of a pool's gate weight that the selected boxes hold; 1 or more keeps everything.
        pool: what competes: "head_global" (the paper's global selection), "query_head", "block" or "overall".
        mode: "threshold", or "topk" with ``topk`` boxes a query.
        topk: boxes a query for mode="topk", its own box included.
        blocks: None for the defaults, or a mapping from "1d", "2d", "3d" to a block size (frames, rows, columns) in
            tokens,
            None for a whole axis, or to ``{"count": (frames, rows, columns)}``, the number of boxes along each axis.
            Schemes left out keep their default.
        granularity: "token", the paper's selection per query token, or "tile", one selection for every tile of up to 128
            neighbouring queries of a box by their mean: not the paper's exact rule, less work (see ``select``).
        float_masks: what masks in floating point are that the graph does not build from a bool mask: "dense", unknown, so
            that their attention stays dense; or "padding", zeros and values of at most -10,000, which is checked at each
            run without waiting for the device (a RuntimeError on a CPU, a device-side assertion on a GPU).
        dense_steps: first denoising steps that ``schedule`` keeps dense, a fraction (float) or a count (int).
        dense_layers: layer numbers kept dense.
        min_tokens: shorter sequences stay dense; "auto" takes the length from which sparse attention is faster on the
            device, for inference or for training: your own figure, where ``python -m vmoba_compile bench --calibrate``
            has measured it, else a shipped one (see ``profit``).

    Raises:
        ValueError, TypeError: a value is out of range, unknown or of the wrong type.
    """

    threshold: float = 0.25
    pool: str = "head_global"
    mode: str = "threshold"
    topk: int | None = None
    blocks: BlockSpec | None = None
    granularity: str = "token"
    float_masks: str = "dense"
    dense_steps: float | int = 0.25
    dense_layers: tuple[int, ...] = ()
    min_tokens: int | str = "auto"

    def __post_init__(self) -> None:
        check_selection(
            pool=self.pool, mode=self.mode, threshold=self.threshold, topk=self.topk, granularity=self.granularity
        )
        if self.float_masks not in FLOAT_MASKS:
            raise ValueError(
                f"float_masks must be one of {', '.join(map(repr, FLOAT_MASKS))}, not {self.float_masks!r}"
            )
        object.__setattr__(self, "threshold", float(self.threshold))
        if self.blocks is not None:
            object.__setattr__(self, "blocks", MappingProxyType(_checked_blocks(self.blocks)))
        object.__setattr__(self, "dense_layers", _checked_layers(self.dense_layers))
        _check_steps(self.dense_steps)
        if self.min_tokens != "auto" and not _is_count(self.min_tokens):
            raise ValueError(f"min_tokens must be 'auto' or an int of at least 0, not {self.min_tokens!r}")

    def least_tokens(self, device: torch.device, training: bool) -> int:
        """Sequences shorter than this stay dense on that device; ``training`` where a backward follows."""
        return self._least(device, training).tokens

    def least_tokens_named(self, device: torch.device, training: bool) -> str:
        """That number and where it comes from, for a sentence: "fewer than ..."."""
        return self._least(device, training).named

    def _least(self, device: torch.device, training: bool) -> profit.Least:
        if isinstance(self.min_tokens, int):
            return profit.Least(self.min_tokens, f"min_tokens={self.min_tokens} of the configuration")
        return profit.least_tokens(device, training)

    def block_for(self, layer: int, grid: Triple) -> tuple[str, Block]:
        """Scheme of a layer ("1d", "2d", "3d" in turn) and its block size in tokens on ``grid``, None for a whole axis.

        One graph may serve several grids; the sizes are then those for the grid that it was made for.
        """
        scheme = SCHEMES[layer % len(SCHEMES)]
        spec = (self.blocks or {}).get(scheme)
        if spec is None:
            return scheme, default_block(scheme, grid)
        if isinstance(spec, Mapping):
            spec = [-(-extent // count) if count else None for extent, count in zip(grid, spec["count"], strict=True)]
        return scheme, (spec[0], spec[1], spec[2])

    def dense_step_count(self, steps: int) -> int:
        """How many of ``steps`` denoising steps stay dense."""
        if isinstance(self.dense_steps, int):
            return min(self.dense_steps, steps)
        return round(self.dense_steps * steps)

    def to_dict(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.blocks is not None:
            values["blocks"] = {k: dict(v) if isinstance(v, Mapping) else list(v) for k, v in self.blocks.items()}
        values["dense_layers"] = list(self.dense_layers)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VMoBAConfig:
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r}; the options are {', '.join(sorted(known))}")
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> VMoBAConfig:
        return cls.from_dict(json.loads(text))

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __reduce__(self) -> tuple[Any, ...]:
        return VMoBAConfig.from_dict, (self.to_dict(),)


def as_config(config: VMoBAConfig | Mapping[str, Any] | None) -> VMoBAConfig:
    """The configuration, a new one of a mapping's fields, or the default."""
    if config is None:
        return VMoBAConfig()
    if isinstance(config, VMoBAConfig):
        return config
    if isinstance(config, Mapping):
        return VMoBAConfig.from_dict(config)
    raise TypeError(f"config must be a VMoBAConfig or a mapping of its fields, not {type(config).__name__}")


def _checked_blocks(blocks: object) -> dict[str, Any]:
    if not isinstance(blocks, Mapping):
        raise TypeError(f"blocks must map '1d', '2d', '3d' to block sizes, not {type(blocks).__name__}")
    checked: dict[str, Any] = {}
    for scheme, spec in blocks.items():
        if scheme not in SCHEMES:
            raise ValueError(f"blocks has an unknown scheme {scheme!r}; the schemes are '1d', '2d' and '3d'")
        if isinstance(spec, Mapping):
            if set(spec) != {"count"}:
                raise ValueError(
                    f"blocks[{scheme!r}] must be sizes or {{'count': (frames, rows, columns)}}, not {spec!r}"
                )
            checked[scheme] = {"count": _triple(scheme, spec["count"])}
        else:
            checked[scheme] = _triple(scheme, spec)
    return checked


def _triple(scheme: str, value: Any) -> tuple[int | None, ...]:
    if not isinstance(value, (tuple, list)) or len(value) != 3 or not all(v is None or _is_count(v, 1) for v in value):
        raise ValueError(
            f"blocks[{scheme!r}] must be three integers of at least 1 or None (frames, rows, columns), not {value!r}"
        )
    return tuple(value)


def _checked_layers(layers: Any) -> tuple[int, ...]:
    if not isinstance(layers, (tuple, list, range, set, frozenset)) or not all(_is_count(layer) for layer in layers):
        raise ValueError(f"dense_layers must hold layer numbers (int, from 0), not {layers!r}")
    return tuple(sorted(layers))


def _check_steps(steps: Any) -> None:
    if isinstance(steps, float) and not 0 <= steps <= 1:
        raise ValueError(f"dense_steps as a fraction must be in 0 to 1, not {steps}; give an int for a count of steps")
    if not isinstance(steps, float) and not _is_count(steps):
        raise ValueError(f"dense_steps must be a fraction (float, 0 to 1) or a count (int), not {steps!r}")


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
