"""What integers can be: the least and the greatest value of an expression, and whether a dtype holds them.

Eager arithmetic of narrow integers wraps (`uint8`: 3 - 5 is 254), that of the IR does not: an integer is written out
only where the dtype that the model has it in provably holds it, and is loaded from the model's own tensor elsewhere.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import fx

from attncc.ir.affine import simplify
from attncc.ir.attention import DTYPES
from attncc.ir.build import cast
from attncc.ir.expr import Const, Expr, Load, Op, Size, walk
from attncc.patterns.reader.pointwise import ELEMENTS, input_at
from attncc.patterns.reader.rules import Facts, Point, Values, op_name

Range = tuple[float, float]  # of Python integers, or infinite

_ALL: Range = (float("-inf"), float("inf"))
#: No size of a call is larger: an axis of so many elements has no attention.
_LARGEST = 1 << 28
_HOLDS: dict[torch.dtype, Range] = {
    dtype: (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32)
}
_OPERANDS = ("other", "min", "max", "value")
#: Operations that make an integer of a float as the IR does, by cutting off its fraction.
_CONVERSIONS = {"to", "_to_copy", "type_as", "copy"}
_EXACT = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "min": min, "max": max}


def wraps(r: Values, n: fx.Node, x: Expr, at: Point) -> bool:
    """Whether `x`, what an operation gives of its operands, may be another number in the integers that the model
    computes in. A graph of scalars has no tensor to load instead, and its indices are 32 bits wide: there, a 32-bit
    integer is taken to fit."""
    f = r.facts
    if _through_floats(f, n, x):
        return True
    held, used = f.dtype(n), _computed_in(f, n)
    if r.given:
        held, used = (None if dtype is torch.int32 else dtype for dtype in (held, used))
    if held is not None and not fits(f, cast(x, DTYPES[f.dtype_name(n) or "i64"][0]), held, r.extents):
        return True
    if used is None or n.target not in ELEMENTS:
        return False
    given: list[Any] = [*n.args, *(y for name, y in n.kwargs.items() if name in _OPERANDS)]
    operands = [input_at(r, n, y, at) for y in given if not f.is_tensor(y) or f.dtype(y) != used]
    return any(y is not None and y.kind == "int" and not fits(f, y, used, r.extents) for y in operands)


def fits(f: Facts, x: Expr, dtype: torch.dtype, extents: Mapping[Expr, Expr]) -> bool:
    """Whether a dtype holds every value of an integer."""
    if dtype not in _HOLDS or x.kind == "bool":
        return True
    low, high = _HOLDS[dtype]
    for y in (x, simplify(x, extents)):
        least, most = _range(f, y, extents)
        if low <= least and most <= high:
            return True
    return False


def _through_floats(f: Facts, n: fx.Node, x: Expr) -> bool:
    """Whether `x` computes in floats what an operation computes in integers, which not every integer survives."""
    computed = isinstance(x, Op) and x.kind == "float" and op_name(n).rstrip("_") not in _CONVERSIONS
    return computed and _is_integer(f.dtype(n))


def _computed_in(f: Facts, n: fx.Node) -> torch.dtype | None:
    """The narrow dtype that an operation on integers casts its operands to; None where it is a wide one."""
    ranked: dict[bool, list[torch.dtype]] = {True: [], False: []}  # tensors without dimensions come second
    for x in n.all_input_nodes:
        if f.is_tensor(x) and f.dtype(x) != torch.bool:
            ranked[f.rank(x) > 0].append(f.dtype(x))
    if any(not _is_integer(x) for x in (*ranked[True], *ranked[False])):
        return None
    found = ranked[True] or ranked[False]
    if any(isinstance(x, float) for x in n.args) or not found:
        return None
    dtype = found[0]
    for other in found[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype if dtype in _HOLDS else None


def _is_integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex


def _range(f: Facts, root: Expr, extents: Mapping[Expr, Expr]) -> Range:
    known: dict[Expr, Range] = {}
    for x in walk(root):
        if x.kind == "int":
            known[x] = _of(f, x, known, extents)
    return known.get(root, _ALL)


def _of(f: Facts, x: Expr, known: Mapping[Expr, Range], extents: Mapping[Expr, Expr]) -> Range:
    if x in extents:
        extent = extents[x]
        return 0, (int(extent.value) if isinstance(extent, Const) else _LARGEST) - 1
    match x:
        case Const(value):
            return int(value), int(value)
        case Size():
            return 0, _LARGEST
        case Load(tensor):
            node = f.by_name.get(tensor)
            return _ALL if node is None else _HOLDS.get(f.dtype(node), _ALL)
        case Op("add" | "sub" | "mul" | "min" | "max" as name, (a, b)):
            return _ends([_EXACT[name](p, q) for p, q in product(known[a], known[b])])
        case Op("neg", (a,)):
            return -known[a][1], -known[a][0]
        case Op("abs", (a,)):
            low, high = known[a]
            return max(low, -high, 0), max(high, -low)
        case Op("where", (_, a, b)):
            return min(known[a][0], known[b][0]), max(known[a][1], known[b][1])
        case Op("mod", (a, Const(by))) if by > 0:
            low, high = known[a]
            return (low, high) if low >= 0 and high < by else (0, int(by) - 1)
        case Op("floordiv" | "truncdiv", (a, Const(by))) if by > 0 and 0 <= known[a][0] <= known[a][1] < _ALL[1]:
            return int(known[a][0]) // int(by), int(known[a][1]) // int(by)
        case Op("floordiv" | "truncdiv", (a, b)) if known[b][0] > 0:
            return min(known[a][0], 0), max(known[a][1], 0)
        case Op("mod", (_, b)) if known[b][0] > 0:
            return 0, known[b][1] - 1
        case _:
            return _ALL


def _ends(values: list[float]) -> Range:
    """The least and greatest of corner values; an infinity times zero tells nothing."""
    return _ALL if any(v != v for v in values) else (min(values), max(values))
