"""What the rewrite found and did: one :class:`Site` per attention, collected in a :class:`Report`."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any


class Reason(str, Enum):
    """Why an attention was rewritten or left dense."""

    REWRITTEN = "rewritten"
    CROSS_ATTENTION = "cross_attention"
    NOT_VIDEO = "not_video"
    DENSE_LAYER = "dense_layer"
    TOO_FEW_TOKENS = "too_few_tokens"
    FACTORISED = "factorised"
    NO_GRID = "no_grid"
    AMBIGUOUS_GRID = "ambiguous_grid"
    NOT_RASTER = "not_raster"
    SEVERAL_GRIDS = "several_grids"
    CAUSAL = "causal"
    MASK = "mask"
    DROPOUT = "dropout"
    LAYOUT = "layout"
    SPELLING = "spelling"
    WEIGHTS_USED = "weights_used"
    DYNAMIC_GRID = "dynamic_grid"
    SHARED_SUBGRAPH = "shared_subgraph"
    CONTROL_FLOW = "control_flow"
    NOT_COMPILED = "not_compiled"
    RING_ATTENTION = "ring_attention"

    @property
    def intended(self) -> bool:
        """True where a dense attention is no loss: it was rewritten, asked to stay dense, or is none over a video."""
        return self in _INTENDED


_INTENDED = frozenset(
    {Reason.REWRITTEN, Reason.CROSS_ATTENTION, Reason.NOT_VIDEO, Reason.DENSE_LAYER, Reason.FACTORISED}
)


@dataclass(frozen=True)
class Picture:
    """The boxes that one video query selected, in the first sample of the batch.

    ``query`` is (frame, row, column) on ``grid``, which ``block`` cuts into boxes (both in tokens); ``boxes`` holds the
    selected boxes' numbers of every head, ascending, in raster order of boxes.
    """

    query: tuple[int, int, int]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    boxes: tuple[tuple[int, ...], ...]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Picture:
        boxes = tuple(tuple(selected) for selected in data["boxes"])
        return cls(tuple(data["query"]), tuple(data["grid"]), tuple(data["block"]), boxes)


@dataclass(frozen=True)
class Site:
    """One attention of the model.

    Sizes that depend on the input are strings such as ``"s0*s1"``. ``block`` is in tokens; ``dense_flops`` counts one
    forward pass of dense attention over the whole sequence (0 where the size is symbolic); ``density_bound`` is the
    largest fraction of the video pairs that the selection may keep.

    The rest is measured on real inputs, None without: of every head, mean over the samples, ``density`` is the kept
    fraction of the video pairs and ``mass`` the share of dense attention's weights on the keys that are still attended;
    ``sparse_flops`` counts one forward pass, the selection included; ``dense_ms`` and ``sparse_ms`` are the times of one.
    """

    path: str
    reason: Reason
    detail: str
    spelling: str
    source: str
    layer: int | None = None
    tokens: int | str = 0
    heads: int | str = 0
    head_dim: int | str = 0
    grid: tuple[int | str, ...] | None = None
    prefix: int | str = 0
    suffix: int | str = 0
    scheme: str | None = None
    block: tuple[int | str, ...] | None = None
    evidence: str = ""
    dense_flops: int = 0
    density_bound: float | None = None
    density: tuple[float, ...] | None = None
    mass: tuple[float, ...] | None = None
    sparse_flops: int | None = None
    dense_ms: float | None = None
    sparse_ms: float | None = None
    picture: Picture | None = None

    @property
    def rewritten(self) -> bool:
        return self.reason is Reason.REWRITTEN

    @property
    def layout(self) -> str:
        """The sequence in short: "226+13x30x45" is 226 condition tokens before a grid, "512" tokens without a grid."""
        if self.grid is None:
            return str(self.tokens)
        parts = [str(self.prefix), "x".join(map(str, self.grid)), str(self.suffix)]
        return "+".join(part for part in parts if part != "0")

    def to_dict(self) -> dict[str, Any]:
        """Fields by name, of the measured ones those that are known."""
        fields = asdict(self) | {"reason": self.reason.value}
        return {name: value for name, value in fields.items() if value is not None or name not in _MEASURED}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Site:
        fields = dict(data)
        fields["reason"] = Reason(fields["reason"])
        for name in ("grid", "block", "density", "mass"):
            if fields.get(name) is not None:
                fields[name] = tuple(fields[name])
        if fields.get("picture") is not None:
            fields["picture"] = Picture.from_dict(fields["picture"])
        return cls(**fields)


_MEASURED = frozenset({"density", "mass", "sparse_flops", "dense_ms", "sparse_ms", "picture"})

SiteKey = tuple[str, str, int]  # module path, source line, and how many sites of those came before in the graph


class Layers:
    """Layer numbers, in execution order of the sites over a whole model.

    Kept across the graphs of one model (graph breaks) and across recompilations: a site that comes back keeps its
    number.
    """

    def __init__(self) -> None:
        self._numbers: dict[SiteKey, int] = {}

    def number(self, key: SiteKey) -> int:
        return self._numbers.setdefault(key, len(self._numbers))


@dataclass
class Report:
    """Every attention found, in execution order. ``print`` shows a table; ``save`` writes JSON or a page."""

    sites: list[Site] = field(default_factory=list)
    layers: Layers = field(default_factory=Layers, repr=False, compare=False)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def rewritten(self) -> list[Site]:
        return [site for site in self.sites if site.rewritten]

    @property
    def counts(self) -> dict[str, int]:
        """Number of sites per reason code."""
        return dict(Counter(site.reason.value for site in self.sites))

    def merge(self, other: Report) -> None:
        """Add the sites of another graph; a site seen before (a recompilation) takes the newer reading."""
        places = {key: place for place, key in enumerate(_keys(self.sites))}
        for key, site in zip(_keys(other.sites), other.sites, strict=True):
            if key in places:
                self.sites[places[key]] = site
            else:
                self.sites.append(site)

    def to_json(self) -> str:
        return json.dumps({"version": 1, "sites": [site.to_dict() for site in self.sites]}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("version") != 1:
            raise ValueError("this is no report of vmoba_compile, or not of version 1")
        return cls([Site.from_dict(site) for site in data["sites"]])

    @classmethod
    def load(cls, path: str | Path) -> Report:
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    def save(self, path: str | Path) -> None:
        """Write ``.json`` (read back by :meth:`load`) or ``.html`` (one page that needs no other file and no network).

        Raises:
            ValueError: the path has another ending.
        """
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(self.to_json() + "\n", encoding="utf-8")
        elif path.suffix == ".html":
            from .page import page

            path.write_text(page(self), encoding="utf-8")
        else:
            raise ValueError(f"a report is saved as .json or .html, not {path.suffix or 'without an ending'!r}")

    def __str__(self) -> str:
        return self._render()

    def __rich__(self):
        from rich.console import Group

        return Group(self._table(), self.summary())

    def summary(self) -> str:
        """One line: how many of how many were rewritten, and why not the others."""
        others = ", ".join(f"{count} {code}" for code, count in self.counts.items() if code != Reason.REWRITTEN.value)
        found = f"{len(self.rewritten)} of {len(self)} attentions rewritten"
        return f"{found} (left dense: {others})" if others else found

    def _table(self):
        from rich.markup import escape
        from rich.table import Table

        measured = [(title, name) for title, name in (("density", "density"), ("mass kept", "mass")) if self._any(name)]
        table = Table(show_edge=False, pad_edge=False)
        for title in ("layer", "module", "heads", "tokens", "block", *(title for title, _ in measured), "verdict"):
            right = title in ("layer", "density", "mass kept")
            table.add_column(title, justify="right" if right else "left", no_wrap=True)
        table.add_column("why", min_width=20)
        for site in self.sites:
            block = "x".join(map(str, site.block)) if site.block else ""
            colour = "green" if site.rewritten else "yellow"
            shares: list[tuple[float, ...] | None] = [getattr(site, name) for _, name in measured]
            table.add_row(
                "" if site.layer is None else str(site.layer),
                escape(site.path or "(top)"),
                f"{site.heads}x{site.head_dim}",
                site.layout,
                f"{site.scheme} {block}" if site.scheme else "",
                *("" if not share else f"{sum(share) / len(share):.3f}" for share in shares),
                f"[{colour}]{site.reason.value}[/]",
                escape(site.evidence if site.rewritten else site.detail),
            )
        return table

    def _any(self, name: str) -> bool:
        return any(getattr(site, name) is not None for site in self.sites)

    def _render(self) -> str:
        from io import StringIO

        from rich.console import Console
        from rich.measure import Measurement

        out = StringIO()
        console = Console(file=out, width=1000, no_color=True, force_terminal=False)
        least = Measurement.get(console, console.options, self._table()).minimum  # in less, figures would be cut
        console.width = max(least, 80, shutil.get_terminal_size((180, 24)).columns)
        console.print(self)
        return "\n".join(map(str.rstrip, out.getvalue().splitlines()))


def site_keys(places: Iterable[tuple[str, str]]) -> list[SiteKey]:
    """Sites, given by module path and source line, told apart from each other."""
    seen: Counter[tuple[str, str]] = Counter()
    keys = []
    for place in places:
        keys.append((*place, seen[place]))
        seen[place] += 1
    return keys


def _keys(sites: list[Site]) -> list[SiteKey]:
    return site_keys((site.path, site.source) for site in sites)
