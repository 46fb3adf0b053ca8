"""Recorded launches in a package: what is recorded, and that the C++ runtime asks the driver for exactly that.

The runtime runs against a driver that only tells what it is asked for; on a GPU, test_gpu_package runs the real one.
"""

from __future__ import annotations

import inspect
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from fake_kernels import array_at
from vmoba_compile.kernels import implementations
from vmoba_compile.kernels.launches import Place, Plan, Step
from vmoba_compile.kernels.partition import Geometry

pytest.importorskip("triton")

from vmoba_compile.deploy import replay
from vmoba_compile.deploy.program import options_of

HARNESS = Path(__file__).parents[1] / "support" / "cpp" / "replayed.cpp"
BF16 = torch.bfloat16


def compiled(name: str, signature: dict[str, str], **changed) -> SimpleNamespace:
    """As much of a compiled kernel of Triton's as matters."""
    metadata = {
        "name": name, "num_warps": 4, "shared": 1024, "num_ctas": 1, "launch_cooperative_grid": False,
        "launch_pdl": False, "global_scratch_size": 0, "profile_scratch_size": 0, "tensordesc_meta": None,
    }  # fmt: skip
    return SimpleNamespace(
        metadata=SimpleNamespace(**metadata | changed),
        src=SimpleNamespace(signature=signature),
        asm={"cubin": f"{name}-image".encode()},
    )


def step(kernel: SimpleNamespace, grid: tuple[int, int, int], args: list, moving: list[tuple[int, int]]) -> Step:
    return Step(print, grid, 0, None, args, moving, kernel)


def descriptor(padding: str = "zero") -> SimpleNamespace:
    return SimpleNamespace(shape=[12, 64], strides=[64, 1], block_shape=[4, 64], padding=padding, base=None)


TENSOR_MAP = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [4, 64], "fp4_padded": False}
SMALL = compiled("small", {"X": "*bf16", "n": "i32", "scale": "fp32", "N": "constexpr", "none": "*fp32"})
LARGE = compiled(
    "large", {"map": "tensordesc<bf16[4, 64]>", "X": "*i32", "wide": "i64"},
    launch_cooperative_grid=True, shared=100 * 1024, num_warps=12, tensordesc_meta=[TENSOR_MAP],
)  # fmt: skip


def a_plan(*steps: Step) -> Plan:
    # Areas: q, k, v, selected, mask, scratch, zeros, out, lse.
    places = (Place(0, 0), Place(5, 512), Place(6, 16), Place(7, 0))
    outputs = (torch.Size((1, 2, 6, 8)), BF16), (torch.Size((1, 2, 6)), torch.float32)
    return Plan(torch.device("cpu"), outputs, False, 2048, 256, places, ((1, descriptor()),), steps)


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


