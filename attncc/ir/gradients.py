"""What the gradients of an expression flow into, and the expression without what only its gradients need."""

from __future__ import annotations

from collections.abc import Callable

from attncc.ir.build import op, stop
from attncc.ir.rewrite import rewrite
from attncc.ir.terms import Const, Expr, Load, Op, Var

_PLAIN_TIES = {"minfirst": "min", "maxfirst": "max"}


def bounded(x: Expr) -> tuple[str, Expr, Const, float] | None:
    """("min" or "max", inner, limit, share) of a minimum or maximum of something and a number, `share` being the part
    of the gradient that the something gets at a tie."""
    if not (isinstance(x, Op) and x.kind == "float" and x.name in ("min", "max", *_PLAIN_TIES)):
        return None
    for share, (inner, limit) in ((1.0, x.args), (0.0, x.args[::-1])):
        if isinstance(limit, Const):
            plain = _PLAIN_TIES.get(x.name)
            return (x.name, inner, limit, 0.5) if plain is None else (plain, inner, limit, share)
    return None


def followed(*roots: Expr) -> frozenset[Expr]:
    """The loads and variables that gradients flow into: reached through floats, and under no stop."""
    found: set[Expr] = set()
    seen: set[Expr] = set()
    stack = list(roots)
    while stack:
        x = stack.pop()
        if x in seen or x.kind != "float":
            continue
        seen.add(x)
        if isinstance(x, Load | Var):
            found.add(x)
        elif isinstance(x, Op) and x.name != "stop":
            stack += x.args
    return frozenset(found)


def unstopped(x: Expr, leaf: Callable[[Expr], bool] = lambda x: True) -> Expr:
    """`x` without the stops at the leaves that `leaf` names."""

    def rule(y: Expr) -> Expr | None:
        return y.args[0] if isinstance(y, Op) and y.name == "stop" and leaf(y.args[0]) else None

    return rewrite(x, rule)


def thawed(x: Expr, *leaves: Expr) -> tuple[Expr, Callable[[Expr], Expr]]:
    """`x` without the stops at some leaves (at all, if none is named) where gradients flow into none of them, and what
    puts these stops back."""

    def named(y: Expr) -> bool:
        return not leaves or y in leaves

    bare = x if any(map(named, followed(x))) else unstopped(x, named)
    return bare, (lambda y: y) if bare is x else (lambda y: stop(y, named))


def with_plain_ties(x: Expr) -> Expr:
    """`x` with minima and maxima that do not say whose gradient a tie is."""

    def rule(y: Expr) -> Expr | None:
        plain = _PLAIN_TIES.get(y.name) if isinstance(y, Op) else None
        return None if plain is None else op(plain, *y.children)

    return rewrite(x, rule)


def plain(x: Expr) -> Expr:
    """`x` for those who ask for its value alone."""
    return with_plain_ties(unstopped(x))
