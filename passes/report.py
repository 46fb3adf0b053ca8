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

    @property
    def intended(self) -> bool:
        """True where a dense attention is no loss: it was rewritten, asked to stay dense, or is none over a video."""
        return self in _INTENDED


_INTENDED = frozenset(
    {Reason.REWRITTEN, Reason.CROSS_ATTENTION, Reason.NOT_VIDEO, Reason.DENSE_LAYER, Reason.FACTORISED}
)


@dataclass(frozen=True)
class Site:
    """One attention of the model.

    Sizes that depend on the input are strings such as ``"s0*s1"``. ``block`` is in tokens; ``dense_flops`` counts one
    forward pass of dense attention over the whole sequence (0 where the size is symbolic); ``density_bound`` is the
    largest fraction of the video pairs that the selection may keep.
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
        return asdict(self) | {"reason": self.reason.value}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Site:
        fields = dict(data)
        fields["reason"] = Reason(fields["reason"])
        for name in ("grid", "block"):
            if fields.get(name) is not None:
                fields[name] = tuple(fields[name])
        return cls(**fields)


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
        return cls.from_json(Path(path).read_text())

    def save(self, path: str | Path) -> None:
        """Write ``.json`` (read back by :meth:`load`) or ``.html`` (the table as a page)."""
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(self.to_json() + "\n")
        elif path.suffix == ".html":
            path.write_text(self._render(html=True))
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
        from rich.table import Table

        table = Table(show_edge=False, pad_edge=False)
        for title in ("layer", "module", "heads", "tokens", "block", "verdict"):
            table.add_column(title, justify="right" if title == "layer" else "left", no_wrap=True)
        table.add_column("why")
        for site in self.sites:
            block = "x".join(map(str, site.block)) if site.block else ""
            colour = "green" if site.rewritten else "yellow"
            table.add_row(
                "" if site.layer is None else str(site.layer),
                site.path or "(top)",
                f"{site.heads}x{site.head_dim}",
                site.layout,
                f"{site.scheme} {block}" if site.scheme else "",
                f"[{colour}]{site.reason.value}[/]",
                site.evidence if site.rewritten else site.detail,
            )
        return table

    def _render(self, html: bool = False) -> str:
        from io import StringIO

        from rich.console import Console

        width = 180 if html else max(80, shutil.get_terminal_size((180, 24)).columns)
        console = Console(file=StringIO(), width=width, record=html, no_color=not html, force_terminal=False)
        console.print(self)
        return console.export_html() if html else "\n".join(map(str.rstrip, console.file.getvalue().splitlines()))  # type: ignore[attr-defined]


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
