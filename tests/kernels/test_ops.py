"""The operators' contracts with torch: schemas, fake kernels, FLOP counts, autocast, torch.compile."""

from __future__ import annotations

import functools

import oracle
import pytest
import torch
from kernel_cases import Case, Tensors, mask_or_empty, relative, sparse
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from vmoba_compile.kernels import attention, select

CASES = {
    "plain": Case(grid=(3, 2, 3), block=(2, 2, 2)),
    "condition": Case((3, 2, 3), (2, 2, 2), prefix=2, suffix=1, heads=4, kv_heads=2, batch=2, layout="packed"),
    "mask": Case(grid=(3, 2, 3), block=(2, 2, 2), prefix=2, masked="tokens", batch=2),
    "one_full_word": Case(grid=(4, 2, 4), block=(1, 1, 1), head_dim=3),
    "many_boxes": Case(grid=(5, 2, 7), block=(1, 1, 1), head_dim=5),
    "tiles": Case(grid=(3, 8, 9), block=(2, 8, 9), prefix=2, suffix=3, heads=4, batch=2, head_dim=4, tile=128),
}  # fmt: skip
UNMASKED = [name for name, case in CASES.items() if case.masked == "none"]
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_op = pytest.mark.parametrize("name", ["select", "attention", "attention_backward"])


def call(name: str, case: Case, dtype: torch.dtype = torch.float32, requires_grad: bool = False):
    """An operator, and its positional and keyword arguments."""
    tensors = case.tensors(dtype)
    q, k, v, mask = *tensors[:3], mask_or_empty(tensors)
    options = {"pool": case.pool, "mode": case.mode, "threshold": case.threshold, "topk": case.topk or 0}
    options["tile"] = case.tile
    if name == "select":
        return torch.ops.vmoba.select.default, (q, k, mask, *case.sizes), options
    words = torch.ops.vmoba.select(q, k, mask, *case.sizes, **options)
    scale = {"scale": case.op_scale, "tile": case.tile}
    if name == "attention":
        q, k, v = (x.detach().requires_grad_(requires_grad) for x in (q, k, v))
        return torch.ops.vmoba.attention.default, (q, k, v, words, mask, *case.sizes), scale
    out, lse = torch.ops.vmoba.attention(q, k, v, words, mask, *case.sizes, **scale)
    dout = torch.randn_like(out)
    args = (dout, q, k, v, words, mask, out, lse, torch.randn_like(lse), *case.sizes)
    return torch.ops.vmoba.attention_backward.default, args, scale


def test_selection_of_inputs_that_require_grad():
    """A rewritten graph calls the operator without detaching anything."""
    op, (q, k, *others), options = call("select", CASES["plain"])
    words = op(q.detach().requires_grad_(), k, *others, **options)
    assert not words.requires_grad
    assert torch.equal(words, op(q, k, *others, **options))


@every_op
def test_no_kernel_no_substitute(name):
    """Sparse tensors stand for a device that has no kernel: the call fails and says for which operator and device."""
    op, args, kwargs = call(name, CASES["plain"])
    elsewhere = [x.to_sparse() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    with pytest.raises(NotImplementedError, match=f"vmoba::{name}.*SparseCPU"):
        op(*elsewhere, **kwargs)


def outputs(result) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


@every_op
@pytest.mark.parametrize(
    "case", [CASES[name] for name in ("condition", "mask", "tiles")], ids=["no_mask", "mask", "tiles"]
)
def test_opcheck(name, case):
    op, args, kwargs = call(name, case, requires_grad=True)
    torch.library.opcheck(op, args, kwargs)


@every_op
@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fake_kernels_predict_the_real_ones(name, case, dtype):
    op, args, kwargs = call(name, case, dtype)
    real = outputs(op(*args, **kwargs))
    with FakeTensorMode() as mode:
        fake_args = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
        fake = outputs(op(*fake_args, **kwargs))
    meta = outputs(op(*[x.to("meta") if isinstance(x, torch.Tensor) else x for x in args], **kwargs))
    for x, y, z in zip(real, fake, meta, strict=True):
        for predicted in (y, z):
            assert (predicted.shape, predicted.dtype, predicted.stride()) == (x.shape, x.dtype, x.stride())
        assert x.is_contiguous()


@every_op
def test_outputs_share_no_memory_with_inputs(name):
    op, args, kwargs = call(name, CASES["condition"])
    inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor) and x.numel()}
    found = [x.untyped_storage().data_ptr() for x in outputs(op(*args, **kwargs))]
    assert not inputs & set(found)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("case", [CASES[name] for name in UNMASKED], ids=UNMASKED)
