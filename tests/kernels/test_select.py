"""Block selection against the oracle, and the rules that it must keep."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import given
from kernel_cases import Case, Tensors, cases, choose
from vmoba_compile.kernels.partition import pack_bits, unpack_bits

POOLS = ("head_global", "query_head", "block", "overall")
POOLS_AND_MODES = [
    (pool, mode) for mode in ("threshold", "topk") for pool in POOLS if (pool, mode) != ("block", "topk")
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

every_rule = pytest.mark.parametrize(
    ("pool", "mode"), POOLS_AND_MODES, ids=["-".join(rule) for rule in POOLS_AND_MODES]
)
every_pool = pytest.mark.parametrize("pool", POOLS)


def expected(case: Case, tensors: Tensors) -> torch.Tensor:
    return oracle.select(
        tensors.q, tensors.k, case.grid, case.block, key_mask=tensors.key_mask,
        **case.layout_arguments, **case.selection,
    )  # fmt: skip


def with_rule(case: Case, pool: str, mode: str) -> Case:
    return case.but(pool=pool, mode=mode, topk=2 if mode == "topk" else None)


def own_boxes(case: Case) -> torch.Tensor:
    """Bool [N, C]: the box that holds the query."""
    members = oracle.boxes(case.grid, case.block)
    own = torch.zeros(case.num_video, len(members), dtype=torch.bool)
    for box, tokens in enumerate(members):
        own[tokens, box] = True
    return own


@given(cases())
def test_equals_the_oracle(case):
    tensors = case.tensors()
    selection = choose(case, tensors)
    assert torch.equal(selection.mask(), expected(case, tensors))
    assert selection.words.dtype == torch.int32
    assert selection.words.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@given(case=cases())
def test_every_dtype_selects_as_its_values_in_double_precision(case, dtype):
    tensors = case.tensors(dtype)
    upcast = tensors._replace(q=tensors.q.double(), k=tensors.k.double())
    selected = choose(case, tensors).mask()
    assert torch.equal(selected, choose(case, upcast).mask())
    assert torch.equal(selected, expected(case, tensors))


@given(cases())
def test_own_box_always_and_bounded_pairs(case):
    tensors = case.tensors()
    selected, own = choose(case, tensors).mask(), own_boxes(case)
    assert selected[..., own].all()
    others = (selected & ~own).double()
    per_pool = {
        "head_global": others.sum((2, 3)), "query_head": others.sum(3), "block": others.sum((1, 2)),
        "overall": others.sum((1, 2, 3)),
    }[case.pool]  # fmt: skip
    entries = others[0].numel() * len(others) // per_pool.numel()
    if case.mode == "threshold":
        assert per_pool.max() <= math.ceil(case.threshold * entries) + 1
    else:
        queries = entries // len(own[0])
        assert per_pool.max() <= queries * (min(case.topk, len(own[0])) - 1)


@every_rule
def test_equal_entries_go_in_order_of_box_then_query_then_head(pool, mode):
    """Boxes 1, 2 and 4 have equal means, and small integers make every gate value exact."""
    case = with_rule(Case(grid=(5, 2, 2), block=(1, 2, 2), heads=3, kv_heads=1, head_dim=2), pool, mode)
    q = torch.randint(-2, 3, (1, 3, 20, 2), dtype=torch.float64)
    boxes = torch.tensor([[3.0, -1.0], [1.0, 2.0], [1.0, 2.0], [-2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    offsets = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [0.0, -3.0]], dtype=torch.float64)
    k = (boxes[:, None] + offsets).reshape(1, 1, 20, 2)
    tensors = Tensors(q, k, k, None)
    for threshold in (0.01, 0.25, 0.4, 0.6, 0.8):
        changed = case.but(threshold=threshold)
        assert torch.equal(choose(changed, tensors).mask(), expected(changed, tensors))


@every_rule
@pytest.mark.parametrize("masked", ["none", "boxes"])
def test_constant_keys_have_no_range(pool, mode, masked):
    """Every weight is 1, rounding of the means included: 0.1 is not exact, and boxes differ in size."""
    case = with_rule(Case(grid=(5, 3, 3), block=(2, 2, 3), heads=2, masked=masked), pool, mode)
    tensors = case.tensors()
    tensors = tensors._replace(k=torch.full_like(tensors.k, 0.1), q=tensors.q[:, :, :1].expand(-1, 2, 45, -1))
    if pool in ("head_global", "query_head"):
        assert torch.equal(choose(case, tensors).mask(), expected(case, tensors))
    tensors = tensors._replace(q=torch.full_like(tensors.q, 0.1))
    selected = choose(case, tensors).mask()
    assert torch.equal(selected, expected(case, tensors))
    if masked == "none" and pool == "head_global" and mode == "threshold":
        own = own_boxes(case)
        needed = math.ceil(0.25 * own.numel() - own.sum())
        first = (~own[:, 0]).nonzero()[:needed, 0]
        assert (selected & ~own).nonzero().tolist() == [[0, head, n, 0] for head in range(2) for n in first.tolist()]


def test_range_floor():
    """At a range of 1e-6 every weight is 1, above it the largest gate has all the weight."""
    case = Case(grid=(4, 1, 1), block=(1, 1, 1), heads=1, kv_heads=1, head_dim=1, pool="query_head", threshold=0.3)
    k = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64).view(1, 1, 4, 1)
    for reach, chosen in [(1e-6, [True, True, False, False]), (1.1e-6, [True, False, False, True])]:
        tensors = Tensors(torch.full_like(k, reach), k, k, None)
        assert choose(case, tensors).mask()[0, 0, 0].tolist() == chosen
        assert torch.equal(choose(case, tensors).mask(), expected(case, tensors))


@every_pool
@pytest.mark.parametrize("threshold", [1.0, 1, 3.5, math.inf])
def test_threshold_of_one_or_more_selects_everything(pool, threshold):
    case = Case(pool=pool, threshold=threshold)
    assert choose(case, case.tensors()).mask().all()


@every_pool
def test_tiny_threshold_takes_one_other_entry_a_pool(pool):
    case = Case(pool=pool, threshold=1e-12, batch=2, heads=3, kv_heads=1)
    others = choose(case, case.tensors()).mask() & ~own_boxes(case)
    pools = {"head_global": 2 * 3, "query_head": 2 * 3 * 60, "block": 2 * others.shape[-1], "overall": 2}[pool]
    assert others.sum() == pools


@pytest.mark.parametrize("pool", ["head_global", "query_head", "overall"])
def test_topk_counts(pool):
    case = Case(pool=pool, mode="topk", topk=1, heads=4)
    tensors, own = case.tensors(), own_boxes(case)
    boxes = own.shape[1]
    assert torch.equal(choose(case, tensors).mask(), own.expand(1, 4, -1, -1))
    for topk in (2, 3, boxes - 1):
        selected = choose(case.but(topk=topk), tensors).mask()
        assert selected.sum() == 4 * 60 * topk
        if pool != "overall":
            assert (selected.sum((2, 3)) == 60 * topk).all()
        if pool == "query_head":
            assert (selected.sum(3) == topk).all()
    for topk in (boxes, boxes + 1, 10**6):
        assert choose(case.but(topk=topk), tensors).mask().all()


@every_rule
def test_samples_do_not_see_each_other(pool, mode):
    case = with_rule(Case(batch=3, prefix=1, suffix=2, masked="tokens"), pool, mode)
    q, k, v, key_mask = case.tensors()
    q = q * torch.tensor([1.0, 100.0, 0.01]).double().view(3, 1, 1, 1)
    words = choose(case, Tensors(q, k, v, key_mask)).words
    for sample in range(3):
        alone = Tensors(*(x[sample : sample + 1] for x in (q, k, v, key_mask)))
        assert torch.equal(choose(case, alone).words, words[sample : sample + 1])


@every_rule
def test_same_twice(pool, mode):
    case = with_rule(Case(prefix=3), pool, mode)
    tensors = case.tensors(torch.float32)
    assert torch.equal(choose(case, tensors).words, choose(case, tensors).words)


@every_rule
def test_masked_keys_and_condition_tokens_do_not_count(pool, mode):
    case = with_rule(Case(prefix=3, suffix=2, masked="tokens"), pool, mode)
    q, k, v, key_mask = case.tensors()
    words = choose(case, Tensors(q, k, v, key_mask)).words
    noise = torch.full_like(k, torch.nan)
    outside = torch.ones(case.num_tokens, dtype=torch.bool)
    outside[3:63] = False
    ignored = (~key_mask | outside)[:, None, :, None]
    changed = Tensors(torch.where(outside[:, None], noise, q), torch.where(ignored, noise, k), v, key_mask)
    assert torch.equal(choose(case, changed).words, words)


@every_rule
def test_boxes_without_keys_are_left_out(pool, mode):
    case = with_rule(Case(masked="boxes", threshold=0.9), pool, mode)
    tensors, own = case.tensors(), own_boxes(case)
    empty = [
        box for box, tokens in enumerate(oracle.boxes(case.grid, case.block)) if not tensors.key_mask[0, tokens].any()
    ]
    assert 0 < len(empty) < own.shape[1]
    for changed in (case, case.but(threshold=1.0, topk=1000 if mode == "topk" else None)):
        assert not (choose(changed, tensors).mask() & ~own)[..., empty].any()


@given(cases())
def test_density(case):
    tensors = case.tensors()
    selection = choose(case, tensors)
    pairs = oracle.allowed(selection.mask(), case.grid, case.block)
    density = selection.density()
    assert (density.dtype, density.shape) == (torch.float32, (case.batch, case.heads))
    torch.testing.assert_close(density.double(), pairs.double().mean((2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("boxes", [1, 31, 32, 33, 64, 65, 100])
def test_bit_sets(boxes):
    mask = torch.rand(2, 3, 50, boxes) > 0.5
    mask[0, 0, 0], mask[0, 0, 1] = True, False
    words = pack_bits(mask)
    assert (words.dtype, words.shape) == (torch.int32, (2, 3, 50, math.ceil(boxes / 32)))
    assert torch.equal(unpack_bits(words, boxes), mask)
    for box in range(boxes):
        bits = [(word >> box % 32) & 1 for word in words[..., box // 32].flatten().tolist()]
        assert bits == mask[..., box].flatten().int().tolist()


def test_bit_31_is_the_sign():
    mask = torch.zeros(3, 40, dtype=torch.bool)
    mask[0, 31] = mask[1, 32] = mask[2, :32] = True
    assert pack_bits(mask).tolist() == [[-(2**31), 0], [0, 1], [-1, 0]]


@pytest.mark.parametrize("boxes", [32, 33, 72])
def test_many_boxes(boxes):
    case = Case(grid=(boxes, 1, 2), block=(1, 1, 2), threshold=0.3)
    tensors = case.tensors()
    selection = choose(case, tensors)
    assert selection.words.shape[-1] == math.ceil(boxes / 32)
    assert torch.equal(selection.mask(), expected(case, tensors))


def test_no_gradient():
    case = Case()
    q, k, v, _ = case.tensors()
    words = choose(case, Tensors(q.requires_grad_(), k.requires_grad_(), v, None)).words
    assert not words.requires_grad
