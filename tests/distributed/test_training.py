"""FSDP2, activation checkpointing and Ulysses: three training steps of one process, and checkpoints for other numbers."""

from __future__ import annotations

import processes
import pytest
import spread_training
import torch
import torch.distributed.checkpoint as dcp
from training import difference
from video_dit import VideoTransformer

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # a checkpoint read without a group
    pytest.mark.xdist_group("spread_training"),  # one worker starts the processes
]
TOLERANCE = 1e-5  # of each step's gradients, all as one vector
WEIGHTS_TOLERANCE = 1e-4  # AdamW turns rounding errors in gradients near zero into whole steps
NOT_COMPILED = ["--inner", "eager"]  # rewritten all the same; many processes compile slowly on two cores
CASES = {
    "fsdp": [],
    "fsdp without checkpointing": ["--no-checkpointing"],
    "fsdp, dense": ["--attention", "dense"],
    "ulysses": ["--ulysses", "2"],
    "ulysses, per query": ["--ulysses", "2", "--attention", "moba"],
}


@pytest.fixture(scope="module")
def wanted():
    return {name: spread_training.alone(name) for name in ("vmoba", "dense", "moba")}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    results = processes.run(spread_training.many, 2, folder, list(CASES.values()), seconds=150)
    return [dict(zip(CASES, found, strict=True)) for found in results]


def check(found, wanted, steps=slice(None)) -> None:
    assert found["shards"] == {"DTensor"}
    assert found["losses"] == pytest.approx(wanted["losses"][steps], rel=TOLERANCE)
    for ours, truth in zip(found["gradients"], wanted["gradients"][steps], strict=True):
        assert difference(ours, truth) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(two, wanted, case):
    words = CASES[case]
    attention = words[words.index("--attention") + 1] if "--attention" in words else "vmoba"
    for rank in two:
        check(rank[case], wanted[attention])


@pytest.mark.slow
def test_the_attention_matters(wanted):
    for other in ("dense", "moba"):
        assert difference(wanted[other]["gradients"][0], wanted["vmoba"]["gradients"][0]) > 1000 * TOLERANCE


@pytest.mark.slow
def test_two_by_two_processes_equal_one(tmp_path, wanted):
    """Two videos' groups times two parts of each video, parameters sharded over all four."""
    for found in processes.run(spread_training.train, 4, tmp_path, ["--ulysses", "2", *NOT_COMPILED]):
        check(found, wanted["vmoba"])


def loaded(folder) -> dict[str, torch.Tensor]:
    """A checkpoint's weights in the plain model, without any process group; its names must be the plain model's."""
    model = VideoTransformer((4, 4, 4), 32, 3, 4)
    weights = model.state_dict()
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    assert {name for name in saved if name.startswith("model.")} == {f"model.{name}" for name in weights}
    dcp.load({"model": weights}, checkpoint_id=folder, no_dist=True)
    return weights


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((2, []), (4, ["--ulysses", "2"])), ((2, ["--ulysses", "2"]), (1, []))])
def test_checkpoints_go_on_with_another_number(tmp_path, wanted, before, after):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    middle, end = str(tmp_path / "middle"), str(tmp_path / "end")
    train = spread_training.train
    for found in processes.run(train, before[0], tmp_path / "first", [*before[1], *NOT_COMPILED], middle, "", 2):
        check(found, wanted["vmoba"], slice(0, 2))
    for found in processes.run(train, after[0], tmp_path / "second", [*after[1], *NOT_COMPILED], end, middle):
        check(found, wanted["vmoba"], slice(2, 3))
    assert difference(loaded(end), wanted["vmoba"]["weights"]) < WEIGHTS_TOLERANCE
    assert difference(loaded(middle), wanted["vmoba"]["weights"]) > 10 * WEIGHTS_TOLERANCE


@pytest.mark.slow
def test_whole_model_has_plain_names(tmp_path, wanted):
    """Sharded and optimized as a whole: the checkpoint of the optimized model is the plain model's."""
    for found in processes.run(spread_training.train_whole, 2, tmp_path, str(tmp_path / "saved")):
        check(found, wanted["vmoba"])
    assert difference(loaded(tmp_path / "saved"), wanted["vmoba"]["weights"]) < WEIGHTS_TOLERANCE
