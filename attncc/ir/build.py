"""Building expressions: constants fold and identities vanish on the way in, so later stages meet one spelling.

Only rewrites that hold for every value are made here. For floats that excludes `x + 0` at x = -0.0 and `x * 0`
(NaN, infinity); what is dropped there is only the sign of a zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from attncc.ir.constants import FOLD
from attncc.ir.terms import OPS, Const, Expr, Kind, Load, Op, Scalar, Var, walk

TRUE, FALSE = Const(True), Const(False)
ZERO, ONE = Const(0), Const(1)
NEG_INF = Const(-math.inf)


def const(value: Scalar) -> Const:
    return Const(value)


def cast(x: Expr, kind: Kind) -> Expr:
    """`x` as `kind`, by torch's rules: to bool is `!= 0`, float to int truncates, bool to number is 0 or 1."""
    if x.kind == kind:
        return x
    if kind == "bool":
        return op("ne", x, const(0 if x.kind == "int" else 0.0))
    if x.kind == "bool":
        return where(x, const(1), const(0)) if kind == "int" else where(x, const(1.0), const(0.0))
    return op(kind, x)


def op(name: str, *args: Expr) -> Expr:
    """The expression `name(*args)`, folded where every argument is a constant or an identity applies.

    Raises KindError for arguments the operation does not take, whether or not they fold."""
    result = Op(name, args)
    rule = _SIMPLIFY.get(name)
    if rule is not None and (simpler := rule(*args)) is not None:
        return simpler
    if (selected := _over_selection(name, args)) is not None:
        return selected
    values = [a.value for a in args if isinstance(a, Const)]
    if len(values) < len(args) or name not in FOLD:
        return result
    try:
        return Const(FOLD[name](*values))
    except (ZeroDivisionError, OverflowError, ValueError):
        return result


def _over_selection(name: str, args: tuple[Expr, ...]) -> Expr | None:
    """f(where(c, 1.0, 0.0), 2.0) is where(c, f(1.0, 2.0), f(0.0, 2.0)): masks in arithmetic become predicates."""
    selections = [a for a in args if isinstance(a, Op) and a.name == "where"]
    if len(selections) != 1 or name not in FOLD or not all(isinstance(a, Const | Op) for a in args):
        return None
    (chosen,) = selections
    condition, yes, no = chosen.args
    rest = [a for a in args if a is not chosen]
    if not all(isinstance(a, Const) for a in (yes, no, *rest)):
        return None
    return where(condition, *(op(name, *(x if a is chosen else a for a in args)) for x in (yes, no)))


def _zero(x: Expr) -> bool:
    return isinstance(x, Const) and not isinstance(x.value, bool) and x.value == 0


def _one(x: Expr) -> bool:
    return isinstance(x, Const) and not isinstance(x.value, bool) and x.value == 1


def _add(a: Expr, b: Expr) -> Expr | None:
    return b if _zero(a) else a if _zero(b) else None


def _sub(a: Expr, b: Expr) -> Expr | None:
    if a is b and a.kind == "int":
        return ZERO
    return a if _zero(b) else None


def _mul(a: Expr, b: Expr) -> Expr | None:
    if a.kind == "int" and (_zero(a) or _zero(b)):
        return ZERO
    return b if _one(a) else a if _one(b) else None


def _over(a: Expr, b: Expr) -> Expr | None:
    return a if _one(b) else None


def _floordiv(a: Expr, b: Expr) -> Expr | None:
    return a if _one(b) else ZERO if _zero(a) else None


def _mod(a: Expr, b: Expr) -> Expr | None:
    return ZERO if _one(b) or _zero(a) else None


def _neg(a: Expr) -> Expr | None:
    return a.args[0] if isinstance(a, Op) and a.name == "neg" else None


def _stop(a: Expr) -> Expr | None:
    """Stops stand at loads and variables: what is computed of them only is stopped with them."""
    return None if isinstance(a, Load | Var) else stop(a)


def _same_or_none(a: Expr, b: Expr) -> Expr | None:
    return a if a is b else None


def _reflexive(value: Const) -> Callable[[Expr, Expr], Expr | None]:
    def rule(a: Expr, b: Expr) -> Expr | None:
        return value if a is b and a.kind == "int" else None  # NaN makes this wrong for floats

    return rule


def _eq(a: Expr, b: Expr) -> Expr | None:
    return TRUE if a is b and a.kind != "float" else _bool_int(a, b, negate=True)


def _ne(a: Expr, b: Expr) -> Expr | None:
    return FALSE if a is b and a.kind != "float" else _bool_int(a, b, negate=False)


def _bool_int(a: Expr, b: Expr, *, negate: bool) -> Expr | None:
    """`int(p) != 0` is p and `int(p) == 0` is not p, for a boolean p (and the same for `float(p)`)."""
    if isinstance(a, Op) and a.name in ("int", "float") and a.args[0].kind == "bool" and _zero(b):
        return not_(a.args[0]) if negate else a.args[0]
    return None


