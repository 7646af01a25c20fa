"""What `attncc bench --suite cpu` measures, and what each row is meant to reach."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from attncc.bench.row import Mod, Row

Extra = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Goal:
    """At least `least` times as fast as `than`; or, than `plain`, the same attention without score or mask, at most
    `least` times as slow (`area`: a visible pair of query and key, not a call). By dtype; a dtype without a number has
    no goal."""

    than: Literal["sdpa", "read", "plain", "area"]
    least: dict[str, float]


@dataclass(frozen=True)
class CpuRow:
    """A row with its goals. `plain` is a row of the same tensors that our own kernel is timed on beside it."""

    row: Row
    goals: tuple[Goal, ...] = ()
    plain: Row | None = None


EVERY = ("f32", "bf16", "f16")
_HALF = 1.0  # what float16 is held to wherever SDPA has it: no slower


def _sdpa(f32: float, bf16: float) -> Goal:
    return Goal("sdpa", {"f32": f32, "bf16": bf16, "f16": _HALF})


def _at_most(than: Literal["plain", "area"], times: float) -> Goal:
    return Goal(than, dict.fromkeys(EVERY, times))


def dense(n: int, d: int = 64) -> CpuRow:
    return CpuRow(Row(f"dense {n}" + (f" D{d}" if d != 64 else ""), 1, 8, 1, n, n, d), (_sdpa(1.25, 2.5),))


def _causal_mod(_: Extra) -> Mod:
    return lambda b, h, i, j: j <= i


def causal(n: int, d: int = 64) -> CpuRow:
    name = f"causal {n}" + (f" D{d}" if d != 64 else "")
    row = Row(name, 1, 8, 1, n, n, d, "j <= i", mask_mod=_causal_mod, causal=True)
    return CpuRow(row, (_sdpa(1.45, 2.9),))


def window(n: int, width: int) -> CpuRow:
    row = Row(f"window {width} of {n}", 1, 8, 1, n, n, 64, f"j <= i and i - j < {width}",
              mask_mod=lambda _: lambda b, h, i, j: (j <= i) & (i - j < width))  # fmt: skip
    goals = (_sdpa(20, 30),) if (n, width) == (4096, 256) else ()
    if n > 4096:
        return CpuRow(row, goals)
    return CpuRow(row, (*goals, _at_most("area", 1.08 if width >= 1024 else 1.25)), dense(n).row)


def documents(n: int, count: int) -> CpuRow:
    """Packed sequences of unequal lengths, each causal."""

    def extra(device: torch.device) -> Extra:
        ends = torch.rand(count - 1, generator=torch.Generator().manual_seed(1)).mul(n).long().sort().values
        return {"doc": torch.bucketize(torch.arange(n), ends, right=True).to(device)}

    def mod(extra: Extra) -> Mod:
        doc = extra["doc"]
        return lambda b, h, i, j: (j <= i) & (doc[i] == doc[j])

    return CpuRow(Row(f"{count} documents in {n}", 1, 8, 1, n, n, 64, "j <= i and doc[i] == doc[j]",
                      declared=(f"doc: i32[{n}]",), extra=extra, mask_mod=mod))  # fmt: skip


def prefix_lm(n: int, prefix: int) -> CpuRow:
    return CpuRow(Row(f"prefix {prefix} of {n}", 1, 8, 1, n, n, 64, f"j <= i or j < {prefix}",
                      mask_mod=lambda _: lambda b, h, i, j: (j <= i) | (j < prefix)))  # fmt: skip


def t5_bias(n: int) -> CpuRow:
    def extra(device: torch.device) -> Extra:
        return {"table": torch.randn(257, 8, generator=torch.Generator().manual_seed(2)).to(device)}

    def mod(extra: Extra) -> Mod:
        table = extra["table"]
        return lambda s, b, h, i, j: s + table[torch.clamp(j - i, -128, 128) + 128, h]

    score = "s * SCALE + table[min(max(j - i, -128), 128) + 128, HEAD]"
    row = Row(f"T5 bias {n}", 1, 8, 1, n, n, 64, score=score, declared=("table: DTYPE[257, 8]",), extra=extra,
              score_mod=mod)  # fmt: skip
    return CpuRow(row, (_at_most("plain", 1.15),), dense(n).row)


def alibi(n: int) -> CpuRow:
    def mod(extra: Extra) -> Mod:
        slope = extra["slope"]
        return lambda s, b, h, i, j: s - slope[h] * (i - j)

    row = Row(f"ALiBi {n}", 1, 8, 1, n, n, 64, "j <= i", "s * SCALE - slope[HEAD] * float(i - j)",
              ("slope: f32[8]",), lambda device: {"slope": 2.0 ** -torch.arange(1, 9, device=device)},
              _causal_mod, mod)  # fmt: skip
    return CpuRow(row, (_at_most("plain", 1.15),), causal(n).row)


def soft_cap(n: int) -> CpuRow:
    row = Row(f"soft-cap {n}", 1, 8, 1, n, n, 64, "j <= i", "tanh(s * SCALE / 50.0) * 50.0", mask_mod=_causal_mod,
              score_mod=lambda _: lambda s, b, h, i, j: torch.tanh(s / 50.0) * 50.0)  # fmt: skip
    return CpuRow(row, (_at_most("plain", 1.15),), causal(n).row)


def neighbourhood(side: int, reach: int) -> CpuRow:
    """Keys at most `reach` away in both directions of a square; tokens in raster order."""

    def near(_: Extra) -> Mod:
        return lambda b, h, i, j: (((i // side - j // side).abs() <= reach) & ((i % side - j % side).abs() <= reach))

    mask = f"abs(i // {side} - j // {side}) <= {reach} and abs(i % {side} - j % {side}) <= {reach}"
    wide = 2 * reach + 1
    name = f"neighbourhood {wide}x{wide} of {side}x{side}"
    return CpuRow(Row(name, 1, 8, 1, side * side, side * side, 64, mask, mask_mod=near))


def swin(batch: int, heads: int) -> CpuRow:
    """Windows of 7x7 tokens with their bias by relative position, as a small tensor."""

    def mod(extra: Extra) -> Mod:
        bias = extra["bias"]
        return lambda s, b, h, i, j: s + bias[h, i, j]

    row = Row("Swin 7x7 windows", batch, heads, 1, 49, 49, 32, score="s * SCALE + bias[HEAD, i, j]",
              declared=(f"bias: DTYPE[{heads}, 49, 49]",), score_mod=mod,
              extra=lambda device: {"bias": torch.randn(heads, 49, 49, device=device)})  # fmt: skip
    return CpuRow(row, (_sdpa(1.3, 1.3),))


def small(name: str, batch: int, n: int) -> CpuRow:
    return CpuRow(Row(f"{name} {n}", batch, 12, 1, n, n, 64), (_sdpa(1.0, 1.0),) if n <= 128 else ())


def decode(keys: int, batch: int = 1, queries: int = 1) -> CpuRow:
    """New tokens of 32 heads on 8 key heads; several queries see all keys but each other's later ones."""
    name = f"decode {keys}" + (f" batch {batch}" if batch > 1 else "")
    name += f" with {queries} queries" if queries > 1 else ""
    row = Row(name, batch, 8, 4, queries, keys, 128)
    if queries > 1:
        last = keys - queries
        row = replace(row, mask=f"j <= i + {last}", mask_mod=lambda _: lambda b, h, i, j: j <= i + last)
    return CpuRow(row, (Goal("read", dict.fromkeys(EVERY, 0.85)), _sdpa(1.0, 1.0)))


