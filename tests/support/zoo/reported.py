"""Forms that were reported as missed: sinks and guards in other spellings, weights of several softmaxes, sums of rows
used beside the output."""

from __future__ import annotations

import torch

from zoo.case import Case
from zoo.heads import SCALE
from zoo.spellings import PAD, Extra, H, N, Q, attend

LOGITS = {"logits": torch.linspace(-1.0, 2.0, H).view(H, 1, 1)}
SEEN = {"seen": torch.arange(N)[:, None] > torch.arange(N)[None] + 3}  # the first rows see nothing


def floored(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """The maximum of scores and sink, and what that leaves of both."""
    scores, sink = q @ k.mT * SCALE, extra["logits"]
    highest = torch.maximum(scores.amax(-1, keepdim=True), sink)
    e = (scores - highest).exp()
    return (e / (e.sum(-1, keepdim=True) + (sink - highest).exp())) @ v


def floored_late(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """The same under a mask, divided after the product; rows that see nothing give zero."""
    scores, sink = (q @ k.mT * SCALE).masked_fill(~extra["seen"], -torch.inf), extra["logits"]
    highest = torch.maximum(scores.amax(-1, keepdim=True), sink)
    e = (scores - highest).exp()
    return (e @ v) / (e.sum(-1, keepdim=True) + torch.exp(sink - highest))


def one_more_late(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """A softmax of one more than the sum, divided after the product."""
    scores = q @ k.mT * SCALE
    highest = scores.amax(-1, keepdim=True).clamp(min=0)
    e = (scores - highest).exp()
    return (e @ v) / (e.sum(-1, keepdim=True) + (-highest).exp())


def beside_a_number(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = q @ k.mT * SCALE
    highest = scores.max(-1, keepdim=True).values
    e = (scores - highest).exp()
    return (e / (e.sum(-1, keepdim=True) + (0.5 - highest).exp())) @ v


def other_maximum(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """What is added is no exponential less the same number: the sum is another one."""
    scores, sink = q @ k.mT * SCALE, extra["logits"]
    largest = scores.amax(-1, keepdim=True)
    e = (scores - torch.maximum(largest, sink)).exp()
    return (e / (e.sum(-1, keepdim=True) + (sink - largest).exp())) @ v


def all_infinite(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = (q @ k.mT * SCALE).masked_fill(~extra["seen"], -torch.inf)
    return scores.softmax(-1).masked_fill(scores.isinf().all(-1, keepdim=True), 0.0) @ v


def bits(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Masks of integers, and a guard that asks them."""
    real = extra["pad"].long()
    seen = (real[:, None, :, None] & real[:, None, None, :]) ^ 0
    weights = (q @ k.mT * SCALE).masked_fill(seen == 0, -torch.inf).softmax(-1)
    return weights.masked_fill(~(seen != 0).any(-1, keepdim=True), 0.0) @ v


def counted(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """A guard that counts the keys of a mask of integers."""
    seen = extra["pad"].int()[:, None, None] & torch.ones(N, N, dtype=torch.int32).tril(-2)
    weights = (q @ k.mT * SCALE).masked_fill(seen == 0, -torch.inf).softmax(-1)
    return weights.masked_fill(~(seen.sum(-1, keepdim=True) > 0), 0.0) @ v


def highest_of_mask(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    seen = extra["pad"].bool()[:, None, None] & torch.ones(N, N).tril(-2).bool()
    weights = (q @ k.mT * SCALE).masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.where(seen.int().amax(-1, keepdim=True) == 0, 0.0, weights) @ v


def more_than_one(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Not the guard of rows without a key: one key alone is zeroed too."""
    seen = extra["seen"]
    weights = (q @ k.mT * SCALE).masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.where(seen.sum(-1, keepdim=True) > 1, weights, 0.0) @ v


def padded_queries(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    real = extra["pad"].bool()
    scores = (q @ k.mT * SCALE).masked_fill(~real[:, None, None], -1e9)
    return scores.softmax(-1).masked_fill(~real[:, None, :, None], 0.0) @ v


def padded_rows(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """The same under -inf: rows that are not zeroed and see no key are NaN."""
    real = extra["pad"].bool()
    seen = real[:, None, None] & torch.ones(N, N).tril(-1).bool()
    weights = (q @ k.mT * SCALE).masked_fill(~seen, -torch.inf).softmax(-1)
    return weights.masked_fill(~real[:, None, :, None], 0.0) @ v


def sums_beside(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """The sums of the rows are used before the values are there, which do not depend on them."""
    scores = q @ k.mT * SCALE
    gate = torch.logsumexp(scores, -1, keepdim=True).sigmoid()
    return (scores.softmax(-1) @ (v * 2).sin()) * gate


def three_ranges(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Softmaxes over near, past and all keys, mixed by gates of the query before one product."""
    at, scores = torch.arange(N), q @ k.mT * SCALE
    gates = torch.stack([q.mean(-1), q.amax(-1), q.amin(-1)], -1).softmax(-1)[..., None]
    past = scores.masked_fill(at[:, None] < at, -1e9).softmax(-1)
    near = scores.masked_fill((at[:, None] - at).abs() > 4, -1e9).softmax(-1)
    return (gates[..., 0, :] * past + gates[..., 1, :] * near + gates[..., 2, :] * scores.softmax(-1)) @ v


PADDED = {"pad": PAD}
REPORTED = (
    Case("floored-sink", attend(floored, **LOGITS), 1, "a sink in the maximum"),
    Case("floored-sink-late", attend(floored_late, **LOGITS, **SEEN), 1, "the same, divided late"),
    Case("one-more-late", attend(one_more_late), 1, "one more than the sum, divided late"),
    Case("sink-number", attend(beside_a_number), 1, "a sink that is a number"),
    Case("other-maximum", attend(other_maximum, **LOGITS), 1, "no sink", kept=1),
    Case("all-infinite", attend(all_infinite, **SEEN), 1, "a guard that asks the scores"),
    Case("bits", attend(bits, **PADDED), 1, "masks of integers"),
    Case("counted", attend(counted, **PADDED), 1, "a guard that counts"),
    Case("highest-of-mask", attend(highest_of_mask, **PADDED), 1, "a guard by the highest"),
    Case("more-than-one", attend(more_than_one, **SEEN), 1, "rows that are zeroed by a count"),
    Case("padded-queries", attend(padded_queries, **PADDED), 1, "weights zeroed for queries"),
    Case("padded-rows", attend(padded_rows, **PADDED), 1, "the same, some without a key"),
    Case("sums-beside", attend(sums_beside), 1, "sums of rows used early"),
    Case("three-ranges", attend(three_ranges), 3, "three softmaxes before one product", refused=1),
)
