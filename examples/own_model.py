"""Train and sample a video transformer of one's own, its attention found in the graph: the model does not name VMoBA.

python examples/own_model.py
"""

import torch
from torch import nn

import vmoba_compile
from vmoba_compile import VMoBAConfig


class VideoTransformer(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.patch = nn.Conv3d(3, width, (1, 2, 2), (1, 2, 2))
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.unpatch = nn.ConvTranspose3d(width, 3, (1, 2, 2), (1, 2, 2))

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        grid = self.patch(video)
        x = grid.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.unpatch(x.transpose(1, 2).unflatten(2, grid.shape[2:]))


torch.manual_seed(0)
model = VideoTransformer()
# On a GPU, with videos of ten thousand tokens or more: fast = vmoba_compile.optimize(model)
fast = vmoba_compile.optimize(model, VMoBAConfig(min_tokens=0), inner="aot_eager", expect=1)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(10):
    clip, noise = torch.randn(2, 1, 3, 8, 16, 16)
    loss = (fast(torch.lerp(clip, noise, torch.rand(()))) - (noise - clip)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")

video = torch.randn(1, 3, 8, 16, 16)
with torch.no_grad():
    # The first quarter of the steps is dense, as weights want it that were trained dense; for others, dense_steps=0.
    for _ in fast.schedule(50):
        video = video - fast(video) / 50
print(f"sampled a video, standard deviation {video.std():.2f}")

print(vmoba_compile.report(fast))
