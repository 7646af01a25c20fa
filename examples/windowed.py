"""Attention written by hand: a causal window of 256 keys and a penalty for distance.

    python examples/windowed.py
    attncc inspect examples.windowed:model
"""

import torch

import attncc


class Windowed(torch.nn.Module):
    def forward(self, q, k, v):
        i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 - 0.1 * (i - j)
        scores = scores.masked_fill((j > i) | (i - j >= 256), float("-inf"))
        return scores.softmax(-1) @ v


def model():
    torch.manual_seed(0)
    return Windowed(), tuple(torch.randn(3, 1, 8, 2048, 64))


def main() -> None:
    windowed, qkv = model()
    fast = torch.compile(windowed, backend="attncc")
    with torch.no_grad():
        print("largest difference:", (fast(*qkv) - windowed(*qkv)).abs().max().item())
        print(attncc.explain(windowed, *qkv))


if __name__ == "__main__":
    main()
