"""Integers of few bits: whether an expression stays within what its type holds, so that no result of it wraps round.

An expression has whole numbers of any size, a tensor of uint8 has 256 of them: 200 + 100 is 44 there, and -1 is 255.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import fx

from attncc.ir.expr import Const, Expr, Load, Op
from attncc.patterns.reader.rules import Facts

#: Types whose numbers models reach the end of. Nobody counts to where 32 bits end.
NARROW = frozenset({torch.uint8, torch.int8, torch.int16})
Range = tuple[int, int]


def fits(f: Facts, x: Expr, dtype: torch.dtype) -> bool:
    """Whether an integer expression is one that `dtype` holds, whatever the tensors that it loads hold."""
    found, held = _range(f, x), torch.iinfo(dtype)
    return found is not None and held.min <= found[0] and found[1] <= held.max


def takes(f: Facts, n: fx.Node, number: Expr) -> bool:
    """Whether the tensors that `n` computes with can be joined by a number: torch gives it their type first."""
    dtypes = [f.dtype(a) for a in n.all_input_nodes if f.is_tensor(a)]
    if not dtypes or not isinstance(number, Const) or number.kind != "int":
        return True
    joint = reduce(torch.promote_types, dtypes)
    return joint not in NARROW or fits(f, number, joint)


def _range(f: Facts, x: Expr) -> Range | None:
    """The least and the greatest value of an integer expression, None where it may have any."""
    match x:
        case Const(value):
            return int(value), int(value)
        case Load(tensor, _):
            n = f.by_name.get(tensor)
            dtype = None if n is None else f.dtype(n)
            return (torch.iinfo(dtype).min, torch.iinfo(dtype).max) if dtype in NARROW else None
        case Op("where", (_, a, b)):
            left, right = _range(f, a), _range(f, b)
            return None if left is None or right is None else (min(left[0], right[0]), max(left[1], right[1]))
        case Op("mod", (_, Const(by))) if by > 0:
            return 0, int(by) - 1
        case Op("neg" | "abs", (a,)):
            return _of_one(x.name, _range(f, a))
        case Op("add" | "sub" | "mul" | "min" | "max", (a, b)):
            left, right = _range(f, a), _range(f, b)
            return None if left is None or right is None else _of_two(x.name, left, right)
        case _:
            return None


def _of_one(name: str, x: Range | None) -> Range | None:
    if x is None:
        return None
    low, high = x
    if name == "neg":
        return -high, -low
    return (0 if low <= 0 <= high else min(abs(low), abs(high))), max(abs(low), abs(high))


def _of_two(name: str, a: Range, b: Range) -> Range:
    if name == "add":
        return a[0] + b[0], a[1] + b[1]
    if name == "sub":
        return a[0] - b[1], a[1] - b[0]
    if name == "mul":
        ends = [x * y for x in a for y in b]
        return min(ends), max(ends)
    pick = min if name == "min" else max
    return pick(a[0], b[0]), pick(a[1], b[1])
