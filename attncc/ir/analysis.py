"""Facts of expressions and attentions that lifting, passes and emitters ask for: one answer for all of them.

Everything here is conservative: None, False and a smaller set mean "not proven". What a kernel then makes of a fact
(a second pass over the keys, a tile for each head) is its own business.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from attncc.ir.affine import Extents, expr, less_than, linear_in, nonnegative, poly
from attncc.ir.attention import Attention, Axis
from attncc.ir.build import ONE, const, mul, not_, op, sub
from attncc.ir.rewrite import rewrite, substitute
from attncc.ir.terms import ROUNDINGS, Const, Expr, Load, Op, Size, Var, free, loads, mentions, walk

# ---- functions of one variable: the weight `w`, the score `s` -------------------------------------------------------

#: Functions with f(0) = 0.
_THROUGH_ZERO = frozenset(
    [*ROUNDINGS, "stop", "neg", "abs", "sqrt", "tanh", "erf", "floor", "ceil", "round", "sin", "log1p"]
)
#: Functions that give NaN for NaN, whatever their other arguments are.
_NAN_FROM_ANY = frozenset(["add", "sub", "mul", "div", "min", "max", "minfirst", "maxfirst"])
_NAN_FROM_ONE = _THROUGH_ZERO | {"exp", "log", "sigmoid", "rsqrt", "cos"}


def linear_factor(x: Expr, v: Var) -> Expr | None:
    """f with x = v * f for every finite v, where f does not mention v. Rounding points are passed over.

    A weight that is linear in `w` commutes with the division by the row's sum; f may mention the score."""
    match x:
        case Var():
            return const(1.0) if x is v else None
        case Const(value):
            return x if value == 0 and x.kind == "float" else None
        case Op(name, (a,)) if name in ROUNDINGS:
            return linear_factor(a, v)
        case Op("neg", (a,)):
            return _joined("neg", linear_factor(a, v))
        case Op("add" | "sub" as name, (a, b)):
            return _joined(name, linear_factor(a, v), linear_factor(b, v))
        case Op("mul", (a, b)):
            if not mentions(b, v):
                return _joined("mul", linear_factor(a, v), b)
            return None if mentions(a, v) else _joined("mul", a, linear_factor(b, v))
        case Op("div", (a, b)) if not mentions(b, v):
            return _joined("div", linear_factor(a, v), b)
        case Op("where", (c, a, b)) if not mentions(c, v):
            return _joined("where", c, linear_factor(a, v), linear_factor(b, v))
        case _:
            return None


def _joined(name: str, *args: Expr | None) -> Expr | None:
    known = [x for x in args if x is not None]
    return op(name, *known) if len(known) == len(args) else None


def zero_unless(x: Expr, *, products: bool = False) -> tuple[Expr, Expr] | None:
    """(c, a) where an expression is a where c holds and zero elsewhere, by a choice.

    Products of a with the choice of 1 or 0 are read too if `products`: these are NaN where a is, whatever c says."""
    match x:
        case Op("where", (c, a, Const(0.0))):
            return c, a
        case Op("where", (c, Const(0.0), a)):
            return not_(c), a
        case Op("mul", (a, Op("where", (c, Const(1.0), Const(0.0))))) if products:
            return c, a
        case _:
            return None


def zero_at_zero(x: Expr, v: Var) -> bool:
    """Whether x is 0 where v is 0, whatever finite values the rest of it has.

    Of a weight: keys of weight zero then add nothing to the output."""
    match x:
        case Var():
            return x is v
        case Const(value):
            return value == 0
        case Op("mul", (a, b)):
            return zero_at_zero(a, v) or zero_at_zero(b, v)
        case Op("div", (a, _)):
            return zero_at_zero(a, v)
        case Op("pow", (a, Const(power))):
            return power > 0 and zero_at_zero(a, v)
        case Op("min" | "max" | "minfirst" | "maxfirst" as name, (a, b)):
            return any(
                zero_at_zero(y, v) and (zero_at_zero(z, v) or _is_beyond_zero(name, z)) for y, z in ((a, b), (b, a))
            )
        case Op("add" | "sub", (a, b)) | Op("where", (_, a, b)):
            return zero_at_zero(a, v) and zero_at_zero(b, v)
        case Op(name, (a,)) if name in _THROUGH_ZERO:
            return zero_at_zero(a, v)
        case _:
            return False


def _is_beyond_zero(name: str, limit: Expr) -> bool:
    """Whether zero is not changed by a clamp."""
    return isinstance(limit, Const) and (limit.value >= 0 if name.startswith("min") else limit.value <= 0)


