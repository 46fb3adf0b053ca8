"""A process that fails ends all, with its cause, long before the others would have waited in vain."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import failing
import processes
import pytest
from torch.multiprocessing import ProcessRaisedException

EXAMPLES = Path(__file__).parents[2] / "examples"
SOON = 45  # seconds; the groups wait for 60 and more


@pytest.mark.slow
def test_group_of_a_test(tmp_path):
    start = time.monotonic()
    with pytest.raises(ProcessRaisedException, match=r"(?s)process 1.*out of luck\nin two lines"):
        processes.run(failing.in_a_group, 2, tmp_path)
    assert time.monotonic() - start < SOON


@pytest.mark.slow
def test_example_under_torchrun(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, sys
            sys.path.append({str(EXAMPLES)!r})
            import train_several_gpus as several

            train_step = several.train_step

            def broken(model, optimizer, step, args):
                if step == 1 and os.environ["RANK"] == "1":
                    raise ValueError("out of luck")
                return train_step(model, optimizer, step, args)

            several.train_step = broken
            several.main()
            """
        )
    )
    start = time.monotonic()
    command = [
        sys.executable,
        "-P",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    words = ["--grid", "4x4x4", "--batch", "2", "--attention", "dense", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, *words], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode != 0 and time.monotonic() - start < SOON
    assert "ValueError: out of luck" in done.stderr and "step 1: loss" in done.stdout
    assert "step 2: loss" not in done.stdout