def test_flops_are_those_of_the_selected_pairs(case):
    tensors = case.leaves()
    pairs = int(case.truth(tensors).pairs.sum())
    boxes = len(oracle.boxes(case.grid, case.block))
    gate = 2 * case.batch * case.heads * case.num_queries * boxes * case.head_dim
    with FlopCounterMode(display=False) as counter:
        out = sparse(case, tensors)
    assert counter.get_total_flops() == gate + 4 * case.head_dim * pairs
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 10 * case.head_dim * pairs
    assert pairs < case.batch * case.heads * case.num_tokens**2


@pytest.mark.parametrize("device", ["fake", "meta"])
def test_flops_without_data_count_all_pairs(device):
    case = CASES["condition"]
    mode = FakeTensorMode()
    convert = mode.from_tensor if device == "fake" else lambda x: x.to("meta")
    tensors = Tensors(*map(convert, case.tensors()[:3]), None)
    with FlopCounterMode(display=False) as counter:
        sparse(case, tensors)
    pairs = case.batch * case.heads * case.num_tokens**2
    gate = 2 * case.batch * case.heads * case.num_video * 4 * case.head_dim
    assert counter.get_total_flops() == gate + 4 * case.head_dim * pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_autocast(dtype):
    """Runs and differentiates in the autocast type, as dense attention does; gradients come back in the inputs' own."""
    case = CASES["condition"]
    tensors = case.leaves(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse(case, tensors)
    rounded = Tensors(*(x.bfloat16() for x in tensors[:3]), None)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, sparse(case, rounded))
    weight = torch.randn_like(out)
    expected = torch.autograd.grad(sparse(case, rounded), tensors[:3], weight)
    with torch.autocast("cpu", torch.bfloat16):  # a backward pass inside is no less exact
        grads = torch.autograd.grad(out, tensors[:3], weight)
    for x, got, wanted in zip(tensors[:3], grads, expected, strict=True):
        assert got.dtype == x.dtype == dtype
        assert torch.equal(got, wanted)


def test_autocast_leaves_double_precision_alone():
    tensors = CASES["plain"].tensors()
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse(CASES["plain"], tensors).dtype == torch.float64


def test_autocast_joins_mixed_types():
    """An fp32 rope leaves q and k wider than v; autocast brings them together."""
    case = CASES["plain"]
    q, k, v, _ = case.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse(case, Tensors(q, k, v.bfloat16(), None)).dtype == torch.bfloat16


def compiled():
    torch._dynamo.reset()
    return torch.compile(sparse, fullgraph=True, backend="aot_eager")


@every_case
def test_compiled_forward_and_backward(case):
    results = []
    for function in (sparse, compiled()):
        tensors = case.leaves()
        out = function(case, tensors)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), tensors[:3])])
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=1e-13)


def test_compiled_under_autocast():
    case = CASES["plain"]
    tensors = case.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled()(case, tensors), sparse(case, tensors))


