"""The report's page: what it says, that it is safe to open, and how Chromium renders it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser

import pytest
from vmoba_compile.passes import Reason, Report, Site
from vmoba_compile.passes.page import page
from vmoba_compile.passes.page_charts import frames, head_frames, heat_map, ramp
from vmoba_compile.passes.page_text import flops, group_of
from vmoba_compile.passes.report import Picture

GRID = (5, 9, 16)
BLOCKS = {"1d": (2, 9, 16), "2d": (5, 4, 5), "3d": (3, 5, 8)}


def explained(layers: int = 3) -> Report:
    """Of each block an attention over the video and one to text; one more is lost."""
    sites = []
    for layer in range(layers):
        scheme = ("1d", "2d", "3d")[layer % 3]
        common = {"spelling": "scaled_dot_product_attention", "tokens": 728, "heads": 4, "head_dim": 8}
        sites += [
            Site(
                f"blocks.{layer}.attn1", Reason.REWRITTEN, "", source="model.py:7", layer=layer, grid=GRID, prefix=8,
                scheme=scheme, block=BLOCKS[scheme], evidence="conv3d patch", dense_flops=67_829_760, density_bound=0.5,
                **common,
            ),
            Site(
                f"blocks.{layer}.attn2", Reason.CROSS_ATTENTION, "keys are text", source="model.py:9",
                dense_flops=1_000_000, **common,
            ),
        ]  # fmt: skip
    lost = Site("refiner.attn", Reason.NO_GRID, "no grid leads here", "softmax", "model.py:99", tokens="s0*s1")
    return Report([*sites, lost])


def measured(layers: int = 3, heads: int = 4) -> Report:
    report = explained(layers)
    for place, site in enumerate(report.sites):
        if site.rewritten:
            density = tuple(0.1 + 0.3 * head / heads for head in range(heads))
            block = BLOCKS[site.scheme]
            picture = Picture((2, 4, 8), GRID, block, tuple(tuple({own(block), head % 3}) for head in range(heads)))
            found = {"density": density, "mass": tuple(min(1.0, 2 * x) for x in density), "picture": picture}
            report.sites[place] = replace(site, sparse_flops=20_000_000, dense_ms=8.0, sparse_ms=2.5, **found)
    return report


def own(block) -> int:
    """The box of (2, 4, 8)."""
    counts = [-(-extent // step) for extent, step in zip(GRID, block, strict=True)]
    t, h, w = (place // step for place, step in zip((2, 4, 8), block, strict=True))
    return (t * counts[1] + h) * counts[2] + w


class Elements(HTMLParser):
    """Start tags with their attributes, and the text between tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr", "rect", "path", "circle", "use"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data + " "


def texts(report: Report) -> str:
    return " ".join(Elements(page(report)).text.split())


def test_verdicts_and_reasons():
    text = texts(explained())
    assert "3 of 7 attentions rewritten" in text and "8 + 5×9×16 tokens, 4 heads of size 8" in text  # noqa: RUF001
    assert "2×9×16 (1d), 5×4×5 (2d), 3×5×8 (3d)" in text  # noqa: RUF001
    assert "rewritten 3" in text and "cross_attention 3" in text and "no_grid 1" in text
    assert "Left dense, though they may be over a video: no_grid , 1 attention: no grid leads here" in text
    assert text.count("keys are text") == 3 and text.count("conv3d patch") == 3 and "model.py:99" in text


def test_without_measurements_it_says_how_to_get_them():
    text = texts(explained())
    assert "vmoba_compile.measure(model, *args, **kwargs)" in text
    assert not any(
        word in text for word in ("Layers and heads", "What one query sees", "density ", "Time of", "slower")
    )
    bound = 67_829_760 * (1 - (720 / 728) ** 2 / 2)
    assert f"≤ {bound / 1e6:.3g} MFLOP" in text and "the most that the rule allows" in text


def test_measurements_are_shown():
    text = texts(measured())
    assert "measure(" not in text and "≤" not in text
    assert "video pairs kept 21.2% 10.0% to 32.5% by head" in text
    assert "attention mass kept 42.5% 20.0% to 65.0% by head" in text
    assert "3.4× fewer 203 MFLOP to 60 MFLOP" in text and "3.2× faster 24 ms to 7.5 ms" in text  # noqa: RUF001
    assert "dense 206 MFLOP sparse 63 MFLOP" in text  # what stays dense counts on both sides


