"""The Triton selection against the float64 reference, on the GPU or, without one, in the Triton interpreter."""

from __future__ import annotations

import interpreter
import oracle
import pytest
import torch
from hypothesis import given, settings
from kernel_cases import MASKS, Case, Tensors, cases, mask_or_empty
from vmoba_compile.kernels import reference_select, select_means, select_query, select_tiles, select_triton
from vmoba_compile.kernels.launches import Work
from vmoba_compile.kernels.partition import Geometry, box_of, unpack_bits
from vmoba_compile.kernels.select_gate import LIST, SEEK, STATUS, TIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOUND = {torch.float32: 1e-4, torch.bfloat16: 1e-3, torch.float16: 1e-3}
POOLS = ("head_global", "query_head", "block", "overall")
JOINED = ("head_global", "block", "overall")  # pools that join queries
RULES = [(pool, mode) for mode in ("threshold", "topk") for pool in POOLS if (pool, mode) != ("block", "topk")]
JOINED_RULES = [rule for rule in RULES if rule[0] != "query_head"]
WITHIN = {"head_global": (2, 3), "query_head": (3,), "block": (1, 2), "overall": (1, 2, 3)}  # axes of one pool

every_rule = pytest.mark.parametrize(("pool", "mode"), RULES, ids=["-".join(rule) for rule in RULES])
every_joined_rule = pytest.mark.parametrize(
    ("pool", "mode"), JOINED_RULES, ids=["-".join(rule) for rule in JOINED_RULES]
)

interpreter.install()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    interpreter.small_selection(monkeypatch)


@pytest.fixture
def stages(monkeypatch):
    """What the stages left in the pools' states: (name, statuses)."""
    seen: list[tuple[str, list[int]]] = []
    monkeypatch.setattr(
        select_triton, "observer", lambda name, state: seen.append((name, state[:, STATUS.value].tolist()))
    )
    return seen


def geometry_of(case: Case) -> Geometry:
    return Geometry(case.grid, case.block, case.prefix, case.suffix)


def with_rule(case: Case, pool: str, mode: str) -> Case:
    return case.but(pool=pool, mode=mode, topk=3 if mode == "topk" else None)


def arguments(case: Case, tensors: Tensors) -> tuple:
    return (*(x.to(DEVICE) for x in (tensors.q, tensors.k, mask_or_empty(tensors))), geometry_of(case))


def rule(case: Case) -> dict:
    return case.selection | {"topk": case.topk or 0, "tile": case.tile}


def run(case: Case, tensors: Tensors) -> torch.Tensor:
    words = select_triton.select(Work(torch.device(DEVICE)), *arguments(case, tensors), **rule(case))
    assert words.is_contiguous()
    assert words.shape == (case.batch, case.heads, case.num_queries, geometry_of(case).num_words)
    return words


def expected(case: Case, tensors: Tensors) -> torch.Tensor:
    return reference_select.select(*arguments(case, tensors), **rule(case))


def weights(case: Case, tensors: Tensors) -> torch.Tensor:
    """float64 [B, H, N, C], of tiles [B, H, M, C], between 0 and 1 within each pool; NaN for boxes without keys."""
    geometry, group = geometry_of(case), case.heads // case.kv_heads
    gates = []
    for sample in range(case.batch):
        valid = None if tensors.key_mask is None else tensors.key_mask[sample, geometry.video]
        means, filled = reference_select.box_means(tensors.k[sample, :, geometry.video], valid, geometry)
        queries = tensors.q[sample, :, geometry.video]
        if case.tile:
            queries = torch.stack([reference_select.tile_means(rows, geometry, case.tile) for rows in queries])
        gate = queries.double() @ means.repeat_interleave(group, 0).mT
        gates.append(torch.where(filled, gate, torch.nan))
    gate = torch.stack(gates)
    low = gate.nan_to_num(torch.inf).amin(WITHIN[case.pool], keepdim=True)
    high = gate.nan_to_num(-torch.inf).amax(WITHIN[case.pool], keepdim=True)
    return (gate - low) / (high - low)


