"""Printing expressions as Triton: each value in the outermost scope where it is known, named once, computed once."""

from __future__ import annotations

import keyword
import math
from collections.abc import Callable, Iterable

from attncc.ir import Const, Expr, Index, Load, Op, Size, Var
from attncc.ir.affine import Extents, is_positive, nonnegative, poly
from attncc.ir.analysis import uses
from attncc.ir.expr import free

_COMPARE, _OR, _AND, _ADD, _MUL, _ATOM = 1, 2, 3, 5, 6, 9
_INFIX: dict[str, tuple[str, int]] = {
    "add": ("+", _ADD), "sub": ("-", _ADD), "mul": ("*", _MUL), "div": ("/", _MUL), "lt": ("<", _COMPARE),
    "le": ("<=", _COMPARE), "eq": ("==", _COMPARE), "ne": ("!=", _COMPARE), "and": ("&", _AND), "or": ("|", _OR),
}  # fmt: skip
_CALLS = {
    "exp": "tl.exp", "log": "tl.log", "sqrt": "tl.sqrt", "rsqrt": "tl.rsqrt", "erf": "tl.erf", "sigmoid": "tl.sigmoid",
    "floor": "tl.floor", "ceil": "tl.ceil", "sin": "tl.sin", "cos": "tl.cos", "abs": "tl.abs", "where": "tl.where",
}  # fmt: skip
#: Operations that Triton lacks, or has with C's rounding; the text of each helper is in `helpers`.
_HELPERS = {
    "floordiv": "floor_div", "mod": "floor_mod", "truncdiv": "trunc_div", "tanh": "tanh", "log1p": "log1p",
    "round": "round_even", "pow": "power", "mix": "mix",
}  # fmt: skip


LARGEST = 3.4028234663852886e38  # of float32, in which all float arithmetic happens


class Names:
    """Python names for the IR's, none of them taken twice."""

    def __init__(self, reserved: Iterable[str]) -> None:
        self._taken = {*reserved, *keyword.kwlist}

    def fresh(self, wanted: str) -> str:
        name, count = wanted, 0
        while name in self._taken:
            name, count = f"{wanted}_{count}" if wanted[-1].isdigit() else f"{wanted}{count}", count + 1
        self._taken.add(name)
        return name


