"""Modules that need more than q, k and v: caches, gates, linear attentions, and what must be refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from zoo.case import Case, Made, lively
from zoo.spellings import N, x
from zoo.text import LLAMA, tokens

WIDTH = 32


class Decoding(nn.Module):
    """One step against a static cache: write in place, see what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("keys", torch.randn(2, 4, 32, 8))
        self.register_buffer("values", torch.randn(2, 4, 32, 8))

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(2, -1, 3, 4, 8).permute(2, 0, 3, 1, 4)
        self.keys.index_copy_(2, position, k)
        self.values.index_copy_(2, position, v)
        seen = torch.arange(32)[None] <= position[:, None]
        out = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=seen)
        return out.transpose(1, 2).flatten(2)


class DecodingByIndex(Decoding):
    """The same with the cache assigned to at positions, and grouped heads."""

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(2, -1, 3, 4, 8).permute(2, 0, 3, 1, 4)
        self.keys[:, :, position], self.values[:, :, position] = k, v
        seen = (torch.arange(32)[None] <= torch.arange(32)[:, None])[None, None, position]
        keys, values = (x[:, :2].repeat_interleave(2, dim=1) for x in (self.keys, self.values))
        own = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=seen)
        return (own + F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)).transpose(1, 2).flatten(2)


class LinearAttention(nn.Module):
    """phi(q) (phi(k)^T [v, 1]), normalised by the column of ones."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        state = F.relu(k).mT @ F.pad(v, (0, 1), value=1.0)
        out = F.relu(q) @ state
        return out[..., :-1] / (out[..., -1:] + 1e-6)


class GlobalContext(nn.Module):
    """One learned query pools the tokens; the pooled value is added to each."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.change = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.query(x).softmax(1)
        return x + self.change(weights.mT @ x)


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.up(F.relu(self.down(x.mean(1, keepdim=True)))).sigmoid()


class Router(nn.Module):
    """Softmax over experts, top two of them, and a weighted sum."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 4), nn.Parameter(torch.empty(4, WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        kept = torch.zeros(*x.shape[:-1], 4, dtype=x.dtype).scatter(-1, chosen, weights)
        return torch.einsum("bnd,edf,bne->bnf", x, self.experts, kept)


class Branches(nn.Module):
    """Selective kernels: softmax over two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.Conv1d(WIDTH, WIDTH, 5, padding=2)
        self.choose = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.stack([self.near(x.mT), self.far(x.mT)], 1)
        weights = self.choose(both.sum(1).mean(-1)).view(-1, 2, WIDTH, 1).softmax(1)
        return (both * weights).sum(1)


class Sampling(nn.Module):
    """Softmax over a few sampling points."""

    def __init__(self) -> None:
        super().__init__()
        self.offset, self.weight = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = (self.offset(x).sigmoid() * (N - 1)).long()[..., None].expand(-1, -1, -1, WIDTH)
        points = x[:, None].expand(-1, N, -1, -1).gather(2, at)
        return (self.weight(x).softmax(-1)[..., None] * points).sum(2)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.mean(1)).softmax(-1)


class PseudoInverse(nn.Module):
    """Six steps towards the inverse of a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = (self.project(x) @ x.mT * 0.1).softmax(-1)
        inverse, one = a.mT / a.abs().sum(-2).amax(), torch.eye(N, dtype=x.dtype)
        for _ in range(3):
            step = a @ inverse
            inverse = 0.25 * inverse @ (13 * one - step @ (15 * one - step @ (7 * one - step)))
        return inverse


class ChangedWeights(nn.Module):
    """The weights are returned, and changed in place after their use."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = (self.project(x) @ x.mT * 0.2).softmax(-1)
        out = weights @ x
        weights[..., 0] = 0.0
        return out, weights


class Slots(nn.Module):
    """Softmax over the queries, not the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.empty(5, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = (self.slots @ x.mT * WIDTH**-0.5).softmax(1) + 1e-6
        return weights / weights.sum(-1, keepdim=True) @ x


class Outlook(nn.Module):
    """Logits from a linear layer, over unfolded values."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.values = nn.Linear(WIDTH, 4 * 3), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        near = F.pad(self.values(x), (0, 0, 1, 1)).unfold(1, 3, 1).reshape(-1, N, 4, 8, 3)
        weights = self.logits(x).view(-1, N, 4, 3).softmax(-1)
        return torch.einsum("bnhk,bnhck->bnhc", weights, near).flatten(2)


class Outlook2d(nn.Module):
    """Outlook attention of VOLO: 3 x 3 windows around each pixel, their outputs summed."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.logits = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 4 * 9 * 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, h, w, _ = x.shape
        near = F.unfold(self.values(x).permute(0, 3, 1, 2), 3, padding=1).view(b, 4, 8, 9, h * w).permute(0, 1, 4, 3, 2)
        logits = self.logits(x).view(b, h * w, 4, 9, 9).permute(0, 2, 1, 3, 4) * 8**-0.5
        out = (logits.softmax(-1) @ near).permute(0, 1, 4, 3, 2).reshape(b, WIDTH * 9, h * w)
        return F.fold(out, (h, w), 3, padding=1)


class Unnormalised(nn.Module):
    """Weights that are a function of the scores, and no softmax."""

    def __init__(self, weigh: Callable[..., torch.Tensor], **settings: Any) -> None:
        super().__init__()
        self.qkv, self.weigh, self.settings = nn.Linear(WIDTH, 3 * WIDTH // 4), weigh, settings

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.weigh(q @ k.mT, **self.settings) @ v


class Efficient(nn.Module):
    """Efficient attention (Shen et al.): softmax(q) (softmax(k)^T v)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH // 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return q.softmax(-1) @ (k.softmax(1).mT @ v)