def assert_agrees(case: Case, tensors: Tensors) -> int:
    """Same selection but for entries whose weight is within rounding of their pool's cut-off; number of those."""
    boxes, bound = geometry_of(case).num_boxes, BOUND[tensors.q.dtype]
    actual = unpack_bits(run(case, tensors), boxes).cpu()
    wanted = unpack_bits(expected(case, tensors), boxes).cpu()
    asking = geometry_of(case).by_tile(case.tile)
    own = torch.nn.functional.one_hot(box_of(asking.grid, asking.block), boxes).bool()
    assert actual[..., own].all()
    different = actual != wanted
    if different.any():
        weight = weights(case, tensors)
        taken = (wanted & ~own).expand_as(weight)
        cut = torch.where(taken, weight, torch.inf).amin(WITHIN[case.pool], keepdim=True)
        assert ((weight - cut).abs()[different] <= bound).all()
        count = actual.sum(WITHIN[case.pool]) - wanted.sum(WITHIN[case.pool])
        assert count.abs().max() <= 3
    return int(different.sum())


CASE = Case(
    grid=(3, 4, 5), block=(2, 2, 2), prefix=3, suffix=2, batch=2, heads=2, kv_heads=1, head_dim=40, threshold=0.25
)  # 12 boxes, ragged


@pytest.mark.halved
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_rule
def test_every_rule_and_dtype(pool, mode, dtype):
    case = with_rule(CASE, pool, mode)
    assert assert_agrees(case, case.tensors(dtype)) <= 2


@pytest.mark.halved
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("threshold", [1e-9, 0.01, 0.25, 0.9, 0.999, 1.0, 1.5])
def test_thresholds(pool, threshold):
    case = CASE.but(pool=pool, threshold=threshold, batch=1, heads=2, kv_heads=2, seed=1)
    assert assert_agrees(case, case.tensors(torch.float32)) == 0


@pytest.mark.halved
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("masked", MASKS[1:])
def test_key_masks(pool, masked):
    """What is masked or no video is not looked at."""
    case = CASE.but(pool=pool, masked=masked, threshold=0.4)
    tensors = case.tensors(torch.float32)
    ignored = ~tensors.key_mask
    ignored[:, :3] = ignored[:, -2:] = True
    tensors = tensors._replace(k=tensors.k.masked_fill(ignored[:, None, :, None], torch.nan))
    assert assert_agrees(case, tensors) == 0


