# ruff: noqa: E501 - spellings are listed a line each, however long
"""What happens to the scores and the weights of a random program: masks, biases, normalisers, and near misses."""

from __future__ import annotations

import torch

from random_models.forms import divided_after, gated, sum_of_softmaxes, talking_scores, talking_weights, turned
from random_models.writer import Writer, _b, _m, _n, integers, normal

FILLS = ["float('-inf')", "torch.finfo(s.dtype).min", "-1e9", "-1e4", "-100.0", "-1e30"]


# masks: (b|1, 1, i|1, j) booleans, true where visible


def _rows(w: Writer) -> tuple[str, str]:
    off = w.pick("", " + (M - N)", "", " + 2")
    return w.pick(f"(torch.arange(N)[:, None]{off})", f"(torch.arange(N).view(-1, 1){off})"), "torch.arange(M)[None, :]"


def predicate(w: Writer, depth: int = 2) -> str:
    """A new variable that holds a mask of 4 dimensions."""
    i, j = _rows(w)
    kind = w.pick("causal", "tril", "triu", "window", "band", "chunk", "docs", "pad", "length", "prefix", "dense",
                  "dilated", "both", "either", "not")
    w.label(f"mask:{kind}")
    if kind in ("both", "either") and depth:
        a, b = predicate(w, depth - 1), predicate(w, depth - 1)
        how = {"both": w.pick("{} & {}", "torch.logical_and({}, {})", "{} * {}"),
               "either": w.pick("{} | {}", "torch.logical_or({}, {})", "({}.int() + {}.int()) > 0")}[kind]
        return w.fresh(how.format(a, b), "m")
    if kind == "not" and depth:
        a = predicate(w, depth - 1)
        return w.fresh(w.pick(f"~{a}", f"torch.logical_not({a})", f"{a} == False", f"(1 - {a}.int()).bool()"), "m")
    flat = {
        "tril": w.pick("torch.ones(N, M).tril() > 0", "torch.ones(N, M, dtype=torch.bool).tril(1)",
                       "torch.tril(torch.ones((N, M), dtype=torch.int64), diagonal=M - N) == 1"),
        "triu": w.pick("~torch.ones(N, M, dtype=torch.bool).triu(1)", "torch.triu(torch.ones(N, M), diagonal=1) == 0",
                       "torch.full((N, M), -1.0).triu(1) >= 0"),
        "window": f"({j} <= {i}) & ({j} > {i} - 3)", "band": f"({i} - {j}).abs() <= 2",
        "chunk": f"{i} // 3 == {j} // 3", "dilated": f"({i} - {j}) % 2 == 0", "prefix": f"({j} <= {i}) | ({j} < 2)",
    }  # fmt: skip
    if kind in flat:
        return w.fresh(f"({flat[kind]})[None, None]", "m")
    if kind == "docs":
        a = w.input("docs_q", integers(lambda s: 3, _b, _n))
        b = w.input("docs_k", integers(lambda s: 3, _b, _m))
        return w.fresh(f"{a}[:, None, :, None] == {b}[:, None, None, :]", "m")
    if kind == "pad":
        name, text = w.pick(("pad_i", "pad_i.bool()"), ("pad_i", "pad_i != 0"), ("pad_i", "pad_i.float() > 0.5"),
                            ("pad_b", "pad_b"))
        make = integers(lambda s: 2, _b, _m)
        w.input(name, make if name == "pad_i" else lambda s, r: make(s, r).bool())
        return w.fresh(f"({text})[:, None, None, :]", "m")
    if kind == "length":
        w.input("lengths", integers(lambda s: s.m + 1, _b))
        if w.maybe(4):
            w.label("length written")
            w.line(w.pick("lengths += 1", "lengths = lengths.add_(1)", "lengths[0] = 1"))
        m = w.fresh("(torch.arange(M)[None, :] < lengths[:, None])[:, None, None, :]", "m")
        if w.maybe(4):
            w.label("length written after")
            w.line(w.pick("lengths += 1", "lengths.zero_()"))
        return m
    if kind == "dense":
        w.input("dense", lambda s, r: torch.randint(0, 2, (s.b, 1, s.n, s.m), generator=r).bool())
        return "dense"
    return w.fresh(f"({j} <= {i}).view(1, 1, N, M)", "m")


