"""Forms with more than one softmax a product, or more than one head a score, and what is near them and is none."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from zoo.case import Case
from zoo.heads import SCALE
from zoo.spellings import CAUSAL, D, Extra, H, N, Q, attend, randoms


def differential(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Two softmaxes over halves of the heads' widths, the second one times a learned number, then a norm."""
    first, second = ((q[..., p] @ k[..., p].mT * (D / 2) ** -0.5) for p in (slice(0, D // 2), slice(D // 2, D)))
    hidden = ~extra["mask"]
    a, b = (s.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype) for s in (first, second))
    factor = extra["lam"][0].exp() - extra["lam"][1].exp() + 0.2
    return F.rms_norm((a - factor * b) @ v, (D,)) * 0.8


def mixed_twice(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Layers over heads before and after the softmax."""
    scores = F.linear((q * SCALE @ k.mT).permute(0, 2, 3, 1), extra["before"], extra["bias"]).permute(0, 3, 1, 2)
    weights = F.linear(scores.softmax(-1).permute(0, 2, 3, 1), extra["after"]).permute(0, 3, 1, 2)
    return weights @ v


def mixed_by_convolution(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    weights = (q @ k.mT * SCALE).masked_fill(~extra["mask"], -torch.inf).softmax(-1)
    return F.conv2d(weights, extra["mix"][:, :, None, None]) @ v


def gated_weights(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """A gate for each row, before the values."""
    return ((q @ k.mT * SCALE).softmax(-1) * torch.sigmoid(q @ extra["gate"])[..., None]) @ v


def joint_heads(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """One score for all heads: a product over heads and components."""
    weights = (torch.einsum("bhid,bhjd->bij", q, k) * SCALE).softmax(-1)
    return torch.einsum("bij,bhjd->bhid", weights, v)


def two_products(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """One softmax, two sets of values."""
    weights = (q @ k.mT * SCALE).softmax(-1)
    return weights @ v - 0.5 * (weights @ v.tanh())


def stable_plus_one(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = q @ k.mT * SCALE
    high = scores.amax(-1, keepdim=True)
    p = torch.exp(scores - high)
    return p / (p.sum(-1, keepdim=True) + torch.exp(-high)) @ v


def one_added_after(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    p = torch.exp(q @ k.mT * SCALE)
    return (p @ v) / (1 + p.sum(-1, keepdim=True))


def assigned(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = q @ k.mT * SCALE
    scores[(~extra["mask"]).expand(scores.shape)] = -math.inf
    return scores.softmax(-1) @ v


def product_of_softmaxes(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return ((q @ k.mT).softmax(-1) * (k @ q.mT).softmax(-1)) @ v


def mixed_over_queries(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return torch.einsum("bhij,ig->bhgj", (q @ k.mT * SCALE).softmax(-1), extra["smooth"]) @ v


def mixed_after_a_bend(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Heads mixed after a soft-cap: the mixture is no product any more."""
    scores = torch.einsum("bhij,hg->bgij", torch.tanh(q @ k.mT * SCALE), extra["mix"])
    return scores.softmax(-1) @ v


def other_sum_after(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """The sum is that of other exponentials."""
    scores = q @ k.mT * SCALE
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (p @ v) / p.sum(-2).unsqueeze(-1)


def sum_with_its_maximum(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """A small number beside exponentials of differences is no constant logit."""
    scores = q @ k.mT * SCALE
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    return p / (p.sum(-1, keepdim=True) + 0.1) @ v


WIDE = (torch.float32, torch.bfloat16)
MASK = {"mask": CAUSAL}
MIX = {"mix": randoms(H, H)}
def routed_values(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Keys and values scaled by a softmax of their own (soft routing of regions)."""
    scale = (q.mean(2, keepdim=True) @ k.mT).softmax(-1).mT
    return (q @ (k * scale).mT * SCALE).softmax(-1) @ (v * scale)


def normalised_values(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return (q @ k.mT * SCALE).softmax(-1) @ v.softmax(-2)


JOINT = (
    Case("routed-values", attend(routed_values), 1, "values scaled by another softmax", golden=1, refused=1),
    Case("normalised-values", attend(normalised_values), 1, "values that are a softmax", refused=1),
    Case("differential", attend(differential, lam=randoms(2), **MASK), 2, "two softmaxes, a learned difference",
         dtypes=WIDE, golden=1, backward=True),
    Case("mixed-twice", attend(mixed_twice, before=randoms(H, H), bias=randoms(H), after=randoms(H, H)), 1,
         "layers over heads around the softmax", dtypes=WIDE, golden=0, backward=True),
    Case("mixed-by-convolution", attend(mixed_by_convolution, **MIX, **MASK), 1, "heads mixed by a 1 x 1 convolution"),
    Case("gated-weights", attend(gated_weights, gate=randoms(D)), 1, "a gate between softmax and values", golden=0),
    Case("joint-heads", attend(joint_heads), 1, "two summed axes", golden=0),
    Case("two-products", attend(two_products), 2, "one softmax, two sets of values"),
    Case("stable-plus-one", attend(stable_plus_one), 1, "a sink of zero beside subtracted maxima"),
    Case("one-added-after", attend(one_added_after), 1, "a sink of zero, divided after the values"),
    Case("assigned", attend(assigned, **MASK), 1, "a mask by assignment", golden=0),
    Case("product-of-softmaxes", attend(product_of_softmaxes), 0, "no sum of softmaxes", refused=2),
    Case("mixed-over-queries", attend(mixed_over_queries, smooth=randoms(N, N)), 0, "rows mixed, not heads", refused=1),
    Case("mixed-after-a-bend", attend(mixed_after_a_bend, **MIX), 0, "heads mixed after a bend", refused=1),
    Case("other-sum-after", attend(other_sum_after), 1, "divided by another sum", kept=1),
    Case("sum-with-its-maximum", attend(sum_with_its_maximum), 1, "the denominator is no sink", kept=1),
)  # fmt: skip
