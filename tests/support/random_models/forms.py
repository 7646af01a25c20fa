# ruff: noqa: E501 - spellings are listed a line each, however long
"""Attention programs of more than one softmax, or more than one head a score: mixtures, sums, quotients after a product."""

from __future__ import annotations

import torch

from random_models.writer import Writer, _b, _m, _n, normal


def _mixture(w: Writer, x: str, mix: str) -> str:
    """`x` (b, h, i, j) with its heads mixed by a matrix (h, h)."""
    h = w.p.sizes.h
    return w.pick(
        f"torch.einsum('bhij,hg->bgij', {x}, {mix})", f"torch.einsum('gh,bhij->bgij', {mix}, {x})",
        f"F.conv2d({x}, {mix}[:, :, None, None])", f"F.linear({x}.permute(0, 2, 3, 1), {mix}).permute(0, 3, 1, 2)",
        f"({x}.permute(0, 2, 3, 1) @ {mix}).permute(0, 3, 1, 2)",
        f"F.linear({x}.permute(0, 2, 3, 1), {mix}, {mix}[0]).permute(0, 3, 1, 2)",
        f"({mix} @ {x}.reshape(B, {h}, N * M)).view(B, {h}, N, M)",
    )  # fmt: skip


def talking_scores(w: Writer) -> None:
    if w.layout != "bhij" or w.p.sizes.h == 1:
        return
    w.label("talking heads before", plain=False)
    h = w.p.sizes.h
    w.line(f"s = {_mixture(w, 's', w.buffer('p_mix', normal(h, h)))}")


def talking_weights(w: Writer, x: str) -> str:
    if w.layout != "bhij" or w.p.sizes.h == 1:
        return gated(w, x)
    w.label("talking heads after", plain=False)
    h = w.p.sizes.h
    return w.fresh(_mixture(w, x, w.buffer("p_after", normal(h, h))), "w")


def sum_of_softmaxes(w: Writer, x: str) -> str:
    """Another softmax joins: over other scores, or over the same ones in another way."""
    s = w.p.sizes
    if w.layout != "bhij":
        return gated(w, x)
    w.label("sum of softmaxes", plain=False)
    w.p.sites += 1
    w.buffer("p_lam", normal(1, s.h, 1, 1))
    other = w.pick("q @ k.mT * 0.7", f"torch.einsum('bhid,bhjd->bhij', q[..., :{max(s.d // 2, 1)}], k[..., :{max(s.d // 2, 1)}])",
                   "(q @ k.transpose(-1, -2)).masked_fill(torch.arange(M) > torch.arange(N)[:, None] + 1, -1e9)")
    t = w.fresh(f"({other}).softmax(-1)", "r")
    lam = w.pick("0.3", "self.p_lam", "self.p_lam.sigmoid()", "2.0")
    return w.fresh(w.pick(f"{x} - {lam} * {t}", f"{x} + {t}", f"{lam} * {x} + {t} / 2", f"({x} + {t}) * {lam}",
                          f"torch.lerp({x}, {t}, 0.25)", f"{t} - {x}"), "w")  # fmt: skip


def gated(w: Writer, x: str) -> str:
    """A gate for each row."""
    w.label("gated weights")
    if w.layout == "bhij":
        return w.fresh(w.pick(f"{x} * torch.sigmoid(q[..., :1])", f"{x} * q.mean(-1, keepdim=True)",
                              f"{x} / (1 + q[..., :1].square())"), "w")  # fmt: skip
    return w.fresh(f"{x} * {w.pick('0.5', 'q.mean()', 'v.sigmoid().mean()')}", "w")


def turned(w: Writer, x: str) -> str:
    w.label("weights turned", plain=False)
    d = w.dim
    return w.fresh(w.pick(f"{x}.flip({d})", f"{x}.roll(2, {d})", f"{x} + {x}.roll(1, {d})", f"{x} - 0.5 * {x}.flip({d})"), "w")


def divided_after(w: Writer) -> str | None:
    """Exponentials whose sum divides the product, later."""
    d = w.dim
    if w.layout not in ("bhij", "fij"):
        return None
    w.label("divided after", plain=False)
    high = w.pick(f"s - s.amax({d}, keepdim=True)", f"s - s.max({d}, keepdim=True)[0]", "s")
    if high != "s" and any(x.startswith("fill") and "inf'" not in x for x in w.p.labels):
        high = "s"
    if high == "s" and any(x.startswith("fill") and "-100" not in x for x in w.p.labels):
        high = f"s - s.amax({d}, keepdim=True)"
    if high == "s" and w.p.dtype == torch.float16:  # it overflows
        high = f"s - s.amax({d}, keepdim=True)"
    e = w.fresh(f"torch.exp({high})", "e")
    total = w.pick(f"{e}.sum({d}, keepdim=True)", f"{e}.sum({d}).unsqueeze(-1)", f"{e}.sum({d})[..., None]")
    if high == "s" and w.maybe(3):
        total = f"({total} + {w.pick('1', '1e-3')})"
    w.after = w.pick(f"{{}} / {total}", f"{{}}.div({total})", f"({{}} / {total}) * 1.0")
    return e


def twin(w: Writer) -> None:
    """The other direction of the same scores: a second attention."""
    if w.layout != "bhij" or not w.square or w.p.sizes.e != w.p.sizes.d:
        return
    w.label("both directions", plain=False)
    w.p.sites += 1
    w.extra.append(w.fresh(w.pick("s.mT.softmax(-1) @ v", "s.transpose(-1, -2).softmax(dim=-1) @ (v * 2)",
                                  "s.softmax(-2).mT @ v"), "u"))  # fmt: skip


def joint_heads(w: Writer) -> None:
    """One score for all heads: the product sums over heads and components."""
    w.label("joint heads", plain=False)
    w.line("s = " + w.pick("torch.einsum('bhid,bhjd->bij', q, k)", "torch.einsum('...hid,...hjd->...ij', q, k)",
                           "torch.einsum('bihd,bjhd->bij', q.transpose(1, 2), k.transpose(1, 2))"))  # fmt: skip
    if w.maybe():
        w.line("s = s.masked_fill(torch.arange(M) > torch.arange(N)[:, None] + 1, float('-inf'))")
    w.line("w = (s * 0.3).softmax(-1)")
    w.line("o = " + w.pick("torch.einsum('bij,bhje->bhie', w, v)", "w[:, None] @ v", "torch.einsum('bij,bhje->bihe', w, v).transpose(1, 2)"))


def library(w: Writer) -> None:
    """SDPA with what it takes."""
    s, pick = w.p.sizes, w.pick
    w.label("sdpa")
    mask = pick("None", "None", "bool", "float", "causal")
    more = ""
    if mask == "bool":
        from random_models.spellings import predicate  # noqa: PLC0415

        more = f", attn_mask={predicate(w)}"
    elif mask == "float":
        w.input("bias", normal(_b, 1, _n, _m))
        more = ", attn_mask=bias"
    elif mask == "causal":
        more = ", is_causal=True"
    if w.maybe(3):
        more += ", scale=0.4"
    if s.h != s.hk:
        more += ", enable_gqa=True"
    w.line(f"o = F.scaled_dot_product_attention(q, k, v{more})")
