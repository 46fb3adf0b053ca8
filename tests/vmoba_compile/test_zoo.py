"""The named models: their shapes, and the precision in which their weights are made."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vmoba_compile
from vmoba_compile.zoo import PRESETS, preset

pytest.importorskip("diffusers")


class Made(TorchDispatchMode):
    """Numbers of elements of the float32 tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.sizes.add(result.numel())
        return result


@pytest.mark.parametrize("as_loaded", [False, True])
def test_weights_are_made_in_their_dtype(as_loaded):
    with Made() as made:
        model, inputs = preset("wan2.1-1.3b").build(dtype=torch.bfloat16, as_loaded=as_loaded, num_layers=1)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    large = max(p.numel() for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} | ({torch.float32} if as_loaded else set())
    assert ("blocks.0.norm2.weight" in kept, "blocks.0.attn1.norm_q.weight" in kept) == (as_loaded, False)
    assert {b.dtype for b in model.buffers()} == {torch.float32 if as_loaded else torch.bfloat16}
    assert large not in made.sizes, "a weight was made in float32 first"
    assert inputs["hidden_states"].dtype == torch.bfloat16 and torch.get_default_dtype() == torch.float32


def test_rotary_tables_stay_as_pipelines_make_them():
    for as_loaded in (False, True):
        _, inputs = preset("tiny-cogvideox1.5").build(dtype=torch.bfloat16, as_loaded=as_loaded)
        assert inputs["image_rotary_emb"][0].dtype == (torch.float32 if as_loaded else torch.bfloat16)


def test_a_failing_model_leaves_the_default_dtype():
    with pytest.raises(TypeError):
        preset("tiny-wan").build(dtype=torch.bfloat16, no_such_option=1)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("tiny-")])
def test_small_models_run_as_loaded(name):
    model, inputs = preset(name).build(device="cpu", dtype=torch.bfloat16, as_loaded=True)
    with torch.no_grad():
        output = model.eval()(**inputs).sample
    assert output.dtype == torch.bfloat16 and output.shape == inputs["hidden_states"].shape


def test_patches_of_two_frames():
    """CogVideoX 1.5: 22 latent frames make 11 of tokens, behind 226 tokens of text."""
    torch._dynamo.reset()
    model, inputs = preset("cogvideox1.5-5b").build(num_layers=1)
    (site,) = vmoba_compile.explain(model, **inputs).rewritten
    assert (site.grid, site.prefix, site.heads, site.tokens) == ((11, 48, 85), 226, 48, 226 + 11 * 48 * 85)
