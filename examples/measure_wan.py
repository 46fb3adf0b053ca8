"""What sparse attention keeps of the dense one, layer by layer and head by head, on a page to look at or to send.

python examples/measure_wan.py                                   # seconds
python examples/measure_wan.py --grid 21x30x52 --heads 4         # minutes on a CPU; writes report.html

The weights are random: put your own model and a real input in their place, its attention keeps more.
"""

import argparse
from pathlib import Path

import vmoba_compile
from vmoba_compile import VMoBAConfig
from vmoba_compile.__main__ import parse_grid
from vmoba_compile.zoo import preset

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--grid", type=parse_grid, default=(6, 10, 13), metavar="TxHxW", help="frames, rows, columns in tokens"
)
parser.add_argument("--heads", type=int, default=2)
parser.add_argument("--out", type=Path, default=Path("report.html"))
args = parser.parse_args()

model, inputs = preset("wan2.1-1.3b").build(
    grid=args.grid, device="cpu", num_layers=3, num_attention_heads=args.heads, attention_head_dim=64, ffn_dim=256
)
report = vmoba_compile.measure(model, config=VMoBAConfig(min_tokens=0), **inputs)
print(report)
report.save(args.out)
print(f"wrote {args.out}")