@pytest.mark.parametrize("tile", [0, 128])
@torch.fx.experimental._config.patch(use_duck_shape=False)
def test_compiled_for_changing_sizes(tile):
    """One graph for every batch size, grid, block and number of condition tokens.

    With duck shapes, sizes that happen to be equal at first would be taken to be equal for good.
    """
    compilations = CompileCounterWithBackend("aot_eager")

    @functools.partial(torch.compile, fullgraph=True, dynamic=True, backend=compilations)
    def dynamic(q, k, v, grid, block, prefix):
        return attention(q, k, v, grid, block=block, prefix=prefix, granularity="tile" if tile else "token")

    torch._dynamo.reset()
    counts = []
    for case in (
        Case(grid=(3, 4, 5), block=(2, 2, 3), prefix=3, batch=2, tile=tile),
        Case(grid=(4, 6, 2), block=(3, 4, 5), prefix=7, batch=3, tile=tile),
        Case(grid=(7, 3, 6), block=(5, 6, 4), prefix=2, batch=5, tile=tile),
    ):
        tensors = case.tensors()
        out = dynamic(*tensors[:3], case.grid, case.block, case.prefix)
        assert torch.equal(out, sparse(case, tensors))
        counts.append(compilations.frame_count)
    assert counts[1:] == counts[:-1]


@pytest.mark.parametrize("case", [CASES["many_boxes"], CASES["tiles"]], ids=["tokens", "tiles"])
def test_compiled_selection(case):
    tensors = case.tensors()

    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def masks(q, k):
        layout = case.layout_arguments
        return select(
            q, k, case.grid, block=case.block, granularity=case.granularity, **layout, **case.selection
        ).mask()

    torch._dynamo.reset()
    assert torch.equal(masks(*tensors[:2]), case.truth(tensors).selected)


def test_exported_program():
    """Both operators stand in the graph itself, not in a graph nested in it."""
    case = CASES["mask"]
    tensors = case.tensors(torch.float32)

    class Model(torch.nn.Module):
        def forward(self, q, k, v, key_mask):
            return sparse(case, Tensors(q, k, v, key_mask))

    program = torch.export.export(Model(), tuple(tensors))
    called = {str(node.target) for node in program.graph.nodes if "vmoba" in str(node.target)}
    assert called == {"vmoba.select.default", "vmoba.attention.default"}
    assert torch.equal(program.module()(*tensors), sparse(case, tensors))


def test_exported_program_with_a_dynamic_batch():
    case = CASES["condition"]

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return sparse(case, Tensors(q, k, v, None))

    batch = torch.export.Dim("batch")
    example = case.tensors(torch.float32)[:3]
    program = torch.export.export(Model(), example, dynamic_shapes=[{0: batch}] * 3)
    tensors = case.but(batch=5).tensors(torch.float32)
    assert torch.equal(program.module()(*tensors[:3]), sparse(case, tensors))


def test_activation_checkpointing():
    """The selection is made again in the backward pass and must be the same."""
    case = CASES["condition"]
    tensors = case.leaves()
    plain = sparse(case, tensors)
    again = torch.utils.checkpoint.checkpoint(sparse, case, tensors, use_reentrant=False)
    grads = [torch.autograd.grad(out.square().sum(), tensors[:3]) for out in (plain, again)]
    assert all(map(torch.equal, *grads))


def test_compiled_result_is_close_to_the_oracle():
    case = CASES["mask"].but(seed=5)
    tensors = case.tensors(torch.bfloat16)
    assert relative(compiled()(case, tensors), case.truth(tensors).out) < 1e-2


def test_dynamo_does_not_look_inside():
    """In a frame that Dynamo runs as it is, the operators' bodies are not compiled instead."""
    graphs = []
    q, mask, sizes = torch.randn(1, 1, 64, 16), torch.empty(0, dtype=torch.bool), (4, 4, 4, 2, 2, 2, 0, 0)

    def model(q):
        for _ in range(1):
            try:
                torch._dynamo.graph_break()
            finally:
                pass
            words = torch.ops.vmoba.select(
                q, q, mask, *sizes, pool="head_global", mode="threshold", threshold=0.25, topk=0
            )
            out = torch.ops.vmoba.attention(q, q, q, words, mask, *sizes, scale=0.25)[0]
        return out

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    assert torch.equal(torch.compile(model, backend=backend)(q), model(q))
    names = {node.name for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}
    assert all("vmoba" in name or "select" in name or "attention" in name or "getitem" in name for name in names), names
