"""Guards against rows that see nothing, around a softmax: what becomes of its NaN."""

from __future__ import annotations

import math

import torch

from zoo.spellings import HALF, LATE, Core, D, Extra, Q, case, randoms


def safe_softmax(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = (q @ k.mT * D**-0.5).masked_fill(~extra["mask"], -torch.inf)
    weights = torch.softmax(scores, -1)
    return torch.where(extra["mask"].any(-1, keepdim=True), weights, 0.0) @ v


def nan_to_num(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = (q @ k.mT * D**-0.5).masked_fill(~extra["mask"], -torch.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


def masked_again(value: float) -> Core:
    def core(q: Q, k: Q, v: Q, extra: Extra) -> Q:
        hidden = extra["mask"].logical_not()
        return (q @ k.mT * D**-0.5).masked_fill(hidden, value).softmax(-1).masked_fill(hidden, 0.0) @ v

    return core


def times_the_mask(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = (q @ k.mT * D**-0.5).masked_fill(extra["mask"] == 0, -1e9)
    return (scores.softmax(-1) * extra["mask"]) @ v


def decomposed(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """What torch.export decomposes `scaled_dot_product_attention` to, with a bias that hides as well."""
    fill = torch.scalar_tensor(-math.inf, dtype=q.dtype), torch.scalar_tensor(0.0, dtype=q.dtype)
    bias = torch.where(extra["mask"], fill[1], fill[0]) + extra["bias"]
    root = D**-0.25
    q, k, v = (x.flatten(0, 1) for x in (q * root, k * root, v))
    scores = torch.bmm(q, k.mT).unflatten(0, (2, -1)) + bias
    weights = torch.ops.aten._softmax(scores, -1, False)
    seen = torch.logical_not(scores == -math.inf).any(-1, True)
    weights = torch.where(torch.logical_not(seen), torch.full_like(weights, 0), weights)
    return torch.bmm(weights.flatten(0, 1), v).unflatten(0, (2, -1))


def all_hidden(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = (q @ k.mT * D**-0.5).masked_fill(~extra["mask"], -torch.inf)
    return scores.softmax(-1).masked_fill((~extra["mask"]).all(-1, keepdim=True), 0.0) @ v


def lowest_maximum(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = (q @ k.mT * D**-0.5).masked_fill(~extra["mask"], -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return torch.where((scores.amax(-1) == -math.inf).unsqueeze(-1), 0.0, weights) @ v


def of_other_scores(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Zero where another softmax would see nothing."""
    scores = (q @ k.mT * D**-0.5).masked_fill(~extra["mask"], -torch.inf)
    others = scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == 0, -torch.inf)
    return scores.softmax(-1).masked_fill((others == -math.inf).all(-1, keepdim=True), 0.0) @ v


GUARDS = (
    case("safe-softmax", safe_softmax, "rows that see nothing are zero", extra={"mask": LATE}, golden=0),
    case("nan-to-num", nan_to_num, "rows that see nothing are zero", extra={"mask": LATE}),
    case("masked-again", masked_again(-math.inf), "rows that see nothing are zero", extra={"mask": LATE}, golden=0),
    case("masked-again-1e9", masked_again(-1e9), "rows that see nothing are zero", extra={"mask": LATE}),
    case("times-the-mask", times_the_mask, "rows that see nothing are zero", extra={"mask": LATE}, golden=0),
    case("decomposed-sdpa", decomposed, "rows that see nothing are zero", dtypes=HALF, golden=0,
         extra={"mask": LATE, "bias": randoms(21, 21)}),
    case("all-hidden", all_hidden, "rows that see nothing are zero", extra={"mask": LATE}, dynamic=True),
    case("lowest-maximum", lowest_maximum, "rows that see nothing are zero", dtypes=HALF, extra={"mask": LATE}),
    case("guard-of-others", of_other_scores, "the guard asks for other scores", kept=1, extra={"mask": LATE}),
)
