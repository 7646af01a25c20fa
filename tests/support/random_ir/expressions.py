"""Random scalar expressions, each in two spellings: as written, and as the builders fold it."""

from __future__ import annotations

import math
from typing import NamedTuple

from hypothesis import strategies as st

from attncc.ir import Const, Expr, Index, Kind, Load, Op, Size, Var
from attncc.ir.build import op
from attncc.ir.terms import OPS


class Pair(NamedTuple):
    written: Expr
    folded: Expr


ROW, KEY, LENGTH = Index("i"), Index("j"), Size("N")

_LEAVES: dict[Kind, tuple[Expr, ...]] = {
    "int": (ROW, KEY, LENGTH, Load("doc", (ROW,), "int"), *(Const(n) for n in (0, 1, -1, 2, 7))),
    "float": (
        Var("s"),
        Load("bias", (ROW, KEY), "float"),
        *(Const(x) for x in (0.0, 1.0, -1.0, 0.5, 3.0, 1e9, math.inf, -math.inf, math.nan)),
    ),
    "bool": (Load("seen", (KEY,), "bool"), Const(True), Const(False)),
}

#: Exactly rounded everywhere, so two orders of evaluation agree to the bit.
_EXACT = (
    "add", "sub", "mul", "neg", "abs", "min", "max", "lt", "le", "eq", "ne", "and", "or", "not", "where", "float",
    "int", "floor", "ceil", "sqrt", "isnan", "minfirst", "maxfirst",
)  # fmt: skip
_NONZERO: dict[Kind, tuple[Expr, ...]] = {"int": (Const(1), Const(3), Const(-2)), "float": (Const(1.0), Const(-3.0))}


def _leaf(kind: Kind) -> st.SearchStrategy[Pair]:
    return st.sampled_from(_LEAVES[kind]).map(lambda x: Pair(x, x))


@st.composite
def pairs(draw: st.DrawFn, kind: Kind | None = None, depth: int = 4) -> Pair:
    """An expression of a kind (or any), from operations that round exactly; divisors are constants other than 0."""
    wanted = kind or draw(st.sampled_from(("int", "float", "bool")))
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(_leaf(wanted))
    name = draw(st.sampled_from([*(n for n in _EXACT if _gives(n, wanted)), *_divisions(wanted)]))
    if name in ("div", "floordiv", "mod", "truncdiv"):
        by = draw(st.sampled_from(_NONZERO[wanted]))
        args = [draw(pairs(wanted, depth - 1)), Pair(by, by)]
    else:
        common = wanted if OPS[name].gives == "n" else draw(st.sampled_from(("int", "float")))
        args = [draw(pairs(_argument(name, letter, common, wanted), depth - 1)) for letter in OPS[name].takes]
    return Pair(Op(name, tuple(a.written for a in args)), op(name, *(a.folded for a in args)))


def _divisions(kind: Kind) -> tuple[str, ...]:
    return {"int": ("floordiv", "mod", "truncdiv"), "float": ("div",), "bool": ()}[kind]


def _gives(name: str, kind: Kind) -> bool:
    gives = OPS[name].gives
    return {"b": kind == "bool", "i": kind == "int", "f": kind == "float", "n": kind != "bool", "a": True}[gives]


def _argument(name: str, letter: str, common: Kind, wanted: Kind) -> Kind:
    if letter == "a":
        return wanted if name == "where" else "bool" if name == "int" else "int"
    return {"i": "int", "f": "float", "b": "bool", "n": common}[letter]
