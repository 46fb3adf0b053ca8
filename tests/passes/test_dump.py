"""Graphs as text: in a folder, and in torch's structured trace."""

from __future__ import annotations

import json
import logging
from unittest import mock

import graphs
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from vmoba_compile.passes import rewrite
from vmoba_compile.passes.dump import dump


class Checkpointed(nn.Module):
    """Attention in a graph that the graph calls."""

    def __init__(self) -> None:
        super().__init__()
        self.model = graphs.VideoAttention()

    def forward(self, video):
        return checkpoint(self.model, video, use_reentrant=False)


def dumped(model, video, folder=None, dynamic=False):
    """The files of a graph before and after the rewrite, and what the graph computes."""
    files = []

    def backend(gm, inputs):
        files.append(dump(gm, "graph_1_before", folder))
        assert len(rewrite(gm, graphs.SPARSE).rewritten) == 1
        files.append(dump(gm, "graph_1_after", folder))
        return gm.forward

    torch._dynamo.reset()
    result = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(video)
    return files, result


@pytest.mark.parametrize("model", [graphs.VideoAttention, Checkpointed])
def test_before_and_after_in_a_folder(model, tmp_path):
    model, video = model(), graphs.video()
    files, result = dumped(model, video, tmp_path / "new" / "folder")
    assert [path.relative_to(tmp_path).as_posix() for path in files] == [
        "new/folder/graph_1_before.py",
        "new/folder/graph_1_after.py",
    ]
    before, after = (path.read_text(encoding="utf-8") for path in files)
    assert "scaled_dot_product_attention" in before and "vmoba" not in before
    assert "torch.ops.vmoba.select.default" in after and "torch.ops.vmoba.attention.default" in after
    assert "f32[" in after and "graphs.py" in after  # shapes, and the lines that made the nodes
    compile(after, "after", "exec")  # it reads as Python
    torch.testing.assert_close(dumped(model, video)[1], result)  # and the graph is what it was


def test_with_symbolic_sizes(tmp_path):
    files, _ = dumped(graphs.VideoAttention(), graphs.video(), tmp_path, dynamic=True)
    assert all("Sym(s" in path.read_text() for path in files)


def test_a_later_dump_takes_the_place(tmp_path):
    gm = torch.fx.symbolic_trace(nn.ReLU())
    (tmp_path / "a.py").write_text("old")
    assert dump(gm, "a", str(tmp_path)) == tmp_path / "a.py"
    assert "relu" in (tmp_path / "a.py").read_text()


def test_in_the_structured_trace():
    seen = []

    class Keep(logging.Handler):
        def emit(self, record):
            seen.append((record.metadata, record.payload))

    log, keep = torch._logging._internal.trace_log, Keep()
    log.addHandler(keep)
    try:
        assert dumped(graphs.VideoAttention(), graphs.video())[0] == [None, None]
    finally:
        log.removeHandler(keep)
    found = {
        data["artifact"]["name"]: text
        for data, text in seen
        if data.get("artifact", {}).get("name", "").startswith("vmoba_")
    }
    assert list(found) == ["vmoba_graph_1_before", "vmoba_graph_1_after"]
    assert "vmoba" not in found["vmoba_graph_1_before"] and "vmoba.attention" in found["vmoba_graph_1_after"]
    json.dumps([data for data, _ in seen])  # as the trace's file has them


def test_costs_nothing_where_nobody_looks():
    with mock.patch.object(torch.fx.GraphModule, "print_readable", side_effect=AssertionError):
        assert dump(torch.fx.symbolic_trace(nn.ReLU()), "graph") is None


def test_processes_have_files_of_their_own(tmp_path):
    gm = torch.fx.symbolic_trace(nn.ReLU())
    group = {"is_initialized": lambda: True, "get_world_size": lambda: 4, "get_rank": lambda: 3}
    with mock.patch.multiple(torch.distributed, **group):
        assert dump(gm, "graph_1_after", tmp_path).name == "rank3_graph_1_after.py"


@pytest.mark.parametrize("name", ["", "../graph", "a/b", "a b", ".hidden"])
def test_names_are_those_of_one_file(name, tmp_path):
    with pytest.raises(ValueError, match="letters, digits, dots, dashes and underlines alone"):
        dump(torch.fx.symbolic_trace(nn.ReLU()), name, tmp_path)
    assert not list(tmp_path.iterdir())
