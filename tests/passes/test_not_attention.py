"""What looks like attention and is not, or is attention of another kind: a rewrite must not change what is computed."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
import torch
from graph_runs import judged, rewritten_graph
from graphs import verdicts
from hypothesis import given, settings
from hypothesis import strategies as st
from near_misses import NEVER, PERHAPS, NearMiss

SEEDS = st.integers(0, 2**32 - 1)


def spelled(seed, stage, change):
    torch.manual_seed(seed)
    speller = NearMiss(Random(seed), stage=stage, made=change)
    return speller, speller.attention(masks=1)


@pytest.mark.parametrize("name", NEVER)
def test_no_attention_is_left_dense(name):
    """Without the change, the same graph is rewritten."""
    stages, change = NEVER[name]
    reached = Counter()

    @settings(max_examples=6 * len(stages), deadline=None, derandomize=True)
    @given(seed=SEEDS)
    def each(seed):
        stage = stages[seed % len(stages)]
        speller, result = spelled(seed, stage, change)
        report = judged(speller.tape, result, *speller.outputs)
        assert not report.rewritten, f"{report}\n{speller.tape.graph}"
        speller, result = spelled(seed, stage, None)
        report = judged(speller.tape, result)
        assert verdicts(report) == ["rewritten"], f"{report}\n{speller.tape.graph}"
        reached[stage] += 1

    each()
    assert reached.keys() == {*stages}, reached


@pytest.mark.parametrize("name", PERHAPS)
def test_what_may_be_attention_computes_the_same(name):
    stages, change = PERHAPS[name]
    found = Counter()

    @settings(max_examples=16, deadline=None, derandomize=True)
    @given(seed=SEEDS)
    def each(seed):
        speller, result = spelled(seed, stages[seed % len(stages)], change)
        found.update(verdicts(rewritten_graph(speller.tape, result, *speller.outputs, gradients=speller.gradients)))

    each()
    assert found["rewritten"], found
