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


def several(q: Q, k: Q) -> list[Q]:
    """Softmaxes of the same scores under biases by distance."""
    place = torch.arange(N, dtype=q.dtype)
    distance = (place[:, None] - place[None, :]).abs()
    return [(q @ k.mT * SCALE - by * distance).softmax(-1) for by in (0.0, 0.1, 1.0)]


def stacked(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return torch.stack(several(q, k)).mean(0) @ v


def stacked_and_mixed(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """A learned share of each of the softmaxes."""
    return (torch.stack(several(q, k), -1) * extra["shares"].sigmoid()).sum(-1) @ v


def stacked_and_gated(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Each row has shares of its own (Superlinear attention)."""
    shares = (q @ extra["gate"]).sigmoid()
    return (torch.stack(several(q, k), -1) * shares[..., None, :]).sum(-1) @ v


def values_by_a_sum(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Sums of rows are no state that is carried over time, wherever they are added."""
    powers = (q @ k.mT * SCALE).exp()
    total = powers.sum(-1, keepdim=True)
    return (powers / total) @ (v + total.mean())


def gate_by_written_sums(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """The sums of the rows as an online softmax leaves them: a maximum and a logarithm."""
    scores = q @ k.mT * SCALE
    highest = scores.amax(-1, keepdim=True)
    powers = (scores - highest).exp()
    total = powers.sum(-1, keepdim=True)
    return (powers / total) @ v * (highest + total.log() - 1.0).sigmoid()


def hidden_rows_by_written_sums(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """A row that sees nothing has a sum that is NaN, where `logsumexp` gives -inf."""
    hidden = torch.arange(N)[:, None] < torch.arange(N)[None, :] + 1
    scores = (q @ k.mT * SCALE).masked_fill(hidden, -torch.inf)
    highest = scores.amax(-1, keepdim=True)
    powers = (scores - highest).exp()
    total = powers.sum(-1, keepdim=True)
    return ((powers / total) @ v).nan_to_num() + (highest + total.log()).nan_to_num(1.0, neginf=2.0)


JOINT = (
    Case("hidden-rows-by-written-sums", attend(hidden_rows_by_written_sums), 1, "a sum that is NaN", kept=1),
    Case("gate-by-written-sums", attend(gate_by_written_sums), 1, "sums of rows written out", golden=0, backward=True),
    Case("stacked", attend(stacked), 3, "softmaxes stacked and averaged before one product", backward=True),
    Case("stacked-and-mixed", attend(stacked_and_mixed, shares=randoms(3)), 3, "softmaxes stacked, a share of each"),
    Case("stacked-and-gated", attend(stacked_and_gated, gate=randoms(D, 3)), 3, "softmaxes stacked, gates by row",
         golden=2),
    Case("values-by-a-sum", attend(values_by_a_sum), 1, "values that need the sums of the rows", kept=1),
    Case("routed-values", attend(routed_values), 1, "values scaled by another softmax", golden=1, refused=1),
    Case("normalised-values", attend(normalised_values), 1, "values that are a softmax", refused=1),
    Case("differential", attend(differential, lam=randoms(2), **MASK), 2, "two softmaxes, a learned difference",
         dtypes=WIDE, golden=1, backward=True),
    Case("mixed-twice", attend(mixed_twice, before=randoms(H, H), bias=randoms(H), after=randoms(H, H)), 1,
         "layers over heads around the softmax", dtypes=WIDE, golden=0, backward=True),
    Case("mixed-by-convolution", attend(mixed_by_convolution, **MIX, **MASK), 1, "heads mixed by a 1 x 1 convolution"),
    Case("gated-weights", attend(gated_weights, gate=randoms(D)), 1, "a gate between softmax and values", golden=0),
    Case("joint-heads", attend(joint_heads), 1, "two summed axes", golden=0),
    Case("two-products", attend(two_products), 1, "one softmax, two sets of values: one attention of both"),
    Case("stable-plus-one", attend(stable_plus_one), 1, "a sink of zero beside subtracted maxima"),
    Case("one-added-after", attend(one_added_after), 1, "a sink of zero, divided after the values"),
    Case("assigned", attend(assigned, **MASK), 1, "a mask by assignment", golden=0),
    Case("product-of-softmaxes", attend(product_of_softmaxes), 0, "no sum of softmaxes", refused=2),
    Case("mixed-over-queries", attend(mixed_over_queries, smooth=randoms(N, N)), 0, "rows mixed, not heads", refused=1),
    Case("mixed-after-a-bend", attend(mixed_after_a_bend, **MIX), 0, "heads mixed after a bend", refused=1),
    Case("other-sum-after", attend(other_sum_after), 1, "divided by another sum", kept=1),
    Case("sum-with-its-maximum", attend(sum_with_its_maximum), 1, "the denominator is no sink", kept=1),
)  # fmt: skip