def keeps_nan(x: Expr, v: Var) -> bool:
    """Whether x is NaN where v is NaN: no choice leaves it out."""
    match x:
        case Var():
            return x is v
        case Op("where", (_, a, b)):
            return keeps_nan(a, v) and keeps_nan(b, v)
        case Op("pow", (a, Const(power))):
            return power != 0 and keeps_nan(a, v)
        case Op(name, (a, b)) if name in _NAN_FROM_ANY:
            return keeps_nan(a, v) or keeps_nan(b, v)
        case Op(name, (a,)) if name in _NAN_FROM_ONE:
            return keeps_nan(a, v)
        case _:
            return False


def unrounded(x: Expr) -> Expr:
    """An expression without the roundings at its top."""
    while isinstance(x, Op) and x.name in ROUNDINGS:
        x = x.args[0]
    return x


def exact(x: Expr) -> Expr:
    """An expression without its roundings."""
    return rewrite(x, lambda y: exact(y.children[0]) if isinstance(y, Op) and y.name in ROUNDINGS else None)


def scaled(x: Expr) -> tuple[Expr, float]:
    """(y, c) with x = y * c and c > 0 a finite number, as large a part of x as there is. Rounding points are passed
    over. The largest x is then c times the largest y."""
    factor = 1.0
    while isinstance(x, Op):
        if x.name in ROUNDINGS:
            x = x.args[0]
            continue
        step = _constant_factor(x)
        if step is None or not 1e-30 < factor * step[1] < 1e30:
            break
        x, factor = step[0], factor * step[1]
    return x, factor


def _constant_factor(x: Op) -> tuple[Expr, float] | None:
    match x:
        case Op("mul", (a, Const(c))) | Op("mul", (Const(c), a)) if 0 < c < math.inf:
            return a, float(c)
        case Op("div", (a, Const(c))) if 0 < c < math.inf:
            return a, 1.0 / float(c)
        case _:
            return None


def uses(*roots: Expr) -> Counter[Expr]:
    """How many places read each subexpression: operations, loads that it is an index of, and who reads the roots."""
    found = Counter(roots)
    for x in walk(*roots):
        found.update(x.children)
    return found


# ---- predicates -----------------------------------------------------------------------------------------------------


def members(name: str, x: Expr) -> tuple[Expr, ...]:
    """The operands of a chain of `and` or `or`, left to right; `x` itself if it is none."""
    if isinstance(x, Op) and x.name == name:
        return (*members(name, x.args[0]), *members(name, x.args[1]))
    return (x,)


@dataclass(frozen=True)
class Sides:
    """`row relation key`, a comparison of integers: "le", "eq" or "ne"."""

    relation: str
    row: Expr
    key: Expr


def comparison_sides(x: Expr, key: Expr, rows: Iterable[Expr]) -> Sides | None:
    """A comparison of integers parted into what mentions the index `key` and all the rest, where no term mentions both
    the key and one of `rows`."""
    if not isinstance(x, Op) or x.name not in ("lt", "le", "eq", "ne") or x.args[0].kind != "int":
        return None
    own = frozenset(rows)
    row: dict[tuple[Expr, ...], int] = {}
    keyed: dict[tuple[Expr, ...], int] = {}
    slack = sub(x.args[1], x.args[0])
    for factors, c in poly(sub(slack, ONE) if x.name == "lt" else slack).items():
        leaves = free(*factors)
        if key not in leaves:
            row[factors] = -c
        elif leaves & own:
            return None
        else:
            keyed[factors] = c
    return Sides("le" if x.name == "lt" else x.name, expr(row), expr(keyed))


def blocks_of(x: Expr, index: Expr) -> tuple[Expr, int] | None:
    """(x over block numbers, the block size c) where `index` occurs, and only as `index // c` of one constant c >= 1:
    x is then the same throughout a block of c."""
    sizes: set[int] = set()
    number = Load("number of the block", (), "int")  # a leaf that cannot be the index itself

    def rule(y: Expr) -> Expr | None:
        if isinstance(y, Op) and y.name == "floordiv" and y.args[0] is index and isinstance(y.args[1], Const):
            sizes.add(int(y.args[1].value))
            return number
        return None

    hidden = rewrite(x, rule)
    if len(sizes) != 1 or min(sizes) < 1 or mentions(hidden, index):
        return None
    return rewrite(hidden, lambda y: index if y is number else None), sizes.pop()


def runs_of(x: Expr, index: Expr, fixed: Iterable[Expr] = ()) -> int | None:
    """c where `index` occurs in x, and only as `(index + n) // c` of one constant c >= 1 and one n over none of
    `fixed`: x is then the same throughout runs of c, the first of which may be shorter."""
    found: set[tuple[Expr, int]] = set()
    moving = {index, *fixed}

    def rule(y: Expr) -> Expr | None:
        if not (isinstance(y, Op) and y.name == "floordiv" and isinstance(y.args[1], Const)):
            return None
        along = linear_in(y.args[0], index)
        if along is None or along[0] != {(): 1} or any(mentions(f, n) for m in along[1] for f in m for n in moving):
            return None
        found.add((expr(along[1]), int(y.args[1].value)))
        return Load("number of the run", (), "int")  # a leaf that cannot be the index itself

    hidden = rewrite(x, rule)
    if len(found) != 1 or mentions(hidden, index):
        return None
    _, size = found.pop()
    return size if size >= 1 else None


