"""Guards against rows that see nothing: what models write around a softmax so that its NaN becomes zero.

    nan_to_num(softmax(x), 0)            where(any(mask), softmax(x), 0)            softmax(x) * any(mask)
    where(mask, softmax(where(mask, x, -inf)), 0)

Each says `empty: zero`; the guard itself then has nothing left to do. The second is one only if what it asks about is
the very mask of the scores, which is looked up in the graph; so is the last, where it is there already.
"""

from __future__ import annotations

import torch
from torch import fx

from attncc.ir.attention import W
from attncc.ir.build import TRUE, not_
from attncc.ir.expr import Const, Expr, Load, Op
from attncc.patterns.facts import Facts
from attncc.patterns.masks import split_mask
from attncc.patterns.moves import Point
from attncc.patterns.schema import argument
from attncc.patterns.value import Reader

aten = torch.ops.aten


def unguarded(f: Facts, reader: Reader, weight: Expr, score: Expr, key: Expr) -> Expr | None:
    """`weight` without its guard, or None if it has none. `key` is the index of the keys in `score`."""
    match weight:
        case Op("where", (Op("isnan", (inner,)), Const(0.0), rest)) if _in_unit_range(rest) is inner is W:
            return W
        case Op("where", (Load() as any_, inner, Const(0.0))) if _asks_for_mask(f, reader, any_, score, key):
            return inner
        case _:
            return None


def masked_again(weight: Expr, score: Expr, *, half: bool) -> Expr | None:
    """`weight` without a choice of zero for the keys that the mask of `score` hides; None if it makes none.

    Such rows as see nothing then are zero, be the mask's fill finite or not; a product with zero leaves a NaN one."""
    masked = split_mask(score, half=half, infinite_empty="nan")
    match weight:
        case Op("where", (shown, inner, Const(0.0))):
            visible = shown
        case Op("where", (hidden, Const(0.0), inner)):
            visible = not_(hidden)
        case Op("mul", (inner, Op("where", (shown, Const(1.0), Const(0.0))))) if masked.empty != "nan":
            visible = shown
        case _:
            return None
    return inner if visible is masked.mask and visible is not TRUE else None


def _in_unit_range(x: Expr) -> Expr:
    """`x` without clamps that a weight between 0 and 1 never meets."""
    while isinstance(x, Op) and x.name in ("min", "max"):
        limit = x.args[1]
        if not isinstance(limit, Const) or (limit.value < 1 if x.name == "min" else limit.value > 0):
            break
        x = x.args[0]
    return x


def _asks_for_mask(f: Facts, reader: Reader, load: Load, score: Expr, key: Expr) -> bool:
    """Whether `load` reads any(mask, over the keys) for the mask that `score` has."""
    n = f.by_name.get(load.tensor)
    if n is None or n.target is not aten.any.dim:
        return False
    source, dim = n.args[0], argument(n, "dim")
    if not isinstance(source, fx.Node) or not isinstance(dim, int):
        return False
    dim %= f.rank(source)
    kept = bool(argument(n, "keepdim"))
    point: Point = (*load.index[:dim], key, *load.index[dim + kept :])
    mask = split_mask(score, half=f.dtype(n) == torch.float16, infinite_empty="nan").mask
    return reader.value_at(source, point, f.order[n]) is mask


def vanishes(weight: Expr) -> bool:
    """Whether a weight is surely zero where the normalised one is: hidden keys then contribute nothing."""
    match weight:
        case Const(value):
            return value == 0
        case Op("mul", (a, b)):
            return vanishes(a) or vanishes(b)
        case Op("where", (_, a, b)) | Op("add" | "sub" | "max" | "min", (a, b)):
            return vanishes(a) and vanishes(b)
        case Op("div", (a, _)):
            return vanishes(a)
        case Op("neg" | "abs" | "sqrt" | "tanh" | "bf16" | "f16" | "f32", (a,)):
            return vanishes(a)
        case _:
            return weight is W
