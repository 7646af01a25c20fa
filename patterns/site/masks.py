"""Scores with masks in them, taken apart: `score + where(c, 0, -inf)` is the score, visible where c.

Only fills that no real score can outweigh count as masks: -inf, finite values of -1e9 and below put in a score's place,
and of -1e30 and below added to it (smaller ones leave something of the score in a row that is all hidden; the lowest
finite value of the scores' own type counts too). Anything milder (-100, -1e4) is a bias and keeps its meaning. A choice
by the score itself (a threshold, the k largest) is part of the score: which keys it hides is known when all is done,
and a row in which it hides every visible one weighs them with those that a finite mask hides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from attncc.ir.attention import Empty, S
from attncc.ir.build import add, and_, not_, op
from attncc.ir.expr import ROUNDINGS, Const, Expr, Load, Op, free, walk
from attncc.ir.gradients import bounded

_PUT, _ADDED = -1e9, -1e30
_FILL_F16 = -65504.0


@dataclass(frozen=True)
class Masked:
    score: Expr
    mask: Expr
    empty: Empty
    floor: float | None = None  # the score of every key in a row that sees none, where that is finite
    slopes: frozenset[float] = frozenset()  # by how much it follows the parts of the score that gradients reach


@dataclass(frozen=True)
class _Hidden:
    """Where `not visible`, the score is `fill`, put in its place or added to it."""

    visible: Expr
    fill: float
    added: bool


def split_mask(
    score: Expr, *, half: bool, infinite_empty: Empty, wants_grad: Callable[[Expr], bool] = lambda x: False
) -> Masked:
    """The score without its masks, the predicate they make, and what a row without visible keys then gives.

    `half`: the scores are float16, whose lowest value is a fill too. `infinite_empty`: what a row of -inf gives.
    `wants_grad`: whether gradients are wanted of an expression."""
    limit = _FILL_F16 if half else _PUT
    bare, found = _strip(score, limit)
    infinite = [h for h in found if h.fill == float("-inf")]
    finite = [h for h in found if h.fill != float("-inf")]
    if finite and (_chosen(bare, limit) or _as_low(bare, max(h.fill for h in finite))):
        bare, found = _strip(score, float("-inf"))
        return Masked(bare, _all(found), infinite_empty if found else "zero")
    if not finite:
        return Masked(bare, _all(infinite), infinite_empty if found else "zero")
    if not infinite and _agree(finite):
        total = sum(h.fill for h in finite) if finite[0].added else finite[0].fill  # what is put last hides the rest
        if torch.tensor(total, dtype=torch.float64).to(_dtype_of(finite, half=half)).isinf():
            return Masked(bare, _all(finite), infinite_empty)
        return Masked(bare, _all(finite), "mean", total, _slopes(score, limit, wants_grad))
    # Rows hidden by several different finite masks weigh keys by how often they are hidden: keep them as they are.
    bare, found = _strip(score, float("-inf"))
    return Masked(bare, _all(found), infinite_empty if found else "zero")


def _dtype_of(finite: list[_Hidden], *, half: bool) -> torch.dtype:
    """What scores are held in that have such fills: float32 has none as low as the lowest of float64."""
    wide = any(h.fill < torch.finfo(torch.float32).min for h in finite)
    return torch.float16 if half else torch.float64 if wide else torch.float32


def hidden_by(x: Expr, *, half: bool) -> float | None:
    """The number that a score comes to in any case, or less, where that is one that masks are filled with."""
    return _lowest(x, _FILL_F16 if half else _PUT)


def _lowest(x: Expr, limit: float) -> float | None:
    match x:
        case Const(value):
            return float(value) if value <= limit else None
        case Op("add", (a, b)):
            limit = limit if limit == _FILL_F16 else min(limit, _ADDED)
            found = [y for y in (_lowest(a, limit), _lowest(b, limit)) if y is not None]
            return min(found, default=None)
        case Op("sub", (a, _)):
            return _lowest(a, limit if limit == _FILL_F16 else min(limit, _ADDED))
        case Op("where", (_, a, b)):
            found = _lowest(a, limit), _lowest(b, limit)
            return None if found[0] is None or found[1] is None else max(found[0], found[1])
        case Op("mul" | "div", (a, Const(by))):
            return -math.inf if by > 0 and _lowest(a, limit) == -math.inf else None
        case Op(name, (a,)) if name in ROUNDINGS:
            return _lowest(a, limit)
        case _:
            return None


def visible_where(score: Expr, fill: float, *, half: bool) -> Expr | None:
    """Where a score is none that masks are filled with; None where it may come to `fill` by other numbers."""
    bare, found = _strip(score, _FILL_F16 if half else _PUT)
    held = any(isinstance(x, Load) and x.kind == "float" for x in walk(bare))
    return None if held or _chosen(bare, fill) or _as_low(bare, fill) else _all(found)


def hides_by_score(score: Expr) -> bool:
    """Whether a score is -inf where a predicate of the score itself says so."""
    return _chosen(score, float("-inf"))


def _as_low(score: Expr, fill: float) -> bool:
    """Whether numbers in a score may bring it down to a fill: what is hidden twice lies below what is hidden once."""
    numbers = [x.value for x in walk(score) if isinstance(x, Const) and isinstance(x.value, float)]
    return any(math.isfinite(x) and abs(x) >= abs(fill) / 100 for x in numbers)


def _chosen(score: Expr, limit: float) -> bool:
    return any(
        isinstance(x, Op) and x.name == "where" and S in free(x.args[0]) and any(_is_fill(y, limit) for y in x.args[1:])
        for x in walk(score)
    )


def _agree(finite: list[_Hidden]) -> bool:
    """Whether a row in which every key is hidden has one and the same score everywhere."""
    if len({h.visible for h in finite}) == 1:
        return True
    return len({h.fill for h in finite}) == 1 and not any(h.added for h in finite)


def _all(found: list[_Hidden]) -> Expr:
    return and_(*dict.fromkeys(h.visible for h in found))


def _strip(x: Expr, limit: float) -> tuple[Expr, list[_Hidden]]:
    match x:
        case Op(name, (a,)) if name in ROUNDINGS:
            bare, found = _strip(a, limit)
            return (op(name, bare) if found else x), found
        case Op("max" | "maxfirst", _) if (floor := _floor(x, limit)) is not None:
            bare, found = _strip(floor[0], limit)
            # a fill that is not above the limit ends on it, however often it was added
            return bare, [_Hidden(h.visible, max(h.fill, floor[1]), h.added and h.fill > floor[1]) for h in found]
        case Op("where", (c, a, b)) if _is_fill(b, limit) and S not in free(c):
            bare, found = _strip(a, limit)
            return bare, [_Hidden(c, _number(b), added=False), *found]
        case Op("where", (c, a, b)) if _is_fill(a, limit) and S not in free(c):
            bare, found = _strip(b, limit)
            return bare, [_Hidden(not_(c), _number(a), added=False), *found]
        case Op("add", (a, b)):
            limit = limit if limit == _FILL_F16 else min(limit, _ADDED)
            left, hidden = _strip(a, limit)
            right, more = _strip(b, limit)
            both = [*hidden, *more]
            if not both:
                return x, []
            return add(left, right), [_Hidden(h.visible, h.fill, added=True) for h in both]
        case Op("sub", (a, b)):
            limit = limit if limit == _FILL_F16 else min(limit, _ADDED)
            bare, found = _strip(a, limit)
            return (op("sub", bare, b) if found else x), [_Hidden(h.visible, h.fill, added=True) for h in found]
        case _:
            return x, []


def _floor(x: Expr, limit: float) -> tuple[Expr, float, float] | None:
    """(score, low, share) of a score that is kept from falling below a number that masks are filled with."""
    found = bounded(x)
    if found is None or found[0] != "max" or found[2].value > limit:
        return None
    return found[1], float(found[2].value), found[3]


def _slopes(x: Expr, limit: float, wants_grad: Callable[[Expr], bool]) -> frozenset[float]:
    """By how much a hidden score follows what it is computed from: 1 where a fill was added to it, 0 where one took its
    place. More than one number where that is not alike for all parts of it."""

    def of(x: Expr, limit: float) -> frozenset[float]:
        _, hidden = _strip(x, limit)
        if not hidden:
            return frozenset({1.0}) if wants_grad(x) else frozenset()
        match x:
            case Op("max" | "maxfirst", _) if (floor := _floor(x, limit)) is not None:
                inner, low, share = floor
                ties = {0.0 if h.fill < low else share if h.fill == low else 1.0 for h in _strip(inner, limit)[1]}
                return frozenset(a * b for a in of(inner, limit) for b in ties)
            case Op("where", (_, a, b)):
                taken = a if _is_fill(b, limit) else b
                return frozenset({0.0}) if wants_grad(taken) else frozenset()
            case Op("add" | "sub", (a, b)):
                limit = limit if limit == _FILL_F16 else min(limit, _ADDED)
                second = of(b, limit) if x.name == "add" else frozenset({1.0} if wants_grad(b) else ())
                return of(a, limit) | second
            case Op(_, (a,)):
                return of(a, limit)
            case _:
                return frozenset()

    return of(x, limit)


def _is_fill(x: Expr, limit: float) -> bool:
    return isinstance(x, Const) and isinstance(x.value, float) and x.value <= limit


def _number(x: Expr) -> float:
    assert isinstance(x, Const)
    return float(x.value)