QKV = tuple(meta(1, 2, 6, 8) for _ in range(3))
INPUTS = (*QKV, meta(1, 2, 6, 1, dtype=torch.int32), meta(0, dtype=torch.bool))
STEPS = (
    step(SMALL, (3, 2, 1), [0, -5, 0.5, 64, 0], [(0, 0)]),
    step(LARGE, (132, 1, 1), [0, 0, 2**40 + 1], [(0, 1), (1, 2)]),
    step(SMALL, (1, 1, 1), [0, 7, 1.0, 64, 0], [(0, 3)]),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[..., tuple[int, list[str], str]]:
    """A program that replays the plan for q with a stride of a head, at an address."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    import triton

    folder = tmp_path_factory.mktemp("replay")
    bad = a_plan(step(SMALL, (1, 1, 9), [0, 0, 0.0, 64, 0], [(0, 0)]))
    replays = replay.Replays(torch.device("cpu"))
    replays.plans, replays.inputs = [a_plan(*STEPS), bad], [INPUTS, INPUTS]
    declared = replays.declarations(folder)
    assert [len(texts) for texts in declared.values()] == [2, 1]
    # As Inductor's generated code includes it.
    shims = "\n".join(f"extern {text};" for texts in declared.values() for text in texts)
    (folder / "shims.cpp").write_text(f'extern "C" {{\n{shims}\n}}\n')
    torch_headers = Path(torch.__file__).parent / "include"
    cuda_headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    flags = ["-std=c++17", "-Wall", "-DUSE_CUDA", f"-I{folder}", f"-isystem{torch_headers}", f"-isystem{cuda_headers}"]
    handles = "#include <torch/csrc/inductor/aoti_torch/c/shim.h>"
    subprocess.run(
        [compiler, *flags, "-fsyntax-only", "-x", "c++", "-"], check=True, text=True,
        input=f'{handles}\n#include "shims.cpp"\nint x = sizeof(&aoti_torch_cuda_replay_select);\n',
    )  # fmt: skip
    # Arguments of the kernels above, shape and strides of the tensor map and two of Triton's own; the last are not read.
    subprocess.run([compiler, *flags, "-DARGUMENTS=4", "-w", str(HARNESS), "-o", str(folder / "replayed")], check=True)

    def run(stride: int = 48, address: int = 16, plan: int = 0, **settings: int) -> tuple[int, list[str], str]:
        words = [str(folder / "replayed"), str(stride), str(address), str(plan)]
        told = {name: str(value) for name, value in settings.items()}
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=told)
        return done.returncode, done.stdout.splitlines(), done.stderr

    return run


def test_the_driver_is_asked_for_what_was_recorded(run):
    status, told, errors = run()
    assert (status, errors) == (0, "")
    half, one, minus_5 = (struct.unpack("<I", struct.pack(f, x))[0] for f, x in (("<f", 0.5), ("<f", 1), ("<i", -5)))
    assert told == [
        "allocate 2048 on 1", "allocate 256 on 1", "allocate 1 on 1", "allocate 1 on 1",  # scratch, zeros, out, lse
        "zeros 0x30000 256",
        "map 0x20200 type 9 rank 2 shape 64 12 stride 128 block 64 4 swizzle 3 fill 0",
        "load small-", f"launch 1 on 3 2 1 threads 128 shared 1024 cooperative 0: 0x10 {minus_5:#x} {half:#x} 0",
        "load large-", "shared 2 102400",
        "launch 2 on 132 1 1 threads 384 shared 102400 cooperative 1: 0x20200 0xc 0x40 0x40",
        f"launch 1 on 1 1 1 threads 128 shared 1024 cooperative 0: 0x40000 0x7 {one:#x} 0",
        *told[12:14], "out 0x40000 lse 0x50000", *told[15:],
    ]  # fmt: skip
    assert sorted(told[12:14]) == ["free 0x20000", "free 0x30000"]
    # Once more: new memory, the same modules.
    assert len([line for line in told if line.startswith("load")]) == 2
    assert len([line for line in told if line.startswith("launch")]) == 6 and told[-1] == "out 0x80000 lse 0x90000"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"stride": 96},
            "q has the sizes and strides [1, 2, 6, 8] [7, 96, 8, 1], and the launches were recorded for [1, 2, 6, 8] [96,",
        ),
        ({"MULTIPROCESSORS": 114}, "made on a GPU with 132 multiprocessors, and this one has 114"),
        ({"CONTEXT": 2}, "the inputs are on cuda:1, and the package runs on cuda:2"),
        ({"NO_FUNCTION": 1}, "small: a fault"),
        ({"plan": 1}, "small: a fault"),
        ({"plan": 1, "address": 24}, "small: a fault"),
    ],
)
def test_what_is_not_as_it_was_recorded_is_refused(run, changed, message):
    status, told, errors = run(**changed)
    assert status == 3 and message in errors
    assert sum(line.startswith(("allocate", "copy")) for line in told) == sum(line.startswith("free") for line in told)
    assert ("unload 1" in told) == ("NO_FUNCTION" in changed)


def test_an_address_between_is_copied(run):
    """Whose address a call alone knows, whatever the launches were recorded for."""
    status, told, errors = run(address=24)
    assert (status, errors, told[0]) == (0, "", "copy 0x18")
    launches = [number for number, line in enumerate(told) if line.startswith("launch")]
    assert ": 0x20000 " in told[launches[0]]
    assert launches[2] < told.index("free 0x20000") < launches[3]  # the second call's


def test_a_thread_that_has_not_used_the_gpu(run):
    status, told, errors = run(CONTEXT=0)
    assert (status, errors) == (0, "") and told[0] == "retain 1" and told.count("retain 1") == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_ctas": 2}, "has clusters"),
        ({"global_scratch_size": 128}, "scratch memory of Triton's"),
        ({"tensordesc_meta": None}, "a tensor descriptor that is no tensor map"),
        ({"tensordesc_meta": [TENSOR_MAP | {"fp4_padded": True}]}, "of a kind that is not recorded"),
        ({"signature": LARGE.src.signature | {"wide": "bf16"}}, "an argument has the type bf16"),
    ],
)
def test_launches_that_only_triton_can_do(tmp_path, changed, message):
    metadata = vars(LARGE.metadata) | changed
    kernel = compiled(signature=metadata.pop("signature", LARGE.src.signature), **metadata)
    replays = replay.Replays(torch.device("cpu"))
    replays.plans, replays.inputs = [a_plan(step(kernel, *STEPS[1][1:2], *STEPS[1][4:6]))], [INPUTS]
    with pytest.raises(replay.NotReplayable, match=message):
        replays.declarations(tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_kernel_launched_in_two_ways(tmp_path):
    """The same code, once for all programs at a time."""
    together = compiled("small", SMALL.src.signature, launch_cooperative_grid=True)
    replays = replay.Replays(torch.device("cpu"))
    steps = [step(kernel, (1, 1, 1), [0, 1, 0.0, 64, 0], [(0, 0)]) for kernel in (SMALL, together, SMALL)]
    replays.plans, replays.inputs = [a_plan(*steps)], [INPUTS]
    replays.declarations(tmp_path)
    tables = (tmp_path / "plans.hpp").read_text()
    assert "vmoba_image_0, 128, 1024, 0}" in tables and "vmoba_image_1, 128, 1024, 1}" in tables
    assert len(list(tmp_path.glob("*.cubin"))) == 2


@pytest.mark.parametrize("expanded", [False, True])
def test_invented_inputs_have_the_layout(expanded):
    x = torch.empty(1, 1, 4, 3).expand(2, 5, 4, 3) if expanded else torch.empty(2, 4, 5, 3).transpose(1, 2)
    state = torch.get_rng_state()
    made = replay._invented(x, torch.device("cpu"))
    assert (made.shape, made.stride()) == (x.shape, x.stride()) and made.std() > 0.5
    assert torch.equal(torch.get_rng_state(), state)
    assert replay._invented(torch.empty(0, dtype=torch.bool), torch.device("cpu")).shape == (0,)


@pytest.mark.parametrize(
    ("name", "given"),
    [("select", {"pool": "block", "mode": "topk", "threshold": 0.0, "topk": 2}), ("attention", {"scale": 0.3})],
)
def test_options_of_a_call_are_all_that_its_operator_takes(name, given):
    graph = torch.fx.Graph()
    node = graph.call_function(getattr(torch.ops.vmoba, name).default, (graph.placeholder("q"),), given)
    parameters = inspect.signature(getattr(implementations, name)).parameters.values()
    options = options_of(node)
    assert options.keys() == {x.name for x in parameters if x.kind is x.KEYWORD_ONLY} - {"run"}
    assert options == options | given | {"implementation": "auto", "tile": 0}


def test_the_run_in_python_hands_over_aligned_memory():
    """While Inductor compiles."""
    q = torch.randn(900).as_strided((1, 2, 6, 8), (288, 144, 24, 1), storage_offset=3)
    mask = torch.empty(0, dtype=torch.bool)
    seen = []

    class Reader(Plan):
        def replay(self, inputs):
            seen.extend(inputs)
            words = 144 + 5 * 24 + 8  # from the first head's first number to the last one's last
            seen.append(torch.tensor(array_at(inputs[0], numpy.float32)(words)))
            return torch.empty(0)

    replays = replay.Replays(torch.device("cpu"))
    replays.plans, replays.inputs = [Reader(**vars(a_plan()))], [(q, q, mask)]
    with replays.compiling():
        replay._replay(q, q, mask, 24, 1, 0)
    assert q.data_ptr() % 16 and not any(address % 16 for address in seen[:2])
    assert torch.equal(seen[-1].as_strided(q.shape, q.stride()), q)


class TestExchange:
    """Which operators of a graph launches are recorded for; the recording itself is a GPU's."""

    @pytest.fixture
    def recorded(self, monkeypatch) -> list[torch.fx.Node]:
        nodes = []

        def record(self, node, values, sizes):
            nodes.append(node)
            return a_plan(*STEPS), tuple(values)

        monkeypatch.setattr(replay.Replays, "_record", record)
        return nodes

    @staticmethod
    def graph(
        change: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
        layers: int = 2,
        mask: Callable[[], torch.Tensor] = lambda: torch.empty(0, dtype=torch.bool),
        batch: int = 1,
    ) -> torch.fx.GraphModule:
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx

        geometry = Geometry((2, 3, 4), (1, 3, 2))
        sizes = (*geometry.grid, *geometry.block, 0, 0)

        def model(q, k, v, mask):
            for _ in range(layers):
                q = change(q)
                words = torch.ops.vmoba.select(
                    q, k, mask, *sizes, pool="overall", mode="threshold", threshold=0.5, topk=0
                )
                q, _ = torch.ops.vmoba.attention(q, k, v, words, mask, *sizes, scale=0.3, threshold=0.5)
            return q

        with FakeTensorMode():
            qkv = [torch.empty(batch, 2, 24, 16, dtype=BF16) for _ in range(3)]
            return make_fx(model)(*qkv, mask())

    @staticmethod
    def exchange(made: torch.fx.GraphModule) -> tuple[replay.Replays, list[str]]:
        replays = replay.Replays(torch.device("cpu"))
        operators = (torch.ops.vmoba.select.default, torch.ops.vmoba.attention.default)
        return replays, [replays.exchange(node) for node in made.graph.nodes if node.target in operators]

    def test_equal_layers_share_a_plan(self, recorded):
        made = self.graph(layers=3)
        replays, done = self.exchange(made)
        assert done == [""] * 6 and len(recorded) == len(replays.plans) == 2
        assert replays.kernels() == ["large", "small"]
        selects = [node for node in made.graph.nodes if node.target is torch.ops.vmoba.replay_select.default]
        attentions = [node for node in made.graph.nodes if node.target is torch.ops.vmoba.replay_attention.default]
        assert [node.args[-3:] for node in selects] == [(24, 1, 0)] * 3
        assert [node.args[-1] for node in attentions] == [1] * 3 and len(attentions[0].args) == 6
        made.recompile()
        with torch._subclasses.FakeTensorMode() as mode:
            like = [mode.from_tensor(torch.empty(1, 2, 24, 16, dtype=BF16)) for _ in range(3)]
            assert made(*like, torch.empty(0, dtype=torch.bool)).shape == (1, 2, 24, 16)

    def test_another_layout_is_another_plan(self, recorded):
        def as_projected(x):
            return x.transpose(1, 2).contiguous().transpose(1, 2)

        made = self.graph(lambda x: as_projected(x) if x.is_contiguous() else x, layers=1)
        replays, done = self.exchange(made)
        assert done == ["", ""] and replays.inputs[0][0].stride() == (768, 16, 32, 1)

    @pytest.mark.parametrize(
        "change",
        [
            lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
            lambda x: x[:, :1].expand(-1, 2, -1, -1),
        ],
        ids=["rows with gaps", "one head for all"],
    )
    def test_copied_first(self, recorded, change):
        """As the operators' own code does before it launches anything."""
        made = self.graph(change, layers=1)
        replays, done = self.exchange(made)
        assert done == ["", ""] and replays.inputs[0][0].is_contiguous()
        for node in made.graph.nodes:
            if "replay" in str(node.target):
                assert node.args[0].target is torch.ops.aten.clone.default and node.args[0].meta["val"].is_contiguous()
                assert node.args[1].op == "placeholder"
        made.graph.lint()

    def test_where_a_tensor_begins_makes_no_other_plan(self, recorded):
        made = self.graph(lambda x: torch.cat([x, x], 3)[..., 5:21], layers=1)
        replays, done = self.exchange(made)
        assert done == ["", ""] and replays.inputs[0][0].stride() == (1536, 768, 32, 1)
        assert not any(node.target is torch.ops.aten.clone.default for node in made.graph.nodes)

    def test_a_mask_for_all_samples(self, recorded):
        made = self.graph(layers=1, mask=lambda: torch.empty(1, 24, dtype=torch.bool).expand(2, 24), batch=2)
        replays, done = self.exchange(made)
        assert done == ["", ""] and [x.stride() for x in (replays.inputs[0][2], replays.inputs[1][4])] == [(24, 1)] * 2

    @pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("Triton: [CUDA]: out of memory")])
    def test_too_little_memory_to_record(self, monkeypatch, error):
        def fail(*_):
            raise error

        monkeypatch.setattr(replay.Replays, "_record", fail)
        _, done = self.exchange(self.graph())
        assert len(done) == 4 and all("too little of the GPU's memory" in reason for reason in done)

    def test_launches_that_fail(self, monkeypatch):
        def fail(*_):
            raise RuntimeError("an illegal memory access")

        monkeypatch.setattr(replay.Replays, "_record", fail)
        with pytest.raises(RuntimeError, match="an illegal"):
            self.exchange(self.graph())

    def test_a_plan_that_only_triton_can_do(self, monkeypatch):
        bad = step(compiled("pairs", {"x": "*bf16"}, num_ctas=2), (1, 1, 1), [0], [(0, 0)])
        monkeypatch.setattr(replay.Replays, "_record", lambda *_: (a_plan(bad), INPUTS))
        replays, done = self.exchange(self.graph())
        assert all("has clusters" in reason for reason in done) and not replays.plans
        assert not replays.declarations(Path("unused"))


