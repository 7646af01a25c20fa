"""The same attention in the ways people write it, as small modules: (B, H, N, D) queries, keys and values between two
projections, and one core each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import Case, Made, lively

Core = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]
B, H, N, D = 2, 4, 21, 8


class Attend(nn.Module):
    """x -> q, k, v -> core -> projection. `extra` are the tensors a core needs beside them."""

    def __init__(self, core: Core, extra: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(H * D, 3 * H * D), nn.Linear(H * D, H * D)
        self.core = core
        self.names = tuple(extra)
        for name, value in extra.items():
            if value.is_floating_point():
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        out = self.core(q, k, v, {name: getattr(self, name) for name in self.names})
        return self.proj(out.transpose(1, 2).reshape(batch, length, H * D))


def attend(core: Core, **extra: torch.Tensor) -> Callable[[], Made]:
    def make() -> Made:
        return lively(Attend(core, extra)), (x(),), {}

    return make


def x(n: int = N, width: int = H * D, batch: int = B) -> torch.Tensor:
    return torch.randn(batch, n, width, generator=torch.Generator().manual_seed(13))


def randoms(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(14))


PAD = torch.arange(N)[None] < torch.tensor([N, N - 6])[:, None]
DOC = torch.tensor([[0] * 5 + [1] * 9 + [2] * 7, [0] * 12 + [1] * 9])
CAUSAL = torch.ones(N, N, dtype=torch.bool).tril()
LATE = CAUSAL & (torch.arange(N) >= 4)[:, None]  # the first rows see nothing
Extra = dict[str, torch.Tensor]
Q = torch.Tensor


def q_scaled_first(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return ((q * D**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def divided(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return F.softmax(torch.matmul(q, k.mT) / math.sqrt(D), -1).matmul(v)


def both_scaled(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return torch.softmax((q * D**-0.25) @ (k * D**-0.25).mT, -1) @ v


def in_float32(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return F.softmax(q @ k.mT * D**-0.5, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def by_einsum(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(D**-0.5).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def einsum_of_other_orders(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    q, k, v = (t.permute(2, 0, 1, 3) for t in (q, k, v))
    weights = torch.einsum("nbhd,mbhd->bnmh", q, k).mul(D**-0.5).softmax(2)
    return torch.einsum("bnmh,mbhd->bhnd", weights, v)


def by_bmm(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    q, k, v = (t.reshape(-1, N, D) for t in (q, k, v))
    scores = torch.baddbmm(torch.empty(q.shape[0], N, N, dtype=q.dtype), q, k.transpose(1, 2), beta=0, alpha=D**-0.5)
    return torch.bmm(scores.softmax(-1), v).view(B, H, N, D)


def exp_minus_logsumexp(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = q @ k.mT * D**-0.5
    return torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True)) @ v


def exp_over_sum(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = q @ k.mT * D**-0.5
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    return p / p.sum(-1, keepdim=True) @ v


def divided_after(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = q @ k.mT * D**-0.5
    p = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return (p @ v) / p.sum(-1, keepdim=True)


def log_softmax_exp(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return F.log_softmax(q @ k.mT * D**-0.5, -1).exp() @ v


def filled(value: float) -> Core:
    def core(q: Q, k: Q, v: Q, extra: Extra) -> Q:
        return (q @ k.mT * D**-0.5).masked_fill(~extra["mask"], value).softmax(-1) @ v

    return core


def added(value: float) -> Core:
    def core(q: Q, k: Q, v: Q, extra: Extra) -> Q:
        return (q @ k.mT * D**-0.5 + (1.0 - extra["mask"].to(q.dtype)) * value).softmax(-1) @ v

    return core


def clamped(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    least = torch.full((), torch.finfo(q.dtype).min, dtype=q.dtype)
    mask = torch.zeros(N, N, dtype=q.dtype).masked_fill(~extra["mask"], torch.finfo(q.dtype).min)
    return torch.max(q @ k.mT * D**-0.5 + mask, least).softmax(-1) @ v


def added_in_place(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = q @ k.mT
    scores *= D**-0.5
    scores += torch.zeros(N, N).masked_fill_(~extra["mask"], -torch.inf).to(q.dtype)
    return scores.softmax(-1) @ v


def triangle_in_the_graph(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    n = q.shape[-2]
    future = torch.triu(torch.full((n, n), -torch.inf, dtype=q.dtype), diagonal=1)
    return (q @ k.mT * D**-0.5 + future).softmax(-1) @ v


def window_in_the_graph(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    i = torch.arange(q.shape[-2])
    seen = (i[:, None] >= i[None]) & (i[:, None] - i[None] < 5)
    return torch.where(seen, q @ k.mT * D**-0.5, torch.finfo(q.dtype).min).softmax(-1) @ v


def documents(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    doc = extra["doc"]
    seen = (doc[:, None, :, None] == doc[:, None, None]) & extra["pad"][:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def sdpa_causal(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)


def sdpa_under_the_old_context(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Dynamo breaks the graph at it, and what runs inside is not compiled, if nobody shows it a way through."""
    with torch.backends.cuda.sdp_kernel(enable_math=True, enable_mem_efficient=False):
        return F.scaled_dot_product_attention(q, k, v)


