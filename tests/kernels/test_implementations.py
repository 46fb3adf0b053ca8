"""Which implementation runs, and what is said where a named one cannot."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Case, choose
from vmoba_compile.kernels import attention, implementations, reference_attention, reference_select, select

CASE = Case(head_dim=8)


def call(function, **options) -> object:
    q, k, v, _ = CASE.tensors(options.pop("dtype", torch.float32))
    tensors = (q, k, v) if function is attention else (q, k)
    return function(*tensors, CASE.grid, block=CASE.block, **options)


every_function = pytest.mark.parametrize("function", [attention, select], ids=["attention", "select"])


@every_function
def test_unknown_name(function):
    with pytest.raises(
        ValueError, match="implementation must be one of 'auto', 'reference', 'triton', 'hopper', not 'cuda'"
    ):
        call(function, implementation="cuda")


@every_function
@pytest.mark.parametrize("name", ["triton", "hopper"])
def test_a_gpu_is_needed(function, name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"implementation='{name}' cannot run: the tensors are on the CPU; use 'auto'"):
        call(function, implementation=name)


@every_function
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_a_cpu_has_the_reference(function, name, monkeypatch):
    seen = []
    for module, inner in ((reference_attention, "attention"), (reference_select, "select")):
        original = getattr(module, inner)
        monkeypatch.setattr(
            module, inner, lambda *a, original=original, inner=inner, **k: (seen.append(inner), original(*a, **k))[1]
        )
    call(function, implementation=name)
    assert seen == (["select", "attention"] if function is attention else ["select"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the interpreter")
def test_float64_by_name():
    with pytest.raises(ValueError, match="it takes float16, bfloat16 and float32, not float64; use 'auto'"):
        call(attention, implementation="triton", dtype=torch.float64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the interpreter")
def test_hopper_by_name_without_a_gpu():
    """The interpreter has no Gluon: even there the kernel for Hopper is not replaced by another."""
    with pytest.raises(ValueError, match="implementation='hopper' cannot run: the tensors are not on a GPU"):
        call(attention, implementation="hopper")


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the interpreter")
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scales_that_turn_the_order(scale):
    with pytest.raises(ValueError, match="it takes a scale greater than 0"):
        call(attention, implementation="triton", scale=scale)
    assert call(attention, scale=scale).isfinite().all()


def test_pairs_beyond_32_bits():
    from vmoba_compile.kernels.partition import Geometry

    q = torch.empty(1, 48, 131072, 8, device="meta", dtype=torch.bfloat16)
    geometry = Geometry((32, 64, 64), (1, 8, 16))
    why = implementations._no_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(implementations, "_no_triton", lambda q: "")
        assert "fewer than 2**31 pairs" in why(q, geometry, 1.0, 1.0)
        assert not why(q, geometry, 1.0, 0.25)


@pytest.mark.parametrize(
    ("grid", "block", "heads", "groups"),
    [
        ((21, 30, 52), (3, 30, 52), 12, 1),  # few boxes, short lists
        ((21, 30, 52), (7, 5, 13), 12, 2),
        ((21, 30, 52), (7, 5, 13), 10, 2),
        ((24, 36, 64), (8, 12, 8), 12, 2),
        ((24, 36, 64), (8, 12, 8), 8, 3),
    ],
)
def test_heads_at_a_time(grid, block, heads, groups, monkeypatch):
    """Few groups of heads: each has launches of its own, and its last partial results are merged by themselves."""
    pytest.importorskip("triton")
    from vmoba_compile.kernels import attend
    from vmoba_compile.kernels.launches import Work
    from vmoba_compile.kernels.partition import Geometry

    done = []
    monkeypatch.setattr(attend.attend_triton, "attention", lambda work, q, *rest, **limits: done.append(q.shape[1]))
    geometry = Geometry(grid, block)
    q = torch.empty(1, heads, geometry.num_tokens, 128, device="meta", dtype=torch.bfloat16)
    words = torch.empty(1, heads, geometry.num_video, geometry.num_words, device="meta", dtype=torch.int32)
    mask = torch.empty(0, device="meta", dtype=torch.bool)
    attend.attention(
        Work(q.device), q, q, q, words, mask, geometry, 1.0, implementation="triton", share=0.25, by_head=True
    )
    assert len(done) == groups
    assert sum(done) == heads


def test_long_rows_of_the_gate():
    with pytest.raises(ValueError, match="pool 'query_head' takes up to 2048 boxes, not 4096"):
        q = torch.zeros(1, 1, 4096, 8)
        select(q, q, (16, 16, 16), block=(1, 1, 1), pool="query_head", implementation="triton")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(implementations, "_has_triton", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="triton is not installed"):
        call(attention, implementation="triton")
    assert call(attention).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float32}, "it takes float16 and bfloat16, not torch.float32"),
        ({"head_dim": 20}, "head sizes up to 128 that are multiples of 8, not 20"),
        ({"head_dim": 256}, "head sizes up to 128 that are multiples of 8, not 256"),
    ],
    ids=["fp32", "odd_head_dim", "long_heads"],
)
def test_hopper_names_what_it_cannot_take(change, message):
    if torch.cuda.get_device_capability() != (9, 0):
        message = "compute capability 9.0"
    case = CASE.but(**{name: value for name, value in change.items() if name != "dtype"})
    tensors = case.tensors(change.get("dtype", torch.bfloat16))
    words = choose(case, tensors).words
    moved = [x.cuda() for x in (*tensors[:3], words, torch.empty(0, dtype=torch.bool))]
    with pytest.raises(ValueError, match=message):
        torch.ops.vmoba.attention(*moved, *case.sizes, scale=1.0, implementation="hopper")
    torch.ops.vmoba.attention(*moved, *case.sizes, scale=1.0)  # auto takes the portable kernels
