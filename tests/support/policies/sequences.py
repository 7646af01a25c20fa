"""The sequences of a situation, as rules from sources are given them."""

from __future__ import annotations

import torch
from torch import Tensor

from policies.selected import Sequence
from policies.situations import B, Situation


def sequences(data: dict[str, Tensor], s: Situation) -> list[tuple[int, int, list[int], Sequence]]:
    """(sequence of the batch, head of keys, the rows that are tokens of it, what a rule is given), each key in place of
    the mask's first."""
    found: list[tuple[int, int, list[int], Sequence]] = []
    for b in range(B):
        seen = [s.visible(data, b, i) for i in range(s.n)]
        start = seen[0][2]
        rows = [i for i, (keys, _, _) in enumerate(seen) if keys and (s.causal or i >= start)]
        end = max(max(seen[i][0]) for i in rows) + 1
        see = torch.zeros(len(rows), end - start, dtype=torch.bool)
        for n, i in enumerate(rows):
            see[n, [j - start for j in seen[i][0]]] = True
        for g in range(s.heads // s.group):
            q = data["q"][b, g * s.group : (g + 1) * s.group, rows].double()
            k = data["k"][b, g, start:end].double()
            positions = [seen[i][1] if s.causal or s.n == s.m else i for i in rows]
            found.append((b, g, rows, Sequence(q, k, positions, see, s.causal)))
    return found


def exactly(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: x.double() if x.is_floating_point() else x for n, x in data.items()}
