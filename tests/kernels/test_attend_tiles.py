"""Attention of tiles of queries in Triton against the oracle: on a GPU or in the Triton interpreter."""

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
from vmoba_compile.kernels import attend_lists, attend_pack, attend_tiles, attention, partition
from vmoba_compile.kernels.launches import Work
from vmoba_compile.kernels.partition import Geometry, box_order, tile_of, unpack_bits

ON_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEYS = 16  # of a block
TILE = 16  # queries

interpreter.install()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small tiles, blocks and programs, so that tiny problems have many of them."""
    monkeypatch.setattr(partition, "TILE_SIZES", (TILE,))
    monkeypatch.setitem(partition.TILE_OF, "tile", TILE)
    monkeypatch.setattr(attend_tiles, "program_shape", lambda q: (16, KEYS, 4, 2))


WORK = Work(torch.device(DEVICE))

# Boxes of 40 and 20 tokens in three tiles each; three blocks of keys, the last ragged.
CASE = Case(
    grid=(3, 4, 5), block=(2, 4, 5), prefix=3, suffix=5, heads=2, kv_heads=1, head_dim=40, tile=TILE, threshold=0.4
)
SMALL_BOXES = CASE.but(block=(2, 2, 3))  # 12 to 2 tokens, one tile each


@settings(
    max_examples=60 if ON_GPU else 8,  # the interpreter is slow
    phases=[Phase.explicit, Phase.generate],
)  # fmt: skip
@given(case=cases())
def test_equals_the_oracle(case):
    assert_equals_oracle(case.but(tile=TILE), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [3, 16, 72, 256])
def test_head_sizes(head_dim, dtype):
    assert_equals_oracle(CASE.but(head_dim=head_dim, heads=1), dtype)


@pytest.mark.parametrize("case", [CASE, SMALL_BOXES], ids=["tiles", "small_boxes"])
@pytest.mark.parametrize("masked", MASKS)
def test_masked_keys(masked, case):
    assert_equals_oracle(case.but(masked=masked), torch.bfloat16)


def test_samples_and_groups_of_heads():
    case = CASE.but(grid=(2, 3, 4), block=(1, 3, 4), batch=3, heads=6, kv_heads=3, masked="sample", head_dim=16)
    assert_equals_oracle(case, torch.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    assert_equals_oracle(CASE.but(layout=layout), torch.bfloat16)


def test_last_stride():
    tensors = CASE.tensors(torch.float32)
    turned = Tensors(*(x.mT.contiguous().mT for x in tensors[:3]), None)
    assert_close(run(CASE, turned), CASE.truth(tensors), torch.float32)


@pytest.mark.parametrize(("prefix", "suffix"), [(0, 0), (1, 0), (0, 33), (40, 7)])
def test_condition_tokens(prefix, suffix):
    assert_equals_oracle(CASE.but(prefix=prefix, suffix=suffix, heads=1), torch.bfloat16)


@pytest.mark.parametrize("block", [(1, 1, 1), (3, 1, 5), (9, 9, 9), (3, 4, 4), (2, 4, 4)])
def test_boxes(block):
    assert_equals_oracle(CASE.but(block=block, heads=1), torch.bfloat16)


def test_more_than_64_boxes():
    assert_equals_oracle(CASE.but(grid=(3, 5, 5), block=(1, 1, 1), heads=1), torch.bfloat16)


@pytest.mark.parametrize("step", [1, 2])
def test_blocks_are_listed_a_few_at_a_time(step, monkeypatch):
    monkeypatch.setattr(attend_tiles, "STEP", step)
    assert_equals_oracle(CASE.but(block=(3, 4, 4), heads=1), torch.bfloat16)


def test_tiles_in_several_programs(monkeypatch):
    monkeypatch.setattr(attend_tiles, "program_shape", lambda q: (TILE // 2, KEYS, 4, 2))
    if ON_GPU:
        pytest.skip("a product of fewer than 16 rows")
    assert_equals_oracle(CASE, torch.bfloat16)


@pytest.mark.parametrize("masked", ["none", "tokens"])
def test_a_head_at_a_time(masked, tight):
    case = CASE.but(masked=masked, batch=2, heads=4, kv_heads=2, head_dim=16)
    assert_equals_oracle(case, torch.bfloat16)


@pytest.mark.parametrize(
    "geometry", [Geometry((21, 30, 52), (7, 5, 13)), Geometry((33, 45, 80), (3, 45, 80), suffix=256)]
)
def test_scratch_memory(geometry, monkeypatch):
    """The buffers stay within what is given, the tables of queries and keys aside, in as many turns as that takes."""
    q = torch.zeros(1, 12, geometry.num_tokens, 128, dtype=torch.bfloat16, device="meta")
    words = torch.zeros(1, 12, geometry.by_tile(128).num_video, geometry.num_words, dtype=torch.int32, device="meta")
    mask = torch.zeros(0, dtype=torch.bool, device="meta")
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device="meta")
    scratch = int(0.2 * 4 * q.numel() * 2)
    made, launched = [], []

    class Counting(Work):
        def empty(self, *shape, dtype):
            made.append(super().empty(*shape, dtype=dtype))
            return made[-1]

        def launch(self, kernel, grid, *args, **options):
            launched.append(kernel)

    monkeypatch.setattr(attend_tiles, "program_shape", lambda q: (128, 64, 4, 2))
    work = Counting(q.device)
    attend_tiles.attention(work, q, q, q, words, mask, out, lse, geometry, 1.0, tile=128, scratch=scratch)
    buffers = sum(x.numel() * x.element_size() for x in made)
    assert 0.5 * scratch < buffers < scratch + 16 * geometry.num_tokens
    assert launched.count(attend_tiles.attend_queries) == 3


def test_every_box_selected_is_dense_attention():
    case = CASE.but(threshold=1.0)
    tensors = case.tensors(torch.bfloat16)
    q, k, v = (x.float() for x in tensors[:3])
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert relative(run(case, tensors)[0], dense) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("condition", [0, 8])
def test_no_box_selected_but_by_hand(condition):
    """Without any bit a video query sees the condition tokens alone: nothing, where there are none."""
    case = CASE.but(prefix=0, suffix=condition)
    tensors = case.tensors(torch.bfloat16)
    out, lse = run(case, tensors, words=torch.zeros_like(choose(case, tensors).words))
    q, k, v, _ = tensors
    if condition:
        q, k, v = q[:, :, : case.num_video].double(), k[:, :, -condition:].double(), v[:, :, -condition:].double()
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        assert relative(out[:, :, : case.num_video], expected) < TOLERANCE[torch.bfloat16]
    else:
        assert not out.any()
        assert (lse == -torch.inf).all()


@pytest.mark.parametrize("masked", MASKS[2:])
def test_queries_without_keys_beside_others(masked):
    case = SMALL_BOXES.but(prefix=0, suffix=0, batch=2, masked=masked, threshold=1e-9)
    assert_equals_oracle(case, torch.bfloat16)


def test_a_key_mask_of_any_strides():
    case = CASE.but(batch=2, masked="tokens")
    q, k, v, mask = case.tensors(torch.bfloat16)
    padded = torch.cat([mask, ~mask], dim=1)[:, : mask.shape[1]]
    assert_close(run(case, Tensors(q, k, v, padded)), case.truth(case.tensors(torch.bfloat16)), torch.bfloat16)


def test_same_bits_every_time():
    tensors = CASE.tensors(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(run(CASE, tensors), run(CASE, tensors), strict=True))


def test_nan_stays_with_its_query():
    tensors = CASE.tensors(torch.bfloat16)
    words = choose(CASE, tensors).words
    expected = run(CASE, tensors, words=words)[0]
    tensors.q[0, 1, 20] = torch.nan
    out = run(CASE, tensors, words=words)[0]
    assert out[0, 1, 20].isnan().all()
    expected[0, 1, 20] = out[0, 1, 20] = 0
    assert torch.equal(out, expected)


def test_masked_keys_may_be_nan():
    case = CASE.but(masked="tokens")
    tensors = case.tensors(torch.bfloat16)
    words, truth = choose(case, tensors).words, case.truth(tensors)
    for x in (tensors.k, tensors.v):
        x.masked_fill_(~tensors.key_mask[:, None, :, None], torch.nan)
    assert_close(run(case, tensors, words=words), truth, torch.bfloat16)


def test_nan_stays_in_its_box():
    case = CASE.but(prefix=0, suffix=0, block=(1, 4, 5), threshold=0.2)
    tensors = case.tensors(torch.float32)
    selection = choose(case, tensors)
    order, starts = box_order(case.grid, case.block)
    tensors.v[0, :, order[starts[1] : starts[2]]] = torch.nan
    reached = run(case, tensors, words=selection.words)[0].isnan().any(-1)
    assert torch.equal(reached, selection.mask()[..., 1])
    assert not reached.all()


@pytest.mark.parametrize(("pool", "mode"), [("head_global", "threshold"), ("overall", "topk")])
def test_selection_and_attention(pool, mode):
    case = CASE.but(pool=pool, mode=mode, topk=2 if mode == "topk" else None, head_dim=16)
    tensors = case.tensors(torch.float32)
    q, k, v = (x.to(DEVICE) for x in tensors[:3])
    out = attention(
        q, k, v, case.grid, block=case.block, implementation="triton", granularity="tile", **case.layout_arguments,
        **case.selection,
    )  # fmt: skip
    assert relative(out.cpu(), case.truth(tensors).out) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("masked", ["none", "tokens"])
def test_lists(masked):
    """Every tile lists exactly its keys, and the tiles of a head come in order of their length."""
    case = CASE.but(masked=masked)
    tensors = case.tensors(torch.float32)
    geometry = Geometry(case.grid, case.block, case.prefix, case.suffix)
    words, mask = choose(case, tensors).words.to(DEVICE), mask_or_empty(tensors).to(DEVICE)
    tiles = geometry.by_tile(TILE).num_video
    stride, rows = attend_pack.packed_rows(geometry, KEYS)
    most, boxes = rows // KEYS, geometry.num_boxes + 1
    _, span = attend_lists.list_all_keys(WORK, mask, geometry, case.batch)
    blocks = torch.empty(case.heads, tiles + 1, most, dtype=torch.int32, device=DEVICE)
    count = torch.empty(case.heads, tiles + 1, 2, dtype=torch.int32, device=DEVICE)
    order = torch.empty(case.heads, tiles + 1, dtype=torch.int32, device=DEVICE)
    WORK.launch(
        attend_tiles.list_blocks, (tiles + 1, case.heads), words, span, blocks, count, 0, case.heads, tiles,
        geometry.num_boxes, boxes, stride, most, 0, BLOCK=KEYS, STEP=8,
    )  # fmt: skip
    WORK.launch(attend_tiles.order_tiles, (1, case.heads), count, order, tiles + 1, BLOCK=16 if tiles < 16 else 128)
    selected = torch.nn.functional.pad(unpack_bits(words[0], geometry.num_boxes), (0, 1, 0, 1), value=True)
    for head in range(case.heads):
        for tile in range(tiles + 1):
            whole, ragged = count[head, tile].tolist()
            entries = blocks[head, tile].tolist()
            listed = [(row, KEYS) for row in entries[:whole]]
            listed += [(end // KEYS * KEYS, end % KEYS) for end in entries[most - ragged :]]
            wanted = []
            for box in selected[head, tile].nonzero().flatten().tolist():
                size = int(span[0, box, 1])
                wanted += [(box * stride + at, min(KEYS, size - at)) for at in range(0, size, KEYS)]
            assert sorted(listed) == sorted(wanted)
        lengths = count[head].sum(-1)[order[head].long()]
        assert sorted(order[head].tolist()) == list(range(tiles + 1))
        assert (lengths.diff() <= 0).all()


def test_queries_of_tiles():
    geometry = Geometry((3, 4, 5), (2, 4, 3), 3, 20)
    tiles = geometry.by_tile(TILE).num_video
    queries = torch.empty(tiles + 2, TILE, dtype=torch.int32, device=DEVICE)
    WORK.launch(
        attend_tiles.list_queries, (tiles + 2,), queries, tiles, geometry.by_tile(TILE).block[0], geometry.prefix,
        geometry.suffix, *geometry.grid, *geometry.block, *geometry.counts[1:], TILE=TILE,
    )  # fmt: skip
    of = tile_of(geometry.grid, geometry.block, TILE)
    for tile in range(tiles):
        found = [s for s in queries[tile].tolist() if s >= 0]
        assert sorted(found) == [n + 3 for n in (of == tile).nonzero().flatten().tolist()]
    condition = [s for s in queries[tiles:].flatten().tolist() if s >= 0]
    assert condition == [*range(3), *range(63, 83)]
