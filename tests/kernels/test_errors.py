"""Wrong uses of ``attention`` and ``select``: what is raised, and that the message names the culprit."""

from __future__ import annotations

import pytest
import torch
from vmoba_compile.kernels import attention, select

GRID = (2, 3, 4)
TOKENS = 24


def heads(count: int = 2, tokens: int = TOKENS, dim: int = 8, batch: int = 1, **options) -> torch.Tensor:
    return torch.zeros(batch, count, tokens, dim, **options)


def mask(*shape: int, dtype: torch.dtype = torch.bool, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


TRIPLE = "must be three integers"
OPTIONS = [
    ("grid_two_numbers", {"grid": (6, 4)}, ValueError, f"grid {TRIPLE} (frames, rows, columns), not (6, 4)"),
    ("grid_number", {"grid": 24}, ValueError, f"grid {TRIPLE}"),
    ("grid_string", {"grid": "234"}, ValueError, f"grid {TRIPLE}"),
    ("grid_zero", {"grid": (0, 3, 4)}, ValueError, "grid must hold integers of at least 1"),
    ("grid_float", {"grid": (2.0, 3, 4)}, TypeError, "grid must hold integers, not float"),
    ("grid_bool", {"grid": (True, 6, 4)}, TypeError, "grid must hold integers, not bool"),
    ("grid_too_large", {"grid": (3, 3, 4)}, ValueError, "has 36 tokens and prefix + suffix 0, but q has 24"),
    ("block_one_number", {"block": 4}, ValueError, f"block {TRIPLE}"),
    ("block_zero", {"block": (1, 0, 4)}, ValueError, "block must hold integers of at least 1"),
    ("block_negative", {"block": (1, -3, 4)}, ValueError, "block must hold integers of at least 1"),
    ("block_float", {"block": (1, 1.5, 4)}, TypeError, "block must hold integers, not float"),
    ("prefix_forgotten", {"grid": (2, 3, 3)}, ValueError, "has 18 tokens and prefix + suffix 0, but q has 24"),
    ("prefix_too_long", {"prefix": 3}, ValueError, "prefix + suffix 3, but q has 24"),
    (
        "prefix_negative",
        {"prefix": -1, "suffix": 1},
        ValueError,
        "prefix and suffix must not be negative, not -1 and 1",
    ),
    (
        "suffix_negative",
        {"suffix": -1, "prefix": 1},
        ValueError,
        "prefix and suffix must not be negative, not 1 and -1",
    ),
    ("prefix_float", {"prefix": 0.0}, TypeError, "prefix must be an integer, not float"),
    ("suffix_none", {"suffix": None}, TypeError, "suffix must be an integer, not NoneType"),
    (
        "pool_unknown",
        {"pool": "head"},
        ValueError,
        "pool must be one of 'head_global', 'query_head', 'block', 'overall'",
    ),
    ("mode_unknown", {"mode": "top_k"}, ValueError, "mode must be one of 'threshold', 'topk', not 'top_k'"),
    (
        "granularity_unknown",
        {"granularity": "box"},
        ValueError,
        "granularity must be one of 'token', 'tile', not 'box'",
    ),
    ("threshold_zero", {"threshold": 0.0}, ValueError, "threshold must be greater than 0"),
    ("threshold_negative", {"threshold": -0.25}, ValueError, "threshold must be greater than 0"),
    ("threshold_nan", {"threshold": float("nan")}, ValueError, "threshold must be greater than 0"),
    ("threshold_string", {"threshold": "0.25"}, TypeError, "threshold must be a number, not str"),
    ("threshold_bool", {"threshold": True}, TypeError, "threshold must be a number, not bool"),
    ("threshold_tensor", {"threshold": torch.tensor(0.25)}, TypeError, "threshold must be a number, not Tensor"),
    ("topk_missing", {"mode": "topk"}, ValueError, "mode='topk' needs topk of at least 1"),
    ("topk_zero", {"mode": "topk", "topk": 0}, ValueError, "mode='topk' needs topk of at least 1"),
    ("topk_float", {"mode": "topk", "topk": 2.0}, TypeError, "topk must be an int or None, not float"),
    ("topk_bool", {"mode": "topk", "topk": True}, TypeError, "topk must be an int or None, not bool"),
    ("topk_of_a_box", {"mode": "topk", "topk": 2, "pool": "block"}, ValueError, "pool='block' has no top-k rule"),
    ("mask_additive", {"key_mask": mask(1, 24, dtype=torch.float32)}, TypeError, "key_mask must be bool"),
    ("mask_of_ones", {"key_mask": mask(1, 24, dtype=torch.int64)}, TypeError, "key_mask must be bool"),
    ("mask_short", {"key_mask": mask(1, 23)}, ValueError, "key_mask must be [batch, tokens] = [1, 24], not [1, 23]"),
    ("mask_four_dims", {"key_mask": mask(1, 1, 1, 24)}, ValueError, "key_mask must be [batch, tokens]"),
    ("mask_empty", {"key_mask": mask(0)}, ValueError, "key_mask must be [batch, tokens]"),
    ("mask_elsewhere", {"key_mask": mask(1, 24, device="meta")}, ValueError, "key_mask is on meta, q on cpu"),
]
HALF = torch.float16
TENSORS = [
    ("q_three_dims", {"q": heads()[0]}, ValueError, "q must be [batch, heads, tokens, head_dim], not [2, 24, 8]"),
    ("k_five_dims", {"k": heads()[None]}, ValueError, "k must be [batch, heads, tokens, head_dim]"),
    ("k_other_length", {"k": heads(tokens=20)}, ValueError, "k [1, 2, 20, 8] does not match q [1, 2, 24, 8]"),
    ("k_other_head_dim", {"k": heads(dim=16)}, ValueError, "does not match q [1, 2, 24, 8] in batch, tokens or head_dim"),
    ("k_other_batch", {"k": heads(batch=2)}, ValueError, "k [2, 2, 24, 8] does not match q"),
    ("k_half", {"k": heads(dtype=HALF)}, TypeError, "k is torch.float16, q is torch.float32"),
    ("k_elsewhere", {"k": heads(device="meta")}, ValueError, "k is on meta, q on cpu"),
]  # fmt: skip
BOTH_SIDES = [
    ("integers", {name: heads(dtype=torch.int64) for name in "qkv"}, TypeError, "q is torch.int64"),
    ("complex", {name: heads(dtype=torch.complex64) for name in "qkv"}, TypeError, "q is torch.complex64"),
    ("heads_not_a_multiple", {"q": heads(3)}, ValueError, "the 3 query heads are not a multiple of the 2 key heads"),
    ("fewer_query_heads", {"q": heads(1)}, ValueError, "the 1 query heads are not a multiple of the 2 key heads"),
    ("no_key_heads", {"k": heads(0), "v": heads(0)}, ValueError, "not a multiple of the 0 key heads"),
]
VALUES = [
    ("v_three_dims", {"v": heads()[0]}, ValueError, "v must be [batch, heads, tokens, head_dim]"),
    ("v_other_length", {"v": heads(tokens=20)}, ValueError, "v [1, 2, 20, 8] does not match q"),
    ("v_other_heads", {"v": heads(1)}, ValueError, "k [1, 2, 24, 8] and v [1, 1, 24, 8] must have one shape"),
    ("v_half", {"v": heads(dtype=HALF)}, TypeError, "v is torch.float16, q is torch.float32"),
    ("scale_string", {"scale": "none"}, ValueError, "could not convert string to float"),
]


def wrong_uses(*tables):
    rows = [row for table in tables for row in table]
    return pytest.mark.parametrize(("wrong", "error", "message"), [r[1:] for r in rows], ids=[r[0] for r in rows])


def check(function, tensors: str, wrong: dict, error: type[Exception], message: str) -> None:
    arguments = {name: heads() for name in tensors} | {"grid": GRID, "block": (1, 3, 4)} | wrong
    with pytest.raises(error) as caught:
        function(**arguments)
    assert type(caught.value) is error
    assert message in str(caught.value)


@wrong_uses(OPTIONS, TENSORS, BOTH_SIDES, VALUES)
def test_attention(wrong, error, message):
    check(attention, "qkv", wrong, error, message)


@wrong_uses(OPTIONS, TENSORS, BOTH_SIDES)
def test_select(wrong, error, message):
    check(select, "qk", {name: value for name, value in wrong.items() if name != "v"}, error, message)


def test_block_is_required():
    with pytest.raises(TypeError, match="block"):
        attention(heads(), heads(), heads(), GRID)


def test_correct_use_passes():
    """The table's arguments without the wrong one."""
    assert attention(heads(), heads(), heads(), GRID, block=(1, 3, 4), key_mask=mask(1, 24)).shape == (1, 2, 24, 8)
    assert select(heads(), heads(), [2, 3, 4], block=torch.Size([1, 3, 4])).mask().shape == (1, 2, 24, 2)


def test_errors_come_through_compilation():
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="eager")
    with pytest.raises(Exception, match="prefix \\+ suffix 3, but q has 24"):
        compiled(heads(), heads(), heads(), GRID, block=(1, 3, 4), prefix=3)


@pytest.mark.parametrize("call", [attention, select], ids=["attention", "select"])
def test_no_tensor(call):
    tensors = [heads()] * (3 if call is attention else 2)
    for place, name in enumerate("qkv"[: len(tensors)]):
        wrong = [*tensors[:place], 3, *tensors[place + 1 :]]
        with pytest.raises(TypeError, match=rf"{name} must be a torch\.Tensor, not int"):
            call(*wrong, GRID, block=(1, 3, 4))
