"""Ops that compute element by element: `out[at] = f(inputs[at])`. One line of the table an op."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from attncc.ir.build import (
    ZERO,
    add,
    and_,
    cast,
    const,
    eq,
    ge,
    gt,
    le,
    lt,
    maximum,
    minimum,
    mul,
    not_,
    op,
    or_,
    sub,
    where,
)  # fmt: skip
from attncc.ir.expr import Const, Expr, Kind
from attncc.ir.gradients import with_plain_ties
from attncc.patterns.reader import activations
from attncc.patterns.reader.bits import bits, shifted
from attncc.patterns.reader.dropout import dropped
from attncc.patterns.reader.rules import Point, Rule, Values, argument, has_argument, op_name, takes_tensors
from attncc.patterns.reader.size_arithmetic import number
from attncc.patterns.reader.view_ops import broadcast

aten = torch.ops.aten


def input_at(r: Values, n: fx.Node, x: Any, at: Point) -> Expr | None:
    """An argument of `n` at the point: a tensor broadcast to the result, or a number, which sizes may decide."""
    if isinstance(x, fx.Node) and r.facts.is_tensor(x):
        return r.value_at(x, broadcast(r.facts, x, at), r.facts.order[n])
    return number(r.facts, x, n)


def _together(*xs: Expr) -> tuple[Expr, ...]:
    """Operands promoted to one kind, as torch promotes."""
    rank: dict[Kind, int] = {"bool": 0, "int": 1, "float": 2}
    top: Kind = max((x.kind for x in xs), key=rank.__getitem__)
    return tuple(cast(x, top) for x in xs)


def _numbers(*xs: Expr) -> tuple[Expr, ...]:
    """The same, truth values as the numbers 0 and 1."""
    promoted = _together(*xs)
    return tuple(cast(x, "int") for x in promoted) if promoted[0].kind == "bool" else promoted


def _args(r: Values, n: fx.Node, at: Point, count: int) -> tuple[Expr, ...] | None:
    found = [input_at(r, n, x, at) for x in n.args[:count]]
    return None if any(x is None for x in found) else tuple(x for x in found if x is not None)


def _unary(f: Callable[[Expr], Expr], *, floats: bool = True) -> Rule:
    def rule(r: Values, n: fx.Node, at: Point) -> Expr | None:
        args = _args(r, n, at, 1)
        return None if args is None else f(cast(args[0], "float") if floats else args[0])

    return rule


def _binary(f: Callable[[Expr, Expr], Expr], *, swapped: bool = False) -> Rule:
    """A function of two numbers, of which the second is multiplied by `alpha` where the operator has one."""

    def rule(r: Values, n: fx.Node, at: Point) -> Expr | None:
        args = _args(r, n, at, 2)
        alpha = argument(n, "alpha") if has_argument(n, "alpha") else 1
        scale = input_at(r, n, alpha, at)
        if args is None or scale is None:
            return None
        if all(x.kind == "bool" for x in args):
            scale = cast(scale, "bool")  # a sum of truth values is scaled by one
        a, b = _numbers(*(reversed(args) if swapped else args))
        return f(a, b if alpha == 1 else mul(b, cast(scale, b.kind)))

    return rule


def _logical(f: Callable[[Expr, Expr], Expr], *, bitwise: bool) -> Rule:
    def rule(r: Values, n: fx.Node, at: Point) -> Expr | None:
        args = _args(r, n, at, 2)
        if args is not None and bitwise and any(a.kind != "bool" for a in args):
            return bits(f, *args)
        if args is None:
            return None
        return f(cast(args[0], "bool"), cast(args[1], "bool"))

    return rule


def _shift(way: int) -> Rule:
    def rule(r: Values, n: fx.Node, at: Point) -> Expr | None:
        args = _args(r, n, at, 2)
        return None if args is None else shifted(args[0], args[1], way)

    return rule


def _not(r: Values, n: fx.Node, at: Point) -> Expr | None:
    args = _args(r, n, at, 1)
    if args is None or (op_name(n).startswith("bitwise") and args[0].kind != "bool"):
        return None
    return not_(cast(args[0], "bool"))


def _where(r: Values, n: fx.Node, at: Point) -> Expr | None:
    args = _args(r, n, at, 3)
    if args is None:
        return None
    a, b = _together(*(_fitting(r.facts.dtype(n), x) for x in args[1:]))
    return where(cast(args[0], "bool"), a, b)


def _fitting(dtype: torch.dtype, x: Expr) -> Expr:
    """A number as a tensor of float16 holds it, where it may be too large for one."""
    if dtype != torch.float16 or not isinstance(x, Const) or not isinstance(x.value, float):
        return x
    return const(float(torch.tensor(x.value).to(dtype)))


def _masked_fill(r: Values, n: fx.Node, at: Point) -> Expr | None:
    args = _args(r, n, at, 3)
    if args is None:
        return None
    x, mask, fill = args
    return where(cast(mask, "bool"), cast(fill, x.kind), x)


def _identity(r: Values, n: fx.Node, at: Point) -> Expr | None:
    return input_at(r, n, n.args[0], at)


def _dropout(r: Values, n: fx.Node, at: Point) -> Expr | None:
    p, train = argument(n, "p"), argument(n, "train")
    return input_at(r, n, n.args[0], at) if not train or p == 0.0 else None


def _clamp(r: Values, n: fx.Node, at: Point) -> Expr | None:
    x = input_at(r, n, n.args[0], at)
    for name, bounded in (("min", "maxfirst"), ("max", "minfirst")):
        try:
            limit = argument(n, name)
        except KeyError:
            continue
        if limit is None or x is None:
            continue
        bound = input_at(r, n, limit, at)
        x = None if bound is None else _bounded(r, n, bounded, *_numbers(x, bound))
    return x


def _bounded(r: Values, n: fx.Node, name: str, a: Expr, b: Expr) -> Expr:
    """The minimum or maximum of two numbers, that of the first at a tie where gradients flow."""
    return op(name if r.followed(n) and a.kind == "float" else name.removesuffix("first"), a, b)


def _square(x: Expr) -> Expr:
    return activations.square(cast(x, "int") if x.kind == "bool" else x)


def _pow(r: Values, n: fx.Node, at: Point) -> Expr | None:
    args = _args(r, n, at, 2)
    if args is None or args[0].kind == "bool":
        return None
    if args[0].kind == "int" and args[1].kind == "int":
        return mul(args[0], args[0]) if args[1] is const(2) else None
    base, power = (cast(a, "float") for a in args)
    if isinstance(power, Const) and power.value == 2.0:
        return activations.square(base)
    if isinstance(base, Const) and base.value > 0:
        return activations.power_of(float(base.value), power)
    return op("pow", base, power)


def _divide(r: Values, n: fx.Node, at: Point) -> Expr | None:
    mode = n.kwargs.get("rounding_mode")
    args = _args(r, n, at, 2)
    if args is None:
        return None
    a, b = _together(*args)
    if mode is None:
        return op("div", cast(a, "float"), cast(b, "float"))
    if a.kind != "int":
        return None
    return op("floordiv" if mode == "floor" else "truncdiv", a, b)


def _integers(name: str) -> Rule:
    def rule(r: Values, n: fx.Node, at: Point) -> Expr | None:
        args = _args(r, n, at, 2)
        return op(name, *args) if args is not None and all(a.kind == "int" for a in args) else None

    return rule


def _nan_to_num(r: Values, n: fx.Node, at: Point) -> Expr | None:
    x = input_at(r, n, n.args[0], at)
    if x is None or x.kind != "float":
        return x
    if argument(n, "posinf") is not None or argument(n, "neginf") is not None:
        return None
    limits, nan = torch.finfo(r.facts.dtype(n)), argument(n, "nan")
    finite = _bounded(r, n, "maxfirst", _bounded(r, n, "minfirst", x, const(limits.max)), const(limits.min))
    return where(op("isnan", x), const(float(nan or 0.0)), finite)


def _relu(r: Values, n: fx.Node, at: Point) -> Expr | None:
    x = input_at(r, n, n.args[0], at)
    if x is None or not r.followed(n):
        return None if x is None else maximum(x, cast(ZERO, x.kind))
    return _bounded(r, n, "maxfirst", cast(ZERO, x.kind), x)


def _fill(r: Values, n: fx.Node, at: Point) -> Expr | None:
    return input_at(r, n, n.args[1], at)


def _copy(r: Values, n: fx.Node, at: Point) -> Expr | None:
    return input_at(r, n, n.args[1], at)


def _tri(keep: Callable[[Expr, Expr], Expr]) -> Rule:
    def rule(r: Values, n: fx.Node, at: Point) -> Expr | None:
        x = input_at(r, n, n.args[0], at)
        diagonal = input_at(r, n, argument(n, "diagonal"), at)
        if x is None or diagonal is None:
            return None
        row, column = at[-2], at[-1]
        zero = {"bool": const(False), "int": const(0), "float": const(0.0)}[x.kind]
        return where(keep(sub(column, row), diagonal), x, zero)

    return rule


def _lerp(r: Values, n: fx.Node, at: Point) -> Expr | None:
    args = _args(r, n, at, 3)
    if args is None:
        return None
    start, end, weight = (cast(x, "float") for x in args)
    return add(mul(start, sub(const(1.0), weight)), mul(end, weight))  # linear in both ends, for infinite ones too


def _activation(f: Callable[..., Expr], *settings: str) -> Rule:
    """A function of one number and of arguments that are numbers."""

    def rule(r: Values, n: fx.Node, at: Point) -> Expr | None:
        x = input_at(r, n, n.args[0], at)
        given = [argument(n, name) for name in settings]
        if x is None or any(not isinstance(g, int | float | str) for g in given):
            return None
        try:
            value = f(cast(x, "float"), *given)
        except ZeroDivisionError:  # by a `beta` of zero
            return None
        return value if r.followed(n) else with_plain_ties(value)

    return rule


def _prelu(r: Values, n: fx.Node, at: Point) -> Expr | None:
    x, slope = input_at(r, n, n.args[0], at), n.args[1]
    if x is None or not isinstance(slope, fx.Node) or r.facts.value(slope).numel() != 1:
        return None
    below = r.value_at(slope, (ZERO,) * r.facts.rank(slope), r.facts.order[n])
    return where(gt(x, const(0.0)), x, mul(x, below))


def _addcmul(name: str) -> Rule:
    """x + value * a * b, or x + value * a / b."""

    def rule(r: Values, n: fx.Node, at: Point) -> Expr | None:
        args, scale = _args(r, n, at, 3), argument(n, "value")
        if args is None or not isinstance(scale, int | float) or not r.facts.dtype(n).is_floating_point:
            return None
        x, a, b = (cast(y, "float") for y in args)
        return add(x, mul(op(name, a, b), const(float(scale))))

    return rule


def _ne(a: Expr, b: Expr) -> Expr:
    return op("ne", a, b)


def _named(name: str) -> Callable[[Expr], Expr]:
    return lambda x: op(name, x)


def _xor(a: Expr, b: Expr) -> Expr:
    return op("ne", cast(a, "int"), cast(b, "int"))


def _both(base: str, *overloads: str) -> list[object]:
    """The overloads of an op, and of its in-place form, that this torch has for tensors."""
    found: list[object] = []
    for name in (base, f"{base}_"):
        packet = getattr(aten, name, None)
        found += [getattr(packet, o) for o in overloads if packet is not None and hasattr(packet, o)]
    return [target for target in found if takes_tensors(target)]


_TS = ("Tensor", "Scalar", "default", "Tensor_mode", "Scalar_mode", "Tensor_Tensor", "Tensor_Scalar")

#: Functions of one number by the name of their op, with the arguments that they take beside it.
_ACTIVATIONS: dict[Callable[..., Expr], tuple[str, ...]] = {
    activations.elu: ("alpha", "scale", "input_scale"), activations.celu: ("alpha",), activations.selu: (),
    activations.leaky_relu: ("negative_slope",), activations.silu: (), activations.softplus: ("beta", "threshold"),
    activations.log_sigmoid: (), activations.mish: (), activations.gelu: ("approximate",), activations.exp2: (),
    activations.hardsigmoid: (), activations.hardswish: (), activations.threshold: ("threshold", "value"),
    activations.trunc: (),
}  # fmt: skip

#: The table: op name -> rule; every overload and in-place form of the name follows it.
_RULES: dict[str, Rule] = {
    "add": _binary(add), "sub": _binary(sub), "subtract": _binary(sub), "rsub": _binary(sub, swapped=True),
    "mul": _binary(mul), "multiply": _binary(mul), "div": _divide, "true_divide": _divide, "divide": _divide,
    "floor_divide": _integers("floordiv"), "remainder": _integers("mod"),
    "neg": _unary(lambda x: op("neg", x), floats=False), "abs": _unary(lambda x: op("abs", x), floats=False),
    "minimum": _binary(minimum), "maximum": _binary(maximum),
    "clamp": _clamp, "clamp_min": _clamp, "clamp_max": _clamp, "relu": _relu,
    "pow": _pow, "clip": _clamp, "prelu": _prelu, "addcmul": _addcmul("mul"), "addcdiv": _addcmul("div"),
    **{f.__name__: _activation(f, *settings) for f, settings in _ACTIVATIONS.items()},
    "log2": _unary(lambda x: activations.logarithm(2.0, x)), "log10": _unary(lambda x: activations.logarithm(10.0, x)),
    "expm1": _unary(lambda x: sub(op("exp", x), const(1.0))),
    "relu6": _activation(activations.relu6),
    "hardtanh": _activation(activations.clipped, "min_val", "max_val"),
    "sign": _unary(activations.sign, floats=False), "sgn": _unary(activations.sign, floats=False),
    "square": _unary(_square, floats=False),
    **{name: _unary(_named(name)) for name in
       ("exp", "log", "log1p", "tanh", "sigmoid", "sqrt", "rsqrt", "erf", "floor", "ceil", "round", "sin", "cos")},
    "isnan": _unary(_named("isnan")), "isneginf": _unary(lambda x: eq(x, const(-math.inf))),
    "isinf": _unary(lambda x: eq(op("abs", x), const(math.inf))), "special_expit": _unary(_named("sigmoid")),
    "reciprocal": _unary(lambda x: op("div", const(1.0), x)),
    "lt": _binary(lt), "le": _binary(le), "gt": _binary(gt), "ge": _binary(ge), "eq": _binary(eq), "ne": _binary(_ne),
    "less": _binary(lt), "less_equal": _binary(le), "greater": _binary(gt), "greater_equal": _binary(ge),
    "logical_and": _logical(and_, bitwise=False), "logical_or": _logical(or_, bitwise=False),
    "logical_xor": _logical(_xor, bitwise=False),
    "bitwise_and": _logical(and_, bitwise=True), "bitwise_or": _logical(or_, bitwise=True),
    "bitwise_xor": _logical(_xor, bitwise=True), "__and__": _logical(and_, bitwise=True),
    "__or__": _logical(or_, bitwise=True), "__xor__": _logical(_xor, bitwise=True),
    "logical_not": _not, "bitwise_not": _not,
    "masked_fill": _masked_fill, "nan_to_num": _nan_to_num, "dropout": _dropout, "tril": _tri(le), "triu": _tri(ge),
    "lerp": _lerp, "fill": _fill, "zero": lambda r, n, at: const(0), "copy": _copy,
}  # fmt: skip

#: Operators of other libraries, and our own, by name: attention-gym's is one instruction of a GPU.
_CUSTOM: dict[str, Rule] = {"approx::tanh": _RULES["tanh"], "attncc::dropped": dropped}


def element_rule(target: Any) -> Rule | None:
    """The rule of an operator that computes element by element, None where it has none."""
    return ELEMENTS.get(target) or _CUSTOM.get(getattr(getattr(target, "_schema", None), "name", ""))


ELEMENTS: dict[object, Rule] = {
    **{target: rule for name, rule in _RULES.items() for x in (name, f"special_{name}") for target in _both(x, *_TS)},
    **dict.fromkeys([aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar], _where),
    **dict.fromkeys([aten.to.dtype, aten.to.device, aten.to.other, aten.to.dtype_layout, aten.type_as.default,
                     aten._to_copy.default], _identity),
    **dict.fromkeys([aten.__rshift__.Scalar, aten.bitwise_right_shift.Tensor_Scalar], _shift(-1)),
    **dict.fromkeys([aten.__lshift__.Scalar, aten.bitwise_left_shift.Tensor_Scalar], _shift(1)),
    **dict.fromkeys([aten.min.other], _binary(minimum)),
    **dict.fromkeys([aten.max.other], _binary(maximum)),
}  # fmt: skip