def masked(w: Writer) -> None:
    m = predicate(w)
    fill = w.pick(*FILLS)
    w.label(f"fill {fill}")
    out = w.fit(f"(~{m})")
    keep = w.fit(m)
    texts = [
        f"s = s.masked_fill({out}, {fill})", f"s = torch.where({keep}, s, {fill})",
        f"s = torch.where({out}, torch.full((), {fill}, dtype=s.dtype), s)",
        f"s.masked_fill_({out}, {fill})",
        f"s = s + torch.zeros({m}.shape, dtype=s.dtype).masked_fill(~{m}, {fill})" if w.layout == "bhij"
        else f"s = s.masked_fill({out}, {fill})",
        f"s = s + torch.where({keep}, torch.zeros((), dtype=s.dtype), {fill})",
        f"s[{out}.expand(s.shape)] = {fill}",
    ]  # fmt: skip
    if fill != FILLS[0]:
        texts += [
            f"s = s + (1.0 - {keep}.to(s.dtype)) * {fill}", f"s += {out} * {fill}", f"s.add_({out}.to(s.dtype) * {fill})",
            f"s = torch.max(s + {out} * {fill}, torch.full((), torch.finfo(s.dtype).min, dtype=s.dtype))",
            f"a = {out} * {fill}; s = s + a; s = s + a",
            *([f"s = s * {keep} + {out} * {fill}"] if f"fill {FILLS[0]}" not in w.p.labels else []),  # no inf * 0
        ]  # fmt: skip
    else:
        texts += [f"s = s + {keep}.to(s.dtype).log()"]
    w.line(w.pick(*texts))


def alibi(w: Writer) -> None:
    h = w.p.sizes.h
    w.label("alibi")
    i, j = _rows(w)
    w.buffer("p_slopes", normal(h))
    w.line(f"a = self.p_slopes.view(1, -1, 1, 1) * ({j} - {i})" + w.pick("", ".abs()"))
    w.line(w.pick(f"s = s + {w.fit('a')}", f"s += {w.fit('a')}", f"s = s - {w.fit('a')}.to(s.dtype)"))


def bucketed(w: Writer) -> None:
    h = w.p.sizes.h
    w.label("table")
    w.buffer("p_table", normal(9, h))
    i, j = _rows(w)
    w.line(f"r = {j} - {i}")
    w.line(w.pick("r = r.clamp(-4, 4) + 4", "r = torch.where(r < 0, 4, 0) + torch.minimum(r.abs(), torch.tensor(4))",
                  "r = torch.where(r.abs() < 3, r.abs(), 3 + (torch.log(r.abs().clamp(min=1).float() / 3) * 2).long())"
                  ".clamp(max=8)"))  # fmt: skip
    w.line(w.pick("a = F.embedding(r, self.p_table).permute(2, 0, 1)[None]", "a = self.p_table[r].movedim(-1, 0)[None]",
                  "a = self.p_table.t()[:, r].unsqueeze(0)",
                  f"a = self.p_table.index_select(0, r.view(-1)).view(N, M, {h}).permute(2, 0, 1)[None]"))  # fmt: skip
    w.line(f"s = s + {w.fit('a')}")


def added(w: Writer) -> None:
    w.label("bias")
    if w.maybe():
        w.input("bias", normal(_b, 1, _n, _m))
    else:
        w.input("bias", normal(1, w.p.sizes.h, _n, _m))
    if w.maybe(5):
        w.label("bias written")
        w.line(w.pick("bias.mul_(2)", "bias += 1", "bias[..., 0] = 0", "bias = bias.clone(); bias[:, :, 0] = 3.0"))
    w.line(f"s = {w.pick('s + {0}', '{0} + s', 'torch.add(s, {0}, alpha=0.5)').format(w.fit('bias'))}")
    if w.maybe(6):
        w.label("bias written late", plain=False)
        w.line(w.pick("bias.mul_(2)", "bias.zero_()"))


