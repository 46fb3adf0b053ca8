"""Wrap a diffusers transformer, run a denoising loop with a dense start, and see what was rewritten.

python examples/optimize_wan.py             # a tiny random model; put your own pipeline's transformer in its place
"""

import torch

import vmoba_compile
from vmoba_compile import VMoBAConfig
from vmoba_compile.zoo import preset

# With a real pipeline: transformer = pipe.transformer, and config=None does.
transformer, inputs = preset("tiny-wan").build(device="cpu")
config = VMoBAConfig(min_tokens=0)

fast = vmoba_compile.optimize(transformer.eval(), config, inner="eager")

latents = inputs["hidden_states"]
with torch.no_grad():
    for timestep in fast.schedule(torch.linspace(999, 0, 8).long()):  # the first quarter of the steps is dense
        noise = fast(latents, timestep=timestep[None], encoder_hidden_states=inputs["encoder_hidden_states"]).sample
        latents = latents - noise / 8

print(vmoba_compile.report(fast))
