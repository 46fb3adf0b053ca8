"""diffusers' Wan transformer over several GPUs by Ulysses, its attention sparse: the same result as on one.

    torchrun --standalone --nproc-per-node 2 examples/parallel_wan.py      # gloo without GPUs, else NCCL
    torchrun --standalone --nproc-per-node 4 examples/parallel_wan.py --preset wan2.1-1.3b --grid 21x30x52

Every process has the whole model; between two attentions it has a part of the tokens, and for an attention all tokens of a
part of the heads. Random weights here; with a real model, load it in place of ``build``.
"""

import argparse
import os
import time

import torch
from diffusers import ContextParallelConfig
from torch import distributed as dist

import vmoba_compile
from vmoba_compile.__main__ import parse_grid
from vmoba_compile.zoo import preset


def build(args: argparse.Namespace, device: torch.device) -> tuple[torch.nn.Module, dict]:
    """The same on every process."""
    torch.manual_seed(0)
    dtype, small = (torch.bfloat16, {}) if device.type == "cuda" else (torch.float32, {"num_attention_heads": 4})
    model, inputs = preset(args.preset).build(grid=args.grid, device=device, dtype=dtype, **small)
    return model.eval().requires_grad_(False), inputs | {"return_dict": False}  # diffusers' hooks take tuples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny-wan", help="a model of vmoba_compile.zoo")
    parser.add_argument("--grid", type=parse_grid, default=(4, 6, 8), metavar="TxHxW", help="tokens")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        raise SystemExit("start it with torchrun: torchrun --standalone --nproc-per-node 2 examples/parallel_wan.py")
    gpus = torch.cuda.device_count()
    dist.init_process_group("nccl" if gpus else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    else:
        torch.accelerator.device_count = lambda: 1  # diffusers takes a rank modulo this number, which is 0 on a CPU
    config, options = vmoba_compile.VMoBAConfig(min_tokens=0), {} if gpus else {"inner": "eager"}
    model, inputs = build(args, device)
    with torch.no_grad():
        (alone,) = vmoba_compile.optimize(model, config, **options)(**inputs)
        torch.compiler.reset()
        if ranks > 1:
            model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
        fast = vmoba_compile.optimize(model, config, **options)
        (spread,) = fast(**inputs)
        start = time.perf_counter()
        fast(**inputs)[0].sum().item()  # waits for the GPU
    error = ((spread - alone).norm() / alone.norm()).item()
    if rank == 0:
        print(vmoba_compile.report(fast))
        print(f"{ranks} processes ({device.type}): {time.perf_counter() - start:.3f} s a forward, error {error:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