class Scope:
    """Lines of code, the names that they define, and the scope around them.

    `guard` is the name of what says, in the loop over keys, that a key is in range, where that is in doubt. A leaf that
    `define` gave a name to belongs to the scope that defined it, an expression to the innermost scope of its leaves."""

    def __init__(
        self,
        names: Names,
        extents: Extents,
        shared: frozenset[Expr],
        load: Callable[[Scope, Load], str],
        around: Scope | None = None,
    ) -> None:
        self.names, self.extents, self.shared, self.load, self.around = names, extents, shared, load, around
        self.known: dict[Expr, str] = {}
        self.lines: list[str] = []
        self.guard: str | None = None
        self.helpers: set[str] = around.helpers if around else set()

    def inner(self) -> Scope:
        return Scope(self.names, self.extents, self.shared, self.load, self)

    def define(self, x: Expr, text: str) -> None:
        """`text` is what `x` is here and in the scopes inside."""
        self.known[x] = text

    def name(self, wanted: str, text: str) -> str:
        """Add the line that gives `text` a name; the name."""
        name = self.names.fresh(wanted)
        self.lines.append(f"{name} = {text}")
        return name

    def home(self, x: Expr) -> Scope:
        """The innermost scope that defines a leaf of `x`."""
        leaves = free(x)
        scope = self
        while scope.around is not None and not any(leaf in scope.known for leaf in leaves):
            scope = scope.around
        return scope

    def lookup(self, x: Expr) -> str | None:
        scope: Scope | None = self
        while scope is not None:
            if x in scope.known:
                return scope.known[x]
            scope = scope.around
        return None

    def text(self, x: Expr) -> str:
        return self._value(x)[0]

    def atom(self, x: Expr) -> str:
        return self._part(x, _ATOM)

    def _part(self, x: Expr, least: int) -> str:
        text, level = self._value(x)
        return text if level >= least else f"({text})"

    def _value(self, x: Expr) -> tuple[str, int]:
        known = self.lookup(x)
        if known is not None:
            return known, _ATOM
        if isinstance(x, Const):
            return literal(x)
        if isinstance(x, Index | Size | Var):
            raise KeyError(f"{x!r} has no value here")
        home = self.home(x)
        if home is not self:
            text, level = home.render(x)
            if isinstance(x, Op) and level == _MUL and all(isinstance(c, Size | Const) for c in x.args):
                return text, level
            if not isinstance(x, Load):
                text = home.name("t", text)
            home.known[x] = text
            return text, _ATOM
        text, level = self.render(x)
        if isinstance(x, Load):
            self.known[x] = text
        elif x in self.shared:
            text, level = self.name("t", text), _ATOM
            self.known[x] = text
        return text, level

    def render(self, x: Expr) -> tuple[str, int]:
        """The text of one operation on its arguments, and how tightly it binds."""
        match x:
            case Load():
                return self.load(self, x), _ATOM
            case Op("add" | "sub" | "mul" | "div" | "lt" | "le" | "eq" | "ne" | "and" | "or" as name, (a, b)):
                symbol, level = _INFIX[name]
                both = level + 1 if level == _COMPARE else level
                return f"{self._part(a, max(both, _OR))} {symbol} {self._part(b, level + 1)}", level
            case Op("not", (a,)):
                return f"{self._part(a, _OR)} == 0", _COMPARE
            case Op("neg", (a,)):
                return f"-{self._part(a, _ATOM)}", _MUL
            case Op("bf16" | "f16" | "f32", (a,)):
                return self._value(a)
            case Op("isnan", (a,)):
                text = self._part(a, _ATOM)
                return f"{text} != {text}", _COMPARE
            case Op("float", (a,)):
                return self._cast(a, "tl.float32")
            case Op("int", (a,)):
                return self._cast(a, "tl.int32")
            case Op("min" | "max" as name, (a, b)):
                call = "tl.minimum" if name == "min" else "tl.maximum"
                nan = ", propagate_nan=tl.PropagateNan.ALL" if x.kind == "float" else ""
                return f"{call}({self.text(a)}, {self.text(b)}{nan})", _ATOM
            case Op("floordiv" | "truncdiv", (a, b)) if self._whole(a, b):
                return f"{self._part(a, _MUL)} // {self._part(b, _MUL + 1)}", _MUL
            case Op("mod", (a, b)) if self._whole(a, b):
                return f"{self._part(a, _MUL)} % {self._part(b, _MUL + 1)}", _MUL
            case Op(name, args) if name in _HELPERS:
                self.helpers.add(_HELPERS[name])
                return f"{_HELPERS[name]}({', '.join(self.text(c) for c in args)})", _ATOM
            case Op(name, args):
                return f"{_CALLS[name]}({', '.join(self.text(c) for c in args)})", _ATOM
            case _:
                raise KeyError(f"{x!r} has no value here")

    def _cast(self, a: Expr, to: str) -> tuple[str, int]:
        if a.kind == "bool":
            one, zero = ("1.0", "0.0") if to == "tl.float32" else ("1", "0")
            return f"tl.where({self.text(a)}, {one}, {zero})", _ATOM
        return f"{self._part(a, _ATOM)}.to({to})", _ATOM

    def _whole(self, a: Expr, b: Expr) -> bool:
        """C's division is the floor's: a >= 0 and b >= 1."""
        return is_positive(poly(b)) and nonnegative(a, self.extents)


def literal(x: Const) -> tuple[str, int]:
    value = x.value
    if isinstance(value, float) and abs(value) > LARGEST:
        value = math.copysign(math.inf, value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")', _ATOM
    return repr(value), _ATOM if not isinstance(value, bool) and value >= 0 else _MUL if x.kind != "bool" else _ATOM


def used_twice(roots: Iterable[Expr]) -> frozenset[Expr]:
    """Operations that more than one place reads."""
    return frozenset(x for x, n in uses(*roots).items() if n > 1 and isinstance(x, Op))
