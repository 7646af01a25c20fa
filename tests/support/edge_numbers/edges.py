"""Tensors with edge values in them, whose products are exact in every type: then eager and float64 are one answer.

Queries and keys hold small integers times a power of two, so that a score is the same number in whatever order its
products are summed, in bfloat16 too, and ties are ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from attncc.ir import Attention, interpret
from attncc.ir.evaluate import DTYPE_OF
from attncc.ir.expr import Op, walk

Tensors = dict[str, torch.Tensor]
Edge = Callable[[Tensors, torch.Generator], None]
NAN, INF = math.nan, math.inf


def _whole(t: Tensors, r: torch.Generator, size: float, *, sign: int = 0) -> None:
    """Scores of about `size` where all dimensions add up: half of it into the queries, half into the keys."""
    power = round(math.log2(size))
    for name, part in (("q", power // 2), ("k", power - power // 2)):
        x = torch.randint(-2, 3, t[name].shape, generator=r, dtype=torch.float64)
        if sign:
            x = x.abs() * (sign if name == "k" else 1)
        t[name] = (x * 2.0**part).to(t[name].dtype)


def scores(size: float, sign: int = 0) -> Edge:
    return lambda t, r: _whole(t, r, size, sign=sign)


def _at(where: str, value: float, *place: int | slice) -> Edge:
    def put(t: Tensors, r: torch.Generator) -> None:
        _whole(t, r, 1.0)
        t[where] = t[where].clone()
        t[where][(..., *place)] = value

    return put


def values(size: float) -> Edge:
    """Values of one size, so that sums of a few pass the largest number."""

    def put(t: Tensors, r: torch.Generator) -> None:
        _whole(t, r, 1.0)
        t["v"] = (t["v"].sign() * size).to(t["v"].dtype)
        t["v"][..., 0] = size

    return put


def added(fill: float, share: float, size: float = 1.0) -> Edge:
    """A bias of `fill` on a share of the pairs, zero elsewhere, with scores in steps of `size`."""

    def put(t: Tensors, r: torch.Generator) -> None:
        _whole(t, r, size)
        for name in {"bias", "half"} & t.keys():
            hit = torch.rand(t[name].shape, generator=r) < share
            hit[..., :2, :] = True  # whole rows
            t[name] = torch.where(hit, fill, 0.0).to(t[name].dtype)

    return put


def _climbing(t: Tensors, r: torch.Generator) -> None:
    """Scores of 2e9 that climb by their last bit, which not all multiples of theirs have."""
    t["q"], t["k"] = torch.zeros_like(t["q"]), torch.zeros_like(t["k"])
    t["q"][..., 0], t["k"][..., 0] = 2.0**15, 2.0**15 * 1.9375
    t["q"][..., 1], t["k"][..., 1] = 2.0**7, torch.arange(t["k"].shape[-2]).div(16, rounding_mode="floor") % 120


#: What floats of 32 bits and bfloat16 hold.
WIDE: dict[str, Edge] = {
    "scores of 1e6": scores(1e6),
    "scores of 1e10": scores(1e10),
    "scores of 1e30": scores(1e30),
    "scores near the largest": scores(2.0**120),
    "scores of -1e6": scores(1e6, -1),
    "scores of -1e13": scores(1e13, -1),
    "scores that climb by their last bit": _climbing,
    "values near the largest": values(3e38),
}
#: What every type holds.
ALL: dict[str, Edge] = {
    "scores of 1e3": scores(1e3),
    "scores of 2.7e8": scores(2.0**28),
    "NaN in the last key": _at("k", NAN, -1, 3),
    "NaN in the first key": _at("k", NAN, 0, slice(None)),
    "NaN in a query": _at("q", NAN, 0, 0),
    "infinity in a key": _at("k", INF, 5, 1),
    "minus infinity in a key": _at("k", -INF, 7, 0),
}
BIASES: dict[str, Edge] = {
    "NaN in a pair": lambda t, r: _pair(t, r, NAN),
    "infinity in a pair": lambda t, r: _pair(t, r, INF),
    "a pair of each": lambda t, r: (_pair(t, r, INF), _pair(t, r, NAN, 4))[0],
    "-1e9 on all": added(-1e9, 1.0, 2.0**9),
    "-1e10 on half": added(-1e10, 0.5),
    "the lowest on half": added(torch.finfo(torch.float32).min, 0.5),
    "minus infinity on half": added(-INF, 0.5),
}


def _pair(t: Tensors, r: torch.Generator, value: float, row: int = 3) -> None:
    if t["q"].abs().max() != 2:
        _whole(t, r, 1.0)
    for name in {"bias", "half"} & t.keys():
        t[name] = t[name].clone()
        t[name][..., min(row, t[name].shape[-2] - 1), min(2, t[name].shape[-1] - 1)] = value


def edges_of(a: Attention) -> dict[str, Edge]:
    dtypes = {x.dtype for x in a.tensors if x.name in "qkv"}
    held = ALL if "f16" in dtypes else ALL | WIDE
    if a.normalizer != "softmax":  # sums of weights have no bound
        held = {name: edge for name, edge in held.items() if not name.startswith("values")}
    return held | (BIASES if {"bias", "half"} & {x.name for x in a.tensors} else {})


def hold(
    a: Attention, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int], got: Mapping[str, torch.Tensor], what: str,
    *, rounds: bool = False,
) -> None:  # fmt: skip
    """`got` against the interpreter in float64, and against the interpreter in its own types for what is not finite.
    `rounds`: products of scores and constants round before anything is subtracted."""
    want = interpret(a, tensors, sizes, compute=torch.float64)
    eager = interpret(a, tensors, sizes)
    for name in a.outputs:
        g, w, e = got[name].double(), want[name].double(), eager[name].double()
        text = f"{what}: {name}"
        assert torch.equal(g.isnan(), e.isnan()), f"{text}: NaN {_places(g.isnan(), e.isnan())}"
        assert torch.equal(g.isinf(), e.isinf()), f"{text}: infinite {_places(g.isinf(), e.isinf())}"
        fine = w.isfinite() & e.isfinite()
        assert torch.equal(fine, e.isfinite()), f"{text}: eager is not float64"
        if not fine.any():
            continue
        off = (g - w)[fine].abs()
        halves = "bf16" in {a.tensor(x.tensor).dtype for x in (a.q, a.k, a.v)}
        unit = max(torch.finfo(got[name].dtype).eps, torch.finfo(DTYPE_OF[a.compute_dtype]).eps)
        if name == "lse":
            most = 4 * max(unit, 7.5e-5 if halves else 0) * (1 + w[fine].abs())
        else:
            unit = max(unit, torch.finfo(torch.bfloat16).eps if halves else 0)
            v = tensors[a.v.tensor].double()
            most = _mass(a, tensors, sizes).expand_as(w)[fine] * (8 * unit * float(v[v.isfinite()].abs().max()))
            if a.compute_dtype == "f64":  # sums in another order are as far from each other as from the truth
                most = 16 * most
            if rounds or any(isinstance(x, Op) and x.name in ("tanh", "float", "min") for x in walk(a.score)):
                # scores that round, as eager's do where they are not these numbers
                most = most + min(4 * _rounding(a, tensors), 2.0) * float(v[v.isfinite()].abs().max())
            most = torch.maximum(most, 4 * (e - w)[fine].abs())
        assert (off <= most).all(), f"{text}: off by {(off / most).max():.3g} times what is allowed"


def _rounding(a: Attention, tensors: Mapping[str, torch.Tensor]) -> float:
    """By how much the largest finite score, of those that q and k make, rounds."""
    q, k = (tensors[n].double().abs().nan_to_num(0.0, 0.0, 0.0).amax((0, 1, 2)) for n in "qk")
    return float(q @ k) * 0.25 * torch.finfo(DTYPE_OF[a.compute_dtype]).eps


def _mass(a: Attention, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
    """What the weights of each row sum to, at least one."""
    weights = interpret(replace(a, outputs=("weights",)), tensors, sizes, compute=torch.float64)["weights"]
    return weights.abs().sum(-1, keepdim=True).nan_to_num(1.0).clamp_min(1.0)


def _places(got: torch.Tensor, eager: torch.Tensor) -> str:
    parts = {"where eager is not": got & ~eager, "not where eager is": eager & ~got}
    return ", ".join(f"{what}: {int(x.sum())}, {x.nonzero()[:3].tolist()}" for what, x in parts.items())
