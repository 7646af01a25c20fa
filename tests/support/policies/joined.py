"""Rules that put an output together, each written from its source in plain loops, on one sequence without padding.

As in `selected`: `q` of the heads of one head of keys, `k`, `v`; every row's output, (heads, rows, components), in
float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from policies.selected import (
    SCALE,
    Sequence,
    groups,
    mean_keys,
    mean_rows,
    merged,
    open_blocks,
    own_blocks,
    softmax,
    take,
)

Outputs = Callable[[Sequence, Tensor], Tensor]


def seen_whole(s: Sequence, members: list[int], block: int, keys: int) -> bool:
    """Whether each of some rows sees every key of a block."""
    inside = range(block * keys, min((block + 1) * keys, s.length))
    return all(bool(s.see[i, j]) for i in members for j in inside)


def pooled_rest(rows: int, keys: int, how: str, amount: float, sinks: int = 1, share: str = "none") -> Outputs:
    def rule(s: Sequence, v: Tensor) -> Tensor:
        out = torch.zeros(s.q.shape[0], s.q.shape[1], v.shape[-1], dtype=torch.float64)
        for members in groups(s.position, rows).values():
            opened = open_blocks(s, members, keys)
            whole = {J for J in opened if seen_whole(s, members, J, keys)}
            every = [
                softmax({J: float(mean_rows(s, h, members) @ mean_keys(s.k, J, keys)) * SCALE for J in opened})
                for h in range(s.q.shape[0])
            ]
            for h in range(s.q.shape[0]):
                p = every[h] if share == "none" else merged(every, share)
                chosen = take(p, how, amount, set(range(sinks)) | own_blocks(s, members, keys))
                chosen |= {J for J in opened if J not in whole}
                for i in members:
                    logits, values = [], []
                    for j in range(s.length):
                        if s.see[i, j] and j // keys in chosen:
                            logits.append(float(s.q[h, i] @ s.k[j]) * SCALE)
                            values.append(v[j])
                    for J in sorted(whole - chosen):
                        count = min((J + 1) * keys, s.length) - J * keys
                        logits.append(float(s.q[h, i] @ mean_keys(s.k, J, keys)) * SCALE + math.log(count))
                        values.append(mean_keys(v, J, keys))
                    out[h, i] = torch.tensor(logits, dtype=torch.float64).softmax(0) @ torch.stack(values)
        return out

    return rule


def rectified(block: int, mass: float, drop: float, near: int) -> Outputs:
    """`near` is -1 where rows and keys have no positions in common."""

    def rule(s: Sequence, v: Tensor) -> Tensor:
        out = torch.zeros(s.q.shape[0], s.q.shape[1], v.shape[-1], dtype=torch.float64)
        for members in groups(s.position, block).values():
            opened = open_blocks(s, members, block)
            for h in range(s.q.shape[0]):
                qm = mean_rows(s, h, members)
                q_apart = (s.q[h, members] - qm).abs().mean(0)
                scores: dict[int, float] = {}
                exact: set[int] = set()
                for J in opened:
                    km, held = mean_keys(s.k, J, block), s.k[J * block : (J + 1) * block]
                    scores[J] = float(qm @ km) * SCALE + math.log(len(held))
                    k_apart = (held - km).abs().mean(0)
                    if abs(float(qm @ km)) > float(q_apart @ km.abs()) + float(qm.abs() @ k_apart):
                        exact.add(J)
                p = softmax(scores)
                least = int((1 - drop) * len(opened) + 1e-4)
                chosen = take(p, "count", max(len(take(p, "mass", mass)), least))
                own = own_blocks(s, members, block)
                chosen |= {J for J in opened if min(own) - near <= J <= max(own) + near} if near >= 0 else set()
                chosen |= {J for J in opened if not seen_whole(s, members, J, block)}
                rest = [J for J in opened if J in exact and J not in chosen]
                for i in members:
                    keys = [j for j in range(s.length) if s.see[i, j] and j // block in chosen]
                    w = (s.q[h, i] @ s.k[keys].T * SCALE).softmax(-1)
                    out[h, i] = (1 - sum(p[J] for J in rest)) * (w @ v[keys])
                    for J in rest:
                        out[h, i] += p[J] * mean_keys(v, J, block)
        return out

    return rule
