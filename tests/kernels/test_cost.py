"""What the reference costs on a CPU at a real model's size: memory linear in the tokens, time below dense attention."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.xdist_group("cost")  # what one worker has measured is for all tests here
GRID = (15, 30, 52)
SCRIPT = """
import json, sys, time
import torch
import torch.nn.functional as F
from vmoba_compile.kernels import attention

torch.manual_seed(0)
torch.set_num_threads(1)  # with more, a busy machine times how OpenMP's threads wait for each other
grid, block = json.loads(sys.argv[1])
q, k, v = (torch.randn(1, 1, grid[0] * grid[1] * grid[2], 64) for _ in range(3))

def seconds(function):
    start = time.process_time()  # not the wall's clock, which also counts what a busy machine does for others
    function()
    return time.process_time() - start

sparse = seconds(lambda: attention(q, k, v, tuple(grid), block=tuple(block)))
# Of this process alone: ru_maxrss would start from the parent's.
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
dense = seconds(lambda: F.scaled_dot_product_attention(q, k, v))
print(json.dumps({"sparse": sparse, "dense": dense, "peak": peak}))
"""


@pytest.fixture(scope="module", params=[(3, 30, 52), (7, 5, 13)], ids=["1d", "3d"])
def cost(request) -> dict[str, Any]:
    argument = json.dumps([GRID, request.param])
    # -I: an import of the test run's folders would not tell of the installed package.
    done = subprocess.run([sys.executable, "-I", "-c", SCRIPT, argument], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory(cost):
    assert cost["peak"] < 2 * 2**30, cost


@pytest.mark.slow
def test_faster_than_dense_attention(cost):
    assert cost["sparse"] < cost["dense"], cost