# ---- batch axes -----------------------------------------------------------------------------------------------------


def folded_axes(a: Attention, fixed: Iterable[Expr]) -> tuple[Axis, ...]:
    """Batch axes on which neither keys nor values nor any of `fixed` depend: the heads of a group, whose rows fit one
    tile, so that each key is read once for all of them.

    `fixed` are the expressions that a kernel works out once a tile: those of its loop bounds, stripes and bits too."""
    shared = free(*a.k.index, *a.v.index, *fixed)
    return tuple(x for x in a.batch if x.index not in shared)


@dataclass(frozen=True)
class Shard:
    """A batch axis that can be cut into runs of a multiple of `multiple` indices, each worked out by itself: the part
    of an output is what the same node gives for the parts of `tensors`, cut along the dimension that is named. Tensors
    that are not named are read whole by all."""

    axis: Axis
    tensors: Mapping[str, int]
    multiple: int


def shardable_axes(a: Attention) -> tuple[Shard, ...]:
    """The batch axes that occur in nothing but indices, in one dimension of a tensor each, plainly or by `// c`.

    A dimension that several axes share (`h * 4 + g`) can be cut along the one that counts slowest."""
    extents: dict[Expr, Expr] = {x.index: x.extent for x in a.axes}
    found = (_shard(a, axis, extents) for axis in a.batch)
    return tuple(x for x in found if x is not None)


def _shard(a: Attention, axis: Axis, extents: Extents) -> Shard | None:
    roots = [x for x in (a.score, a.mask, a.weight, a.sink, a.drop) if x is not None]
    if axis.index in _outside_loads(*roots):
        return None
    dims: dict[str, int | None] = {}
    multiple = 1
    for x in (a.q, a.k, a.v, *loads(*roots)):
        held = [d for d, i in enumerate(x.index) if axis.index in _outside_loads(i)]
        by = _run_of(x.index[held[0]], a.tensor(x.tensor).shape[held[0]], axis, extents) if len(held) == 1 else None
        if held and by is None:
            return None
        dim = held[0] if held else None
        if dims.setdefault(x.tensor, dim) != dim:
            return None
        multiple = math.lcm(multiple, by or 1)
    cut = {name: d for name, d in dims.items() if d is not None}
    return Shard(axis, cut, multiple) if _counts_alone(a, axis, cut) else None


def _outside_loads(*roots: Expr) -> set[Expr]:
    """What occurs in expressions, but for the indices of loads: there an axis is cut with the tensor."""
    seen: set[Expr] = set()
    stack = list(roots)
    while stack:
        x = stack.pop()
        if x not in seen:
            seen.add(x)
            stack += () if isinstance(x, Load) else x.children
    return seen


def _run_of(x: Expr, length: Expr, axis: Axis, extents: Extents) -> int | None:
    """The multiple of which a run of the axis must be for `x`, which mentions it, to take a run of a dimension, and all
    runs to take all of its `length`; None where there is none."""
    match x:
        case Op("floordiv", (index, Const(by))) if index is axis.index:
            return int(by) if by > 0 and poly(mul(length, const(int(by)))) == poly(axis.extent) else None
        case _:
            pass
    line = linear_in(x, axis.index)
    if line is None:
        return None
    by, rest = expr(line[0]), expr(line[1])
    whole = poly(length) == poly(mul(axis.extent, by))
    return 1 if whole and nonnegative(rest, extents) and less_than(rest, by, extents) else None


def _counts_alone(a: Attention, axis: Axis, cut: Mapping[str, int]) -> bool:
    """Whether an extent that is a size counts nothing else, so that it can be another one for each part."""
    if isinstance(axis.extent, Const):
        return True
    others: list[Expr] = [x.extent for x in a.axes if x is not axis]
    others += [n for t in a.tensors for d, n in enumerate(t.shape) if cut.get(t.name) != d]
    return axis.extent not in free(*others, *a.expressions())


# ---- sizes ----------------------------------------------------------------------------------------------------------


def at_sizes(x: Expr, sizes: Mapping[Size, int]) -> int:
    """An integer over sizes, once these are known. Raises ValueError where it depends on anything else."""
    known = substitute(x, {size: const(int(n)) for size, n in sizes.items()})
    if not isinstance(known, Const):
        raise ValueError(f"{x!r} depends on more than {', '.join(map(repr, sizes)) or 'numbers'}")
    return int(known.value)