def test_slower_is_called_slower():
    report = measured(1)
    report.sites[0] = replace(report.sites[0], dense_ms=1.0, sparse_ms=4.0)
    assert "4.0× slower 1 ms to 4 ms" in texts(report)  # noqa: RUF001


def test_a_section_without_data_is_absent():
    report = Report([replace(site, mass=None, picture=None, dense_ms=None) for site in measured()])
    text = texts(report)
    assert "Video pairs kept" in text
    assert not any(word in text for word in ("Attention mass kept", "What one query sees", "Time of", "time"))


@pytest.mark.parametrize("report", [Report(), Report([explained().sites[-1]])], ids=["empty", "nothing rewritten"])
def test_next_to_nothing(report):
    text = texts(report)
    assert f"0 of {len(report)} attentions rewritten" in text and "measure(" not in text and "Compute" not in text
    assert ("Every attention" in text) == bool(len(report))


@pytest.mark.parametrize("report", [explained(2), measured(2)], ids=["explained", "measured"])
def test_every_text_is_escaped(report):
    """A module's name or a detail, perhaps from another person's file, must not become a tag, an attribute or an entity."""
    harmless = Elements(page(report))
    fields = (
        "path",
        "detail",
        "source",
        "evidence",
        "scheme",
        "tokens",
        "heads",
        "head_dim",
        "prefix",
        "suffix",
        "layer",
    )
    for name in fields:
        nasty = f"\"><script>{name}()</script><img src=x onerror='{name}()'>&lt;"
        found = Elements(page(Report([replace(site, **{name: nasty}) for site in report])))
        assert {tag for tag, _ in found.tags} <= {tag for tag, _ in harmless.tags} | {"svg", "ul", "li"}
        assert not any(key.startswith("on") for _, attributes in found.tags for key in attributes)
        if name not in ("evidence", "layer", "scheme", "prefix", "suffix"):
            assert f"<script>{name}()</script>" in found.text and "&lt;" in found.text


def test_needs_no_other_file():
    """Nothing to fetch, nothing to run, and a policy that would forbid it."""
    text = page(measured())
    tags = Elements(text).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"}
    assert all(not key.startswith("on") and key not in ("src", "srcset", "action") for _, keys in tags for key in keys)
    assert all(keys["href"].startswith("#") for _, keys in tags if "href" in keys)
    assert "url(" not in text and "@import" not in text and "//" not in re.sub(r"<text.*?</text>", "", text)
    policy = [keys["content"] for tag, keys in tags if keys.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_ids_are_unique_and_found():
    tags = Elements(page(measured(7))).tags
    ids = [keys["id"] for _, keys in tags if "id" in keys]
    assert len(ids) == len(set(ids)) and {keys["href"][1:] for tag, keys in tags if tag == "use"} == set(ids)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("blocks.3.attn1", ("blocks.3", "attn1")),
        ("transformer.blocks.12.attn.0.core", ("transformer.blocks.12", "attn.0.core")),
        ("refiner.attn", ("refiner", "attn")),
        ("attn", ("attn", "")),
        ("", ("", "")),
        ("blocks.3", ("blocks.3", "")),
    ],
)
def test_blocks_of_the_model(path, parts):
    assert group_of(path) == parts


def test_rows_are_grouped_by_block():
    tags = Elements(page(explained(40))).tags
    assert sum(tag == "tr" and "site" in (keys.get("class") or "") for tag, keys in tags) == 81
    spans = [keys["rowspan"] for tag, keys in tags if tag == "th" and "rowspan" in keys]
    assert spans == ["2"] * 40 + ["1"]


def test_flops_leave_out_what_is_not_known():
    known, unknown = measured(1).sites[0], replace(explained(1).sites[0], grid=("s0", 9, 16))
    spent = flops([known, unknown])
    assert (spent.dense, spent.sparse, spent.exact) == (67_829_760, 20_000_000, True)


@pytest.mark.parametrize(
    ("shares", "ends"),
    [([0.11, 0.29], (0.1, 0.3)), ([0.2, 0.3], (0.2, 0.3)), ([0.25], (0.2, 0.3)), ([1, 1], (0.95, 1)), ([0], (0, 0.05))],
)  # fmt: skip
def test_ends_of_a_scale(shares, ends):
    assert ramp(shares) == pytest.approx(ends)


