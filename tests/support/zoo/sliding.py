"""Sliding windows in chunks, the way long-document encoders write them, and what looks like them and is none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from zoo.case import Case, Made, lively
from zoo.spellings import Attend, Core, Extra, Q, x

W, N = 3, 18
COLUMNS = 2 * W + 1
WIDE = (torch.float32, torch.bfloat16)
Put = Callable[[Q, Q], Q]
Skew = Callable[[Q], Q]


def chunks(x: Q) -> Q:
    """(BH, N / W - 1, 2 W, D): chunks that overlap by half."""
    batch, heads, _, d = x.shape
    x = x.reshape(batch * heads, N // (2 * W), 2 * W, d)
    size, stride = list(x.size()), list(x.stride())
    size[1], stride[1] = size[1] * 2 - 1, stride[1] // 2
    return x.as_strided(size, stride)


def products(q: Q, k: Q) -> Q:
    """(BH, N / W - 1, 2 W, 2 W + 1): scores of chunks, each row one further to the left."""
    return shifted(torch.einsum("bcxd,bcyd->bcxy", chunks(q * q.shape[-1] ** -0.5), chunks(k)))


def scaled_late(q: Q, k: Q) -> Q:
    """The same where chunks are scaled, and not what they were cut from."""
    return shifted(torch.einsum("bcxd,bcyd->bcxy", chunks(q) / q.shape[-1] ** 0.5, 1.25 * chunks(k)))


def shifted(scores: Q) -> Q:
    scores = F.pad(scores, (0, 0, 0, 1))
    return scores.view(*scores.shape[:2], 2 * W, COLUMNS)


def parts(part: Q, into: Q) -> Q:
    """The bands of the chunks, written side by side into (BH, N / W, W, columns)."""
    into[:, :-1, :, W:] = part[:, :, :W, : W + 1]
    into[:, -1, :, W:] = part[:, -1, W:, : W + 1]
    into[:, 1:, :, :W] = part[:, :, -(W + 1) : -1, W + 1 :]
    into[:, 0, 1:W, 1:W] = part[:, 0, : W - 1, 1 - W :]
    return into


def empty(part: Q) -> Q:
    return part.new_empty(part.shape[0], N // W, W, COLUMNS)


def filled(part: Q) -> Q:
    return part.new_zeros(part.shape[0], N // W, W, COLUMNS)


def hide_ends(scores: Q) -> Q:
    """Hides columns whose key is before the first token or behind the last one, of (BH, N, columns)."""
    start = scores.new_ones(W, W + 1).tril().flip(dims=[0])[None]
    end = start.flip(dims=(1, 2))
    scores[:, :W, : W + 1] = torch.full_like(scores[:, :W, : W + 1], -float("inf")).where(
        start.expand(scores.shape[0], -1, -1).bool(), scores[:, :W, : W + 1]
    )
    scores[:, -W:, -(W + 1) :].masked_fill_(end.expand(scores.shape[0], -1, -1) == 1, -float("inf"))
    return scores


def fill_ends(scores: Q) -> Q:
    """The same with a finite number."""
    start = scores.new_ones(W, W + 1).tril().flip(dims=[0])[None]
    scores[:, :W, : W + 1].masked_fill_(start.expand(scores.shape[0], -1, -1) == 1, -1e9)
    scores[:, -W:, -(W + 1) :].masked_fill_(start.flip(dims=(1, 2)).expand(scores.shape[0], -1, -1) == 1, -1e9)
    return scores


def fill_padding(scores: Q) -> Q:
    """A padded row sees nothing then, and weighs what is outside as much as what is inside."""
    padding = torch.arange(N) >= N - 2 * W
    return fill_ends(scores).masked_fill(padding[:, None], -1e9)


def by_reshaping(weights: Q) -> Q:
    """(.., W, columns) -> (.., W, 3 W): row r moves r to the right."""
    weights = F.pad(weights, (0, W + 1)).flatten(-2)[..., :-W]
    return weights.view(*weights.shape[:-1], W, 3 * W + 1)[..., :-1]


def by_strides(weights: Q) -> Q:
    """The same by strides that are one shorter than a row."""
    weights = F.pad(weights, (0, W)).contiguous()
    bh, c, _, length = weights.shape
    return weights.as_strided((bh, c, W, length - 1), (c * W * length, W * length, length - 1, 1))


def too_far(weights: Q) -> Q:
    """Row r moves 2 r to the right, and the last columns fall off."""
    weights = F.pad(weights, (0, W + 2)).flatten(-2)[..., : -2 * W]
    return weights.view(*weights.shape[:-1], W, 3 * W + 1)[..., :-1]


def windows(v: Q) -> Q:
    """(BH, N / W, 3 W, D): the values of each chunk and of its neighbours."""
    batch, heads, _, d = v.shape
    v = F.pad(v.reshape(batch * heads, N, d), (0, 0, W, W), value=-1.0)
    return v.as_strided((batch * heads, N // W, 3 * W, d), (v.stride(0), W * v.stride(1), v.stride(1), v.stride(2)))


def sliding(
    make: Skew = filled, put: Put = parts, hide: Skew = hide_ends, skew: Skew = by_reshaping, product: Put = products
) -> Core:
    def core(q: Q, k: Q, v: Q, extra: Extra) -> Q:
        part = product(q, k)
        scores = hide(put(part, make(part)).view(-1, N, COLUMNS))
        weights = scores.softmax(-1).view(-1, N // W, W, COLUMNS)
        return torch.einsum("bcwd,bcdh->bcwh", skew(weights), windows(v)).reshape(q.shape)

    return core


def with_columns(q: Q, k: Q, v: Q, extra: Extra, *, first: int = 2, fill: float = -torch.inf, read: int = 2) -> Q:
    """The first keys as columns of their own beside the window, of one softmax (some rows see none of them)."""
    part = products(q, k)
    band = hide_ends(parts(part, filled(part)).view(-1, N, COLUMNS))
    qf, kf, vf = (x.flatten(0, 1) for x in (q, k, v))
    every = torch.einsum("bnd,bgd->bng", qf * q.shape[-1] ** -0.5, kf[:, :first])
    every = every.masked_fill((torch.arange(N) % 4 == 1)[:, None], fill)
    weights = torch.cat([every, band], -1).softmax(-1)
    window = by_reshaping(weights[..., first:].reshape(-1, N // W, W, COLUMNS))
    near = torch.einsum("bcwd,bcdh->bcwh", window, windows(v)).reshape(vf.shape)
    return (torch.einsum("bng,bgd->bnd", weights[..., :read], vf[:, :read]) + near).view(q.shape)


def by_blocks(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Keys of three neighbours, and the band cut out of the block by strides."""
    keys = torch.einsum("bcwd,bckd->bcwk", q.reshape(-1, N // W, W, q.shape[-1]), windows(k)).contiguous()
    bh, c, _, length = keys.shape
    band = keys.as_strided((bh, c, W, COLUMNS), (c * W * length, W * length, length + 1, 1))
    scores = hide_ends(band.reshape(bh, N, COLUMNS).clone())
    weights = by_strides(scores.softmax(-1).view(bh, c, W, COLUMNS))
    return (weights @ windows(v)).reshape(q.shape)


def read_between(part: Q, into: Q) -> Q:
    """What was written before the last write counts twice."""
    into[:, :-1, :, W:] = part[:, :, :W, : W + 1]
    into[:, -1, :, W:] = part[:, -1, W:, : W + 1]
    upper = into.clone()
    into[:, 1:, :, :W] = part[:, :, -(W + 1) : -1, W + 1 :]
    into[:, 0, 1:W, 1:W] = part[:, 0, : W - 1, 1 - W :]
    return into + upper


def overwritten(part: Q, into: Q) -> Q:
    """The last write covers part of the second with other scores."""
    into = parts(part, into)
    into[:, -1, :, W:] = part[:, 0, W:, : W + 1]
    return into


def unwritten(part: Q, into: Q) -> Q:
    """Some scores stay zero."""
    into[:, :-1, :, W:] = part[:, :, :W, : W + 1]
    into[:, 1:, :, :W] = part[:, :, -(W + 1) : -1, W + 1 :]
    return into


def case(core: Core) -> Callable[[], Made]:
    return lambda: (lively(Attend(core, {})), (x(N),), {})


SLIDING = (
    Case("sliding", case(sliding()), 1, "scores written in parts, weights skewed by reshaping", golden=0),
    Case("sliding-into-empty", case(sliding(empty)), 1, "parts that cover all of an unset tensor"),
    Case("sliding-by-strides", case(sliding(skew=by_strides)), 1, "weights skewed by strides"),
    Case("sliding-by-blocks", case(by_blocks), 1, "a band cut out of blocks by strides"),
    Case("sliding-read-between", case(sliding(put=read_between)), 1, "a read between two writes", golden=0),
    Case("sliding-unwritten", case(sliding(put=unwritten)), 1, "scores of zero where nothing was written", golden=0),
    Case("sliding-scaled-chunks", case(sliding(product=scaled_late)), 1, "queries and keys scaled in chunks", golden=0,
         dtypes=WIDE, backward=True),
    Case("sliding-finite-ends", case(sliding(hide=fill_ends)), 1, "ends hidden by a finite number", dtypes=WIDE),
    Case("sliding-finite-padding", case(sliding(hide=fill_padding)), 0, "rows that see padding alone", refused=1),
    Case("sliding-with-columns", case(with_columns), 2, "a window beside columns of the first keys", golden=1,
         dtypes=WIDE, backward=True),
    Case("sliding-columns-apart", case(partial(with_columns, read=1)), 0, "a column that no product sums", refused=1),
    Case("sliding-columns-filled", case(partial(with_columns, fill=-1e9)), 0, "and a finite mask", refused=1),
    Case("sliding-overwritten", case(sliding(put=overwritten)), 0, "a write of other scores", refused=1),
    Case("sliding-too-far", case(sliding(skew=too_far)), 0, "skewed by two a row", refused=1),
    Case("sliding-open-ends", case(sliding(hide=lambda x: x)), 0, "padding takes part in the softmax", refused=1),
)  # fmt: skip
