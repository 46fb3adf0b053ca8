"""Inline operators and packages on a GPU: the bits of the ordinary operators, and models that run on their own."""

from __future__ import annotations

import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from kernel_cases import Case, mask_or_empty
from vmoba_compile.kernels import inline  # noqa: F401  registers the operators

from vmoba_compile import VMoBAConfig, attention, optimize
from vmoba_compile.deploy.package import export_package, read_about
from vmoba_compile.zoo import preset

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASE = Case(grid=(9, 13, 17), block=(3, 5, 6), prefix=19, suffix=45, heads=4, kv_heads=4, head_dim=128)
CASES: dict[str, tuple[Case, torch.dtype]] = {
    "bf16": (CASE, BF16),
    "fp16": (CASE.but(head_dim=80), FP16),
    "fp32": (CASE.but(head_dim=80), FP32),
    "masked": (CASE.but(masked="tokens", batch=2), BF16),
    "grouped": (CASE.but(heads=6, kv_heads=2, layout="packed"), BF16),
    "overall": (CASE.but(pool="overall", batch=2), BF16),
    "block": (CASE.but(pool="block", head_dim=80), BF16),
    "query_head": (CASE.but(pool="query_head"), BF16),
    "topk": (CASE.but(mode="topk", topk=3), BF16),
    "topk_overall": (CASE.but(mode="topk", topk=3, pool="overall", head_dim=64), FP16),
    "own_box": (CASE.but(mode="topk", topk=1, prefix=0, suffix=0), BF16),
    "everything": (CASE.but(threshold=1.0, prefix=0, suffix=0), BF16),
    "tile_128": (CASE.but(tile=128, batch=2), BF16),
    "tile_64": (CASE.but(tile=64, head_dim=80, masked="tokens"), FP16),
    # Inductor makes constants of the integers that are 1.
    "ones": (Case(grid=(5, 7, 9), block=(1, 1, 3), prefix=1, suffix=1, heads=1, kv_heads=1, head_dim=64), BF16),
    "one_frame": (Case(grid=(1, 9, 9), block=(1, 1, 9), prefix=1, heads=1, kv_heads=1, head_dim=80, batch=2), FP16),
}
every_case = pytest.mark.parametrize(("case", "dtype"), CASES.values(), ids=CASES)


