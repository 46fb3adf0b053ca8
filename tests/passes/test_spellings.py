"""Attention spelled at random: it must be found, rewritten and compute what it did, gradients included."""

from __future__ import annotations

from collections import Counter
from random import Random

import torch
from graph_runs import before_and_after, largest, rewritten_graph
from graphs import verdicts
from hypothesis import given, settings
from hypothesis import strategies as st
from spelled_masks import MASKS
from spellings import Speller

SEEDS = st.integers(0, 2**32 - 1)


def test_any_spelling_is_rewritten():
    ways = Counter()

    @settings(max_examples=600, deadline=None, derandomize=True)
    @given(seed=SEEDS)
    def each(seed):
        torch.manual_seed(seed)
        speller = Speller(Random(seed))
        report = rewritten_graph(speller.tape, speller.attention())
        assert verdicts(report) == ["rewritten"], f"{report}\n{speller.tape.graph}"
        ways.update(speller.ways)

    each()
    kinds = Counter(way.split(":")[0] for way in ways)
    assert kinds["mask"] == len(MASKS) and kinds["scale"] == 10 and kinds["softmax"] == 7, kinds
    assert min(ways.values()) >= 5, ways


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=SEEDS)
def test_any_spelling_of_bfloat16_is_rewritten(seed):
    """It errs no more than the original does, but for a rounding; float32 is what both are measured by."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(seed)
        speller = Speller(Random(seed), dtype, late=False)
        report, *ran = before_and_after(speller.tape, speller.attention())
        assert verdicts(report) == ["rewritten"], f"{report}\n{speller.tape.graph}"
        results += ran
    exact, _, before, after = results
    # The gradients of queries and keys are differences of numbers as large as the values' gradients.
    scale = max(largest(truth) for truth in exact if truth is not None)
    for place, (truth, *both) in enumerate(zip(exact, before, after, strict=True)):
        assert len({x is None for x in (truth, *both)}) == 1
        if truth is not None:
            old, new = ((x - truth).nan_to_num(0.0).norm().item() for x in both)
            slack = 0.02 * largest(truth) if place == 0 else 0.1 * scale
            assert new <= 1.5 * old + slack, f"{report}\n{speller.tape.graph}"
