"""Numbers that a graph computes from its sizes and from numbers of the call, as expressions over these.

    q @ k.mT / math.sqrt(n)       scores * math.log(n) / 3       scaled_dot_product_attention(..., scale=n ** -0.5)
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import fx

from attncc.ir.build import add, cast, const, maximum, minimum, mul, op
from attncc.ir.expr import Expr
from attncc.patterns.reader import activations
from attncc.patterns.reader.call_numbers import call_number
from attncc.patterns.reader.rules import Facts, formula

_FOLDS = {"Add": add, "Mul": mul, "Max": maximum, "Min": minimum}
_FUNCTIONS = ("sqrt", "exp", "log", "sin", "cos", "tanh")
_ROOTS = {0.5: "sqrt", -0.5: "rsqrt"}


def number(f: Facts, x: Any, reader: fx.Node) -> Expr | None:
    """A number that the operation `reader` takes, a symbolic one or a node that holds one; None where it is none."""
    value = f.value(x) if isinstance(x, fx.Node) else x
    if isinstance(value, torch.SymInt):
        return f.size(value)
    if isinstance(value, torch.SymFloat):
        known = _float(f, formula(value))
        return call_number(f, x, reader) if known is None and isinstance(x, fx.Node) else known
    return const(value) if isinstance(value, bool | int | float) else None


def _float(f: Facts, x: Any) -> Expr | None:
    """A formula over sizes, as a float."""
    if x.is_number:
        return const(float(x))
    name = type(x).__name__
    if x.is_integer and name not in _FOLDS:
        return cast(f.integer(x), "float")
    found = [_float(f, a) for a in x.args]
    args = [a for a in found if a is not None]
    if len(args) < len(found):
        return None
    if name in _FOLDS:
        return reduce(_FOLDS[name], args)
    if name == "ToFloat":
        return args[0]
    if name in ("IntTrueDiv", "FloatTrueDiv"):
        return op("div", *args)
    if name in ("FloatPow", "Pow"):
        root = _ROOTS.get(float(x.args[1])) if x.args[1].is_number else None
        return op("pow", *args) if root is None else op(root, args[0])
    function = name.removeprefix("OpaqueUnaryFn_")
    if function == "log2":
        return activations.logarithm(2.0, args[0])
    return op(function, args[0]) if function in _FUNCTIONS else None