def _and(a: Expr, b: Expr) -> Expr | None:
    if a is FALSE or b is FALSE:
        return FALSE
    return b if a is TRUE else a if b is TRUE or a is b else None


def _or(a: Expr, b: Expr) -> Expr | None:
    if a is TRUE or b is TRUE:
        return TRUE
    return b if a is FALSE else a if b is FALSE or a is b else None


def _not(a: Expr) -> Expr | None:
    if isinstance(a, Const):
        return FALSE if a.value else TRUE
    if isinstance(a, Op):
        x = a.args
        if a.name == "not":
            return x[0]
        if a.name in ("eq", "ne"):
            return op("ne" if a.name == "eq" else "eq", *x)
        if a.name in ("lt", "le") and x[0].kind == "int":  # not so for floats: NaN compares false both ways
            return op("le" if a.name == "lt" else "lt", x[1], x[0])
        if a.name in ("and", "or"):
            return op("or" if a.name == "and" else "and", not_(x[0]), not_(x[1]))
    return None


def _where(c: Expr, a: Expr, b: Expr) -> Expr | None:
    if isinstance(c, Const):
        return a if c.value else b
    if a is b:
        return a
    if a is TRUE and b is FALSE:
        return c
    if a.kind == "bool":
        return or_(and_(c, a), and_(not_(c), b)) if isinstance(a, Const) or isinstance(b, Const) else None
    if isinstance(c, Op) and c.name == "not":
        return op("where", c.args[0], b, a)
    there, elsewhere = _branch(a, c, taken=True), _branch(b, c, taken=False)
    return None if there is a and elsewhere is b else op("where", c, there, elsewhere)


def _branch(x: Expr, condition: Expr, *, taken: bool) -> Expr:
    """What a selection under `condition`, or its negation, comes to where `condition` is known."""
    if not (isinstance(x, Op) and x.name == "where"):
        return x
    if x.args[0] is condition:
        return x.args[1] if taken else x.args[2]
    if x.args[0] is not_(condition):
        return x.args[2] if taken else x.args[1]
    return x


def _float(a: Expr) -> Expr | None:
    return a if a.kind == "float" else None


def _int(a: Expr) -> Expr | None:
    if a.kind == "int":
        return a
    if isinstance(a, Op) and a.name == "float" and a.args[0].kind in ("int", "bool"):
        return cast(a.args[0], "int")
    return None


_SIMPLIFY: dict[str, Callable[..., Expr | None]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _over,
    "floordiv": _floordiv,
    "mod": _mod,
    "neg": _neg,
    "min": _same_or_none,
    "max": _same_or_none,
    "minfirst": _same_or_none,
    "maxfirst": _same_or_none,
    "stop": _stop,
    "lt": _reflexive(FALSE),
    "le": _reflexive(TRUE),
    "eq": _eq,
    "ne": _ne,
    "and": _and,
    "or": _or,
    "not": _not,
    "where": _where,
    "float": _float,
    "int": _int,
}

assert set(_SIMPLIFY) | set(FOLD) <= set(OPS)


def add(a: Expr, b: Expr) -> Expr:
    return op("add", a, b)


def sub(a: Expr, b: Expr) -> Expr:
    return op("sub", a, b)


def mul(a: Expr, b: Expr) -> Expr:
    return op("mul", a, b)


def floordiv(a: Expr, b: Expr) -> Expr:
    return op("floordiv", a, b)


def mod(a: Expr, b: Expr) -> Expr:
    return op("mod", a, b)


def minimum(a: Expr, b: Expr) -> Expr:
    return op("min", a, b)


def maximum(a: Expr, b: Expr) -> Expr:
    return op("max", a, b)


def lt(a: Expr, b: Expr) -> Expr:
    return op("lt", a, b)


def le(a: Expr, b: Expr) -> Expr:
    return op("le", a, b)


def gt(a: Expr, b: Expr) -> Expr:
    return op("lt", b, a)


def ge(a: Expr, b: Expr) -> Expr:
    return op("le", b, a)


def eq(a: Expr, b: Expr) -> Expr:
    return op("eq", a, b)


def and_(*xs: Expr) -> Expr:
    result: Expr = TRUE
    for x in xs:
        result = op("and", result, x)
    return result


def or_(*xs: Expr) -> Expr:
    result: Expr = FALSE
    for x in xs:
        result = op("or", result, x)
    return result


def not_(x: Expr) -> Expr:
    return op("not", x)


def where(c: Expr, a: Expr, b: Expr) -> Expr:
    return op("where", c, a, b)


def stop(x: Expr, follows: Callable[[Expr], bool] = lambda x: True) -> Expr:
    """`x` without its gradients, those with respect to the leaves (loads and variables) that `follows` names."""
    done: dict[Expr, Expr] = {}
    for y in walk(x):
        done[y] = y
        if y.kind != "float":
            continue  # no gradient comes this way
        if isinstance(y, Load | Var):
            done[y] = Op("stop", (y,)) if follows(y) else y
        elif isinstance(y, Op) and y.name != "stop":
            args = tuple(done[a] for a in y.args)
            done[y] = y if args == y.args else op(y.name, *args)
    return done[x]