def capped(w: Writer) -> None:
    w.label("softcap")
    w.line(w.pick("s = torch.tanh(s / 3.0) * 3.0", "s = 2 * (s / 2).tanh()", "s = s / 4; s = s.tanh_(); s = s * 4.0"))


def tempered(w: Writer) -> None:
    w.label("temperature")
    w.buffer("p_temp", normal(1, w.p.sizes.h, 1, 1))
    w.line(f"s = s * {w.fit(w.pick('self.p_temp.sigmoid()', 'self.p_temp.abs().clamp(max=1.0)', 'self.p_temp.clamp(0.1, 0.9)'))}")


def shifted(w: Writer) -> None:
    """Relative positions as Transformer-XL has them: a second product, shifted by a pad and a reshape."""
    s = w.p.sizes
    if w.layout != "bhij" or not w.square:
        return added(w)
    w.label("relative shift")
    w.buffer("p_far", normal(1, s.h, s.d, 16))
    w.line("r = q @ self.p_far[..., :N]")
    w.line(f"r = F.pad(r, (1, 0)).reshape(B, {s.h}, N + 1, N)[:, :, 1:].reshape(B, {s.h}, N, N)")
    w.line("s = s + r")


def patched(w: Writer) -> None:
    w.label("written in part", plain=False)
    w.line(w.pick("s[..., 0] = 0.5", "s[0] += 1.0", "s[..., :1, :].mul_(2)", "s.diagonal(dim1=-2, dim2=-1).fill_(-1.0)",
                  "t = s.view(-1); t.add_(0.1)", "t = s.transpose(-1, -2); t += 0.3", "s.view(-1)[::2] = 0",
                  "t = s; t *= 0.5", "t = s[..., :]; t.mul_(0.5)"))  # fmt: skip


CHANGES = [masked, masked, masked, masked, alibi, bucketed, added, capped, tempered, shifted, patched, talking_scores]


# normalisers


def softmax(w: Writer) -> str:
    d = w.dim
    if w.maybe(8):
        return near_miss(w)
    if w.maybe(8):
        return sink(w)
    late = divided_after(w) if w.maybe(10) else None
    if late is not None:
        return late
    if w.maybe(12) and w.layout == "bhij":
        w.p.labels.append("float32 softmax")
    # In a row that holds finite fills alone these differ from a softmax by what rounding makes of huge numbers: the
    # logarithm drowns, an exponential of all is zero, a cast of the float64 program rounds as float32 does.
    delicate = [
        f"F.softmax(s.float(), dim={d}, dtype=torch.float32).to(s.dtype)", f"torch.log_softmax(s, {d}).exp()",
        f"(s - s.logsumexp({d}, keepdim=True)).exp()", f"s.exp() / s.exp().sum({d}, keepdim=True)",
        f"s.exp2() / s.exp2().sum({d}, keepdim=True)", f"1.5 ** s / (1.5 ** s).sum({d}, keepdim=True)",
        f"s.sigmoid() / s.sigmoid().sum({d}, keepdim=True)", f"s.relu() / (s.relu().sum({d}, keepdim=True) + 0.1)",
    ]  # fmt: skip
    if any(x.startswith("fill") and "inf'" not in x for x in w.p.labels):
        delicate = []
    text = w.pick(
        f"F.softmax(s, dim={d})", f"s.softmax({d})", f"torch.softmax(s, dim={d})", f"F.softmax(s, dim={d}, dtype=s.dtype)",
        *delicate,
        f"(s - s.max({d}, keepdim=True)[0]).softmax({d})",
        f"F.softmax(s - s.amax({d}, keepdim=True).detach(), dim={d})",
        "EXP", "EXP", "INPLACE", "SAFE", "NAN", "ONE",
    )  # fmt: skip
    if text == "EXP":
        w.line(f"e = torch.exp(s - {w.pick(f's.amax({d}, keepdim=True)', f's.max(dim={d}, keepdim=True).values', f's.max(dim={d})[0].unsqueeze({d})')})")
        text = f"e / {w.pick(f'e.sum({d}, keepdim=True)', f'e.sum(dim={d}).unsqueeze({d})', f'torch.sum(e, {d}, True)')}"
    elif text == "INPLACE":
        w.label("exp in place")
        w.line(f"s = s - s.amax({d}, keepdim=True)")
        w.line("e = s.exp_()")
        text = w.pick(f"e / e.sum({d}, keepdim=True)", f"e.div_(e.sum({d}, keepdim=True))")
    elif text == "ONE":
        w.label("one in the sum", plain=False)
        w.line(f"m = s.amax({d}, keepdim=True); e = torch.exp(s - m)")
        text = f"e / ({w.pick('torch.exp(-m)', '1', '1e-6')} + e.sum({d}, keepdim=True))"
    elif text == "SAFE":
        text = f"torch.ops.aten._safe_softmax(s, {d})"
    elif text == "NAN":
        text = f"torch.nan_to_num(s.softmax({d}), {w.pick('', '0.0', 'nan=0.0')})"
    return w.fresh(text, "w")


