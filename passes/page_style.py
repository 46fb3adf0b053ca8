"""How a report's page looks: one style sheet, light and dark, without anything fetched."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #1d2129; --soft: #5b6270; --faint: #6d7480; --line: #e4e1da; --wash: #f3f1ec;
  --done: #0d7a5f; --done-wash: #e2f3ec; --meant: #5b6270; --meant-wash: #eeece7; --missed: #a5460b; --missed-wash: #fdeddc;
  --density: #3a4fc4; --mass: #0d7a5f; --pick: #3a4fc4; --query: #e0541b; --rest: #b9bcc6; --frame: #eceae4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161b; --card: #1b1e25; --ink: #e8e9ec; --soft: #a7adb9; --faint: #8d94a1; --line: #2e323c; --wash: #22262e;
    --done: #5fd0ab; --done-wash: #17352c; --meant: #a7adb9; --meant-wash: #2a2e37; --missed: #f2a65e; --missed-wash:
    #3d2815;
    --density: #8b9bff; --mass: #5fd0ab; --pick: #8b9bff; --query: #ff9a5c; --rest: #565c69; --frame: #262a33;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 1160px; margin: 0 auto; padding: 44px 28px 72px; }
code, .mono {
  font-family: ui-monospace, "SF Mono", "Cascadia Code", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size:
  .92em;
}
.eyebrow { color: var(--soft); font-size: 12.5px; letter-spacing: .06em; margin: 0 0 6px; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -.02em; font-weight: 650; margin: 0; text-wrap: balance; }
h1 .of { color: var(--faint); font-weight: 450; }
h2 { font-size: 19px; letter-spacing: -.01em; font-weight: 640; margin: 52px 0 4px; }
h3 { font-size: 14px; font-weight: 620; margin: 0; }
p { margin: 0; }
.lead { color: var(--soft); margin-top: 8px; max-width: 110ch; }
.note { color: var(--soft); font-size: 13.5px; margin: 0 0 16px; }
.chips { display: flex; flex-wrap: wrap; gap: 8px; margin: 18px 0 0; padding: 0; list-style: none; }
.chip {
  display: inline-block; border-radius: 999px; padding: 1px 9px; font-size: 12.5px; font-weight: 560; white-space:
  nowrap;
}
.chips .chip { padding: 3px 12px; font-size: 13.5px; }
.done .chip, .chip.done { color: var(--done); background: var(--done-wash); }
.meant .chip, .chip.meant { color: var(--meant); background: var(--meant-wash); }
.missed .chip, .chip.missed { color: var(--missed); background: var(--missed-wash); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 14px; margin-top: 26px; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.tile { padding: 14px 18px 15px; }
.tile .label { color: var(--soft); font-size: 13px; }
.tile .value { font-size: 27px; line-height: 1.25; font-weight: 640; letter-spacing: -.02em; }
.tile .value small { font-size: 15px; font-weight: 500; color: var(--soft); letter-spacing: 0; }
.tile .under { color: var(--faint); font-size: 12.5px; }
.card { padding: 20px 22px; }
.hint, .warning {
  border-radius: 12px; padding: 13px 18px; margin-top: 18px; font-size: 14px; background: var(--wash); color:
  var(--soft);
}
.hint code { color: var(--ink); overflow-wrap: anywhere; }
.warning { background: var(--missed-wash); color: var(--ink); }
.warning b { color: var(--missed); }
.warning ul { margin: 6px 0 0; padding-left: 20px; }
.warning li { overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 16px; }
.bars {
  display: grid; grid-template-columns: max-content 1fr max-content; gap: 7px 14px; align-items: center; font-size:
  13.5px;
}
.bars .title { grid-column: 1 / -1; font-weight: 620; font-size: 14px; }
.bars .title + * { margin-top: 2px; }
.bars .name { color: var(--soft); }
.bars .track { display: flex; gap: 2px; height: 18px; }
.bars .track span { border-radius: 4px; min-width: 1px; }
.seg-work { background: var(--pick); } .seg-rest { background: var(--rest); }
.key {
  display: flex; flex-wrap: wrap; gap: 6px 18px; color: var(--soft); font-size: 12.5px; margin: 14px 0 0; align-items:
  center;
}
.key i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; vertical-align: -1.5px; margin-right: 6px; }
.key .dot { border-radius: 50%; background: var(--query); }
.key .some { background: var(--pick); opacity: .3; }
.key .own { border: 2px solid var(--query); }
svg { display: block; max-width: 100%; height: auto; }
svg text { fill: var(--soft); font: 10.5px/1 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.heat { width: 100%; }
.heat rect.bg { fill: var(--wash); }
.heat.density rect.c, .ramp.density { fill: var(--density); } .heat.mass rect.c, .ramp.mass { fill: var(--mass); }
.scale { display: flex; align-items: center; gap: 8px; color: var(--soft); font-size: 12.5px; margin: 2px 0 12px; }
.scale i { width: 120px; height: 9px; border-radius: 3px; }
.scale.density i { background: linear-gradient(90deg, color-mix(in srgb, var(--density) 6%, transparent), var(--density)); }
.scale.mass i { background: linear-gradient(90deg, color-mix(in srgb, var(--mass) 6%, transparent), var(--mass)); }
.pictures { display: grid; gap: 16px; margin-top: 14px; }
.pictures .card > header { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; margin-bottom: 12px; }
.pictures header .mono { overflow-wrap: anywhere; }
.pictures header span { color: var(--soft); font-size: 13px; }
.v-frame { fill: var(--frame); } .v-pick { fill: var(--pick); }
.v-cuts { fill: none; stroke: var(--card); stroke-width: 1; vector-effect: non-scaling-stroke; }
.v-own { fill: none; stroke: var(--query); stroke-width: 2; vector-effect: non-scaling-stroke; }
.v-query { fill: var(--query); stroke: var(--card); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
details { margin-top: 14px; }
details > summary { cursor: pointer; color: var(--soft); font-size: 13.5px; width: fit-content; border-radius: 6px; }
details > summary:hover { color: var(--ink); }
details[open] > summary { margin-bottom: 12px; }
.heads { display: flex; flex-wrap: wrap; gap: 14px 18px; }
.heads figure { margin: 0; } .heads figcaption { color: var(--soft); font-size: 11.5px; margin-top: 3px; }
.card.scroll { overflow-x: auto; padding: 0; }
table { border-collapse: collapse; width: 100%; font-size: 13px; line-height: 1.4; }
th { text-align: left; font-weight: 560; color: var(--soft); font-size: 12px; padding: 10px 10px; vertical-align: bottom; }
td, tbody th { padding: 6px 10px; vertical-align: top; }
thead th { border-bottom: 1px solid var(--line); }
tbody { border-bottom: 1px solid var(--line); }
tbody:last-child { border-bottom: 0; }
tbody th { font-weight: 600; color: var(--ink); font-size: 13px; }
tr.meant td { color: var(--soft); }
th:first-child { padding-left: 20px; } td:last-child, thead th:last-child { padding-right: 20px; }
th.num, .num { text-align: right; white-space: nowrap; }
td.why { min-width: 250px; color: var(--soft); font-size: 12.5px; overflow-wrap: anywhere; }
td .under { color: var(--faint); font-size: 11.5px; white-space: nowrap; }
td.why .under { white-space: normal; }
.meter {
  display: block; height: 3px; border-radius: 2px; margin: 3px 0 0 auto; width: 56px; background: var(--wash);
  overflow: hidden;
}
.meter b { display: block; height: 100%; border-radius: 2px; }
.meter.density b { background: var(--density); } .meter.mass b { background: var(--mass); }
footer { margin-top: 44px; color: var(--faint); font-size: 12.5px; max-width: 96ch; }
@media (max-width: 560px) { main { padding: 28px 16px 48px; } .pair { grid-template-columns: 1fr; } h1 { font-size: 27px; } }
@media print { .card, .tile { break-inside: avoid; } }
"""
