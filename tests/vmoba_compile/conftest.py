"""Fixtures of the tests of what a person calls."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def fresh():
    """Dynamo without the graphs of earlier tests."""
    torch._dynamo.reset()


@pytest.fixture
def ran(monkeypatch):
    """How often each operator ran."""
    import training

    return training.count_runs(monkeypatch)
