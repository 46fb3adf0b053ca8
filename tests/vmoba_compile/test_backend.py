"""How the compiler of the rewritten graph is chosen and set."""

from __future__ import annotations

import pytest
import torch

from vmoba_compile.backend import inner_compiler

NAME = "triton.mix_order_reduction"
broken = pytest.mark.skipif(
    torch.__version__ >= torch.torch_version.TorchVersion("2.14"),
    reason="mix-order reductions keep gradients since 2.14",
)


@broken
@pytest.mark.parametrize("mode", [None, "default", "max-autotune"])
def test_mix_order_reductions_are_off(mode):
    assert inner_compiler("inductor", mode).patches[NAME] is False


@broken
def test_mix_order_reductions_can_be_asked_for():
    assert inner_compiler("inductor", None, {NAME: True}).patches[NAME] is True
