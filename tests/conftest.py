"""Fixtures of every test: a fixed seed, poisoned memory, and no GPU tests without a GPU."""

from __future__ import annotations

import gc
import os
import zlib

import hypothesis
import pytest
import torch

# Without a GPU, Triton kernels run in the interpreter; Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

hypothesis.settings.register_profile("default", deadline=None, max_examples=60, derandomize=True, print_blob=True)
# HYPOTHESIS_PROFILE=explore draws new examples at every run, and more of them.
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


# The tensors are tiny, and on a busy machine OpenMP's threads spin while they wait for each other: fifty times slower.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the interpreter every second case of tests marked ``halved``, the same ones always; on a GPU all."""
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("halved") and zlib.crc32(item.name.encode()) % 2 == 0]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def pytest_collection_finish() -> None:
    """Leave the libraries' millions of objects out of garbage collections, a sixth of the time of tests that compile."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 50)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def shipped_figures(monkeypatch, tmp_path):
    """The figures of min_tokens="auto" that are shipped, not what was measured on this machine."""
    monkeypatch.setenv("VMOBA_COMPILE_CALIBRATION", str(tmp_path / "calibration.json"))


@pytest.fixture(autouse=True)
def plans(monkeypatch):
    """Launches recorded by this test only: others may have changed constants that no key holds."""
    from vmoba_compile.kernels import implementations, launches

    monkeypatch.setattr(implementations, "PLANS", launches.Plans())
    return implementations.PLANS


@pytest.fixture
def tight(monkeypatch):
    """Hardly any scratch memory for attention: many chunks, few samples and heads at a time."""
    from vmoba_compile.kernels import attend

    monkeypatch.setattr(attend, "MEMORY_FLOOR", 0)
    monkeypatch.setattr(attend, "MEMORY_SHARE", 0.01)
    monkeypatch.setattr(attend, "GRADIENT_MEMORY_SHARE", 0.01)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill uninitialised tensors with NaN (integers: their maximum), so that an element left unwritten is seen.

    The scratch memory of a replayed call is bytes of 255, which are NaN in every floating type.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
