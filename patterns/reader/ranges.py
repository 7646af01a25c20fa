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
from attncc.ir.expr import Const, Expr, Load, Op, Size, walk
from attncc.patterns.graph.facts import Facts

Range = tuple[float, float]  # of Python integers, or infinite

_ALL: Range = (float("-inf"), float("inf"))
#: No size of a call is larger: an axis of so many elements has no attention.
_LARGEST = 1 << 28
_HOLDS: dict[torch.dtype, Range] = {
    dtype: (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32)
}
_EXACT = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "min": min, "max": max}


def narrow(dtype: torch.dtype) -> bool:
    """Whether arithmetic of a dtype may wrap where that of the IR does not."""
    return dtype in _HOLDS


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


def computed_in(f: Facts, n: fx.Node) -> torch.dtype | None:
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


def numbers_of(n: fx.Node) -> list[Any]:
    """The operands of an operation on elements, tensors and numbers."""
    return [*n.args, *(x for name, x in n.kwargs.items() if name in ("other", "min", "max", "value"))]


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
            return (low, high) if 0 <= low and high < by else (0, int(by) - 1)
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
