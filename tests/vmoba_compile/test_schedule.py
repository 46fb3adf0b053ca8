"""Schedules: which steps are dense, however the loop is written and however it ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vmoba_compile
from vmoba_compile import VMoBAConfig


@pytest.fixture
def fast():
    model = nn.Linear(2, 2)
    return vmoba_compile.optimize(model, VMoBAConfig(dense_steps=0.5), inner="eager")


def is_dense(fast) -> bool:
    return fast._vmoba.dense


def test_iterating_over_a_number(fast):
    assert [(step, is_dense(fast)) for step in fast.schedule(4)] == [(0, True), (1, True), (2, False), (3, False)]
    assert not is_dense(fast)


def test_iterating_over_timesteps(fast):
    timesteps = torch.linspace(1000, 0, 5)
    seen = [(float(t), is_dense(fast)) for t in fast.schedule(timesteps, dense_steps=2)]
    assert [t for t, _ in seen] == timesteps.tolist() and [dense for _, dense in seen] == [True] * 2 + [False] * 3


def test_iterating_over_a_generator(fast):
    assert [is_dense(fast) for _ in fast.schedule((x for x in "abcd"), dense_steps=0.25)] == [True, False, False, False]


def test_context_with_steps(fast):
    with fast.schedule(3, dense_steps=1) as schedule:
        seen = []
        for _ in range(3):
            seen += [is_dense(fast), is_dense(fast)]  # two guidance branches in one step
            schedule.step()
    assert seen == [True, True, False, False, False, False] and not is_dense(fast)


def test_sparse_again_after_an_error_or_a_break(fast):
    with pytest.raises(KeyError), fast.schedule(4):
        assert is_dense(fast)
        raise KeyError
    assert not is_dense(fast)
    iterator = iter(fast.schedule(4))
    next(iterator)
    assert is_dense(fast)
    iterator.close()
    assert not is_dense(fast)


def test_nesting_restores_what_was_before(fast):
    with fast.dense():
        assert [is_dense(fast) for _ in fast.schedule(2, dense_steps=0)] == [False, False]
        assert is_dense(fast)
    for _ in fast.schedule(2, dense_steps=1):
        outer = is_dense(fast)
        list(fast.schedule(3))
        assert is_dense(fast) == outer


@pytest.mark.parametrize("steps", [-1, True, 2.5])
def test_wrong_steps(fast, steps):
    with pytest.raises(ValueError, match="steps must be a number of steps"):
        fast.schedule(steps)


def test_no_dense_steps(fast):
    assert not any(is_dense(fast) for _ in fast.schedule(3, dense_steps=0))


def test_wrong_dense_steps(fast):
    with pytest.raises(ValueError, match="must be in 0 to 1"):
        fast.schedule(10, dense_steps=2.0)