def test_heat_map_has_a_cell_for_every_head():
    cells = [keys for tag, keys in Elements(heat_map("mass", [("0", (0.1, 0.2)), ("1", (0.3,))], (0.1, 0.3), "x")).tags]
    strength = [float(keys["fill-opacity"]) for keys in cells if "fill-opacity" in keys]
    assert strength == [0.06, 0.53, 1.0]


def test_picture_of_the_frames():
    """Boxes of (3, 5, 8) on (5, 9, 16): two in time, the second shorter; 2 of 4 heads select box 6 besides their own."""
    picture = Picture((2, 4, 8), GRID, (3, 5, 8), ((1,), (1, 6), (1, 6), (1,)))
    tags = Elements(frames(picture, "k")).tags
    areas = {keys["d"]: float(keys["fill-opacity"]) for tag, keys in tags if keys.get("class") == "v-pick"}
    assert areas == {"M8 0h8v5h-8z": 1.0, "M0 5h8v4h-8z": 0.56}
    assert [keys["href"] for tag, keys in tags if tag == "use"] == ["#ks0"] * 3 + ["#ks1"] * 2
    assert [keys["d"] for _, keys in tags if keys.get("class") == "v-own"] == ["M8 0h8v5h-8z"]
    (dot,) = [keys for tag, keys in tags if tag == "circle"]
    third = next(keys for tag, keys in tags[::-1] if tag == "use" and keys["href"] == "#ks0")
    assert float(dot["cx"]) == pytest.approx(float(third["x"]) + 8.5) and dot["cy"] == "4.5"


def test_picture_of_every_head():
    picture = Picture((2, 4, 8), GRID, (3, 5, 8), ((1,), (1, 6)))
    found = Elements(head_frames(picture, "k"))
    areas = [keys["d"] for _, keys in found.tags if keys.get("class") == "v-pick"]
    assert areas[0] == "M8 0h8v5h-8z"
    assert re.fullmatch(r"M8 0h8v5h-8zM(\S+) 5h8v4h-8z", areas[1]) and areas[1].count("M") == 2
    assert "head 0 · 1 of 8" in found.text and "head 1 · 2 of 8" in found.text


# In a real browser ----------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH (Debian: apt-get install chromium)")

# The page lies in a frame as wide as asked for, of which a script outside of it reports.
HARNESS = """<!doctype html><meta charset="utf-8"><body style="margin:0"><pre id="found"></pre><script>
function look(frame) {
  const page = frame.contentDocument, count = what => page.querySelectorAll(what).length;
  if (OPEN) page.querySelectorAll("details").forEach(x => x.open = true);
  const shown = x => x.checkVisibility() && x.getBoundingClientRect().width > 0;
  const seen = what => [...page.querySelectorAll(what)].filter(shown).length, root = page.documentElement;
  const text = [...page.querySelectorAll("td, th, p, h1, h2, h3, .value, .label, .under, summary")];
  const cut = text.filter(x => x.scrollWidth > x.clientWidth + 1 && frame.contentWindow.getComputedStyle(x).display
    != "inline").map(x => x.textContent);
  const table = page.querySelector(".scroll");
  document.getElementById("found").textContent = JSON.stringify({rows: seen("tr.site"), wide: root.scrollWidth,
    table: table ? table.scrollWidth - table.clientWidth : 0, cells: seen(".heat rect.c"), frames: seen(".video use"),
    picks: count(".v-pick"), fill: page.querySelector(".v-pick") &&
    frame.contentWindow.getComputedStyle(page.querySelector(".v-pick")).fill,
    heads: seen(".heads figure"), cut: cut, fetched: frame.contentWindow.performance.getEntriesByType("resource").length,
    scripts: count("script")});
}
</script><iframe style="border:0;width:WIDEpx;height:900px" onload="look(this)" srcdoc="PAGE"></iframe>"""


