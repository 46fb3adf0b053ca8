"""The README's table of models, made from what the tests expect of each: ``python tests/support/video_zoo/table.py``."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
from video_zoo import EXPECT
from video_zoo.outcomes import OUTCOMES


def support_table() -> str:
    """Markdown: which models are rewritten by themselves, which with ``grid=``, which stay dense and why."""
    itself, given, partly, dense = [], [], [], []
    for name, outcome in OUTCOMES.items():
        label, wanted = name.replace("_", " "), len(EXPECT[name][0])
        if not outcome.rewritten:
            dense.append(f"{label} ({outcome.why or ', '.join(sorted(outcome.dense))})")
        elif outcome.rewritten < wanted:
            partly.append(f"{label} ({outcome.rewritten} of {wanted}: {outcome.why})")
        else:
            (itself if outcome.grid is None else given).append(label)
    rows = {"rewritten, no help needed": itself, "rewritten with `grid=`": given, "in part": partly, "dense": dense}
    lines = [
        "| | models |",
        "|---|---|",
        *(f"| {title} | {', '.join(names)} |" for title, names in rows.items() if names),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(support_table())