def sdpa_bias(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=extra["bias"].masked_fill(~extra["mask"], -torch.inf))


def sdpa_narrow_values(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return F.pad(F.scaled_dot_product_attention(q, k, v[..., :5], attn_mask=extra["mask"]), (0, 3))


def grouped_sdpa(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return F.scaled_dot_product_attention(q, k[:, ::2], v[:, ::2], enable_gqa=True)


def grouped_by_repeat(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    k, v = (t[:, :2].repeat_interleave(2, dim=1) for t in (k, v))
    return (q @ k.mT * D**-0.5).softmax(-1) @ v


def grouped_by_repeat_of_all(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    k, v = (t[:, :2].repeat(1, 2, 1, 1) for t in (k, v))  # head h reads h % 2
    return (q @ k.mT * D**-0.5).softmax(-1) @ v


def grouped_by_einsum(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    q = q.reshape(B, 2, 2, N, D)
    weights = torch.einsum("bkgid,bkjd->bkgij", q, k[:, :2]).mul(D**-0.5).softmax(-1)
    return torch.einsum("bkgij,bkjd->bkgid", weights, v[:, :2]).reshape(B, H, N, D)


def keys_first(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Scores as k q^T, normalised over their first axis."""
    weights = (k @ q.mT * D**-0.5).softmax(-2)
    return (v.mT @ weights).mT


def values_times_transpose(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Channel-major, v @ A^T."""
    q, k, v = (t.mT.contiguous() for t in (q, k, v))
    weights = (q.mT @ k * D**-0.5).softmax(-1)
    return (v @ weights.mT).mT


def twice_masked(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    mask = torch.where(extra["mask"], 0.0, -100.0).to(q.dtype)
    return (q @ k.mT * D**-0.5 + mask + mask).softmax(-1) @ v


def sum_of_two(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Two attentions sharing their queries, as image prompts are added to text."""
    few = k[:, :, :7], v[:, :, :7]
    return F.scaled_dot_product_attention(q, k, v) + 0.5 * F.scaled_dot_product_attention(q, *few)


def null_key(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """A learned key and value before the others."""
    k = torch.cat([extra["null"].view(1, 1, 1, D).expand(B, H, 1, D), k], 2)
    v = torch.cat([extra["null"].view(1, 1, 1, D).expand(B, H, 1, D), v], 2)
    return (q @ k.mT * D**-0.5).softmax(-1) @ v


def by_vmap(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """A mask function of single indices, that reads data, batched by `torch.vmap` as transformers does it."""
    doc, rows = extra["doc"], torch.arange(N)

    def seen(b: Q, i: Q, j: Q) -> Q:
        return (j <= i) | (doc[b, i] == doc[b, j])

    of_row = torch.vmap(torch.vmap(seen, (None, None, 0)), (None, 0, None))
    mask = torch.vmap(of_row, (0, None, None))(torch.arange(B), rows, rows)
    return (q @ k.mT * D**-0.5).masked_fill(~mask[:, None], -math.inf).softmax(-1) @ v


def case(name: str, core: Core, why: str, sites: int = 1, extra: Extra | None = None, **more: Any) -> Case:
    return Case(name, attend(core, **(extra or {})), sites, why, **more)


MASK = {"mask": CAUSAL}
HALF = (torch.float32, torch.bfloat16, torch.float16)
SPELLINGS = (
    case("q-scaled-first", q_scaled_first, "scale on q", dtypes=HALF, golden=0),
    case("divided", divided, "division by the root"),
    case("both-scaled", both_scaled, "the fourth root on both"),
    case("in-float32", in_float32, "softmax in float32, cast back", dtypes=HALF),
    case("by-einsum", by_einsum, "einsum"),
    case("einsum-of-other-orders", einsum_of_other_orders, "heads last, sequence first, softmax over a middle axis"),
    case("by-bmm", by_bmm, "heads in the batch, baddbmm with beta 0"),
    case("exp-minus-logsumexp", exp_minus_logsumexp, "softmax by logsumexp"),
    case("exp-over-sum", exp_over_sum, "softmax by hand"),
    case("divided-after", divided_after, "normalised after the values", golden=0),
    case("log-softmax-exp", log_softmax_exp, "softmax by log_softmax"),
    case("fill-minus-inf", filled(-math.inf), "a mask of -inf", extra=MASK),
    case("fill-minus-100", filled(-100.0), "a fill small enough to show", extra={"mask": LATE}, golden=0),
    case("fill-minus-1e4", filled(-1e4), "rows of fill are uniform", extra={"mask": LATE}),
    case("fill-minus-1e30", filled(-1e30), "rows of fill are uniform", extra={"mask": LATE}),
    case("add-minus-1e4", added(-1e4), "a sum that keeps the score", extra={"mask": LATE}),
    case("add-min", added(torch.finfo(torch.float32).min), "a sum that loses the score", extra={"mask": LATE}),
    case("clamped", clamped, "maximum with finfo.min", extra={"mask": LATE}),
    case("added-in-place", added_in_place, "in-place scale and mask", extra=MASK),
    case("triangle-in-the-graph", triangle_in_the_graph, "triu of a full matrix", golden=0),
    case("window-in-the-graph", window_in_the_graph, "arange, compare, where", golden=0),
    case("documents", documents, "packed documents and padding", extra={"doc": DOC, "pad": PAD}, golden=0),
    case("by-vmap", by_vmap, "a mask function under vmap", extra={"doc": DOC}, golden=0),
    case("sdpa-causal", sdpa_causal, "is_causal and scale"),
    case("sdpa-old-context", sdpa_under_the_old_context, "the deprecated torch.backends.cuda.sdp_kernel"),
    case("sdpa-bias", sdpa_bias, "a learned bias with -inf", extra={**MASK, "bias": randoms(H, N, N)}),
    case("sdpa-narrow-values", sdpa_narrow_values, "d_v below d_qk; empty rows are zero", extra={"mask": LATE}),
    case("grouped-sdpa", grouped_sdpa, "enable_gqa on strided keys"),
    case("grouped-by-repeat", grouped_by_repeat, "repeat_interleave", golden=0),
    case("grouped-by-repeat-of-all", grouped_by_repeat_of_all, "repeat: head modulo groups"),
    case("grouped-by-einsum", grouped_by_einsum, "two head axes"),
    case("keys-first", keys_first, "softmax over the second-last axis of k q^T"),
    case("values-times-transpose", values_times_transpose, "v @ A^T, channels first", golden=0),
    case("twice-masked", twice_masked, "a finite mask added twice", extra={"mask": LATE}),
    case("sum-of-two", sum_of_two, "two attentions share q", sites=2),
    case("null-key", null_key, "keys in parts", extra={"null": randoms(D)}),
)
