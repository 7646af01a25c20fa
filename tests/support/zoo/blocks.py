"""Attention over blocks of keys, the way long-document encoders write it: global, near and chosen blocks."""

from __future__ import annotations

import torch

from zoo.case import Case
from zoo.spellings import B, D, Extra, H, Q, attend, randoms

BLOCK, BLOCKS = 3, 7
N = BLOCK * BLOCKS
SCALE = D**-0.5
WIDE = (torch.float32, torch.bfloat16)


def blocked(x: Q) -> Q:
    return x.unflatten(2, (BLOCKS, BLOCK))


def neighbours(x: Q) -> Q:
    """(B, H, BLOCKS - 2, 3 * BLOCK, D): each inner block with the one before and the one behind it."""
    return torch.cat([x[:, :, :-2], x[:, :, 1:-1], x[:, :, 2:]], 3)


def chosen(x: Q, table: Q) -> Q:
    """(B, H, BLOCKS - 2, BLOCK, D): a block for each inner block."""
    heads = torch.arange(H)[:, None]
    return x[:, heads, table]


def sparse(q: Q, k: Q, v: Q, extra: Extra, *, in_place: bool = True) -> Q:
    """Ends see everything; inner blocks see the first block, their neighbours and one that a table chooses. What the
    pieces of their softmax give is added up in place."""
    qb, kb, vb = blocked(q), blocked(k), blocked(v)
    seen = extra["seen"].view(B, 1, 1, N)
    penalty = (1.0 - seen.to(q.dtype)) * -1e4
    ends = [(e @ k.mT * SCALE + penalty).softmax(-1) @ v for e in (qb[:, :, 0], qb[:, :, -1])]
    inner = qb[:, :, 1:-1]
    first = torch.einsum("bhnid,bhjd->bhnij", inner, kb[:, :, 0]) * SCALE
    near = inner @ neighbours(kb).mT * SCALE
    far = inner @ chosen(kb, extra["table"]).mT * SCALE
    first += penalty[..., None, :BLOCK]
    weights = torch.cat([first, near, far], -1).softmax(-1)
    out = weights[..., BLOCK:-BLOCK] @ neighbours(vb)
    more = (weights[..., -BLOCK:] @ chosen(vb, extra["table"]),
            torch.einsum("bhnij,bhjd->bhnid", weights[..., :BLOCK], vb[:, :, 0]))  # fmt: skip
    for part in more:
        if in_place:
            out += part
        else:
            out = out + part
    return torch.cat([ends[0][:, :, None], out, ends[1][:, :, None]], 2).flatten(2, 3)


def written_between(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Values that change between the products of one softmax."""
    weights = (q @ k.mT * SCALE).softmax(-1)
    v = v.clone()
    out = weights[..., :9] @ v[:, :, :9]
    v[:, :, 9:] *= 2.0
    return out + weights[..., 9:] @ v[:, :, 9:]


def hashed(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Reformer: tokens sorted by their bucket, chunks that look back, masks by the places that tokens came from, and
    scores less the logarithm of their sum."""
    bucket = (q @ extra["directions"]).argmax(-1)
    order = (bucket * N + torch.arange(N)).argsort(-1)
    rows, keys, values = (blocked(x.gather(2, order[..., None].expand_as(x))) for x in (q, q / 2, v))
    keys, values, place = (torch.cat([x.roll(1, 2), x], 3) for x in (keys, values, blocked(order)))
    scores = rows @ keys.mT * SCALE
    scores = scores.masked_fill(blocked(order)[..., :, None] < place[..., None, :], -1e9)
    scores = torch.where(blocked(order)[..., :, None] == place[..., None, :], -1e5, scores)
    out = torch.exp(scores - scores.logsumexp(-1, keepdim=True)) @ values
    back = order.argsort(-1)
    return out.flatten(2, 3).gather(2, back[..., None].expand_as(v))


def routed(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Routing: each cluster attends among the tokens that are nearest to it; results are added where they came from."""
    chosen = torch.einsum("bhnd,dc->bhcn", q, extra["directions"]).topk(6, -1).indices.sort(-1).values
    clusters, d = chosen.shape[2], q.shape[-1]
    rows, keys, values = (
        x[:, :, None].expand(-1, -1, clusters, -1, -1).gather(3, chosen[..., None].expand(-1, -1, -1, -1, d))
        for x in (q, k, v)
    )
    scores = (rows @ keys.mT * d**-0.5).masked_fill(chosen[..., :, None] < chosen[..., None, :], -torch.inf)
    out = (scores.softmax(-1) @ values).flatten(2, 3)
    return torch.zeros_like(v).scatter_add(2, chosen.flatten(2)[..., None].expand_as(out), out)


SEEN = torch.arange(N)[None] < torch.tensor([N, N - 4])[:, None]
TABLE = torch.tensor([[4, 5, 6, 0, 1], [6, 6, 0, 1, 2], [3, 4, 5, 6, 0], [5, 0, 6, 0, 3]])
HELD = {"seen": SEEN, "table": TABLE}

BLOCKED = (
    Case("block-sparse", attend(sparse, **HELD), 5, "global, near and chosen blocks, added up in place", golden=2,
         dtypes=WIDE, backward=True),
    Case("hashed-buckets", attend(hashed, directions=randoms(D, 3)), 1, "keys in the order of their buckets", golden=0),
    Case("routed-clusters", attend(routed, directions=randoms(D, 3)), 1, "tokens chosen for clusters", dynamic=True),
    Case("pieces-written-between", attend(written_between), 2, "a write to other values between two pieces", kept=2),
)  # fmt: skip
