"""Choosing: which head takes which form, so that all of it costs least for the error that it makes.

    minimise  sum cost[s, r(s, h)]   subject to   sum D[s, h, r(s, h)] <= theta,   at most `most` forms a site

Relaxed by a multiplier: for each lambda every site takes the forms and heads of the least cost + lambda D, which is the
best plan for its own error. Lambda from infinity to zero gives a ladder of plans from exact to fastest (Everett, 1963).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from attncc.plans.plan import Key

#: Multipliers, from far above any ratio of milliseconds to error to far below.
_LAMBDAS = [0.0, *(10.0 ** (at / 8) for at in range(-48, 97))]
#: A site changes form only for this share of its exact time: what runs of one kernel differ by.
LEAST_GAIN = 0.03


@dataclass(frozen=True)
class Options:
    """What one site may do. `cost`: milliseconds of all heads, (forms,), NaN where a form cannot run; `error`: D,
    (forms, heads). Form 0 is exact: its error is 0."""

    cost: torch.Tensor
    error: torch.Tensor


@dataclass(frozen=True)
class Rung:
    """One plan of the ladder: the form of each head, by site; what it costs and the error that is predicted."""

    forms: Mapping[Key, tuple[int, ...]]
    cost: float
    error: float


def ladder(sites: Mapping[Key, Options], most: int = 2) -> list[Rung]:
    """Plans from exact to fastest, each cheaper than the one before. `most`: forms a site, the exact one included."""
    tables = {key: _Table(o, most) for key, o in sites.items()}
    found: dict[tuple[tuple[int, ...], ...], Rung] = {}
    for each in sorted(_LAMBDAS, reverse=True):
        chosen = {key: t.best(each) for key, t in tables.items()}
        forms = {key: c[0] for key, c in chosen.items()}
        found.setdefault(
            tuple(forms.values()),
            Rung(forms, sum(c[1] for c in chosen.values()), sum(c[2] for c in chosen.values())),
        )
    exact = {key: (0,) * t.heads for key, t in tables.items()}
    rungs = [Rung(exact, sum(float(o.cost[0]) for o in sites.values()), 0.0)]
    for rung in sorted(found.values(), key=lambda r: (r.error, r.cost)):
        if rung.cost < rungs[-1].cost:
            rungs.append(rung)
    return rungs


class _Table:
    """The sets of forms that a site may mix, with what each head pays for each."""

    def __init__(self, o: Options, most: int) -> None:
        heads = o.error.shape[1]
        usable = ~(o.cost.isnan() | o.error.isnan().any(-1))
        usable &= o.cost <= o.cost[0] * (1 - LEAST_GAIN)
        usable[0] = True  # exact
        kinds = [n for n in range(len(o.cost)) if bool(usable[n])]
        self.sets = [c for size in range(1, most + 1) for c in combinations(kinds, size)]
        self.cost, self.error, self.heads = o.cost / heads, o.error, heads

    def best(self, multiplier: float) -> tuple[tuple[int, ...], float, float]:
        """(the form of each head, the cost, the error) of the least cost + multiplier * error; of equals the first,
        which has the fewest forms and the exact one before others."""
        best: tuple[float, tuple[int, ...], float, float] | None = None
        for kinds in self.sets:
            at = torch.tensor(kinds)
            cost, error = self.cost[at], self.error[at]  # (k,), (k, heads)
            taken = (cost[:, None] + multiplier * error).argmin(0)  # (heads,)
            total = cost[taken].sum().item()
            wrong = error.gather(0, taken[None])[0].sum().item()
            price = total + multiplier * wrong
            if best is None or price < best[0]:
                best = price, tuple(at[taken].tolist()), total, wrong
        assert best is not None  # the exact form is always there
        return best[1:]


def nearest(rungs: Sequence[Rung], theta: float) -> int:
    """The number of the fastest plan whose predicted error is at most theta; the exact one is number 0."""
    fitting = [n for n, rung in enumerate(rungs) if rung.error <= theta]
    return fitting[-1] if fitting else 0