class BlockGates(nn.Module):
    """Channel and spatial gates of CBAM."""

    def __init__(self) -> None:
        super().__init__()
        self.channel, self.place = nn.Linear(WIDTH, WIDTH), nn.Conv1d(2, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.channel(x.mean(1, keepdim=True)) + self.channel(x.amax(1, keepdim=True))
        x = x * pooled.sigmoid()
        return x * self.place(torch.stack([x.mean(-1), x.amax(-1)], 1)).sigmoid().mT


class GatedDelta(nn.Module):
    """A recurrence over tokens with a decay and a delta rule."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.rate = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        k = F.normalize(k, dim=-1)
        decay, beta = self.rate(x).sigmoid().unbind(-1)
        state, outs = x.new_zeros(x.shape[0], WIDTH, WIDTH), []
        for t in range(6):
            state = state * decay[:, t, None, None]
            error = v[:, t] - torch.einsum("bkv,bk->bv", state, k[:, t])
            state = state + beta[:, t, None, None] * k[:, t, :, None] * error[:, None]
            outs.append(torch.einsum("bkv,bk->bv", state, q[:, t]))
        return torch.stack(outs, 1)


def of(module: Callable[[], nn.Module], *arguments: Any) -> Callable[[], Made]:
    return lambda: (lively(module()), (x(), *arguments), {})


def outlook_2d() -> Made:
    return lively(Outlook2d()), (torch.randn(2, 5, 6, WIDTH, generator=torch.Generator().manual_seed(4)),), {}


def decoding(kind: type[Decoding], count: int) -> Callable[[], Made]:
    def make() -> Made:
        torch.manual_seed(3)
        return lively(kind()), (x(count), torch.arange(17, 17 + count)), {}

    return make


def llama_decoding(kind: str) -> Callable[[], Made]:
    """One token after twelve, against a cache of transformers."""

    def make() -> Made:
        config = transformers.LlamaConfig(**LLAMA)
        config._attn_implementation = "sdpa"
        model = lively(transformers.LlamaModel(config))
        static = kind == "static"
        cache = transformers.StaticCache(config=config, max_cache_len=32) if static else transformers.DynamicCache()
        with torch.no_grad():
            model(input_ids=tokens(12), past_key_values=cache, use_cache=True)
        return model, (), {"input_ids": tokens(1, seed=8), "past_key_values": cache, "use_cache": True}

    return make


OTHERS = (
    Case("decoding", decoding(Decoding, 1), 1, "a static cache written in place", golden=0),
    Case("decoding-by-index", decoding(DecodingByIndex, 1), 2, "cache[:, :, position] = k", golden=0),
    Case("prefill-by-index", decoding(DecodingByIndex, 5), 2, "several tokens at once", dynamic=True),
    Case("llama-static-cache", llama_decoding("static"), 2, "decode against a static cache", golden=0),
    Case("llama-dynamic-cache", llama_decoding("dynamic"), 2, "decode against a growing cache"),
    Case("linear-attention", of(LinearAttention), 1, "relu features and a ones column", kept=1, golden=0),
    Case("gated-delta", of(GatedDelta), 1, "a recurrence, unrolled", kept=1, golden=0),
    Case("squeeze-excite", of(SqueezeExcite), 1, "a gate", kept=1),
    Case("global-context", of(GlobalContext), 0, "pooling by one learned query: no keys", refused=1),
    Case("outlook", of(Outlook), 1, "logits from a layer over windows of values", golden=0),
    Case("outlook-2d", outlook_2d, 1, "as published: windows attend to windows, folded back", golden=0),
    Case("l1-norm", of(lambda: Unnormalised(F.normalize, p=1.0, dim=-1)), 0, "weights by the L1 norm", refused=1),
    Case("atan-weights", of(lambda: Unnormalised(torch.atan)), 0, "a function without a rule", refused=1),
    Case("dot-product", of(lambda: Unnormalised(torch.mul, other=1 / N)), 1, "no normaliser at all", kept=1, golden=0),
    Case("efficient", of(Efficient), 1, "softmaxes over channels and over tokens", kept=1, golden=0),
    Case("gates", of(BlockGates), 2, "channel and spatial gates", kept=2),
    Case("router", of(Router), 0, "experts", refused=1),
    Case("branches", of(Branches), 0, "branches", refused=1),
    Case("sampling", of(Sampling), 0, "sampling points", refused=1),
    Case("classifier", of(Classifier), 0, "classes", refused=1),
    Case("pseudo-inverse", of(PseudoInverse), 1, "the weights are iterated on", kept=1),
    Case("changed-weights", of(ChangedWeights), 1, "weights changed in place", kept=1),
    Case("slots", of(Slots), 0, "softmax over queries", refused=1),
)  # fmt: skip