def sink(w: Writer) -> str:
    h, d = w.p.sizes.h, w.dim
    w.label("sink")
    w.buffer("p_sink", normal(1, h, 1, 1))
    column = w.fresh(f"self.p_sink.expand(B, {h}, N, 1)", "c")
    column = {"bhij": column, "bhji": f"{column}.transpose(-1, -2)", "bijh": f"{column}.permute(0, 2, 3, 1)",
              "bihj": f"{column}.transpose(1, 2)", "fij": f"{column}.flatten(0, 1)"}[w.layout]  # fmt: skip
    first = w.maybe()
    w.line(f"s = torch.cat([{f'{column}, s' if first else f's, {column}'}], dim={d})")
    if w.maybe(3):
        w.line(f"s = s - s.max(dim={d}, keepdim=True).values")
    w.line(f"f = s.softmax({d})")
    return w.fresh(f"f.narrow({d}, {1 if first else 0}, M)", "w")


def near_miss(w: Writer) -> str:
    """What looks like an attention's softmax and is none."""
    d = w.dim
    other = -2 if d == -1 else -1
    # a column of fills alone has a maximum as low: what is left of the scores beside it is rounding
    top = f"s.amax({other}, keepdim=True)"
    top += ".clamp(-50, 50)" if any(x.startswith("fill") and "inf'" not in x for x in w.p.labels) else ""
    w.label("near miss", plain=False)
    text = w.pick(
        f"s.softmax({other})", f"s.exp() / s.exp().sum({other}, keepdim=True)", f"s.exp() / (s + 1).exp().sum({d}, keepdim=True)",
        f"torch.exp(s - {top}) / torch.exp(s - {top}).sum({d}, keepdim=True)",
        f"(s - s.logsumexp({other}, keepdim=True)).exp()", f"s.softmax({d}) * s.softmax({other})",
        f"s.exp() / s.sum({d}, keepdim=True)", f"(s - {top}).softmax({d})",
        f"(s - (s * 2).amax({d}, keepdim=True)).softmax({d})", f"s.softmax({d}) - s.softmax({d}).mean()",
        "s.softmax(0)", "torch.sigmoid(s)", f"s.softmax({d}).cumsum({d})", f"s.softmax({d}).softmax({d})",
        f"(s.softmax({d}) + 0.1)", f"s.softmax({d}) + s.softmax({d}).flip({d})", f"s.softmax({d}).roll(1, {other})",
        f"s.exp() / s.exp().sum({d}, keepdim=True).clamp(min=0.5)", f"s.exp() / (s.exp().sum({d}, keepdim=True) + 1)",
        f"(s.exp() + 1) / s.exp().sum({d}, keepdim=True)", f"s.exp() / s.clone().exp().sum({d}, keepdim=True)",
        f"(s + 1).exp() / s.exp().sum({d}, keepdim=True)", f"2 * s.exp() / s.exp().sum({d}, keepdim=True)",
        f"torch.exp(s - s.amax({d}, keepdim=True)) / s.exp().sum({d}, keepdim=True)",
        f"s.softmax({d}).relu()", "(s.relu() / 3)", "LATE", "SELF",
    )  # fmt: skip
    if text == "LATE":
        w.line(f"e = s.exp(); t = e.sum({d}, keepdim=True)")
        w.line(w.pick("e.mul_(2)", "e[..., 0] = 0", "s.add_(1)", "t.add_(1)"))
        text = "e / t"
    if text == "SELF":
        w.line(f"e = (s - s.mean({d}, keepdim=True)).exp()")
        text = f"e / e.sum({d}, keepdim=True)"
    if ("softmax" not in text and "exp" not in text and " / t" not in text) or "s.sum" in text or "logsumexp" in text:
        w.p.sites = 0  # nothing in it says softmax
    return w.fresh(text, "w")


