import torch

import attncc


def attention(q, k, v):  # a causal window of 256 keys, and a penalty for distance
    i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 - 0.1 * (i - j)
    return scores.masked_fill((j > i) | (i - j >= 256), float("-inf")).softmax(-1) @ v


q, k, v = torch.randn(3, 1, 8, 2048, 64)
fast = torch.compile(attention, backend="attncc")
print("largest difference:", (fast(q, k, v) - attention(q, k, v)).abs().max().item())
print(attncc.explain(attention, q, k, v))
