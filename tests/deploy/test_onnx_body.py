"""The portable bodies in ONNX Runtime against the reference, bit for bit where boxes are chosen."""

from __future__ import annotations

import onnx_files
import pytest
import torch
from vmoba_compile.kernels import reference_attention, reference_select
from vmoba_compile.kernels.partition import Geometry

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from vmoba_compile.deploy.onnx_body import Rule, body_bytes  # noqa: E402

SMALL, RAGGED = ((3, 4, 5), (2, 2, 3)), ((5, 7, 11), (2, 4, 5))
CASES = {
    # name: rule, grid and block, prefix and suffix, masked, opset
    "paper": (Rule("head_global", "threshold", 0.25, 0, 0), RAGGED, (0, 0), False, 20),
    "opset-23": (Rule("head_global", "threshold", 0.25, 0, 0), RAGGED, (3, 2), True, 23),
    "suffix-masked": (Rule("head_global", "threshold", 0.25, 0, 0), SMALL, (0, 6), True, 20),
    "barely-any": (Rule("head_global", "threshold", 0.0, 0, 0), SMALL, (2, 0), False, 20),
    "everything": (Rule("head_global", "threshold", 1.0, 0, 0), SMALL, (0, 3), True, 20),
    "topk": (Rule("head_global", "topk", 0.25, 3, 0), RAGGED, (3, 2), True, 20),
    "topk-own-box": (Rule("head_global", "topk", 0.25, 1, 0), SMALL, (0, 0), False, 20),
    "topk-all-boxes": (Rule("head_global", "topk", 0.25, 99, 0), SMALL, (1, 0), False, 20),
    "query-head": (Rule("query_head", "threshold", 0.25, 0, 0), RAGGED, (0, 3), True, 20),
    "query-head-topk": (Rule("query_head", "topk", 0.25, 2, 0), SMALL, (3, 0), False, 20),
    "block": (Rule("block", "threshold", 0.25, 0, 0), RAGGED, (0, 0), True, 20),
    "overall": (Rule("overall", "threshold", 0.25, 0, 0), SMALL, (3, 2), True, 20),
    "overall-topk": (Rule("overall", "topk", 0.25, 2, 0), SMALL, (0, 0), False, 20),
    "tiles": (Rule("head_global", "threshold", 0.25, 0, 64), ((5, 9, 11), (3, 9, 11)), (3, 2), True, 20),
    "empty-tiles": (Rule("head_global", "threshold", 0.25, 0, 64), ((5, 9, 12), (4, 9, 11)), (0, 2), False, 20),
    "more-than-32-boxes": (Rule("head_global", "threshold", 0.25, 0, 0), ((4, 6, 7), (1, 2, 2)), (0, 2), False, 20),
}


def run(rule, geometry, q, k, v, mask, scale, opset):
    file = onnx_files.attention_model(rule, opset, scale)
    onnx.checker.check_model(file)
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    tensors = {"q": q, "k": k, "v": v, "key_mask": mask, "sizes": onnx_files.sizes_of(geometry)}
    return [torch.from_numpy(x) for x in session.run(None, {name: x.numpy() for name, x in tensors.items()})]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    rule, (grid, block), (prefix, suffix), masked, opset = CASES[name]
    geometry = Geometry(grid, block, prefix, suffix)
    q, k, v = (torch.randn(2, heads, geometry.num_tokens, 10) for heads in (4, 2, 2))
    mask = torch.rand(2, geometry.num_tokens) > 0.3 if masked else torch.ones(2, geometry.num_tokens, dtype=torch.bool)
    if masked:  # what is masked is never read
        k, v = (torch.where(mask[:, None, :, None], x, torch.nan) for x in (k, v))
    kind = {"pool": rule.pool, "mode": rule.mode, "threshold": rule.threshold, "topk": rule.topk}
    expected = reference_select.select(q, k, mask, geometry, **kind, tile=rule.tile)
    out, lse = reference_attention.attention(q, k, v, expected, mask, geometry, 0.3, rule.tile)
    got = run(rule, geometry, q, k, v, mask, 0.3, opset)
    assert got[0].dtype == torch.int32 and torch.equal(got[0], expected)
    torch.testing.assert_close(got[1], out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[2], lse, rtol=1e-5, atol=1e-5)


def test_equal_gates_are_taken_in_order():
    """Where no query prefers a box, entries go by box and then by query, as in the definition."""
    geometry = Geometry((4, 4, 4), (2, 2, 2))
    q, k, v = (torch.ones(1, 2, 64, 8) for _ in range(3))
    rule = Rule("head_global", "threshold", 0.4, 0, 0)
    none = torch.empty(0, dtype=torch.bool)
    expected = reference_select.select(q, k, none, geometry, pool=rule.pool, mode=rule.mode, threshold=0.4, topk=0)
    got = run(rule, geometry, q, k, v, torch.ones(1, 64, dtype=torch.bool), 1.0, 20)
    assert torch.equal(got[0], expected) and float((expected != 255).float().mean()) > 0.3


def test_a_sample_without_keys_gives_zeros():
    geometry = Geometry((3, 4, 5), (2, 2, 3), 2, 0)
    q, k, v = (torch.randn(2, 2, 62, 8) for _ in range(3))
    mask = torch.ones(2, 62, dtype=torch.bool)
    mask[1] = False
    _, out, lse = run(Rule("head_global", "threshold", 0.25, 0, 0), geometry, q, k, v, mask, 1.0, 20)
    assert torch.equal(out[1], torch.zeros_like(out[1])) and torch.all(lse[1] == float("-inf"))
    assert out[0].isfinite().all() and lse[0].isfinite().all()


def test_memory_grows_with_the_square_of_the_tokens():
    one, four = (body_bytes(Geometry((t, 30, 52), (3, 30, 52)), 1, 12) for t in (5, 20))
    assert four == 16 * one and one == 12 * 12 * (5 * 30 * 52) ** 2
