"""What one of several ranks computes under Ulysses, and what a process alone does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sharded_models import GRID, Sharded, inputs
from torch import Tensor, nn
from torch import distributed as dist

import vmoba_compile
from vmoba_compile import VMoBAConfig
from vmoba_compile.zoo import preset

CONFIG = VMoBAConfig(min_tokens=0, threshold=0.25)
LAYERS = 3


def wan() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "attention_head_dim": 12, "num_layers": LAYERS}
    model, given = preset("tiny-wan").build(device="cpu", grid=GRID, batch=2, **sizes)
    return model.eval(), given | {"return_dict": False}


def parallel(model: nn.Module, **degrees: int) -> None:
    from diffusers import ContextParallelConfig

    torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and there is none
    model.enable_parallelism(config=ContextParallelConfig(**degrees))


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def seen(fast: nn.Module) -> list[tuple[Any, ...]]:
    """Of every site: path, verdict, layer, grid, block, and how many tokens stand beside the video."""
    return [
        (site.path, site.reason.value, site.layer, site.grid, site.block, (site.prefix or 0) + (site.suffix or 0))
        for site in vmoba_compile.report(fast)
    ]


def inference(model: nn.Module, given: dict[str, Any], **options: Any) -> dict[str, Any]:
    fast = vmoba_compile.optimize(model, CONFIG, inner="eager", **options)
    with torch.no_grad():
        sparse = first(fast(**given))
        with fast.dense():
            dense = first(fast(**given))
    return {"sparse": sparse, "dense": dense, "sites": seen(fast)}


def training(model: nn.Module, given: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Gradients of a sum over this rank's tokens, or over everything where the output is whole on every rank."""
    fast = vmoba_compile.optimize(model.train(), CONFIG, inner="aot_eager", **options)
    first(fast(**given)).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"gradients": grads, "sites": seen(fast)}


def hand_written(text: bool, by: str, ranks: bool) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    given = dict(zip(("video", "text"), inputs(text), strict=False))
    return Sharded("chunk", by, ranks), given


def wan_case(run: Callable[..., dict[str, Any]], ranks: bool, **options: Any) -> dict[str, Any]:
    model, given = wan()
    if ranks:
        parallel(model, ulysses_degree=dist.get_world_size())
    return run(model, given, expect=LAYERS, **options)


def optimized_first(ranks: bool) -> dict[str, Any]:
    """``enable_parallelism`` behind ``optimize``."""
    model, given = wan()
    fast = vmoba_compile.optimize(model, CONFIG, inner="eager", expect=LAYERS)
    if ranks:
        parallel(model, ulysses_degree=dist.get_world_size())
    with torch.no_grad():
        return {"sparse": first(fast(**given)), "sites": seen(fast)}


CASES: dict[str, Callable[[bool], dict[str, Any]]] = {
    "wan": lambda ranks: wan_case(inference, ranks),
    "wan_regional": lambda ranks: wan_case(inference, ranks, regional=True),
    "wan_training": lambda ranks: wan_case(training, ranks),
    "wan_optimized_first": optimized_first,
    "video": lambda ranks: inference(*hand_written(False, "heads_first", ranks), expect=2),
    "video_in_place": lambda ranks: inference(*hand_written(False, "in_place", ranks), expect=2),
    "text_and_video": lambda ranks: inference(*hand_written(True, "to_heads", ranks), expect=2),
    "text_and_video_training": lambda ranks: training(*hand_written(True, "to_heads", ranks), expect=2),
}


def on_rank(rank: int, device: torch.device, names: list[str]) -> dict[str, dict[str, Any]]:
    """These cases, on this rank of a group."""
    found = {}
    for name in names:
        torch._dynamo.reset()
        found[name] = CASES[name](True)
    return found


def failing(rank: int, device: torch.device) -> None:
    """Rank 1 cannot share its heads out."""
    model, given = hand_written(False, "to_heads", True)
    if rank == 1:
        model.heads = 1
    inference(model, given)
