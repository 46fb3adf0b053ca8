"""Speed up a diffusers pipeline: wrap its transformer, call it as ever. The first quarter of the steps is dense by itself.

python examples/optimize_pipeline.py        # a tiny Wan of random weights, on any machine

With the real weights, on a GPU, the same lines are

    pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch_dtype=torch.bfloat16).to("cuda")
    pipe.transformer = vmoba_compile.optimize(pipe.transformer)
    video = pipe("A cat walks on the grass", height=480, width=832, num_frames=81).frames[0]

and for a model that takes long to compile, optimize(pipe.transformer, regional=True). Wan 2.2 has two transformers: wrap
both, and they share the schedule.
"""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

import vmoba_compile
from vmoba_compile import VMoBAConfig
from vmoba_compile.zoo import preset

transformer, inputs = preset("tiny-wan").build(device="cpu")
pipe = WanPipeline(
    tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler()
)

# On a tiny model everything is below min_tokens; inner="eager" runs without a C++ compiler.
pipe.transformer = vmoba_compile.optimize(pipe.transformer, VMoBAConfig(min_tokens=0, dense_steps=0.25), inner="eager")


def tell(pipe, step, timestep, values):
    print(f"step {step}: {'dense' if pipe.transformer.is_dense() else 'sparse'}")
    return values


text = inputs["encoder_hidden_states"][:1]
latents = pipe(
    prompt_embeds=text, negative_prompt_embeds=torch.zeros_like(text), height=96, width=128, num_frames=13,
    num_inference_steps=8, output_type="latent", callback_on_step_end=tell,
).frames  # fmt: skip

print(f"latents {tuple(latents.shape)}")
print(vmoba_compile.report(pipe.transformer))