def inputs(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    tensors = case.tensors(dtype)
    return tuple(x.cuda() for x in (*tensors[:3], mask_or_empty(tensors)))


class Layers(torch.nn.Module):
    def __init__(self, case: Case, suffix: str, **options: str) -> None:
        super().__init__()
        self.case, self.options = case, options
        self.select = getattr(torch.ops.vmoba, f"select{suffix}")
        self.attention = getattr(torch.ops.vmoba, f"attention{suffix}")

    def forward(self, q, k, v, mask):
        case, options = self.case, self.options
        rule = {"tile": case.tile, "pool": case.pool, "threshold": case.threshold, "topk": case.topk or 0}
        words = self.select(q, k, mask, *case.sizes, mode=case.mode, **rule, **options)
        return (words, *self.attention(q, k, v, words, mask, *case.sizes, scale=case.op_scale, **rule, **options))


def ordinary(case: Case, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return Layers(case, "", implementation="triton")(*tensors)


def assert_same(actual, expected) -> None:
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@every_case
def test_eager_is_the_ordinary_operator(case, dtype):
    tensors = inputs(case, dtype)
    assert_same(Layers(case, "_inline")(*tensors), ordinary(case, tensors))


@every_case
def test_compiled_is_the_ordinary_operator(case, dtype):
    torch._dynamo.reset()
    tensors = inputs(case, dtype)
    with torch.no_grad():
        actual = torch.compile(Layers(case, "_inline"), fullgraph=True)(*tensors)
    words, out, lse = ordinary(case, tensors)
    assert torch.equal(actual[0], words)
    # Inductor compiles without fused multiply-adds or with them, as its own kernels.
    assert relative(actual[1], out) < (1e-5 if dtype == FP32 else 2e-3)
    torch.testing.assert_close(actual[2], lse, rtol=1e-4, atol=1e-4)


def test_inputs_stay_as_they_are():
    torch._dynamo.reset()
    tensors = inputs(CASE, BF16)
    before = [x.clone() for x in tensors]
    with torch.no_grad():
        torch.compile(Layers(CASE, "_inline"), fullgraph=True)(*tensors)
    assert_same(tensors, before)


def build(batch: int = 1, dtype: torch.dtype = FP32):
    torch.manual_seed(0)
    model, given = preset("tiny-wan").build(device="cuda", batch=batch, dtype=dtype)
    return model.eval(), given | {"return_dict": False}


CONFIG = VMoBAConfig(min_tokens=0, threshold=0.3, blocks={"1d": (2, None, None), "2d": (None, 4, 3), "3d": (2, 3, 4)})

RUN = """
import sys, torch
torch.backends.cudnn.allow_tf32 = False
folder = sys.argv[1]
model = torch._inductor.aoti_load_package(folder + "/model.pt2")
out = model(**torch.load(folder + "/inputs.pt"))[0]
torch.save(out, folder + "/output.pt")
assert not any(name.startswith("vmoba") for name in sys.modules)
"""


def fresh_process(folder, given) -> torch.Tensor:
    """The package's output in a process that knows nothing of vmoba_compile."""
    torch.save(given, folder / "inputs.pt")
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", RUN, str(folder)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "output.pt")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_package_of_a_model(tmp_path, dtype, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, given = build(dtype=dtype)
    package = export_package(model, (), given, tmp_path / "model.pt2", config=CONFIG, expect=3, verify=True)
    assert package.error < (1e-4 if dtype == FP32 else 2e-2)
    assert {"gate_range", "attend_tiles", "merge_chunks"} <= set(
        package.kernels
    )  # the heads are too small for Hopper's
    about = read_about(package.path)
    assert about["compute_capability"] == list(torch.cuda.get_device_capability())
    with torch.no_grad():
        expected = optimize(model, CONFIG)(**given)[0]
    assert relative(fresh_process(tmp_path, given), expected) < (1e-4 if dtype == FP32 else 2e-2)


@pytest.mark.slow
def test_dynamic_batch(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, given = build(batch=2)
    batch = torch.export.Dim("batch", min=1, max=8)
    shapes = {name: {0: batch} if isinstance(x, torch.Tensor) else None for name, x in given.items()}
    package = export_package(model, (), given, tmp_path / "model.pt2", config=CONFIG, dynamic_shapes=shapes, expect=3)
    loaded, fast = package.load(), optimize(model, CONFIG)
    for size in (1, 2, 3, 8):
        _, other = build(batch=size)
        with torch.no_grad():
            assert relative(loaded(**other)[0], fast(**other)[0]) < 1e-4


class Attentions(torch.nn.Module):
    """Attention of all kinds that launches are recorded for: text, masks, tiles, heads that share keys."""

    def forward(self, qkv, kv, mask):
        q, k, v = qkv.unflatten(-1, (3, 4, 64)).permute(2, 0, 3, 1, 4)
        few_k, few_v = kv.unflatten(-1, (2, 2, 64)).permute(2, 0, 3, 1, 4)
        options = {"block": (2, 4, 3), "prefix": 5, "threshold": 0.4}
        return (
            attention(q, k, v, (4, 8, 9), **options),
            attention(q, few_k, few_v, (4, 8, 9), key_mask=mask, **options),
            attention(q, few_k, few_v, (4, 8, 9), granularity="tile", **options),
            attention(q, k, v, (4, 8, 9), block=(4, 4, 3), prefix=5, mode="topk", topk=2, pool="query_head"),
            attention(
                q, k[:, :1].expand(-1, 4, -1, -1), v, (4, 8, 9), key_mask=mask[:1].expand(q.shape[0], -1), **options
            ),
        )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_recorded_launches(tmp_path, dtype):
    """Several times, on another stream, with other memory in use, in a CUDA graph: always what the operators give."""
    batch, tokens = 3, 4 * 8 * 9 + 5
    model = Attentions()
    make = partial(torch.randn, device="cuda", dtype=dtype)
    given = (
        make(batch, tokens, 3 * 4 * 64),
        make(batch, tokens, 2 * 2 * 64),
        torch.rand(batch, tokens, device="cuda") < 0.8,
    )
    path = tmp_path / "model.pt2"
    package = export_package(model, given, path=path, verify=True)
    assert package.error == 0
    assert ("attend_everything" in package.kernels) == (torch.cuda.get_device_capability() == (9, 0))
    loaded = torch._inductor.aoti_load_package(
        str(path), run_single_threaded=True
    )  # no events, which no graph can hold
    for _ in range(3):
        for x in given[:2]:
            x.normal_()
        expected = model(*given)
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            found = loaded(*given)
            torch.cuda.current_stream().synchronize()
        assert_same(found, expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = loaded(*given)
    given[0].normal_()
    graph.replay()
    assert_same(found, model(*given))


class Parts(torch.nn.Module):
    """Attention over parts of larger tensors, which begin anywhere."""

    def forward(self, q, masks):
        q = q[:, 3:].unflatten(1, (2, -1, 64))
        some = torch.sort(masks[:1] & masks[1:], -1)[0]
        last = masks[:1] | masks[1:]  # in one piece of memory with the one before it
        both = torch.sort(torch.cat([some, last]), -1)[0]
        return both, *(attention(q, q, q, (4, 8, 9), block=(2, 4, 3), prefix=5, key_mask=x) for x in (masks[1:], last))


@pytest.mark.slow
def test_inputs_that_begin_between_the_addresses_of_the_launches(tmp_path):
    """In whichever thread."""
    tokens, model = 4 * 8 * 9 + 5, Parts()
    given = torch.randn(1, 3 + 2 * tokens * 64, device="cuda", dtype=BF16), torch.rand(2, tokens, device="cuda") < 0.8
    package = export_package(model, given, path=tmp_path / "model.pt2")
    loaded, expected, found = package.load(), model(*given), []
    worker = threading.Thread(target=lambda: found.extend(loaded(*given)))
    worker.start()
    worker.join()
    assert_same(found, expected)
    assert_same(loaded(*given), expected)


@pytest.mark.slow
def test_no_float64(tmp_path):
    pytest.importorskip("diffusers")
    from vmoba_compile import ExportError

    model, given = build(dtype=torch.float64)
    with pytest.raises(ExportError, match="it takes float16, bfloat16 and float32, not float64"):
        export_package(model, (), given, tmp_path / "model.pt2", config=CONFIG)


@pytest.mark.slow
def test_two_packages_in_one_process(tmp_path):
    """Each does its own launches, with its own kernels."""

    class One(torch.nn.Module):
        def __init__(self, grid, block, dim):
            super().__init__()
            self.grid, self.block, self.dim = grid, block, dim

        def forward(self, qkv):
            q, k, v = qkv.unflatten(-1, (3, 2, self.dim)).permute(2, 0, 3, 1, 4)
            return attention(q, k, v, self.grid, block=self.block, threshold=0.4)

    loaded, models, given = [], [], []
    cases = [((4, 8, 9), (2, 4, 3), 64, BF16), ((3, 6, 8), (3, 3, 4), 40, FP32)]
    for number, (grid, block, dim, dtype) in enumerate(cases):
        model = One(grid, block, dim)
        x = torch.randn(1, grid[0] * grid[1] * grid[2], 6 * dim, device="cuda", dtype=dtype)
        loaded.append(export_package(model, (x,), path=tmp_path / f"{number}.pt2").load())
        models.append(model)
        given.append(x)
    for _ in range(2):
        for call, model, x in zip(loaded, models, given, strict=True):
            assert_same([call(x)], [model(x)])
