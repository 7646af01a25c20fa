"""Printing the expressions of a linear attention: integers as scalars, floats as vectors over the channels d.

What no channel changes is the same in every lane. At most one load of an expression runs along d; the kernel has that
row in a buffer, and the expression sees it as `x`.
"""

from __future__ import annotations

from dataclasses import dataclass

from attncc.codegen.cpp.expressions import literal, scalar_op, vector_op
from attncc.ir import Const, Expr, Index, Linear, Load, Op, Size, Var
from attncc.ir.expr import ROUNDINGS, free, loads, rewrite, walk


@dataclass(frozen=True)
class LinearPrinter:
    """Prints what one linear attention computes of a token: `i`, `j`, `d`, `e` are variables, the batch is in `b`."""

    a: Linear

    @property
    def double(self) -> bool:
        return self.a.compute_dtype == "f64"

    def integer(self, x: Expr) -> str:
        """An integer or a boolean of integers, as a C++ scalar."""
        match x:
            case Const():
                return literal(x, double=self.double)
            case Size(name):
                return f"c.z_{name}"
            case Index(name):
                axes = (self.a.i, self.a.j, self.a.d, self.a.e)
                own = {x.name: letter for x, letter in zip(axes, "ijde", strict=True)}
                return own.get(name, f"b.x_{name}")
            case Load(tensor, index):
                return f"value(c.t_{tensor}[{self.place(tensor, index)}])"
            case Op(name, args):
                return scalar_op(name, x, [self.integer(y) for y in args])
            case _:
                raise TypeError(f"no scalar for {type(x).__name__}")

    def place(self, tensor: str, index: tuple[Expr, ...]) -> str:
        """Where a load reads, in elements."""
        parts = [f"({self.integer(x)}) * c.s_{tensor}[{n}]" for n, x in enumerate(index) if x != Const(0)]
        return " + ".join(parts) or "0"

    def vector(self, x: Expr, row: Load | None = None) -> str:
        """A float, or a boolean of floats, as a vector over d; `row` is the load that the buffer holds."""
        if x is row or isinstance(x, Var):
            return "x"
        if isinstance(x, Const):
            return f"splat({literal(x, double=self.double)})" if x.kind == "float" else f"splat_mask({self.integer(x)})"
        if isinstance(x, Load):
            return f"splat({self.integer(x)})"
        if not isinstance(x, Op):
            raise TypeError(f"no vector for {type(x).__name__}")
        if all(y.kind != "float" for y in walk(x) if y is not x):
            return f"splat({self.integer(x)})" if x.kind == "float" else f"splat_mask({self.integer(x)})"
        return vector_op(x.name, x, [self.vector(y, row) for y in x.args])


    def less_one(self, x: Expr, row: Load | None = None) -> str:
        """A float less one, to all its digits where it is near one: exp(y) - 1 is computed as such."""
        match x:
            case Const(value):
                return self.vector(Const(float(value) - 1.0))
            case Op("exp", (y,)):
                return f"expm1_of({self.vector(y, row)})"
            case Op("where", (c, y, z)):
                return f"pick({self.vector(c, row)}, {self.less_one(y, row)}, {self.less_one(z, row)})"
            case Op(name, (y,)) if name in ROUNDINGS:
                return self.less_one(y, row)
            case _:
                return f"({self.vector(x, row)} - 1)"


def along(a: Linear, x: Expr) -> Load | str | None:
    """The one load of `x` that runs along d, plainly and in one dimension; none where `x` has no d; else what is in the
    way."""
    d = a.d.index
    if d not in free(x):
        return None
    held = [y for y in loads(x) if d in free(y)]
    if len(held) != 1:
        return "a decay of several tensors with channels"
    (row,) = held
    if [y for y in row.index if d in free(y)] != [d] or d in free(_without(x, row)):
        return f"{row.tensor}[...] does not run along {a.d.name}"
    return row


def _without(x: Expr, row: Load) -> Expr:
    return rewrite(x, lambda y: Const(0.0) if y is row else None)
