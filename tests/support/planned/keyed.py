"""A language model whose attention is known: one head sees the token itself, one finds a key at any distance."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FILLERS, VALUES = 24, 8
#: Token numbers: fillers, then one token `key v` for each value v, then the question.
VOCABULARY = FILLERS + VALUES + 1
QUESTION = VOCABULARY - 1


class Keyed(nn.Module):
    """(batch, n) tokens -> (batch, n, vocabulary). Head 0 looks at near tokens by position, head 1 answers a question
    by the value of the key token, wherever that stands; nothing is learnt: what each head needs is certain."""

    def __init__(self, length: int = 512, layers: int = 1) -> None:
        super().__init__()
        self.length = length
        self.blocks = nn.ModuleList(Block(length) for _ in range(layers))
        self.register_buffer("strength", torch.tensor(6.0))

    def forward(self, tokens: Tensor) -> Tensor:
        found = torch.zeros(*tokens.shape, VOCABULARY)
        for block in self.blocks:
            found = found + block(tokens)
        return self.strength * found


class Block(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        angle = torch.arange(length)[:, None] * 0.8 ** torch.arange(16)[None] * 0.5
        place = torch.cat([angle.sin(), angle.cos()], -1)
        asks = torch.zeros(VOCABULARY, 32)
        asks[QUESTION, 0] = 30.0
        keys = torch.zeros(VOCABULARY, 32)
        keys[FILLERS:QUESTION, 0] = 1.0
        self.place = nn.Parameter(place)
        self.asks, self.keys = nn.Parameter(asks), nn.Parameter(keys)
        self.values = nn.Parameter(torch.eye(VOCABULARY))

    def forward(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        near = self.place[:n].expand(len(tokens), -1, -1)
        q = torch.stack([near * 1.2, self.asks[tokens]], 1)
        k = torch.stack([near, self.keys[tokens]], 1)
        values = self.values[tokens]
        value_of_key = values * (tokens >= FILLERS)[..., None] * (tokens != QUESTION)[..., None]
        v = torch.stack([values * (tokens < FILLERS)[..., None], value_of_key], 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        answered = out[:, 1] * (tokens == QUESTION)[..., None] * 4.0
        return out[:, 0] + answered


def sample(seed: int, length: int = 512) -> Tensor:
    """(1, length) tokens: fillers, a key in the first half, the question at the end."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, FILLERS, (1, length), generator=g)
    place = int(torch.randint(length // 16, length // 2, (1,), generator=g))
    tokens[0, place] = FILLERS + int(torch.randint(0, VALUES, (1,), generator=g))
    tokens[0, -1] = QUESTION
    return tokens


def answer(logits: Tensor) -> int:
    """The value that the model names at the question."""
    return int(logits[0, -1, FILLERS:QUESTION].argmax())


def wanted(tokens: Tensor) -> int:
    return int(tokens[0][tokens[0] >= FILLERS][0]) - FILLERS
