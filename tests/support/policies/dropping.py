"""Attentions whose values are unit vectors: the output is the weights, and says which keys a kernel left out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attncc.ir import Attention, parse_attention

B, H, GROUP, D, MOST = 2, 4, 2, 16, 320


def attention(
    drop: str, dtype: str = "f32", *, padded: bool = False, sink: bool = False, most: int = MOST
) -> Attention:
    """Causal over the last n of m keys, of any n and m; every head of keys has its own."""
    lines = [
        "attention", "size   n, m", f"batch  b = {B}, h = {H}", f"axis   i = n, j = m, d = {D}, e = {most}",
        f"tensor q: {dtype}[{B}, {H}, n, {D}]", f"tensor k: {dtype}[{B}, {H // GROUP}, m, {D}]",
        f"tensor v: {dtype}[{B}, {H // GROUP}, m, {most}]", *([f"tensor seen: bool[{B}, m]"] if padded else []),
        *([f"tensor sink: f32[{H}]"] if sink else []),
        *([f"tensor share: f32[{H}]"] if "share" in drop else []),
        "q      q[b, h, i, d]", f"k      k[b, h // {GROUP}, j, d]", f"v      v[b, h // {GROUP}, j, e]",
        "score  s * 0.25", f"mask   j <= i + (m - n){' and seen[b, j]' if padded else ''}", "norm   softmax",
        "empty  zero", *(["sink   sink[h]"] if sink else []), f"drop   {drop}", "weight w", "give   out",
        f"dtype  {dtype}",
    ]  # fmt: skip
    return parse_attention("\n".join(lines) + "\n")


#: How the scores of a row lie, by name: what a rule that looks at blocks in order could be caught by.
SHAPES = ("even", "peaked", "falling", "climbing", "needle", "first", "far")


def tensors(shape: str, n: int, m: int, dtype: torch.dtype, seed: int = 0, most: int = MOST) -> dict[str, Tensor]:
    """q, k and v: keys along one direction decide the scores, and the rest is noise."""
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(B, H, n, D, generator=g), torch.randn(B, H // GROUP, m, D, generator=g)
    at = torch.arange(m) / m
    along = {
        "even": 0.0 * at, "peaked": 0.0 * at, "falling": -14 * at, "climbing": 14 * at,
        "needle": torch.where(torch.arange(m) == m - m // 4, 30.0, 0.0),
        "first": torch.where(torch.arange(m) < 3, 12.0, 0.0),
        "far": torch.where(torch.arange(m) % 97 == 5, 400.0, -400.0),
    }[shape]  # fmt: skip
    q[..., 0], k[..., 0] = 4.0, along
    if shape == "even":
        q[..., 1:] *= 0.05
    if shape == "peaked":
        q[..., 1:] *= 3.0
    v = torch.eye(most)[:m].expand(B, H // GROUP, m, most).contiguous()
    return {name: x.to(dtype) for name, x in (("q", q), ("k", k), ("v", v))}


@dataclass(frozen=True)
class Kept:
    """`mass`: what the left-out keys of each row weigh, (b, h, i), in float64; `share`: how many of its keys those are;
    `off`: how far the output is from the exact weights of the others over their sum."""

    mass: Tensor
    share: float
    off: float


def kept(data: dict[str, Tensor], out: Tensor, sink: Tensor | None = None) -> Kept:
    """What the output of a kernel says of the keys that it left out."""
    q, k = data["q"].double(), data["k"].double().repeat_interleave(GROUP, 1)
    n, m = q.shape[-2], k.shape[-2]
    visible = torch.arange(m) <= torch.arange(n)[:, None] + (m - n)
    if "seen" in data:
        visible = visible & data["seen"][:, None, None]
    scores = (q @ k.mT * 0.25).masked_fill(~visible, -torch.inf)
    if sink is None:
        weights = scores.softmax(-1).nan_to_num(0.0)
    else:
        beside = sink.double()[None, :, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, beside], -1).softmax(-1)[..., :-1]
    found = out.double()[..., :m]
    # weights that no type would show are counted as left out only where that is what the kernel says of their block
    left = visible & (found == 0) & (weights > 1e-30)
    mass = torch.where(left, weights, 0.0).sum(-1)
    wanted = torch.where(left, 0.0, weights) / (1 - mass)[..., None]
    return Kept(mass, left.sum().item() / visible.expand_as(left).sum().item(), (found - wanted).abs().max().item())
