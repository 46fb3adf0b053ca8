"""The Triton kernels of attention against the oracle: on a GPU, or the portable one in the Triton interpreter."""

from __future__ import annotations

import interpreter
import pytest
import torch
from hypothesis import Phase, given, settings
from kernel_cases import (
    DEVICE,
    LAYOUTS,
    MASKS,
    TOLERANCE,
    Case,
    Tensors,
    assert_close,
    assert_equals_oracle,
    cases,
    choose,
    mask_or_empty,
    relative,
)
from kernel_cases import run_operator as run
from vmoba_compile.kernels import attend_lists, attend_triton, attention
from vmoba_compile.kernels.launches import Work
from vmoba_compile.kernels.partition import Geometry, box_order, unpack_bits

ON_GPU = torch.cuda.is_available()
HAS_HOPPER = ON_GPU and torch.cuda.get_device_capability() == (9, 0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

every_implementation = pytest.mark.parametrize("implementation", ["triton", "hopper"] if HAS_HOPPER else ["triton"])
interpreter.install()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small tiles and groups, so that tiny problems have many of them. The kernel for Hopper has one tile size."""
    if not ON_GPU:
        monkeypatch.setattr(attend_lists, "GROUP", 16)
        monkeypatch.setattr(attend_lists, "TILE", 16)
        monkeypatch.setattr(attend_triton, "TILE", 16)
        monkeypatch.setattr(attend_triton, "QUERIES", 16)


CASE = Case(grid=(3, 4, 5), block=(2, 2, 3), prefix=3, suffix=5, batch=1, heads=2, kv_heads=1, head_dim=40)


def fits(case: Case, dtype: torch.dtype, implementation: str) -> bool:
    return implementation == "triton" or (dtype != torch.float32 and case.head_dim % 8 == 0 and case.head_dim <= 128)


@settings(max_examples=60 if ON_GPU else 4, phases=[Phase.explicit, Phase.generate])  # the interpreter is slow
@given(case=cases())
def test_equals_the_oracle(case):
    assert_equals_oracle(case, torch.float32)


@pytest.mark.halved
@every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [8, 16, 40, 64, 72, 128])
def test_head_sizes(head_dim, dtype, implementation):
    case = CASE.but(head_dim=head_dim, grid=(3, 4, 4))
    if fits(case, dtype, implementation):
        assert_equals_oracle(case, dtype, implementation)


@pytest.mark.parametrize("head_dim", [3, 20, 200, 256])
def test_head_sizes_of_the_portable_kernel(head_dim):
    assert_equals_oracle(CASE.but(head_dim=head_dim, grid=(2, 3, 4)), torch.float32)


@every_implementation
@pytest.mark.parametrize("masked", MASKS)
def test_masked_keys(masked, implementation):
    assert_equals_oracle(CASE.but(masked=masked), torch.bfloat16, implementation)


@every_implementation
def test_samples_and_groups_of_heads(implementation):
    case = CASE.but(grid=(2, 3, 4), batch=3, heads=6, kv_heads=3, masked="sample")
    assert_equals_oracle(case, torch.bfloat16, implementation)


@every_implementation
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, implementation):
    assert_equals_oracle(CASE.but(layout=layout), torch.bfloat16, implementation)


def test_last_stride():
    tensors = CASE.tensors(torch.float32)
    turned = Tensors(*(x.mT.contiguous().mT for x in tensors[:3]), None)
    assert_close(run(CASE, turned), CASE.truth(tensors), torch.float32)


@every_implementation
@pytest.mark.parametrize(("prefix", "suffix"), [(0, 0), (1, 0), (0, 33), (40, 7)])
def test_condition_tokens(prefix, suffix, implementation):
    assert_equals_oracle(CASE.but(prefix=prefix, suffix=suffix), torch.bfloat16, implementation)


@every_implementation
@pytest.mark.parametrize("block", [(1, 1, 1), (3, 1, 5), (9, 9, 9), (3, 4, 5), (1, 3, 2)])
def test_boxes(block, implementation):
    assert_equals_oracle(CASE.but(block=block, batch=1), torch.bfloat16, implementation)


@every_implementation
def test_more_than_64_boxes(implementation):
    assert_equals_oracle(CASE.but(grid=(3, 5, 5), block=(1, 1, 1), batch=1, heads=2), torch.bfloat16, implementation)


@every_implementation
@pytest.mark.parametrize("masked", ["none", "tokens"])
def test_many_chunks(masked, implementation, tight):
    grid, block = ((6, 14, 15), (2, 5, 5)) if ON_GPU else ((4, 4, 5), (2, 2, 3))
    case = CASE.but(grid=grid, block=block, masked=masked, heads=4, kv_heads=2, head_dim=64 if ON_GPU else 16)
    assert_equals_oracle(case, torch.bfloat16, implementation, threshold=0.25)


@every_implementation
def test_samples_one_at_a_time(implementation, tight):
    case = CASE.but(grid=(2, 3, 4), batch=2, heads=2, kv_heads=2, head_dim=16, masked="tokens")
    assert_equals_oracle(case, torch.bfloat16, implementation)


@every_implementation
def test_every_box_selected_is_dense_attention(implementation):
    case = CASE.but(threshold=1.0, head_dim=64)
    tensors = case.tensors(torch.bfloat16)
    q, k, v = (x.float() for x in tensors[:3])
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert relative(run(case, tensors, implementation)[0], dense) < TOLERANCE[torch.bfloat16]


@every_implementation
def test_no_box_selected_but_by_hand(implementation):
    """Without any bit a video query sees the condition tokens alone."""
    case = CASE.but(head_dim=64)
    tensors = case.tensors(torch.bfloat16)
    words = torch.zeros_like(choose(case, tensors).words)
    out, _ = run(case, tensors, implementation, words)
    q, k, v, _ = tensors
    kept = torch.tensor([*range(case.prefix), *range(case.prefix + case.num_video, case.num_tokens)])
    video = slice(case.prefix, case.prefix + case.num_video)
    q, k, v = q[:, :, video].double(), k[:, :, kept].double(), v[:, :, kept].double()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert relative(out[:, :, video], expected) < TOLERANCE[torch.bfloat16]


@every_implementation
def test_a_query_without_any_key_gets_zero(implementation):
    case = CASE.but(prefix=0, suffix=0, head_dim=64)
    tensors = case.tensors(torch.bfloat16)
    out, lse = run(case, tensors, implementation, torch.zeros_like(choose(case, tensors).words))
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.halved
@pytest.mark.parametrize("masked", MASKS)
@every_implementation
def test_queries_without_keys_beside_others(masked, implementation):
    """No condition tokens, so that a query of a masked box may see nothing at all; several heads, so several chunks."""
    case = CASE.but(prefix=0, suffix=0, heads=4, kv_heads=4, batch=2, head_dim=64, masked=masked, threshold=1e-9)
    assert_equals_oracle(case, torch.bfloat16, implementation)


@every_implementation
def test_a_key_mask_of_any_strides(implementation):
    case = CASE.but(batch=2, masked="tokens", head_dim=64)
    q, k, v, mask = case.tensors(torch.bfloat16)
    shared = Tensors(q, k, v, mask[:1].expand(2, -1))
    padded = torch.cat([mask, ~mask], dim=1)[:, : mask.shape[1]]
    assert_close(run(case, shared, implementation), case.truth(shared), torch.bfloat16)
    assert_close(
        run(case, Tensors(q, k, v, padded), implementation), case.truth(case.tensors(torch.bfloat16)), torch.bfloat16
    )


@every_implementation
def test_unwritten_rows_do_not_matter(implementation, monkeypatch):
    """Partial results that nothing wrote are NaN, their log-sum-exps are finite."""
    case = CASE.but(heads=4, kv_heads=4, prefix=0, suffix=0, head_dim=64)
    tensors = case.tensors(torch.bfloat16)
    words, truth = choose(case, tensors).words, case.truth(tensors)
    empty = torch.empty

    def fill(*shape, dtype=torch.float32, device=None, **rest):
        made = empty(*shape, dtype=dtype, device=device, **rest)
        return made.fill_(torch.nan if dtype == torch.bfloat16 else 0)

    monkeypatch.setattr(torch, "empty", fill)
    assert_close(run(case, tensors, implementation, words), truth, torch.bfloat16)


@every_implementation
def test_same_bits_every_time(implementation, tight):
    tensors = CASE.but(head_dim=64).tensors(torch.bfloat16)
    first = run(CASE.but(head_dim=64), tensors, implementation)
    second = run(CASE.but(head_dim=64), tensors, implementation)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_implementation
def test_more_pairs_than_the_rule_allows_is_nan(implementation):
    """A selection that breaks the promise made with ``threshold`` must not write beyond the lists."""
    case = Case(grid=(4, 6, 6), block=(1, 1, 2), heads=2, kv_heads=2, head_dim=64, threshold=1.0)
    tensors = case.tensors(torch.bfloat16)
    out, lse = run(case, tensors, implementation, threshold=0.01)
    assert out.isnan().all()
    assert lse.isnan().all()


@every_implementation
def test_one_head_with_more_than_its_share_is_nan(implementation):
    """With a pool of one head the lists of each head have their own bound: a sample within its own is not enough."""
    case = Case(grid=(3, 4, 6), block=(1, 1, 2), heads=4, kv_heads=4, head_dim=64, threshold=0.3)
    tensors = case.tensors(torch.bfloat16)
    words = torch.zeros_like(choose(case, tensors).words)
    words[:, 2] = -1
    q, k, v = (x[:, 2].float() for x in tensors[:3])
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert (
        relative(run(case, tensors, implementation, words, threshold=0.3)[0][:, 2], dense) < TOLERANCE[torch.bfloat16]
    )
    assert run(case, tensors, implementation, words, threshold=0.3, pool="head_global")[0].isnan().all()


@every_implementation
def test_few_heads_at_a_time(implementation, tight):
    """With a pool of one head, lists are made for as many heads as memory allows."""
    case = CASE.but(head_dim=64, heads=6, kv_heads=3, batch=2)
    assert_equals_oracle(case, torch.bfloat16, implementation, pool="head_global", threshold=case.threshold)


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bf16", "fp16"])
@pytest.mark.parametrize("rise", [0.05, 20.0, 200.0])
def test_scores_that_rise_within_a_box(rise, dtype, implementation):
    """The kernel for Hopper begins with the peak of a box's first keys, and again where later ones go far beyond."""
    case = Case(grid=(2, 8, 20), block=(2, 8, 10), batch=1, heads=2, kv_heads=1, head_dim=64)
    tensors = case.tensors(dtype)
    tensors.k[:, :, case.num_tokens // 2 :] *= rise
    truth = case.truth(tensors)
    out, lse = run(case, tensors, implementation, choose(case, tensors).words)
    assert relative(out, truth.out) < TOLERANCE[dtype]
    torch.testing.assert_close(lse.double(), truth.lse, rtol=1e-6, atol=1e-4)  # up to 500


@every_implementation
def test_nan_stays_with_its_query(implementation):
    case = CASE.but(head_dim=64, batch=1)
    tensors = case.tensors(torch.bfloat16)
    words = choose(case, tensors).words
    expected = run(case, tensors, implementation, words)[0]
    tensors.q[0, 1, 20] = torch.nan
    out = run(case, tensors, implementation, words)[0]
    assert out[0, 1, 20].isnan().all()
    expected[0, 1, 20] = out[0, 1, 20] = 0
    assert torch.equal(out, expected)


@every_implementation
def test_masked_keys_may_be_nan(implementation):
    case = CASE.but(head_dim=64, masked="tokens")
    tensors = case.tensors(torch.bfloat16)
    words, truth = choose(case, tensors).words, case.truth(tensors)
    for x in (tensors.k, tensors.v):
        x.masked_fill_(~tensors.key_mask[:, None, :, None], torch.nan)
    assert_close(run(case, tensors, implementation, words), truth, torch.bfloat16)


def test_nan_stays_in_its_box():
    """The portable kernel never reads a row of a box that the query has not selected."""
    case = CASE.but(prefix=0, suffix=0, batch=1, heads=2, kv_heads=2)
    tensors = case.tensors(torch.float32)
    selection = choose(case, tensors)
    order, starts = box_order(case.grid, case.block)
    tensors.v[0, :, order[starts[1] : starts[2]]] = torch.nan
    out = run(case, tensors, "triton", selection.words)[0]
    assert torch.equal(out.isnan().any(-1), selection.mask()[..., 1])


@every_implementation
@pytest.mark.parametrize(("pool", "mode"), [("head_global", "threshold"), ("overall", "topk")])
def test_selection_and_attention(pool, mode, implementation):
    case = CASE.but(pool=pool, mode=mode, topk=3 if mode == "topk" else None, head_dim=64)
    tensors = case.tensors(torch.bfloat16)
    q, k, v = (x.to(DEVICE) for x in tensors[:3])
    out = attention(
        q, k, v, case.grid, block=case.block, implementation=implementation, **case.layout_arguments, **case.selection
    )
    assert relative(out.cpu(), case.truth(tensors).out) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("least_tiles", [0, 50])
@pytest.mark.parametrize("masked", ["none", "tokens"])
def test_lists_hold_every_pair_once(masked, least_tiles):
    """The entries of a box are its queries in ascending order, and places are the ranks of pairs by query."""
    case = CASE.but(masked=masked)
    tensors = case.tensors()
    words = choose(case, tensors).words
    geometry = Geometry(case.grid, case.block, case.prefix, case.suffix)
    capacity = case.batch * case.heads * case.num_tokens * (geometry.num_boxes + 1)
    masks = mask_or_empty(tensors).to(DEVICE)
    lists = attend_lists.build(
        Work(torch.device(DEVICE)),
        words.to(DEVICE),
        masks,
        geometry,
        capacity=capacity,
        head_capacity=capacity,
        chunk_pairs=1,
        ring=2,
        least_tiles=least_tiles,
    )
    tiles, chunks, overflow, unsteady = lists.totals.tolist()
    assert not overflow
    assert not unsteady
    table = lists.tiles[:tiles].tolist()
    assert all(sum(row[0] == head for row in table) >= least_tiles for head in range(case.batch * case.heads))
    assert [sum(row[5] == chunk for row in table) for chunk in range(chunks)] == [
        last - first for _, _, _, first, last, *_ in lists.chunks[:chunks].tolist()
    ]
    assert not lists.done[:chunks].any()
    truth = case.truth(tensors)
    boxes = unpack_bits(words, geometry.num_boxes)
    seen = torch.zeros(case.batch, case.heads, case.num_tokens, geometry.num_boxes + 1, dtype=torch.bool)
    for head, first, last, key, size, chunk, box, _ in table:
        if first == last:
            assert (key, size) == (0, 1)
            continue
        sample, of_sample = divmod(head, case.heads)
        entries = lists.entries[first : min(last, first + attend_lists.TILE)]
        queries = (entries >> attend_lists.RANK_BITS).tolist()
        assert queries == sorted(queries)
        assert lists.chunks[chunk, 0] == head
        assert lists.chunks[chunk, 1] <= queries[0] <= queries[-1] < lists.chunks[chunk, 2]
        assert not seen[sample, of_sample, queries, box].any()
        seen[sample, of_sample, queries, box] = True
        keys = lists.keys[sample if masked == "tokens" else 0, key : key + size].long().cpu()
        assert truth.pairs[sample, of_sample, queries][:, keys].all()
    pairs = int(lists.place[..., 1].sum())
    assert pairs == int(seen.sum())
    video = slice(case.prefix, case.prefix + case.num_video)
    if masked == "none":
        assert torch.equal(seen[:, :, video, :-1], boxes)
        assert seen[..., -1].all()
        assert seen[:, :, : case.prefix].all()
