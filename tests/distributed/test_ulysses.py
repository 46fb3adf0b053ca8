"""Ulysses on two and four gloo processes: what one process computes, at the same sites, forward and backward."""

from __future__ import annotations

import functools
import logging
from types import SimpleNamespace

import processes
import pytest
import torch
import ulysses_cases
from torch import nn
from training import assert_same

import vmoba_compile
from vmoba_compile import context_parallel

pytest.importorskip("diffusers")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ulysses")]  # one worker starts the processes
TOLERANCE = 1e-4


ON_FOUR = ["wan", "text_and_video", "text_and_video_training"]


@pytest.fixture(scope="module", params=[2, 4], ids=["two", "four"])
def ranks(request, tmp_path_factory):
    """All cases on one group of processes, whose start takes longer than most of them; some on four."""
    names = list(ulysses_cases.CASES) if request.param == 2 else ON_FOUR
    return processes.run(ulysses_cases.on_rank, request.param, tmp_path_factory.mktemp("group"), names, seconds=240)


def only_where_run(ranks, case: str) -> None:
    if case not in ranks[0]:
        pytest.skip("on two processes only")


@functools.cache
def alone(case: str):
    torch._dynamo.reset()
    torch.set_num_threads(1)
    return ulysses_cases.CASES[case](False)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(
    "case", ["wan", "wan_regional", "wan_optimized_first", "video", "video_in_place", "text_and_video"]
)
def test_outputs_equal_one_process(ranks, case):
    only_where_run(ranks, case)
    wanted = alone(case)
    for found in ranks:
        assert relative(found[case]["sparse"], wanted["sparse"]) < TOLERANCE
        if "dense" in wanted:
            assert relative(found[case]["dense"], wanted["dense"]) < TOLERANCE


def test_the_selection_matters():
    wanted = alone("wan")
    assert relative(wanted["dense"], wanted["sparse"]) > 100 * TOLERANCE


@pytest.mark.parametrize("case", ulysses_cases.CASES)
def test_sites_are_those_of_one_process(ranks, case):
    """Module, verdict, layer, grid, block and conditions; only the heads are fewer."""
    only_where_run(ranks, case)
    for found in ranks:
        assert found[case]["sites"] == alone(case)["sites"]
        assert any(verdict == "rewritten" for _, verdict, *_ in found[case]["sites"])


@pytest.mark.parametrize("case", ["wan_training", "text_and_video_training"])
def test_gradients_equal_one_process(ranks, case):
    """Each rank has the gradients of its tokens: their sum is that of all."""
    only_where_run(ranks, case)
    total = {
        name: sum(found[case]["gradients"][name] for found in ranks) for name in ranks[0][case]["gradients"]
    }  # fmt: skip
    assert_same(total, alone(case)["gradients"], TOLERANCE)


def test_a_rank_that_fails_ends_all(tmp_path):
    with pytest.raises(
        torch.multiprocessing.ProcessRaisedException, match=r"(?s)process 1.*1 heads cannot be shared out to 2 ranks"
    ):
        processes.run(ulysses_cases.failing, 2, tmp_path, seconds=60)


def degrees(**values: int) -> nn.Module:
    """A model of six heads on which diffusers' parallelism was enabled."""
    model = nn.Linear(4, 4)
    model.config = SimpleNamespace(num_attention_heads=6)
    model._parallel_config = SimpleNamespace(context_parallel_config=SimpleNamespace(**values))
    return model


def test_heads_that_cannot_be_shared_out_are_refused():
    fast = vmoba_compile.optimize(degrees(ulysses_degree=4, ring_degree=1))
    with pytest.raises(ValueError, match="6 attention heads cannot be shared out by ulysses_degree=4; take a number"):
        fast(torch.randn(2, 4))


@pytest.mark.parametrize("ring", [1, 2])
def test_a_ring_is_warned_of(ring, recwarn):
    context_parallel.check_degrees(degrees(ulysses_degree=2, ring_degree=ring))
    assert [("ring_degree=2 leaves all attention dense" in str(x.message)) for x in recwarn] == [True] * (ring - 1)


def test_pytorch_does_not_log_that_it_cannot_sort_functions(monkeypatch):
    logger, told = logging.getLogger("torch._dynamo.metrics_context"), []
    monkeypatch.setattr(logger, "handle", lambda record: logger.filter(record) and told.append(record))

    def fail(values: set) -> None:
        try:
            sorted(values)
        except TypeError:
            logger.exception("no metrics")

    with context_parallel._without_metrics():
        fail({relative, only_where_run})
        fail({1, "a"})
        logger.error("something else")
    fail({relative, only_where_run})
    errors = [record.exc_info and str(record.exc_info[1]) for record in told]
    assert len(told) == 3 and "'str'" in errors[0] and errors[1] is None and "'function'" in errors[2]
    assert not logger.filters
