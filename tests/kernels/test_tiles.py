"""Tiles of queries that select together: where they are, what they select, attention to it. Reference implementation."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import TOLERANCE, Case, cases, choose, mask_or_empty, operator, relative, sparse
from vmoba_compile.kernels import Geometry, attention, partition, select
from vmoba_compile.kernels.partition import box_of, tile_of, tile_tokens, tiles_per_box

GRIDS = st.tuples(*[st.integers(1, 7)] * 3)
BLOCKS = st.tuples(*[st.integers(1, 9)] * 3)
RULES = [
    (pool, mode)
    for mode in ("threshold", "topk")
    for pool in ("head_global", "query_head", "block", "overall")
    if (pool, mode) != ("block", "topk")
]
CASE = Case(grid=(3, 4, 5), block=(2, 2, 3), prefix=3, suffix=2, batch=2, heads=4, kv_heads=2)

every_rule = pytest.mark.parametrize(("pool", "mode"), RULES, ids=["-".join(rule) for rule in RULES])
every_size = pytest.mark.parametrize("tile_size", [1, 3, 5, 128], indirect=True)
# One size for all examples: the fixture has not to be reset between them.
fixed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
one_size = pytest.mark.parametrize("tile_size", [5], indirect=True)


@pytest.fixture
def tile_size(monkeypatch, request) -> int:
    """The size of tiles, so small that small boxes have several."""
    monkeypatch.setattr(partition, "TILE_SIZES", (request.param,))
    monkeypatch.setitem(partition.TILE_OF, "tile", request.param)
    return request.param


@given(GRIDS, BLOCKS, st.integers(1, 40))
def test_where_tiles_are(grid, block, tile):
    geometry, expected = Geometry(grid, block), oracle.tiles(grid, block, tile)
    of = tile_of(grid, block, tile)
    assert [(of == number).nonzero().flatten().tolist() for number in range(len(expected))] == [
        sorted(tokens) for _, tokens, _ in expected
    ]
    tokens = tile_tokens(geometry, tile)
    assert tokens.tolist() == [len(tokens) for _, tokens, _ in expected]
    assert tokens.max() <= tile
    asking = geometry.by_tile(tile)
    assert asking.num_video == len(expected) == geometry.num_boxes * tiles_per_box(grid, block, tile)
    assert box_of(asking.grid, asking.block).tolist() == [box for box, _, _ in expected]


def test_tiles_of_a_video_are_nearly_equal():
    for block, parts in (((3, 30, 52), 37), ((21, 5, 13), 11), ((7, 5, 13), 4)):
        geometry = Geometry((21, 30, 52), block)
        assert tiles_per_box(geometry.grid, block, 128) == parts
        tokens = tile_tokens(geometry, 128)
        assert tokens.max() - tokens.min() <= 1
        assert tokens.max() <= 128


@every_size
@fixed
@given(case=cases())
def test_equals_the_oracle(case, tile_size):
    case = case.but(tile=tile_size)
    tensors = case.tensors()
    selection = choose(case, tensors)
    geometry = Geometry(case.grid, case.block)
    assert selection.words.shape == (case.batch, case.heads, case.num_queries, geometry.num_words)
    assert selection.words.is_contiguous()
    assert torch.equal(selection.mask(), case.truth(tensors).selected)


@every_size
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@fixed
@given(case=cases())
def test_attention_equals_the_oracle(case, dtype, tile_size):
    case = case.but(tile=tile_size)
    tensors = case.tensors(dtype)
    truth = case.truth(tensors)
    assert relative(sparse(case, tensors), truth.out) < TOLERANCE[dtype]


@every_rule
@one_size
def test_as_if_each_tile_were_one_query(pool, mode, tile_size):
    """The rule over a video of tiles: mean queries by plain loops, and for every tile the mean key of its box."""
    case = CASE.but(pool=pool, mode=mode, topk=3 if mode == "topk" else None, tile=tile_size, masked="tokens")
    q, k, _, key_mask = tensors = case.tensors()
    video = slice(case.prefix, case.prefix + case.num_video)
    members = oracle.boxes(case.grid, case.block)
    queries, keys = [], []
    for box, _, averaged in oracle.tiles(case.grid, case.block, tile_size):
        queries.append(sum(q[:, :, video][:, :, token] for token in averaged) / len(averaged))
        means = []
        for sample in range(case.batch):
            valid = [token for token in members[box] if key_mask[sample, video][token]]
            means.append(sum(k[sample, :, video][:, token] for token in valid) / len(valid))
        keys.append(torch.stack(means))
    asking = Geometry(case.grid, case.block).by_tile(tile_size)
    words = select(
        torch.stack(queries, 2), torch.stack(keys, 2), asking.grid, block=asking.block, **case.selection
    ).words
    assert torch.equal(choose(case, tensors).words, words)


@one_size
@fixed
@given(case=cases())
def test_density(case, tile_size):
    case = case.but(tile=tile_size)
    selection = choose(case, case.tensors())
    pairs = oracle.allowed(selection.mask(), case.grid, case.block)
    torch.testing.assert_close(selection.density().double(), pairs.double().mean((2, 3)), rtol=1e-6, atol=0)


@one_size
def test_gradients(tile_size):
    tensors = CASE.but(tile=tile_size, masked="tokens").leaves()
    case = CASE.but(tile=tile_size, masked="tokens")
    truth = case.truth(tensors)
    out, lse = operator(case, tensors)(*tensors[:3])
    weight = torch.randn_like(out)
    ours = torch.autograd.grad([out, lse], tensors[:3], [weight, torch.ones_like(lse)])
    expected = torch.autograd.grad([truth.out, truth.lse], tensors[:3], [weight, torch.ones_like(lse)])
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@one_size
@pytest.mark.parametrize("masked", ["video", "sample"])
def test_queries_without_keys(masked, tile_size):
    case = CASE.but(tile=tile_size, masked=masked, prefix=0, suffix=0)
    tensors = case.tensors()
    out, lse = operator(case, tensors)(*tensors[:3])
    assert not out[-1].any()
    assert (lse[-1] == -torch.inf).all()
    assert out[0].any() == (masked == "sample")


def test_one_tile_a_box_where_boxes_are_small():
    """The size that users get: every query of a box attends to the same boxes."""
    case = CASE.but(tile=128)
    selected = choose(case, case.tensors()).mask()
    for tokens in oracle.boxes(case.grid, case.block):
        assert (selected[:, :, tokens] == selected[:, :, tokens[:1]]).all()


# Wrong use


def test_tile_sizes():
    case = Case()
    q, k, _, _ = tensors = case.tensors()
    options = case.selection | {"topk": 0}
    with pytest.raises(ValueError, match=r"tile must be 0 .* or 64 or 128 tokens, not 100"):
        torch.ops.vmoba.select(q, k, mask_or_empty(tensors), *case.sizes, **options, tile=100)


@pytest.mark.parametrize("tile", [0, 64])
def test_a_selection_of_the_other_granularity(tile):
    case = Case()
    q, k, v, _ = tensors = case.tensors()
    words = choose(case.but(tile=0 if tile else 128), tensors).words
    rows = "tiles of 64 tokens" if tile else "video queries"
    with pytest.raises(
        ValueError, match=rf"selected must be \[batch, heads, {rows}, words\] = .*, not .* the same tile"
    ):
        torch.ops.vmoba.attention(q, k, v, words, mask_or_empty(tensors), *case.sizes, scale=1.0, tile=tile)


@pytest.mark.parametrize("function", [attention, select], ids=["attention", "select"])
def test_hopper_by_name(function):
    case = Case()
    tensors = case.tensors(torch.float32)[: 3 if function is attention else 2]
    with pytest.raises(
        ValueError, match=r"'hopper' takes granularity='token' alone for now; .* use 'auto' or 'triton'"
    ):
        function(*tensors, case.grid, block=case.block, granularity="tile", implementation="hopper")


def test_hopper_by_name_in_the_operator():
    case = Case(tile=128)
    q, k, v, _ = tensors = case.tensors(torch.float32)
    words = choose(case, tensors).words
    with pytest.raises(ValueError, match="'hopper' takes granularity='token' alone"):
        torch.ops.vmoba.attention(
            q, k, v, words, mask_or_empty(tensors), *case.sizes, scale=1.0, tile=128, implementation="hopper"
        )