class Parts(torch.nn.Module):
    """Attentions whose inputs begin in the middle of memory that is more than theirs."""

    def forward(self, flat, masks):
        geometry = Geometry((2, 3, 4), (1, 3, 2))
        sizes = (*geometry.grid, *geometry.block, 0, 0)
        q = flat[:, 3 : 3 + 768].view(1, 2, 24, 16)
        # What a sort takes is made in one piece of memory, the second mask of it after the first.
        some = torch.sort(masks[:1] & masks[1:], -1)[0]
        last = masks[:1] | masks[1:]
        both = torch.sort(torch.cat([some, last]), -1)[0]
        results = []
        for mask in (masks[1:], last):
            words = torch.ops.vmoba.select(q, q, mask, *sizes, pool="overall", mode="threshold", threshold=0.5, topk=0)
            out, _ = torch.ops.vmoba.attention(q, q, q, words, mask, *sizes, scale=0.3, threshold=0.5)
            results.append(out)
        return (*results, both)


@pytest.mark.slow
def test_what_inductor_hands_over(tmp_path, monkeypatch):
    """A package of real torch.export and Inductor, on the CPU: the driver alone is another."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    import triton

    starts = compiled("starts", {"q": "*bf16", "mask": "*i1", "n": "i32"})

    def record(self, node, values, sizes):
        results = node.meta["val"] if isinstance(node.meta["val"], tuple) else (node.meta["val"],)
        outputs = tuple((x.shape, x.dtype) for x in results)
        places = (Place(0, 0), Place(len(values) - 1, 0))
        steps = (step(starts, (1, 1, 1), [0, 0, 7], [(0, 0), (1, 1)]),)
        plan = Plan(torch.device("cpu"), outputs, len(outputs) == 1, 64, 64, places, (), steps)
        return plan, tuple(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in values)

    runtime = replay.RUNTIME.read_text().replace("_cuda_replay", "_cpu_replay").replace("type_cuda()", "type_cpu()")
    stream = "AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** to) { return *to = nullptr, 0; }"
    handles = "#include <torch/csrc/inductor/aoti_torch/c/shim.h>"
    (tmp_path / "runtime.hpp").write_text(
        f'#define ARGUMENTS 3\n{handles}\n#include "{HARNESS.with_name("driver.hpp")}"\n'
        f'extern "C" __attribute__((visibility("hidden"))) {stream}\n{runtime}'
    )
    declarations = {op: text.replace("_cuda_", "_cpu_") for op, text in replay._DECLARATIONS.items()}
    monkeypatch.setattr(replay, "RUNTIME", tmp_path / "runtime.hpp")
    monkeypatch.setattr(replay, "_DECLARATIONS", declarations)
    monkeypatch.setattr(replay.Replays, "_record", record)
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", str(Path(triton.__file__).parent / "backends" / "nvidia" / "include"))
    given = torch.randn(1, 776, dtype=BF16), torch.rand(2, 24) < 0.5
    program = torch.export.export(Parts(), given)
    replays = replay.Replays(torch.device("cpu"))
    operators = (torch.ops.vmoba.select.default, torch.ops.vmoba.attention.default)
    assert [replays.exchange(node) for node in program.graph.nodes if node.target in operators] == [""] * 4
    assert len(replays.plans) == 2
    options = {"aot_inductor.custom_ops_to_c_shims": replays.declarations(tmp_path)}
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2"), inductor_configs=options
        )
    torch.save(given, tmp_path / "inputs.pt")
    run = "import sys, torch; torch._inductor.aoti_load_package(sys.argv[1])(*torch.load(sys.argv[2]))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", run, package, str(tmp_path / "inputs.pt")],
        capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"CONTEXT": "-1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    launched = [line.split(": ")[1].split() for line in done.stdout.splitlines() if line.startswith("launch")]
    assert len(launched) == 4 and not any(int(address, 16) % 16 for line in launched for address in line[:2])