@pytest.mark.parametrize(
    ("grid", "block"),
    [
        ((3, 4, 5), (9, 9, 9)), ((3, 4, 5), (2, 4, 5)), ((1, 1, 1), (1, 1, 1)),
        ((35, 1, 2), (1, 1, 1)), ((33, 2, 1), (1, 2, 1)),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("pool", POOLS[:3])
def test_partitions(pool, grid, block, monkeypatch):
    """Boxes in pieces, more boxes than a word has bits, and grids of one box."""
    monkeypatch.setattr(select_means, "PIECE", 15)
    monkeypatch.setattr(select_means, "ROWS", 4)
    case = Case(grid=grid, block=block, pool=pool, prefix=1, heads=2, kv_heads=1)
    assert assert_agrees(case, case.tensors(torch.float32)) == 0


@pytest.mark.parametrize(
    ("layout", "head_dim"), [("packed", 3), ("packed", 8), ("contiguous", 64), ("permuted", 80)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims_and_layouts(layout, head_dim, dtype):
    case = Case(head_dim=head_dim, layout=layout, prefix=2, heads=3, kv_heads=1, pool="overall")
    tensors = case.tensors(dtype)
    assert assert_agrees(case, tensors) <= 2
    if layout == "packed" and head_dim == 8:
        q, k, mask, _ = arguments(case, tensors)
        strided = q.mT.contiguous().mT
        words = torch.ops.vmoba.select(strided, k, mask, *case.sizes, **rule(case), implementation="triton")
        assert torch.equal(words, run(case, tensors))


@pytest.mark.parametrize("head_dim", [3, 80])
def test_head_dims_in_rows(head_dim):
    case = Case(head_dim=head_dim, pool="query_head")
    for dtype in DTYPES:
        assert assert_agrees(case, case.tensors(dtype)) <= 2


@settings(max_examples=10)
@given(case=cases())
def test_random_problems(case):
    assert_agrees(case, case.tensors(torch.float32))


@pytest.mark.halved
@every_rule
@pytest.mark.parametrize(("masked", "dtype"), [("boxes", torch.float32), ("none", torch.bfloat16)], ids=str)
def test_constant_keys_have_no_range(pool, mode, masked, dtype, stages):
    """Every weight is 1, rounding of the means included: 0.1 is not exact, and boxes differ in size."""
    case = with_rule(CASE, pool, mode).but(masked=masked, head_dim=8, batch=1)
    tensors = case.tensors(dtype)
    tensors = tensors._replace(q=torch.full_like(tensors.q, 0.1), k=torch.full_like(tensors.k, 0.1))
    for threshold in (0.25, 0.9):
        changed = case.but(threshold=threshold)
        assert torch.equal(run(changed, tensors), expected(changed, tensors))
    assert all(SEEK.value not in states for _, states in stages)


@pytest.mark.halved
@pytest.mark.parametrize("capacity", [2, 1024])
@every_rule
def test_equal_entries_go_in_order(pool, mode, capacity, monkeypatch, stages):
    """Boxes 1, 2 and 4 have equal means; small integers make every gate and every sum exact."""
    monkeypatch.setattr(select_triton, "CAPACITY", capacity)
    case = with_rule(Case(grid=(5, 2, 4), block=(1, 2, 4), heads=3, kv_heads=1, head_dim=2), pool, mode)
    q = torch.randint(-2, 3, (1, 3, 40, 2)).float()
    boxes = torch.tensor([[3.0, -1.0], [1.0, 2.0], [1.0, 2.0], [-2.0, 1.0], [1.0, 2.0]])
    k = boxes[:, None].expand(5, 8, 2).reshape(1, 1, 40, 2)
    tensors = Tensors(q, k, k, None)
    for threshold in (0.01, 0.26, 0.41, 0.6, 0.83):
        changed = case.but(threshold=threshold)
        assert torch.equal(run(changed, tensors), expected(changed, tensors))
        if mode == "topk":
            break
    if pool != "query_head":
        last = "level 4" if pool == "block" else "level 3"
        final = {status for name, states in stages if name == last for status in states}
        assert SEEK.value not in final
        assert (TIES.value if capacity == 2 else LIST.value) in final


@every_joined_rule
def test_crowded_bins_are_looked_at_again(pool, mode, monkeypatch, stages):
    """Gates in narrow clusters around integers, in wide bins: the cut-off is found over several levels."""
    for name, value in {"CAPACITY": 1, "BINS": 512, "CHUNK": 128}.items():
        monkeypatch.setattr(select_triton, name, value)
    case = with_rule(CASE, pool, mode).but(seed=2, head_dim=3, block=(1, 2, 5), batch=1, threshold=0.4)
    tensors = case.tensors(torch.float32)
    q = tensors.q.round() + 1e-5 * torch.rand(tensors.q.shape)
    k = torch.ones_like(tensors.k)
    k[:, :, 3:-2] += torch.arange(6).float().repeat_interleave(10)[:, None] % 3
    clusters = tensors._replace(q=q, k=k)
    assert_agrees(case, clusters)
    sought = [(name, states.count(SEEK.value)) for name, states in stages]
    assert sought[1][0] == "level 0"
    assert sought[1][1] > 0
    assert sought[-1][1] == 0


@every_joined_rule
@pytest.mark.parametrize("factor", [50.0, 0.01])
def test_a_sample_that_misleads(pool, mode, factor, monkeypatch, stages):
    """Only query 0 is in the sample and differs from all the others: the first bracket misses on either side."""
    monkeypatch.setattr(select_triton, "SAMPLE_SHARE", 0.0)
    monkeypatch.setattr(select_triton, "SAMPLE_QUERIES", 0)
    case = with_rule(CASE, pool, mode).but(threshold=0.5, heads=2, kv_heads=2)
    tensors = case.tensors(torch.float32)
    q = tensors.q.clone()
    q[:, :, 3] = q[:, :, 3] * factor + (factor > 1) * 10
    assert assert_agrees(case, tensors._replace(q=q)) <= 2
    missed = dict(stages)["level 0"]
    assert SEEK.value in missed
    assert SEEK.value not in stages[-1][1]


@pytest.mark.parametrize("pool", JOINED)
def test_outliers(pool):
    case = CASE.but(pool=pool, heads=2, kv_heads=2)
    q, k, v, mask = case.tensors(torch.float32)
    scale = torch.where(torch.rand(q.shape[:3]) < 0.05, 50.0, 1.0)[..., None]
    heavy = torch.distributions.StudentT(1.5).sample(q.shape)
    for changed in (q * scale, heavy):
        assert assert_agrees(case, Tensors(changed, k, v, mask)) <= 2


@pytest.mark.parametrize("pool", POOLS)
def test_values_around_zero(pool):
    """Zeros of either sign are equal, and keys of both signs are in order."""
    case = Case(block=(1, 2, 2), pool=pool, threshold=0.7, head_dim=3)  # exact means
    q, k, v, _ = case.tensors(torch.float32)
    q = q * torch.randint(-1, 2, q.shape)
    k = torch.where(torch.rand(k.shape) < 0.5, -0.0, k.round())
    assert assert_agrees(case, Tensors(q.round(), k, v, None)) == 0


@pytest.mark.parametrize("pool", POOLS)
def test_production_constants(pool, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    case = Case(grid=(4, 5, 7), block=(2, 2, 3), pool=pool, prefix=2, heads=2, kv_heads=1, head_dim=64)
    assert assert_agrees(case, case.tensors(torch.bfloat16)) <= 2


@pytest.mark.parametrize("pool", POOLS)
def test_same_twice(pool):
    case = CASE.but(pool=pool, batch=1)
    tensors = case.tensors(torch.bfloat16)
    assert torch.equal(run(case, tensors), run(case, tensors))


@pytest.mark.parametrize("pool", ["head_global", "query_head", "overall"])
@pytest.mark.parametrize("masked", ["none", "boxes"])
@pytest.mark.parametrize("topk", [1, 2, 1000])
def test_topk(pool, masked, topk):
    case = CASE.but(pool=pool, mode="topk", topk=topk, masked=masked, batch=1, head_dim=8)
    assert assert_agrees(case, case.tensors(torch.float32)) == 0


def test_samples_do_not_see_each_other():
    case = CASE.but(batch=3, masked="tokens", heads=2, kv_heads=1, head_dim=8)
    for pool in ("head_global", "query_head"):
        changed = case.but(pool=pool)
        q, k, v, mask = case.tensors(torch.float32)
        q = q * torch.tensor([1.0, 100.0, 0.01]).view(3, 1, 1, 1)
        words = run(changed, Tensors(q, k, v, mask))
        alone = run(changed.but(batch=1), Tensors(*(x[1:2] for x in (q, k, v, mask))))
        assert torch.equal(alone, words[1:2])


TILES = CASE.but(block=(2, 3, 4), tile=8)  # boxes of 24 to 1 tokens, three tiles each


@pytest.mark.halved
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_rule
def test_tiles_of_queries(pool, mode, dtype):
    case = with_rule(TILES, pool, mode).but(masked="boxes")
    assert assert_agrees(case, case.tensors(dtype)) <= 2


@pytest.mark.halved
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("threshold", [1e-9, 0.1, 0.5, 0.9, 1.0])
def test_thresholds_of_tiles(pool, threshold):
    case = TILES.but(pool=pool, threshold=threshold, batch=1)
    assert assert_agrees(case, case.tensors(torch.float32)) == 0


@settings(max_examples=5)
@given(case=cases())
def test_random_problems_with_tiles(case):
    assert_agrees(case.but(tile=4), case.tensors(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("layout", "head_dim"), [("packed", 3), ("contiguous", 64), ("permuted", 40)])
def test_mean_queries(layout, head_dim, dtype):
    """By plain loops; a tile without tokens has the query before it in its box."""
    case = TILES.but(layout=layout, head_dim=head_dim, batch=2)
    q = case.tensors(dtype).q.to(DEVICE)
    found, own = select_tiles.mean_queries(Work(torch.device(DEVICE)), q, geometry_of(case), case.tile)
    video = q[:, :, geometry_of(case).video].double()
    tiles = oracle.tiles(case.grid, case.block, case.tile)
    assert any(not tokens for _, tokens, _ in tiles)
    assert own.tolist() == [box for box, _, _ in tiles]
    expected = torch.stack([sum(video[:, :, n] for n in averaged) / len(averaged) for _, _, averaged in tiles], 2)
    # The interpreter cuts bfloat16 off where a GPU rounds.
    accuracy = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=accuracy, atol=1e-6)


def test_double_precision_is_refused():
    case = Case()
    with pytest.raises(TypeError, match="reference_select"):
        run(case, case.tensors(torch.float64))


def test_too_many_boxes_for_rows(monkeypatch):
    monkeypatch.setattr(select_query, "MAX_BOXES", 11)
    case = CASE.but(pool="query_head")
    with pytest.raises(NotImplementedError, match="supports up to 11 boxes, not 12"):
        run(case, case.tensors(torch.float32))


@pytest.mark.parametrize("pool", ["head_global", "overall"])
@pytest.mark.parametrize("garbage", [0, -1])
def test_words_of_boxes_without_keys(pool, garbage, monkeypatch):
    """Equal entries are taken from marks that every word has, whatever its memory held before."""
    case = Case(grid=(4, 8, 8), block=(1, 2, 2), heads=1, kv_heads=1, head_dim=16, masked="tokens", pool=pool)
    q, k = torch.zeros(1, 1, case.num_tokens, 16), torch.randn(1, 1, case.num_tokens, 16)
    mask = torch.arange(case.num_tokens)[None] >= case.num_tokens // 2
    empty = Work.empty

    def filled(self, *shape, dtype):
        made = empty(self, *shape, dtype=dtype)
        return made.fill_(garbage) if dtype == torch.int32 else made

    monkeypatch.setattr(Work, "empty", filled)
    tensors = Tensors(q, k, k, mask)
    assert torch.equal(run(case, tensors), expected(case, tensors))


def test_nan_selects_its_own_box_at_least_and_no_more_than_the_rule():
    """A sample of NaN must not have so many boxes that there is no room for the others of its batch."""
    case = Case(grid=(4, 8, 8), block=(1, 2, 2), batch=2, heads=1, kv_heads=1, head_dim=16)
    tensors = case.tensors(torch.float32)
    clean = run(case, tensors)[1]
    tensors.q[0] = torch.nan
    words = run(case, tensors)
    kept = unpack_bits(words, geometry_of(case).num_boxes)
    assert kept[0].any(-1).all()
    assert kept[0].double().mean() <= case.threshold + 1 / kept.shape[-1]
    assert torch.equal(words[1], clean)
