"""A report as one page to send to somebody: HTML that needs no other file, no network and no script.

Everything that comes out of a report is escaped: module paths and details are the model's, or another person's file's.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from html import escape

from .page_charts import frames, head_frames, heat_map, ramp
from .page_style import STYLE
from .page_table import table
from .page_text import X, duration, flops, label, layout, mean, number, si, timed, times, verdict
from .report import Report, Site

SHOWN = 3  # with more pictures than these, those of one layer of each scheme are open from the start
# Nothing is fetched or run, whatever text the page holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(report: Report) -> str:
    """The report as an HTML document. Sections of which the report has no data are left out."""
    sections = [_header, _tiles, _lost, _hint, _compute, _heat, _pictures, table, _footer]
    title = f"{len(report.rewritten)} of {len(report)} attentions rewritten"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>vmoba_compile: {title}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, (section(report) for section in sections)))
        + "\n</main></body></html>\n"
    )


def _header(report: Report) -> str:
    chips = "".join(
        f'<li><span class="chip {verdict(sites[0])}">{escape(code)} {len(sites)}</span></li>'
        for code, sites in _by_reason(report).items()
    )
    return (
        '<header><p class="eyebrow">vmoba_compile report</p>'
        f'<h1>{len(report.rewritten)} <span class="of">of {len(report)}</span> attentions rewritten</h1>'
        f'{_sizes(report)}<ul class="chips">{chips}</ul></header>'
    )


def _sizes(report: Report) -> str:
    """The size that most of the rewritten attentions have, and the block of each scheme in order of layers."""
    sizes = Counter(f"{layout(site)} tokens, {site.heads} heads of size {site.head_dim}" for site in report.rewritten)
    if not sizes:
        return ""
    blocks: dict[str, str] = {}
    for site in report.rewritten:
        if site.scheme and site.block:
            blocks.setdefault(site.scheme, times(site.block))
    told = ", ".join(f"{block} ({scheme})" for scheme, block in blocks.items())
    most = sizes.most_common(1)[0][0]
    more = f" (and {number(len(sizes) - 1, 'other size')})" if len(sizes) > 1 else ""
    boxes = f" Boxes of frames {X} rows {X} columns: {told}." if told else ""
    return f'<p class="lead">{escape(f"{most}{more}.{boxes}")}</p>'


def _tiles(report: Report) -> str:
    tiles = []
    for name, what in (("density", "video pairs kept"), ("mass", "attention mass kept")):
        known = [shares for site in report if (shares := getattr(site, name))]
        if known:
            low, high = min(map(min, known)), max(map(max, known))
            tiles.append((what, f"{mean(map(mean, known)):.1%}", f"{low:.1%} to {high:.1%} by head"))
    spent = flops(report)
    if spent.dense and spent.sparse:
        what = "FLOPs of rewritten attention" + ("" if spent.exact else ", at least")
        ratio = f"{spent.dense / spent.sparse:.1f}{X} <small>fewer</small>"
        tiles.append((what, ratio, f"{si(spent.dense)} to {si(spent.sparse)}"))
    if pairs := timed(report):
        dense, sparse = (sum(column) for column in zip(*pairs, strict=True))
        ratio, word = (dense / sparse, "faster") if dense >= sparse else (sparse / dense, "slower")
        what = f"{ratio:.1f}{X} <small>{word}</small>"
        tiles.append(("time in rewritten attention", what, f"{duration(dense)} to {duration(sparse)}"))
    inside = (
        f'<div class="tile"><div class="label">{what}</div><div class="value">{value}</div>'
        f'<div class="under">{under}</div></div>'
        for what, value, under in tiles
    )
    return _wrapped('<section class="tiles">', inside, "</section>")


def _lost(report: Report) -> str:
    """What stayed dense though it may be over a video: a reader should see this first."""
    items = []
    for code, sites in _by_reason(report).items():
        if verdict(sites[0]) == "missed":
            details = Counter(site.detail or "no detail" for site in sites).most_common()
            told = [escape(detail) + (f" ({count}{X})" if count > 1 else "") for detail, count in details[:3]]
            told += [f"{number(len(details) - 3, 'other detail')} below"] * (len(details) > 3)
            items.append(f"<li><b>{escape(code)}</b>, {number(len(sites), 'attention')}: {'; '.join(told)}</li>")
    return _wrapped('<div class="warning">Left dense, though they may be over a video:<ul>', items, "</ul></div>")


def _hint(report: Report) -> str:
    if not report.rewritten or any(site.density or site.mass for site in report):
        return ""
    return (
        '<p class="hint">Not measured: what the selection keeps. <code>vmoba_compile.measure(model, *args, **kwargs)'
        '.save("report.html")</code> runs the model once and adds density, attention mass and pictures.</p>'
    )


def _compute(report: Report) -> str:
    spent = flops(report)
    rest = sum(site.dense_flops for site in report if not site.rewritten)
    charts = []
    if spent.dense:
        top = spent.dense + rest
        marks = (("dense", spent.dense, ""), ("sparse", spent.sparse, "" if spent.exact else "≤ "))
        bars = [
            _bar(name, [("seg-work", work / top), ("seg-rest", rest / top)], mark + si(work + rest))
            for name, work, mark in marks
        ]
        key = '<span><i class="seg-work"></i>rewritten attentions</span>'
        key += '<span><i class="seg-rest"></i>attentions left dense</span>' if rest else ""
        charts.append(_bars("FLOPs of all attentions", bars, key))
    if pairs := timed(report):
        sums = [sum(column) for column in zip(*pairs, strict=True)]
        named = zip(("dense", "sparse"), sums, strict=True)
        bars = [_bar(name, [("seg-work", time / max(sums))], duration(time)) for name, time in named]
        charts.append(_bars("Time of the rewritten attentions", bars, "where they ran, selection included"))
    note = "" if spent.exact else " Not measured: the sparse figure is the most that the rule allows."
    begin = (
        f'<section><h2>Compute</h2><p class="note">One forward pass, dense against sparse.{note}</p><div class="pair">'
    )
    return _wrapped(begin, charts, "</div></section>")


def _bars(title: str, bars: Iterable[str], key: str) -> str:
    return (
        f'<div class="card"><div class="bars"><div class="title">{title}</div>{"".join(bars)}</div>'
        f'<p class="key">{key}</p></div>'
    )


def _bar(name: str, parts: Sequence[tuple[str, float]], value: str) -> str:
    spans = "".join(f'<span class="{kind}" style="width:{share:.2%}"></span>' for kind, share in parts if share > 0)
    return f'<div class="name">{name}</div><div class="track">{spans}</div><div class="num">{value}</div>'


def _heat(report: Report) -> str:
    cards = []
    for name, title in (("density", "Video pairs kept"), ("mass", "Attention mass kept")):
        rows = [(label(site), shares) for site in report if (shares := getattr(site, name))]
        if rows:
            ends = ramp(share for _, shares in rows for share in shares)
            scale = f'<div class="scale {name}">{ends[0]:.0%}<i></i>{ends[1]:.0%}</div>'
            cards.append(f'<div class="card"><h3>{title}</h3>{scale}{heat_map(name, rows, ends, title)}</div>')
    begin = (
        '<section><h2>Layers and heads</h2><p class="note">A row for every rewritten layer, a column for every head. Mass '
        'is the share of the dense softmax\'s weights on keys that are still attended.</p><div class="pair">'
    )
    return _wrapped(begin, cards, "</div></section>")


def _pictures(report: Report) -> str:
    sites = [site for site in report if site.picture is not None]
    shown = set({site.scheme: place for place, site in reversed(list(enumerate(sites)))}.values())
    if len(sites) <= SHOWN:
        shown = set(range(len(sites)))
    cards = [_picture(site, f"p{place}") for place, site in enumerate(sites)]
    rest = [card for place, card in enumerate(cards) if place not in shown]
    begin = f'<details><summary>The other {number(len(rest), "layer")}</summary><div class="pictures">'
    folded = _wrapped(begin, rest, "</div></details>")
    key = (
        '<p class="key"><span><i class="dot"></i>the query</span><span><i class="own"></i>its own box, always selected'
        '</span><span><i class="some"></i>selected by some heads</span><span><i class="seg-work"></i>by all</span></p>'
    )
    begin = (
        '<section><h2>What one query sees</h2><p class="note">Every frame of the video as a small grid of tokens, cut into '
        f'boxes, with the boxes that one query selected.</p>{key}<div class="pictures">'
    )
    return _wrapped(begin, (cards[place] for place in sorted(shown)), f"</div>{folded}</section>")


def _picture(site: Site, key: str) -> str:
    picture = site.picture
    assert picture is not None
    frame, row, column = picture.query
    what = f"boxes of {times(picture.block)} · query at frame {frame}, row {row}, column {column}"
    return (
        f'<article class="card"><header><h3>Layer {escape(label(site))}</h3><code>{escape(site.path or "(top)")}</code>'
        f"<span>{escape(what)}</span></header>{frames(picture, key)}<details><summary>Head by head</summary>"
        f"{head_frames(picture, key)}</details></article>"
    )


def _footer(report: Report) -> str:
    if not any(site.density for site in report):
        return ""
    return (
        "<footer><p>Pairs and mass are means over the samples of one input; pictures show the first of them. The FLOPs of "
        "sparse attention include its selection.</p></footer>"
    )


def _by_reason(report: Report) -> dict[str, list[Site]]:
    """Sites by reason code: the rewritten, then what may be lost, then what is meant to be dense."""
    found: dict[str, list[Site]] = defaultdict(list)
    for site in sorted(report, key=lambda site: ("done", "missed", "meant").index(verdict(site))):
        found[site.reason.value].append(site)
    return found


def _wrapped(begin: str, parts: Iterable[str], end: str) -> str:
    """The parts in their section; nothing where there are none."""
    inside = "".join(parts)
    return begin + inside + end if inside else ""