# weights


def _returned(w: Writer, x: str) -> str:
    w.label("weights used elsewhere", plain=False)
    w.extra.append(w.pick(x, f"{x}.sum()", f"{x}.mean({w.dim})", f"{x}.amax(-1)", f"({x} * 2)", f"{x}[..., 0]"))
    return x


def _written(w: Writer, x: str) -> str:
    w.label("weights written", plain=False)
    w.line(w.pick(f"{x}[..., 0] = 0", f"{x}.mul_(0.5)", f"{x} *= 2", f"{x}[0].zero_()", f"{x}.clamp_(max=0.3)",
                  f"t = {x}.view(-1); t.mul_(0.7)", f"t = {x}[..., :1]; t.add_(1)",
                  f"{x} = {x}.clone(); {x}[..., 0] = 0.25", f"t = {x}.transpose(-1, -2); t.add_(0.01)"))  # fmt: skip
    return x


def _head_mask(w: Writer, x: str) -> str:
    w.label("head mask")
    w.buffer("p_heads", normal(1, w.p.sizes.h, 1, 1))
    return w.fresh(f"{x} * {w.fit('self.p_heads')}", "w")


def _pairs(w: Writer, x: str) -> str:
    w.label("weights times pairs")
    w.input("pairs", normal(_b, w.p.sizes.h, _n, _m))
    return w.fresh(f"{x} * {w.fit('pairs')}" + w.pick("", " + 0.1"), "w")


def _dropped(w: Writer, x: str) -> str:
    w.label("dropout off")
    return w.fresh(w.pick(f"F.dropout({x}, 0.1, self.training and False)", f"F.dropout({x}, p=0.0)", f"{x}.to(v.dtype)",
                          f"{x}.type_as(v)", f"{x}.contiguous()"), "w")  # fmt: skip


def _renormalised(w: Writer, x: str) -> str:
    w.label("renormalised", plain=False)
    return w.fresh(w.pick(f"{x} / {x}.sum({w.dim}, keepdim=True)", f"{x} / ({x}.sum(-1, keepdim=True) + 1e-6)",
                          f"{x} - {x}.mean({w.dim}, keepdim=True)"), "w")  # fmt: skip


def _values_from_weights(w: Writer, x: str) -> str:
    w.label("values from weights", plain=False)
    w.line(w.pick(f"v = v * {x}.sum()", f"v = v + {x}.mean()", f"v = v * {x}.max()"))
    return x


def _again(w: Writer, x: str) -> str:
    w.label("weights used twice", plain=False)
    if w.layout in ("bhij", "fij"):
        w.line(f"u = {x} @ v")
        w.extra.append("u")
    return x


def _any(w: Writer, x: str) -> str:
    if w.layout != "bhij":
        return _dropped(w, x)
    m = predicate(w, 1)
    w.label("any", plain=False)
    return w.fresh(w.pick(f"{x} * {m}.any(-1, keepdim=True)", f"torch.where({m}.any(-1, keepdim=True), {x}, 0.0)",
                          f"{x}.masked_fill(~{m}.any(dim=-1, keepdim=True), 0.0)"), "w")  # fmt: skip


WEIGHTS = [_returned, _written, _head_mask, _pairs, _dropped, _dropped, _renormalised, _values_from_weights, _again, _any,
           talking_weights, sum_of_softmaxes, sum_of_softmaxes, gated, turned]
