"""Bits of integers in arithmetic that the IR has: rests, quotients and products by powers of two.

    x & (2^k - 1) = x % 2^k          x >> k = x // 2^k          x << k = x * 2^k
    x | c = x + c - (x & c)          x ^ c = x + c - 2 (x & c)

They hold for negative x too, as integers floor. Truth values as numbers are taken as what they were.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

from attncc.ir.build import ZERO, add, and_, cast, const, floordiv, mod, mul, or_, sub
from attncc.ir.expr import Const, Expr, Op

#: Runs of ones in a number, each of which is a quotient and a rest; and the widest shift.
_RUNS, _WIDEST = 4, 30


def bits(f: Callable[[Expr, Expr], Expr], a: Expr, b: Expr) -> Expr | None:
    """`and`, `or` or `xor` of integers, given as that of truth values; None where neither is a small number."""
    if "float" in (a.kind, b.kind):
        return None
    a, b = (cast(x, "int") for x in (a, b))
    told = [truth(x) for x in (a, b)]
    if told[0] is not None and told[1] is not None:
        return cast(cast(f(told[0], told[1]), "bool"), "int")
    if isinstance(a, Const):
        a, b = b, a
    both = _of_number(a, int(b.value)) if isinstance(b, Const) else None
    if both is None:
        return None
    if f is and_:
        return both
    return sub(add(a, b), both if f is or_ else mul(both, const(2)))


def truth(x: Expr) -> Expr | None:
    """The truth value that a number of 0 or 1 stands for, or that it is itself."""
    match x:
        case _ if x.kind == "bool":
            return x
        case Op("where", (c, Const(1), Const(0))):
            return c
        case Const(0 | 1 as value):
            return const(bool(value))
        case _:
            return None


def _of_number(x: Expr, c: int) -> Expr | None:
    """x & c, for c at or above zero with few runs of ones."""
    if c < 0 or c.bit_length() > _WIDEST:
        return None
    parts: list[Expr] = []
    low = 0
    while c >> low:
        if not c >> low & 1:
            low += 1
            continue
        high = low
        while c >> high & 1:
            high += 1
        run = mod(floordiv(x, const(1 << low)), const(1 << (high - low)))
        parts.append(mul(run, const(1 << low)))
        low = high
    return reduce(add, parts, ZERO) if len(parts) <= _RUNS else None


def shifted(x: Expr, by: Expr, way: int) -> Expr | None:
    """`x` moved by a number of bits, to the left (`way` 1) or to the right (-1)."""
    if not isinstance(by, Const) or x.kind != "int" or by.kind != "int" or not 0 <= int(by.value) <= _WIDEST:
        return None
    return (mul if way > 0 else floordiv)(x, const(1 << int(by.value)))