def rows(*, quick: bool) -> list[CpuRow]:
    if quick:
        return [dense(1024), causal(1024), window(1024, 256), documents(1024, 4), prefix_lm(1024, 256), t5_bias(1024),
                alibi(1024), soft_cap(1024), neighbourhood(32, 3), cross(1024, 77), swin(64, 4), small("ViT", 4, 197),
                small("BERT", 8, 32), small("BERT", 8, 128), decode(4096)]  # fmt: skip
    return [
        *(dense(n) for n in (1024, 4096, 16384)), dense(2048, 128),
        *(causal(n) for n in (1024, 4096, 16384)), causal(2048, 128),
        *(window(n, w) for n in (4096, 16384) for w in (256, 1024)),
        documents(4096, 8), documents(16384, 8), prefix_lm(4096, 1024), t5_bias(1024), t5_bias(4096), alibi(4096),
        soft_cap(4096), neighbourhood(32, 3), neighbourhood(64, 6), cross(4096, 77), swin(64, 4),
        small("ViT", 4, 197), *(small("BERT", 8, n) for n in (32, 64, 128)),
        *(decode(m) for m in (1024, 4096, 16384, 65536)), decode(4096, 4), decode(16384, 1, 2), decode(16384, 1, 8),
    ]  # fmt: skip


def cross(n: int, m: int) -> CpuRow:
    return CpuRow(Row(f"cross {n} x {m}", 2, 8, 1, n, m, 64))
