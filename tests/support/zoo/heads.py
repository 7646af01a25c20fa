"""Heads that listen to each other: mixed before the softmax, after it, beside themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from zoo.case import Case
from zoo.spellings import CAUSAL, D, Extra, H, N, Q, attend, randoms

SCALE = D**-0.5
MASK = {"mask": CAUSAL}
WIDE = (torch.float32, torch.bfloat16)


def talking_before(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = torch.einsum("bhij,hg->bgij", q @ k.mT * SCALE, extra["mix"])
    return scores.softmax(-1) @ v


def talking_after(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    weights = (q @ k.mT * SCALE).softmax(-1)
    return torch.einsum("bhij,hg->bgij", weights, extra["mix"]) @ v


def talking_twice_to_one_query(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Class attention: one token attends, heads mixed before and after the softmax."""
    scores = torch.einsum("bhij,hg->bgij", q[:, :, :1] @ k.mT * SCALE, extra["mix"])
    weights = torch.einsum("bhij,hg->bgij", scores.softmax(-1), extra["mix"].T)
    return (weights @ v).expand(-1, -1, q.shape[2], -1)


def talking_with_biases(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Position biases before the heads are mixed by convolutions of one tap, which add biases of their own."""
    scores = F.conv2d(q @ k.mT * SCALE + extra["bias"], extra["taps"], extra["shift"])
    return F.conv2d(scores.softmax(-1), extra["taps"], extra["shift"]) @ v


def talking_and_residual(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Mixed scores beside the scores themselves, biases and a mask around, the same again after the softmax."""
    scores = q @ k.mT * SCALE + extra["bias"]
    scores = 0.7 * scores + F.conv2d(scores, extra["taps"], extra["shift"])
    weights = scores.masked_fill(~extra["mask"], torch.finfo(q.dtype).min).softmax(-1)
    return (weights + F.conv2d(weights, extra["taps"])) @ v


def talking_in_turn(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """One mixture after another, and what all heads have in common."""
    scores = q @ k.mT * SCALE
    scores = scores + torch.einsum("bhij,hg->bgij", scores, extra["mix"]) + scores.mean(1, keepdim=True)
    return F.linear(scores.movedim(1, -1), extra["mix"]).movedim(-1, 1).softmax(-1) @ v


def talking_by_query(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Which heads listen to which depends on the query (Xiao et al., 2024: arXiv 2405.08553)."""
    scores = q @ k.mT * SCALE
    mix = torch.tanh(torch.einsum("bhid,dg->bhig", q, extra["mix"]))
    return (scores + torch.einsum("bhij,bhig->bgij", scores, mix)).softmax(-1) @ v


def talking_and_normalised(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Mixed heads normalised over heads: no weighted sum of softmaxes any more."""
    weights = torch.einsum("bhij,hg->bgij", (q @ k.mT * SCALE).softmax(-1), extra["mix"])
    return F.layer_norm(weights.movedim(1, -1), (H,)).movedim(-1, 1) @ v


HEADS = (
    Case("talking-before", attend(talking_before, mix=randoms(H, H)), 1, "heads mixed before the softmax", dtypes=WIDE,
         golden=0),
    Case("talking-after", attend(talking_after, mix=randoms(H, H)), 1, "heads mixed after the softmax", dtypes=WIDE,
         golden=0, backward=True),
    Case("talking-to-one-query", attend(talking_twice_to_one_query, mix=randoms(H, H)), 1,
         "class attention", dtypes=WIDE),
    Case("talking-with-biases", attend(talking_with_biases, bias=randoms(H, N, N), taps=randoms(H, H, 1, 1),
         shift=randoms(H)), 1, "biases before and after the mixture", dtypes=WIDE, golden=0, backward=True),
    Case("talking-residual", attend(talking_and_residual, bias=randoms(H, N, N), taps=randoms(H, H, 1, 1),
         shift=randoms(H), **MASK), 2, "heads mixed beside themselves", dtypes=WIDE, golden=0, backward=True),
    Case("talking-in-turn", attend(talking_in_turn, mix=randoms(H, H)), 1, "mixtures of mixtures", dtypes=WIDE,
         dynamic=True),
    Case("talking-by-query", attend(talking_by_query, mix=randoms(D, H)), 1, "a mixture for each query", dtypes=WIDE),
    Case("talking-normalised", attend(talking_and_normalised, mix=randoms(H, H)), 0, "heads normalised", refused=1),
)  # fmt: skip
