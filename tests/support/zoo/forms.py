"""Forms of attention beyond the plain one: positions, gates, sparse and blocked masks written by hand, caches."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from zoo.case import Case
from zoo.heads import HEADS, MASK, SCALE, WIDE
from zoo.spellings import PAD, B, D, Extra, H, N, Q, attend, randoms


def two_softmaxes_of_one_product(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Both directions of a bidirectional cross attention."""
    scores = q @ k.mT * SCALE
    return scores.softmax(-1) @ v + scores.mT.softmax(-1) @ v


def subtracted(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    a, b = ((q[..., p] @ k[..., p].mT * SCALE).softmax(-1) for p in (slice(0, 4), slice(4, 8)))
    return (a - 0.3 * b) @ v


def sigmoid(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return torch.sigmoid(q @ k.mT * SCALE - math.log(N)) @ v


def relu_squared(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return (F.relu(q @ k.mT * SCALE).square() / N).masked_fill(~extra["mask"], 0.0) @ v


def unnormalised(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return (q @ k.mT * extra["mask"]) @ v


def sink_column(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = q @ k.mT * SCALE
    every = torch.cat([scores, extra["sinks"].view(1, H, 1, 1).expand(B, H, N, 1)], -1)
    every = every - every.max(-1, keepdim=True).values
    return every.softmax(-1)[..., :-1] @ v


def sink_gate(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = q @ k.mT * SCALE
    gate = torch.sigmoid(torch.logsumexp(scores, -1, keepdim=True) - extra["sinks"].view(1, H, 1, 1))
    return (scores.softmax(-1) @ v) * gate


def sink_gate_in_another_order(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Scores of (b, i, h, j), an added mask under which the first rows see nothing."""
    scores = torch.einsum("bhid,bhjd->bihj", q, k) * SCALE
    late = torch.arange(N)[:, None] < torch.arange(N)[None] + 2
    hidden = torch.zeros(N, N).masked_fill(late, torch.finfo(torch.float32).min)
    scores = scores + hidden[:, None].to(q.dtype)
    gate = torch.sigmoid(torch.logsumexp(scores, -1) + 3.0)
    return torch.einsum("bihj,bhjd->bhid", scores.softmax(-1), v) * gate.transpose(1, 2)[..., None]


def _pieces(q: Q, k: Q, v: Q, fill: float, width: int) -> Q:
    """Each block of seven sees itself and the first four keys: scores concatenated, weights sliced, products added."""
    qb, kb, vb = (x.unflatten(2, (3, 7)) for x in (q, k, v))
    far, near = torch.einsum("bhnid,bhgd->bhnig", qb, k[:, :, :4]), qb @ kb.mT
    scores = torch.cat([far, near], -1) * SCALE
    row, column = torch.arange(N).view(3, 7, 1), torch.arange(11)
    weights = scores.masked_fill((row + column) % 5 < width, fill).softmax(-1)
    first = torch.einsum("bhnig,bhgd->bhnid", weights[..., :4], v[:, :, :4])
    return (first + weights[..., 4:] @ vb).flatten(2, 3)


def pieces(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return _pieces(q, k, v, -torch.inf, 3)


def pieces_of_empty_rows(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Some rows see no key: the mean of all eleven values."""
    qb, kb, vb = (x.unflatten(2, (3, 7)) for x in (q, k, v))
    scores = torch.cat([qb @ k[:, :, None, :4].mT, qb @ kb.mT], -1) * SCALE
    hidden = (torch.arange(N).view(3, 7, 1) % 4 == 1) | (torch.arange(11) % 3 == 1)
    weights = scores.masked_fill(hidden, -1e30).softmax(-1)
    far, near = weights.split((4, 7), -1)
    return (near @ vb + far @ v[:, :, None, :4]).flatten(2, 3)


def pieces_that_overlap(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    weights = (q @ k.mT * SCALE).softmax(-1)
    return weights[..., :12] @ v[:, :, :12] + weights[..., 11:] @ v[:, :, 11:]


def sums_before_the_mask(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = q @ k.mT * SCALE
    gate = torch.sigmoid(torch.logsumexp(scores, -1, keepdim=True))
    return (scores.masked_fill(~extra["mask"], -torch.inf).softmax(-1) @ v) * gate


def softmax_plus_one(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    p = torch.exp(q @ k.mT * SCALE)
    return p / (1 + p.sum(-1, keepdim=True)) @ v


def taylor(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """The exponential's first terms, which no score makes negative (de Brebisson and Vincent, 2015)."""
    scores = q @ k.mT * SCALE
    weights = 1 + scores + scores.square() / 2
    return weights / weights.sum(-1, keepdim=True) @ v


def softpick(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Only scores above zero weigh, all of them count (Zuhri et al., 2025: arXiv 2504.20966)."""
    scores = torch.expm1(q @ k.mT * SCALE)
    return F.relu(scores) / (scores.abs().sum(-1, keepdim=True) + 1e-6) @ v


def softcap(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = 2.0 * torch.tanh(q @ k.mT * SCALE / 2.0)
    return scores.masked_fill(~extra["mask"], -torch.inf).softmax(-1) @ v


def alibi(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    slopes = 2.0 ** -torch.arange(1, H + 1, dtype=q.dtype)
    position = torch.arange(N)
    bias = -(position[:, None] - position[None]).abs() * slopes[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def bucketed(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    distance = torch.arange(N)[None] - torch.arange(N)[:, None]
    side, size = (distance > 0).long() * 8, distance.abs()
    far = 4 + (torch.log(size.clamp(min=1).float() / 4) / math.log(16 / 4) * 4).long().clamp(max=3)
    bucket = side + torch.where(size < 4, size, far)
    return (q @ k.mT * SCALE + extra["table"][bucket].permute(2, 0, 1)).softmax(-1) @ v


def window_table(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return (q @ k.mT * SCALE + extra["table"][extra["index"].view(-1)].view(N, N, H).permute(2, 0, 1)).softmax(-1) @ v


def relative_keys(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    distance = torch.arange(N)[:, None] - torch.arange(N)[None] + N - 1
    scores = q @ k.mT
    scores += torch.einsum("bhid,ijd->bhij", q, extra["table"][distance])
    return (scores * SCALE).softmax(-1) @ v


def relative_shift(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    content = (q + extra["u"].view(1, H, 1, D)) @ k.mT
    position = (q + extra["w"].view(1, H, 1, D)) @ extra["table"].mT  # (B, H, N, 2 N - 1)
    shifted = F.pad(position, (1, 0)).view(B, H, 2 * N, N)[:, :, 1:].reshape(B, H, N, 2 * N - 1)[..., :N]
    return ((content + shifted) * SCALE).softmax(-1) @ v


def relative_values(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    distance = (torch.arange(N)[:, None] - torch.arange(N)[None]).clamp(-3, 3) + 3
    weights = (q @ k.mT * SCALE).softmax(-1)
    return weights @ v + torch.einsum("bhij,ijd->bhid", weights, extra["table"][distance])


def decomposed(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Relative positions of rows and of columns, 3 x 7 tokens, each from q."""
    grid = q.reshape(B * H, 3, 7, D)
    rows = torch.einsum("bhwc,hkc->bhwk", grid, extra["rows"].view(3, 3, D))
    columns = torch.einsum("bhwc,wkc->bhwk", grid, extra["columns"].view(7, 7, D))
    scores = (q @ k.mT * SCALE).view(B * H, 3, 7, 3, 7) + rows[..., None] + columns[..., None, :]
    return scores.view(B, H, N, N).softmax(-1) @ v


def cosine(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scale = extra["temperature"].clamp(max=math.log(100)).exp().view(H, 1, 1)
    return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * scale).softmax(-1) @ v


def cosine_similarities(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Content addressing as torch spells it, of keys that are repeated for each query."""
    keys = k[:, :, None].expand(-1, -1, q.shape[2], -1, -1)
    scores = F.cosine_similarity(q[:, :, :, None], keys, dim=-1) * F.softplus(extra["temperature"]).view(H, 1, 1)
    return scores.softmax(-1) @ v


def bilinear(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Weights between queries and keys, and between values and the output (Luong et al., 2015: arXiv 1508.04025)."""
    weights = torch.einsum("bhid,hde,bhje->bhij", q, extra["between"], k).softmax(-1)
    return torch.einsum("bhij,bhjd,hde->bhie", weights, v, extra["between"])


def channels(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Attention between channels: contraction over tokens."""
    q, k, v = q.mT, k.mT, v.mT
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * extra["temperature"].view(H, 1, 1)
    return (scores.softmax(-1) @ v).mT


def channels_max_minus(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    energy = q.mT @ k
    energy = energy.max(-1, keepdim=True)[0].expand_as(energy) - energy
    return (energy.softmax(-1) @ v.mT).mT


def less_a_columns_maximum(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """A maximum that is not alike for every key does not cancel."""
    scores = q @ k.mT * SCALE
    return (scores - scores.amax(-2, keepdim=True)).softmax(-1) @ v


def class_token(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return torch.cat([(q[:, :, :1] @ k.mT * SCALE).softmax(-1) @ v, v[:, :, 1:]], 2)


def windows(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Three windows of seven, rolled by two, with the mask of -100 that keeps the wrapped parts apart."""
    q, k, v = (t.roll(-2, 2).view(B, H, 3, 7, D) for t in (q, k, v))
    part = torch.zeros(N)
    part[-7:-2], part[-2:] = 1, 2
    part = part.view(3, 7)
    mask = torch.where(part[:, :, None] == part[:, None], 0.0, -100.0).to(q.dtype)
    return ((q @ k.mT * SCALE + mask).softmax(-1) @ v).reshape(B, H, N, D).roll(2, 2)


def halo(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Overlapping windows by unfold; the zeros that pad the ends stay in the softmax."""
    q = q.reshape(B, H, 3, 7, D)
    k, v = (F.pad(t, (0, 0, 2, 2)).unfold(2, 11, 7).mT for t in (k, v))
    return ((q @ k.mT * SCALE).softmax(-1) @ v).reshape(B, H, N, D)


def grid(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Tokens three apart attend to each other."""
    q, k, v = (t.reshape(B, H, 7, 3, D).transpose(2, 3) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(B, H, N, D)


def axial(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    q, k, v = (t.reshape(B, H, 3, 7, D) for t in (q, k, v))
    rows = F.scaled_dot_product_attention(q, k, v)
    columns = F.scaled_dot_product_attention(*(t.transpose(2, 3) for t in (q, k, v))).transpose(2, 3)
    return (rows + columns).reshape(B, H, N, D)


def top_k(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Keys chosen by the scores themselves."""
    scores = q @ k.mT * SCALE
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(5, -1).indices, True)
    return scores.masked_fill(~chosen, -torch.inf).softmax(-1) @ v


def indexed(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Keys chosen by an indexer of its own."""
    index = (q.mean(1) @ k.mean(1).mT).topk(5, -1).indices
    chosen = torch.full((B, N, N), -torch.inf, dtype=q.dtype).scatter(-1, index, 0.0)
    return (q @ k.mT * SCALE + chosen[:, None]).softmax(-1) @ v


def sorted_groups(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Tokens sorted by a score, then groups of seven."""
    order = k.sum(-1).argsort(-1)[..., None].expand(B, H, N, D)
    q, k, v = (t.gather(2, order).view(B, H, 3, 7, D) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v).reshape(B, H, N, D)
    return torch.zeros_like(out).scatter(2, order, out)


def gated(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True) * torch.sigmoid(q * 2)


def rematerialised(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    def attention(q: Q, k: Q, v: Q) -> Q:
        return (q @ k.mT * SCALE).masked_fill(~extra["mask"], -torch.inf).softmax(-1) @ v

    return checkpoint(attention, q, k, v, use_reentrant=False)


def under_autocast(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    with torch.autocast("cpu", torch.bfloat16):
        return ((q @ k.mT * SCALE).softmax(-1) @ v).to(q.dtype)


def with_weights(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """The weights leave as well."""
    weights = (q @ k.mT * SCALE).masked_fill(~extra["mask"], -torch.inf).softmax(-1)
    return weights @ v + weights.mean((-1, -2), keepdim=True) + weights.sum(-2)[..., None]


def padded_cross(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return F.scaled_dot_product_attention(q[:, :, :9], k, v, attn_mask=extra["pad"][:, None, None]).repeat(1, 1, 3, 1)[
        :, :, :N
    ]


def key_bias(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Size-weighted tokens: the logarithm of a count is added to each key."""
    count = (torch.arange(N) % 4 + 1).to(q.dtype).log()
    return (q @ k.mT * SCALE + count).softmax(-1) @ v


def dilated(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    i = torch.arange(N)
    gap = i[:, None] - i[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(gap % 3 == 0) & (gap >= 0))


def threshold(q: Q, k: Q, v: Q, extra: Extra, fill: float = -1e9) -> Q:
    """Weak scores count for nothing; where all of a row are weak, what the mask hides counts as much as they do."""
    scores = q @ k.mT * SCALE
    scores = torch.where(scores > 0.5, scores, fill)
    return scores.masked_fill(~extra["mask"], fill).softmax(-1).nan_to_num(0.0) @ v


def strongest(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = (q @ k.mT * SCALE).masked_fill(~extra["mask"], -1e9)
    least = scores.topk(4, -1).values[..., -1:]
    return scores.masked_fill(scores < least, -1e9).softmax(-1) @ v


def kept_bias(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """The last rows and columns of a bias that was made for longer texts."""
    n = q.shape[2]
    return (q @ k.mT * SCALE + extra["bias"][:, -n:, -n:]).softmax(-1) @ v


RELATIVE = torch.arange(N)[:, None] - torch.arange(N)[None] + N - 1
FORMS = (
    *HEADS,
    Case("kept-bias", attend(kept_bias, bias=randoms(H, N + 5, N + 5)), 1, "counted from the end", dynamic=True),
    Case("threshold", attend(threshold, **MASK), 1, "a predicate of the score under a mask", golden=0),
    Case("threshold-infinite", attend(partial(threshold, fill=-torch.inf), **MASK), 0, "rows that hide all", refused=1),
    Case("strongest", attend(strongest, **MASK), 1, "the k largest of the scores", kept=1),
    Case("both-directions", attend(two_softmaxes_of_one_product), 2, "a softmax and one of the transpose", golden=1),
    Case("subtracted", attend(subtracted), 2, "two softmaxes subtracted", dtypes=WIDE, golden=1, backward=True),
    Case("sigmoid", attend(sigmoid), 1, "sigmoid in place of softmax"),
    Case("relu-squared", attend(relu_squared, **MASK), 1, "relu in place of softmax, masked after"),
    Case("unnormalised", attend(unnormalised, **MASK), 1, "no normaliser: retention"),
    Case("sink-column", attend(sink_column, sinks=randoms(H)), 1, "a column of sinks", golden=0),
    Case("sink-gate", attend(sink_gate, sinks=randoms(H)), 1, "out * sigmoid(lse - sink)", golden=0, backward=True),
    Case("sink-gate-transposed", attend(sink_gate_in_another_order), 1, "sums of rows in another order, empty rows"),
    Case("pieces", attend(pieces), 2, "one softmax over two products, their weights sliced", golden=0, dtypes=WIDE,
         backward=True),
    Case("pieces-of-empty-rows", attend(pieces_of_empty_rows), 2, "pieces under a finite mask that hides whole rows"),
    Case("pieces-that-overlap", attend(pieces_that_overlap), 0, "a column summed twice", refused=1),
    Case("sums-before-mask", attend(sums_before_the_mask, **MASK), 1, "sums of other scores", kept=1),
    Case("softmax-plus-one", attend(softmax_plus_one), 1, "a sink of zero, by hand", golden=0),
    Case("softcap", attend(softcap, **MASK), 1, "tanh of the score", golden=0),
    Case("alibi", attend(alibi), 1, "distance times slope, built in the graph", golden=0),
    Case("bucketed", attend(bucketed, table=randoms(16, H)), 1, "T5 buckets by logarithm"),
    Case("window-table", attend(window_table, table=randoms(2 * N - 1, H), index=RELATIVE), 1, "table by index buffer"),
    Case("relative-keys", attend(relative_keys, table=randoms(2 * N - 1, D)), 1, "relative keys added in place"),
    Case("relative-shift", attend(relative_shift, table=randoms(2 * N - 1, D), u=randoms(H * D), w=randoms(H * D)), 1,
         "shift by pad and reshape", golden=0),
    Case("relative-values", attend(relative_values, table=randoms(7, D)), 1, "weights used by a second sum", kept=1),
    Case("decomposed", attend(decomposed, rows=randoms(9, D), columns=randoms(49, D)), 1, "rows and columns apart"),
    Case("cosine", attend(cosine, temperature=randoms(H)), 1, "normalised, clamped scale"),
    Case("taylor", attend(taylor), 1, "a quadratic that is always above zero", dtypes=WIDE, backward=True),
    Case("softpick", attend(softpick), 1, "shares of all by those above zero", dtypes=WIDE, dynamic=True,
         backward=True),
    Case("cosine-similarities", attend(cosine_similarities, temperature=randoms(H)), 1, "scores are cosines",
         dtypes=WIDE, dynamic=True, backward=True),
    Case("bilinear", attend(bilinear, between=randoms(H, D, D)), 1, "einsums of three", dtypes=WIDE, dynamic=True,
         backward=True),
    Case("channels", attend(channels, temperature=randoms(H)), 1, "over channels", golden=0),
    Case("channels-max-minus", attend(channels_max_minus), 1, "softmax(max - x)"),
    Case("less-column-maximum", attend(less_a_columns_maximum), 1, "the maximum of each key's column", kept=1),
    Case("class-token", attend(class_token), 1, "one query"),
    Case("windows", attend(windows), 1, "rolled windows, finite mask", golden=0),
    Case("halo", attend(halo), 1, "unfolded keys, zeros stay", golden=0),
    Case("grid", attend(grid), 1, "strided groups"),
    Case("axial", attend(axial), 2, "rows, then columns"),
    Case("top-k", attend(top_k), 1, "keys chosen by score", kept=1),
    Case("indexed", attend(indexed), 1, "keys chosen by an indexer"),
    Case("sorted-groups", attend(sorted_groups), 1, "data-dependent order"),
    Case("gated", attend(gated), 1, "an output gate"),
    Case("rematerialised", attend(rematerialised, **MASK), 1, "activation checkpointing", backward=True),
    Case("under-autocast", attend(under_autocast), 1, "autocast inside"),
    Case("with-weights", attend(with_weights, **MASK), 1, "weights are outputs", kept=1, backward=True),
    Case("padded-cross", attend(padded_cross, pad=PAD), 1, "cross attention with a padding mask [B, 1, 1, N]"),
    Case("key-bias", attend(key_bias), 1, "a bias of the key alone"),
    Case("dilated", attend(dilated), 1, "every third key", golden=0),
)  # fmt: skip