def chromium(tmp_path, *arguments: str) -> subprocess.CompletedProcess[str]:
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path}/profile"]
    fixed += ["--disable-dev-shm-usage", "--no-first-run", "--enable-logging=stderr", "--window-size=1200,900"]
    run = subprocess.run([CHROMIUM, *fixed, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    return run


def rendered(tmp_path, text: str, wide: int = 1200, open_all: bool = False):
    """What the harness found in a page, and what the browser's console said."""
    harness = HARNESS.replace("WIDE", str(wide)).replace("OPEN", str(open_all).lower()).replace("PAGE", escape(text))
    (tmp_path / "harness.html").write_text(harness, encoding="utf-8")
    run = chromium(tmp_path, "--dump-dom", f"file://{tmp_path}/harness.html")
    found = re.search(r'<pre id="found">(.*?)</pre>', run.stdout, re.DOTALL)
    assert found, run.stderr
    return json.loads(unescape(found[1])), [line for line in run.stderr.splitlines() if "CONSOLE" in line]


@browser
def test_rendered_for_a_large_model(tmp_path):
    """40 layers of 2 attentions and 40 heads, everything unfolded: all there, nothing beside the page, nothing cut off."""
    found, console = rendered(tmp_path, page(measured(40, 40)), open_all=True)
    assert not console
    assert found["rows"] == 81 and found["cells"] == 2 * 40 * 40 and found["heads"] == 40 * 40
    assert found["frames"] == 40 * 5 + 2 * 40 * 40  # frames, and ground and lines of each head
    assert found["wide"] == 1200 and found["table"] == 0 and not found["cut"]
    assert found["fetched"] == found["scripts"] == 0
    assert found["fill"] not in (None, "none", "rgb(0, 0, 0)")  # the style reaches what is drawn by <use>


@browser
def test_rendered_when_folded_and_on_a_telephone(tmp_path):
    """Three pictures are open, one of each scheme; on a narrow screen the table alone scrolls."""
    found, console = rendered(tmp_path, page(measured(40, 4)), wide=400)
    assert not console and found["wide"] == 400 and found["rows"] == 81 and found["table"] > 0
    assert found["frames"] == 3 * 5 and found["heads"] == 0


@browser
def test_rendered_without_measurements(tmp_path):
    found, console = rendered(tmp_path, page(explained(40)))
    assert not console and found["rows"] == 81 and found["cells"] == found["picks"] == 0 and found["wide"] == 1200


@browser
def test_rendered_with_hostile_and_long_names(tmp_path):
    report = measured()
    path = "<script>document.title='run'</script>." + ".".join(["a_module_with_a_rather_long_name"] * 6) + ".0.attn"
    detail = "x" * 400
    report.sites += [
        replace(report.sites[0], path=path, evidence=detail),
        replace(report.sites[-1], path=path, detail=detail),
    ]
    found, console = rendered(tmp_path, page(report))
    assert not console and found["rows"] == 9 and found["scripts"] == 0 and found["wide"] == 1200


@browser
def test_the_harness_sees_what_is_wrong(tmp_path):
    """Otherwise the tests above would prove little."""
    wrong = "<p style='width:1500px'>x</p><script>console.error('heard')</script><img src='http://127.0.0.1:9/x.png'>"
    found, console = rendered(tmp_path, f"<!doctype html><body>{wrong}")
    assert found["wide"] >= 1500 and found["scripts"] == 1 and any("heard" in line for line in console)
    # the policy of a report keeps a script from running
    head = re.search(r"<meta http-equiv[^>]*>", page(Report()))[0]
    _, console = rendered(tmp_path, f"<!doctype html><head>{head}</head><body>{wrong}")
    assert not any("heard" in line for line in console) and any("Content Security Policy" in line for line in console)


@browser
def test_light_and_dark(tmp_path):
    """Screenshots: paper and ink swap, and in both the pictures have their colours."""
    image = pytest.importorskip("matplotlib.image")
    (tmp_path / "page.html").write_text(page(measured()), encoding="utf-8")
    shots = []
    for name, setting in (("light", 1), ("dark", 0)):
        path = tmp_path / f"{name}.png"
        blink = f"--blink-settings=preferredColorScheme={setting}"
        chromium(tmp_path, blink, "--window-size=1200,2400", f"--screenshot={path}", f"file://{tmp_path}/page.html")
        shots.append(image.imread(path)[..., :3])
    light, dark = shots
    assert light.shape == dark.shape == (2400, 1200, 3)
    assert light[5, 5].min() > 0.9 and dark[5, 5].max() < 0.2
    for shot in shots:
        blue = (shot[..., 2] - shot[..., 0] > 0.3).sum()
        assert blue > 10_000  # bars, heat map, selected boxes
        assert (abs(shot - shot[5, 5]).max(-1) > 0.5).mean() > 0.01  # text
