"""The table of a report's page: a row for every attention, a group of rows for every block of the model."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from .page_text import X, duration, flops, group_of, layout, mean, si, timed, times, verdict
from .report import Report, Site


def table(report: Report) -> str:
    """The section with the table, with columns only for what some site has. Without a site nothing."""
    if not len(report):
        return ""
    shares = [name for name in ("density", "mass") if any(getattr(site, name) for site in report)]
    has_time = bool(timed(report))
    titles = [("block", ""), ("attention", ""), ("layer", "num"), ("tokens", ""), ("boxes", "")]
    titles += [(name, "num") for name in shares] + [("FLOPs", "num")] + [("time", "num")] * has_time + [("verdict", "")]
    head = "".join(f'<th scope="col" class="{kind}">{name}</th>' for name, kind in titles)
    bodies = []
    for group, members in groupby(report, key=lambda site: group_of(site.path)[0]):
        sites = list(members)
        rows = [_row(site, shares, has_time) for site in sites]
        first = f'<th scope="rowgroup" rowspan="{len(sites)}" class="mono">{_breakable(group or "(top)")}</th>'
        rows[0] = rows[0].replace(">", f">{first}", 1)
        bodies.append(f"<tbody>{''.join(rows)}</tbody>")
    under = "FLOPs and time: dense, under it sparse." if has_time else "FLOPs: dense, under it sparse."
    return (
        '<section><h2>Every attention</h2><p class="note">In the order in which they run, by block of the model. Boxes are '
        f'in tokens, frames {X} rows {X} columns. {under if report.rewritten else ""}</p><div class="card scroll"><table>'
        f"<thead><tr>{head}</tr></thead>{''.join(bodies)}</table></div></section>"
    )


def _row(site: Site, shares: Sequence[str], has_time: bool) -> str:
    kind = verdict(site)
    heads = f"{site.heads} heads of {site.head_dim}" if site.heads else ""
    cells = [
        f'<td class="mono">{_breakable(group_of(site.path)[1])}</td>',
        f'<td class="num">{"" if site.layer is None else escape(str(site.layer))}</td>',
        f"<td>{escape(layout(site))}{_under(heads)}</td>",
        f"<td>{escape(times(site.block or ()))}{_under(site.scheme or '')}</td>",
        *(_share(name, getattr(site, name)) for name in shares),
    ]
    spent = flops([site])
    after = _under(spent.told()) if spent.sparse else ""
    cells.append(f'<td class="num">{si(site.dense_flops) if site.dense_flops else ""}{after}</td>')
    if has_time:
        pairs = timed([site])
        both = "".join(f"{duration(dense)}{_under(duration(sparse))}" for dense, sparse in pairs)
        cells.append(f'<td class="num">{both}</td>')
    why = site.evidence if site.rewritten else site.detail
    told = f"{escape(why)}{_under(site.source)}"
    cells.append(f'<td class="why"><span class="chip {kind}">{escape(site.reason.value)}</span> {told}</td>')
    return f'<tr class="site {kind}">{"".join(cells)}</tr>'


def _share(name: str, shares: Sequence[float] | None) -> str:
    if not shares:
        return "<td></td>"
    share = mean(shares)
    return (
        f'<td class="num">{share:.1%}<span class="meter {name}"><b style="width:{min(1.0, share):.1%}"></b></span></td>'
    )


def _under(text: str) -> str:
    return f'<div class="under">{escape(text)}</div>' if text else ""


def _breakable(path: str) -> str:
    """A module path, which may go on in another line after a dot where it is long."""
    return escape(path).replace(".", ".<wbr>") if len(path) > 20 else escape(path)
