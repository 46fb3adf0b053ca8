"""What a report's page says of sites: their verdicts, sizes and figures as text. Nothing here is escaped yet."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .report import Site

X = "\u00d7"  # the sign of multiplication


def verdict(site: Site) -> str:
    """ "done": rewritten; "meant": dense as it should be; "missed": dense, though it may be over a video."""
    return "done" if site.rewritten else "meant" if site.reason.intended else "missed"


def label(site: Site) -> str:
    """Layer and scheme."""
    return " · ".join(filter(None, ("?" if site.layer is None else str(site.layer), site.scheme)))


def group_of(path: str) -> tuple[str, str]:
    """A module path as the model's block and the rest: "blocks.3" and "attn1"; without a number the parent module."""
    names = path.split(".")
    numbers = [place for place, name in enumerate(names) if name.isdecimal()]
    cut = numbers[0] + 1 if numbers else max(1, len(names) - 1)
    return ".".join(names[:cut]), ".".join(names[cut:])


def layout(site: Site) -> str:
    """As ``Site.layout``, spaced for a page."""
    if site.grid is None:
        return str(site.tokens) if site.tokens else ""
    return " + ".join(x for x in (str(site.prefix), times(site.grid), str(site.suffix)) if x != "0")


def times(sizes: Iterable[int | str]) -> str:
    return X.join(map(str, sizes))


def number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count != 1 else "")


def si(flops: float) -> str:
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if flops >= 10**power:
            return f"{flops / 10**power:.3g} {prefix}FLOP"
    return f"{flops:.0f} FLOP"


def duration(milliseconds: float) -> str:
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.3g} s"


def mean(shares: Iterable[float]) -> float:
    known = list(shares)
    return sum(known) / len(known)


@dataclass(frozen=True)
class Flops:
    """Of one forward pass; ``exact`` where the sparse figure is measured, else it is the most that the rule allows."""

    dense: int = 0
    sparse: int = 0
    exact: bool = True

    def told(self) -> str:
        """The sparse figure."""
        return ("" if self.exact else "≤ ") + si(self.sparse)


def flops(sites: Iterable[Site]) -> Flops:
    """Of the rewritten sites for which both figures are known, together."""
    dense, sparse, exact = 0, 0, True
    for site in sites:
        after = _most(site) if site.sparse_flops is None else site.sparse_flops
        if site.rewritten and site.dense_flops and after is not None:
            dense, sparse, exact = dense + site.dense_flops, sparse + after, exact and site.sparse_flops is not None
    return Flops(dense, sparse, exact)


def _most(site: Site) -> int | None:
    """The most FLOPs of the sparse attention, without its selection; None where a size is symbolic."""
    if site.density_bound is None or site.grid is None or not isinstance(site.tokens, int):
        return None
    grid = [size for size in site.grid if isinstance(size, int)]
    if len(grid) < 3:
        return None
    video_pairs = min(1.0, (math.prod(grid) / max(1, site.tokens)) ** 2)
    return round(site.dense_flops * (1 - video_pairs * (1 - site.density_bound)))


def timed(sites: Iterable[Site]) -> list[tuple[float, float]]:
    """Milliseconds dense and sparse of the sites that have both."""
    return [(x.dense_ms, x.sparse_ms) for x in sites if x.dense_ms is not None and x.sparse_ms is not None]
