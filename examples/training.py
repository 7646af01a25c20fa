"""Training: the same line, in train mode. A site is fused where forward and backward together measure faster.

    python examples/training.py
"""

import torch
from torch import Tensor, nn

import attncc


class Block(nn.Module):
    """Causal attention over a window of 128 keys, and a layer."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.inner, self.outer = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, n, width = x.shape
        parts = self.inner(x).view(batch, n, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        i, j = torch.arange(n)[:, None], torch.arange(n)
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        scores = scores.masked_fill((j > i) | (i - j >= 128), float("-inf"))
        return x + self.outer((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


torch.manual_seed(0)
model = nn.Sequential(Block(), Block())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
step = torch.compile(model, backend="attncc")
x, y = torch.randn(2, 512, 256), torch.randn(2, 512, 256)

with attncc.record() as report:
    for n in range(4):
        loss = (step(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {n}: loss {loss.item():.4f}")
print(report)
