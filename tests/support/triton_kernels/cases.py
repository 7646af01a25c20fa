"""Attentions by name, as models have them, at any size, and tensors to run them on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from random_ir.programs import Program

from attncc.ir import parse_attention, verify
from attncc.ir.evaluate import DTYPE_OF


@dataclass(frozen=True)
class Case:
    """Changes to the plain grouped attention. Extra tensors are `name: dtype[shape]`; HQ, HK, G are the heads."""

    mask: str = "True"
    score: str = "s * SCALE"
    d: int = 16
    e: int = 0
    norm: str = "softmax"
    empty: str = "zero"
    sink: str = ""
    drop: str = ""
    weight: str = "w"
    give: str = "out"
    tensors: tuple[str, ...] = ()
    groups: int = 2
    heads: int = 2
    rows: int = 37
    keys: int = 0  # as many as rows
    layout: str = ""
    extra: dict[str, int] = field(default_factory=dict[str, int])


_POSITION = ("position: i32[B]",)
CASES: dict[str, Case] = {
    "dense": Case(),
    "causal": Case("j <= i", give="out, lse"),
    "causal from the end": Case("j <= i + (M - N)"),
    "one head a group": Case("j <= i", groups=1, heads=3),
    "one key head": Case("j <= i", groups=5, heads=1),
    "sliding window": Case("j <= i and i - j < 9", rows=60),
    "window and sink tokens": Case("j <= i and (j < 3 or i - j < 9)", rows=90),
    "chunks": Case("j <= i and i // 20 == j // 20", rows=70),
    "dilated": Case("(i - j) % 3 == 0 and j <= i"),
    "every seventh key": Case("j <= i and j % 7 == 3", rows=90, give="out, lse"),
    "window and columns": Case("j <= i and (i - j < 9 or j % 32 < 2)", rows=130),
    "window and blocks by head": Case("j <= i and (i // 8 - j // 8 < 2 or (j // 8 + hk * 2) % 4 == 0)", rows=100),
    "stripes by head": Case("(j - (hk * G + g) * 64) % 256 < 64", groups=4, heads=1, rows=140, give="out, lse"),
    "two stripes": Case("j <= i and (j % 16 < 2 or j % 20 == 3) and 5 <= j", rows=100),
    "far apart": Case("(i - j) % 40 == 0 and j <= i", rows=130, groups=1),
    "prefix": Case("j <= i or j < prefix[b]", tensors=("prefix: i32[B]",)),
    "documents": Case("j <= i and doc[b, i] == doc[b, j]", tensors=("doc: i32[B, N]",)),
    "document starts": Case("j <= i and start[i] <= j", tensors=("start: i64[N]",)),
    "padding": Case("pad[b, j]", tensors=("pad: bool[B, M]",), empty="mean"),
    "dense mask": Case("seen[b, i, j]", tensors=("seen: bool[B, N, M]",)),
    "block table": Case("table[hk * G + g, i // 16, j // 16]", tensors=("table: bool[HQ, 5, 5]",), rows=70),
    "causal block table": Case("j <= i and table[hk, i // 8, j // 32]", tensors=("table: bool[HK, 9, 3]",), rows=70),
    "regions": Case("allowed[b, region[i], region[j]]", tensors=("allowed: bool[B, 5, 5]", "region: i64[N]"), rows=70),
    "clusters": Case("cluster[b, i] == cluster[b, j] or j < 3", tensors=("cluster: i32[B, N]",), rows=70),
    "pages": Case("pages[b, j // 16] and j < length[b]", rows=1, keys=100, tensors=("pages: bool[B, 7]",
                  "length: i32[B]")),
    "soft cap": Case("j <= i", score="tanh(s * SCALE / 5.0) * 5.0"),
    "alibi": Case("j <= i", score="s * SCALE + slope[hk * G + g] * float(j - i)", tensors=("slope: f32[HQ]",)),
    "t5 table": Case(
        score="s + table[min(max(j - i, -8), 8) + 8, hk * G + g]", tensors=("table: bf16[17, HQ]",), groups=1
    ),
    "t5 logarithm": Case(
        score="s + table[where(i - j < 4, max(i - j, 0), min(4 + int(log(float(max(i - j, 1)) / 4.0) * 2.0), 9)), hk]",
        tensors=("table: f32[10, HK]",),
    ),
    "bias of both": Case(score="s * SCALE + bias[b, hk, g, i, j]", tensors=("bias: bf16[B, HK, G, N, M]",)),
    "swin table": Case(score="s * SCALE + table[place[i, j], hk * G + g]", tensors=("table: f32[7, HQ]",
                       "place: i64[N, M]")),
    "rectangles": Case("abs(i // 8 - j // 8) <= 1 and abs(i % 8 - j % 8) <= 1", rows=64),
    "sink": Case("j <= i and i - j < 9", sink="sinks[hk * G + g]", tensors=("sinks: bf16[HQ]",), give="out, lse"),
    "empty rows": Case("j < i - 3", give="out, lse"),
    "empty rows mean": Case("j < i - 3", empty="mean"),
    "empty rows mean, gated": Case("j < i - 3", empty="mean", weight="w * gate[j]", tensors=("gate: f32[M]",)),
    "empty rows nan": Case("j < i - 3", empty="nan"),
    "sigmoid": Case("j <= i", norm="sigmoid", score="s * SCALE - 2.0"),
    "relu": Case("j <= i", norm="relu", weight="w / float(i + 1)"),
    "no normalizer": Case("j <= i", norm="none"),
    "squared weights": Case("j <= i", weight="w * w"),
    "squashed weights": Case("j < i - 3", weight="tanh(w)", empty="mean"),
    "limited weights": Case("j < i - 3", weight="min(w, 0.1)", empty="nan"),
    "less a part": Case("j <= i", weight="w - w * gate[j]", tensors=("gate: f32[M]",)),
    "weights": Case("j <= i", give="out, weights"),
    "weights of empty rows": Case("j < i - 3", give="weights, out", empty="mean"),
    "dropout": Case(weight="where(keep[i, j], w, 0.0) * 1.25", tensors=("keep: bool[N, M]",)),
    "dropout stream": Case("j <= i", weight="w * where(mix(words[b, hk * G + g, i, 0], words[b, hk * G + g, i, 1], j) "
                           "< 1717986918, 1.25, 0.0)", tensors=("words: i32[B, HQ, N, 2]",), give="out, lse"),
    "d 24, e 40": Case("j <= i", d=24, e=40),
    "d 4": Case("j <= i", d=4),
    "d 80": Case("j <= i", d=80),
    "d 192, e 128": Case("j <= i", d=192, e=128, rows=20),
    "d 256": Case("j <= i", d=256, rows=20),
    "layout": Case("j <= i", layout="i, b, g, hk, e"),
    "decode": Case("j < length[b]", rows=1, keys=100, tensors=("length: i32[B]",)),
    "decode with sink": Case("j < length[b]", rows=1, keys=100, tensors=("length: i32[B]",), sink="0.5",
                             give="out, lse"),
    "decode mean": Case("j < length[b] - 3", rows=1, keys=100, tensors=("length: i32[B]",), empty="mean"),
    "decode sigmoid": Case("j < length[b]", rows=1, keys=100, tensors=("length: i32[B]",), norm="sigmoid"),
    "certified skip": Case("j <= i", drop="1e-06", rows=70),
    "two heads of 80": Case("j <= i + 60", rows=3, keys=90, d=80, groups=2, heads=1),
}  # fmt: skip


def text(case: Case, dtype: str, sizes: str = "B, N, M") -> str:
    """The attention of a case. Its sequence lengths are sizes, its heads constants."""
    heads = {"HQ": case.heads * case.groups, "HK": case.heads, "G": case.groups}
    d, e = case.d, case.e or case.d

    def fill(line: str) -> str:
        for name, value in heads.items():
            line = line.replace(name, str(value))
        return line.replace("SCALE", repr(d**-0.5))

    keys = "M" if case.keys or "M" in case.mask or any("M" in t for t in case.tensors) else "N"
    return "\n".join(fill(line) for line in (
        "attention",
        f"size   {sizes}",
        "batch  b = B, hk = HK, g = G",
        f"axis   i = N, j = {keys}, d = {d}, e = {e}",
        f"tensor q: {dtype}[B, HQ, N, {d}]", f"tensor k: {dtype}[B, HK, {keys}, {d}]",
        f"tensor v: {dtype}[B, HK, {keys}, {e}]",
        *(f"tensor {t}" for t in case.tensors),
        "q      q[b, hk * G + g, i, d]", "k      k[b, hk, j, d]", "v      v[b, hk, j, e]",
        f"score  {case.score}", f"mask   {case.mask}", f"norm   {case.norm}", f"empty  {case.empty}",
        *([f"sink   {case.sink}"] if case.sink else []),
        *([f"drop   {case.drop}"] if case.drop else []),
        f"weight {case.weight}", f"give   {case.give}", f"dtype  {dtype}",
        *([f"layout {case.layout}"] if case.layout else []),
    ))  # fmt: skip


def make(name: str, *, rows: int = 0, keys: int = 0, dtype: str = "bf16", batch: int = 2) -> Program:
    """A case with tensors of random numbers; integers are kept small enough for every index they are used as."""
    return case_of(CASES[name], rows=rows, keys=keys, dtype=dtype, batch=batch)


def case_of(case: Case, *, rows: int = 0, keys: int = 0, dtype: str = "bf16", batch: int = 2) -> Program:
    a = verify(parse_attention(text(case, dtype)))
    n = rows or case.rows
    m = keys or case.keys or n
    values = {"B": batch, "N": n, "M": m}
    random = torch.Generator().manual_seed(7)
    tensors: dict[str, torch.Tensor] = {}
    for t in a.tensors:
        shape = [values[repr(x)] if repr(x) in values else int(repr(x)) for x in t.shape]
        tensors[t.name] = _filled(t.name, t.dtype, shape, m, random)
    return Program(a, tensors, [batch, n, m])


def _filled(name: str, dtype: str, shape: list[int], keys: int, random: torch.Generator) -> torch.Tensor:
    kind = DTYPE_OF[dtype]
    if name == "start":  # of packed sequences
        at = torch.arange(shape[0])
        return (at - at % 11).to(kind)
    if name == "length":
        return torch.tensor([keys - 3, keys // 3], dtype=kind)[: shape[0]]
    if dtype == "bool":
        return torch.rand(shape, generator=random) < 0.7
    if name == "cluster":  # in no order
        return torch.randint(0, 5, shape, generator=random).to(kind)
    if name == "words":
        return torch.randint(-(2**31), 2**31, shape, generator=random, dtype=kind)
    if not kind.is_floating_point:
        return torch.sort(torch.randint(0, 5, shape, generator=random), -1).values.to(kind)
    return torch.randn(shape, generator=random, dtype=torch.float64).to(kind)
