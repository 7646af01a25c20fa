"""What a mask says in the terms that operators have: a causal flag, a window, lengths, a mask of keys, and the rest.

    mask(b, i, j)  =  j <= i  and  i - j < window  and  j < lengths[b]  and  padding[b, j]  and  rest(b, i, j)
"""

from __future__ import annotations

from dataclasses import dataclass

from attncc.ir import Attention, Const, Expr
from attncc.ir.affine import expr, plus, poly
from attncc.ir.analysis import members
from attncc.ir.build import TRUE, op
from attncc.ir.expr import Op, mentions

_ONE = {(): 1}


@dataclass(frozen=True)
class Visible:
    """The parts; a `window` of 0 is none. `lengths` and `padding` mention the first batch axis alone, and the key;
    there is one of the two at most. Without the causal part a window is a part of the rest."""

    causal: bool = False
    window: int = 0
    lengths: Expr | None = None
    padding: Expr | None = None
    rest: Expr = TRUE

    @property
    def without_lengths(self) -> Expr:
        """Padding and rest: what is left of a mask whose lengths, flag and window an operator takes otherwise."""
        return self.rest if self.padding is None else op("and", self.padding, self.rest)


def visible(a: Attention) -> Visible:
    """The parts of a mask."""
    causal, window = False, 0
    lengths: Expr | None = None
    padding: Expr | None = None
    rest: list[Expr] = []
    windows: list[Expr] = []
    of_lengths: Expr | None = None
    i, j = a.i.index, a.j.index
    for x in members("and", a.mask):
        slack = _slack(x)
        if slack is not None and slack == {(i,): 1, (j,): -1}:
            causal = True
        elif slack is not None and {m: c for m, c in slack.items() if m} == {(j,): 1, (i,): -1} and not window:
            window = slack.get((), 0) + 1  # i - j <= c
            windows.append(x)
        elif not mentions(x, i, *(axis.index for axis in a.batch[1:])):
            own = None if slack is None or slack.get((j,)) != -1 else plus(slack, {(j,): 1}, 1)
            if own is not None and lengths is None and not mentions(expr(own), j):
                lengths, of_lengths = expr(plus(own, _ONE, 1)), x
            else:
                padding = x if padding is None else op("and", padding, x)
        else:
            rest.append(x)
    if windows and (not causal or window < 1):
        rest += windows
        window = 0
    found: Expr = TRUE
    for x in rest:
        found = op("and", found, x)
    if padding is not None and of_lengths is not None:  # a mask of keys says both
        lengths, padding = None, op("and", padding, of_lengths)
    if isinstance(padding, Const):
        padding, found = None, op("and", found, padding)
    return Visible(causal, window, lengths, padding, found)


def _slack(x: Expr) -> dict[tuple[Expr, ...], int] | None:
    """p where x is `p >= 0`, of integers."""
    if not isinstance(x, Op) or x.name not in ("lt", "le") or x.args[0].kind != "int":
        return None
    found = plus(poly(x.args[1]), poly(x.args[0]), -1)
    return plus(found, _ONE, -1) if x.name == "lt" else found
