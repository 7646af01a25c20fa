"""Rules that select per call, each written from its source in plain loops, on one sequence without padding.

A rule is given one head of keys of one sequence: `q` of its heads (heads, rows, d), `k` (keys, d), the `position` of
each row, and what each row may `see`; it says what each row keeps, bool (heads, rows, keys). Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

SCALE = 0.25
Key = TypeVar("Key")


@dataclass(frozen=True)
class Sequence:
    """`causal`: whether the mask hides the keys behind each row."""

    q: Tensor
    k: Tensor
    position: list[int]
    see: Tensor
    causal: bool

    @property
    def length(self) -> int:
        return self.k.shape[0]

    def weights(self, h: int, rows: Iterable[int]) -> Tensor:
        rows = list(rows)
        s = self.q[h, rows] @ self.k.T * SCALE
        return s.masked_fill(~self.see[rows], -math.inf).softmax(-1)


Rule = Callable[[Sequence], Tensor]


def groups(numbers: Iterable[int], size: int) -> dict[int, list[int]]:
    """The places of numbers by the block that each falls into."""
    found: dict[int, list[int]] = {}
    for at, x in enumerate(numbers):
        found.setdefault(x // size, []).append(at)
    return found


def softmax(s: dict[int, float]) -> dict[int, float]:
    top = max(s.values())
    e = {x: math.exp(v - top) for x, v in s.items()}
    return {x: v / sum(e.values()) for x, v in e.items()}


def take(p: dict[Key, float], how: str, amount: float, first: Iterable[Key] = ()) -> set[Key]:
    """Of the points of p, in their order; those of `first` before all others, the lower before its equals."""
    ahead = {x for x in first if x in p}
    keys = list(p)
    order = sorted(keys, key=lambda x: (x not in ahead, 0.0 if x in ahead else -p[x], keys.index(x)))
    if how == "count":
        return set(order[: max(1, math.ceil(amount))])
    if how == "fraction":
        return set(order[: max(1, math.ceil(amount * len(order) - 1e-6))])
    taken: set[Key] = set()
    held, whole = 0.0, sum(p.values())
    for x in order:
        if taken and held >= amount * whole - 1e-12:
            break
        taken.add(x)
        held += p[x]
    return taken


def by_blocks(s: Sequence, rows: int, keys: int, kept: Callable[[int, int], set[int]]) -> Tensor:
    """What is kept where `kept(h, I)` are the blocks of keys of a block of rows."""
    out = torch.zeros(s.see.shape, dtype=torch.bool).repeat(s.q.shape[0], 1, 1)
    for h in range(s.q.shape[0]):
        for block, members in groups(s.position, rows).items():
            chosen = kept(h, block)
            for i in members:
                for j in range(s.length):
                    out[h, i, j] = bool(s.see[i, j]) and j // keys in chosen
    return out


def open_blocks(s: Sequence, members: list[int], keys: int) -> list[int]:
    return sorted({j // keys for i in members for j in range(s.length) if s.see[i, j]})


def own_blocks(s: Sequence, members: list[int], keys: int, recent: int = 1) -> set[int]:
    at = [s.position[i] // keys for i in members]
    return set(range(min(at) - recent + 1, max(at) + 1))


def mean_rows(s: Sequence, h: int, members: list[int]) -> Tensor:
    return s.q[h, members].mean(0)


def mean_keys(x: Tensor, block: int, keys: int) -> Tensor:
    return x[block * keys : (block + 1) * keys].mean(0)


def block_means(
    rows: int, keys: int, how: str, amount: float, *, sinks: int = 1, recent: int = 1, positions: bool = True,
    share: str = "none",
) -> Rule:  # fmt: skip
    def p_of(s: Sequence, h: int, members: list[int]) -> dict[int, float]:
        x = mean_rows(s, h, members)
        return softmax({j: float(x @ mean_keys(s.k, j, keys)) * SCALE for j in open_blocks(s, members, keys)})

    def rule(s: Sequence) -> Tensor:
        blocks = groups(s.position, rows)

        def kept(h: int, block: int) -> set[int]:
            members = blocks[block]
            every = range(s.q.shape[0]) if share != "none" else [h]
            p = merged([p_of(s, n, members) for n in every], share)
            first = set(range(sinks)) | (own_blocks(s, members, keys, recent) if positions else set())
            return take(p, how, amount, first)

        return by_blocks(s, rows, keys, kept)

    return rule


def merged(p: list[dict[int, float]], share: str) -> dict[int, float]:
    merge: dict[str, Callable[[list[float]], float]] = {
        "none": lambda x: x[0], "max": max, "sum": sum, "mean": lambda x: sum(x) / len(x)
    }  # fmt: skip
    return {j: merge[share]([x[j] for x in p]) for j in p[0]}


def antidiagonal(block: int, stride: int, amount: float, share: str = "none") -> Rule:
    def p_of(s: Sequence, h: int, members: list[int]) -> dict[int, float]:
        p = dict.fromkeys(open_blocks(s, members, block), 0.0)
        for run in groups([s.position[i] for i in members], stride).values():
            rows = [members[n] for n in run]
            scores: dict[int, float] = {}
            for g in open_blocks(s, rows, stride):
                dots = [
                    float(s.q[h, i] @ s.k[j])
                    for i in rows
                    for j in range(g * stride, min((g + 1) * stride, s.length))
                    if s.position[i] % stride + j % stride == stride - 1
                ]
                scores[g] = sum(dots) / max(1, len(dots)) * SCALE
            for g, weight in softmax(scores).items():
                p[g * stride // block] += weight
        return p

    def rule(s: Sequence) -> Tensor:
        blocks = groups(s.position, block)

        def kept(h: int, at: int) -> set[int]:
            every = range(s.q.shape[0]) if share != "none" else [h]
            p = merged([p_of(s, n, blocks[at]) for n in every], share)
            return take(p, "mass", amount, {0} | own_blocks(s, blocks[at], block))

        return by_blocks(s, block, block, kept)

    return rule


def cosine(x: Tensor) -> float:
    """The mean over all pairs of tokens."""
    unit = x / x.norm(dim=-1, keepdim=True)
    return float((unit @ unit.T).mean())


def self_similar(rows: int, keys: int, amount: float, similar: float) -> Rule:
    def rule(s: Sequence) -> Tensor:
        centred = s.k - s.k.mean(0)
        count = -(-s.length // keys)
        alike = [cosine(centred[j * keys : (j + 1) * keys]) >= similar for j in range(count)]
        blocks = groups(s.position, rows)

        def kept(h: int, block: int) -> set[int]:
            members = blocks[block]
            seen = open_blocks(s, members, keys)
            if cosine(s.q[h, members]) < similar:
                return set(seen)
            x = mean_rows(s, h, members)
            scores = {j: float(x @ mean_keys(centred, j, keys)) * SCALE for j in seen if alike[j]}
            apart = {j for j in seen if not alike[j]}
            if not scores:
                return apart
            return apart | take(softmax(scores), "mass", amount, own_blocks(s, members, keys))

        return by_blocks(s, rows, keys, kept)

    return rule


def columns_and_diagonals(s: Sequence, h: int, last: int) -> tuple[dict[int, float], dict[int, float]]:
    """The sums over the last rows, of each key and of each distance."""
    sample = range(max(0, len(s.position) - last), len(s.position))
    w = s.weights(h, sample)
    column = {j: float(w[:, j].sum()) for j in range(s.length)}
    diagonal = dict.fromkeys(range(s.position[-1] + 1), 0.0)
    for n, i in enumerate(sample):
        for j in range(s.position[i] + 1):
            diagonal[s.position[i] - j] += float(w[n, j])
    return column, diagonal


def vertical_slash(columns: int, diagonals: int, last: int, block: int, sinks: int, recent: int) -> Rule:
    def rule(s: Sequence) -> Tensor:
        out = torch.zeros(s.see.shape, dtype=torch.bool).repeat(s.q.shape[0], 1, 1)
        for h in range(s.q.shape[0]):
            column, diagonal = columns_and_diagonals(s, h, last)
            kept = take(column, "count", columns, range(sinks))
            far = take(diagonal, "count", diagonals, range(recent))
            touched = {(i // block - j // block) for i in range(s.length) for j in range(i + 1) if i - j in far}
            for i, at in enumerate(s.position):
                for j in range(s.length):
                    out[h, i, j] = bool(s.see[i, j]) and (j in kept or at // block - j // block in touched)
        return out

    return rule


def routed_streaming(sinks: int, window: int, miss: float, last: int) -> Rule:
    """One head of keys is all heads here."""

    def rule(s: Sequence) -> Tensor:
        heads, keys = s.q.shape[0], torch.arange(s.length)
        before = torch.tensor(s.position)[:, None] - keys
        near = (keys < sinks) | ((before if s.causal else before.abs()) < window)
        sample = list(range(max(0, len(s.position) - last), len(s.position)))
        w = torch.stack([s.weights(h, sample) for h in range(heads)])
        missed = float(torch.where(near[sample], 0.0, w).sum(-1).mean())
        return (s.see & (near | (missed > miss))).repeat(heads, 1, 1)

    return rule


def flex_prefill(block: int, gamma: float, tau: float, least: int) -> Rule:
    def divergence(p: dict[int, float], q: dict[int, float]) -> float:
        m = {x: (p[x] + q[x]) / 2 for x in p}
        return sum(v[x] * math.log(v[x] / m[x]) / 2 for v in (p, q) for x in v if v[x] > 0)

    def rule(s: Sequence) -> Tensor:
        fewest = -(-least // block)
        out = s.see.repeat(s.q.shape[0], 1, 1)
        if len(s.position) <= max(2, fewest) * block:
            return out
        blocks, count = groups(s.position, block), -(-s.length // block)
        for h in range(s.q.shape[0]):
            column, diagonal = columns_and_diagonals(s, h, block)
            nv, ns = (max(len(take(x, "mass", gamma)) // block + 1, fewest) for x in (column, diagonal))
            by_column = {n: sum(v for j, v in column.items() if j // block == n) for n in range(count)}
            by_diagonal: dict[int, float] = {}
            for o, v in diagonal.items():
                by_diagonal[o // block] = by_diagonal.get(o // block, 0.0) + v
            sample = list(range(max(0, len(s.position) - block), len(s.position)))
            x = mean_rows(s, h, sample)
            pooled = softmax({n: float(x @ mean_keys(s.k, n, block)) * SCALE for n in range(count)})
            whole = sum(by_column.values())
            aware = math.sqrt(divergence({n: v / whole for n, v in by_column.items()}, pooled)) < tau
            nv, ns = (fewest, fewest) if aware else (nv, ns)
            kept, far = take(by_column, "count", nv, [0]), take(by_diagonal, "count", ns, [0])
            pairs: dict[tuple[int, int], float] = {}
            for at, members in blocks.items():
                x = mean_rows(s, h, members)
                seen = open_blocks(s, members, block)
                p = softmax({n: float(x @ mean_keys(s.k, n, block)) * SCALE for n in seen})
                pairs |= {(at, n): v for n, v in p.items()}
            held = take(pairs, "mass", gamma) if aware else set[tuple[int, int]]()
            for i, at in enumerate(s.position):
                for j in range(s.length):
                    row, key = at // block, j // block
                    chosen = key in kept or row - key in far or (row, key) in held
                    out[h, i, j] = bool(s.see[i, j]) and chosen
        return out

    return rule


def chunk_means(chunk: int, budget: int, sinks: int, recent: int, dense: int) -> Rule:
    """For a model of one head of keys, whose heads this rule sees all of."""

    def rule(s: Sequence) -> Tensor:
        blocks = groups(s.position, chunk)

        def kept(h: int, block: int) -> set[int]:
            members = blocks[block]
            x = s.q[:, members].mean((0, 1)) * math.sqrt(len(members))
            seen = open_blocks(s, members, chunk)
            length = {j: min(chunk, s.length - j * chunk) for j in seen}
            scores = {j: float(x @ mean_keys(s.k, j, chunk)) * math.sqrt(length[j]) for j in seen}
            return take(scores, "count", budget // chunk)

        out = by_blocks(s, chunk, chunk, kept)
        for i, at in enumerate(s.position):
            for j in range(s.length):
                near = at - j < recent if s.causal else abs(at - j) < recent
                if s.see[i, j] and (j < sinks or near or i >= len(s.position) - dense):
                    out[:, i, j] = True
        return out

    return rule


def pages(page: int, budget: int, recent: int, share: str = "none") -> Rule:
    def rule(s: Sequence) -> Tensor:
        blocks = groups(s.position, 1)

        def bounds(h: int, i: int) -> dict[int, float]:
            found: dict[int, float] = {}
            for n in open_blocks(s, [i], page):
                x = s.k[n * page : (n + 1) * page]
                found[n] = float(torch.maximum(s.q[h, i] * x.amin(0), s.q[h, i] * x.amax(0)).sum())
            return found

        def kept(h: int, block: int) -> set[int]:
            (i,) = blocks[block]
            heads = range(s.q.shape[0]) if share != "none" else [h]
            bound = merged([bounds(n, i) for n in heads], share)
            return take(bound, "count", budget // page, own_blocks(s, [i], page, recent) if recent else ())

        return by_blocks(s, 1, page, kept)

    return rule


def page_mass(page: int, budget: int, recent: int) -> Rule:
    """For a model of one head of keys, whose heads this rule sees all of."""

    def rule(s: Sequence) -> Tensor:
        blocks = groups(s.position, 1)

        def kept(h: int, block: int) -> set[int]:
            (i,) = blocks[block]
            most = torch.stack([s.weights(n, [i])[0] for n in range(s.q.shape[0])]).amax(0)
            mass = {n: float(most[n * page : (n + 1) * page].sum()) for n in open_blocks(s, [i], page)}
            return take(mass, "count", budget // page, own_blocks(s, [i], page, recent) if recent else ())

        return by_blocks(s, 1, page, kept)

    return rule
