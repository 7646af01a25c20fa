"""Printing expressions as C++: scalars where a whole vector of queries agrees, vectors of lanes elsewhere.

Lanes are queries, so an expression is one of four things: `uniform` (no row, no key), `key` (a scalar a key), `row`
(a vector a tile, kept out of the key loop) or `both`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

from attncc.codegen.cpp.diagonals import Diagonals
from attncc.ir import Attention, Const, Expr, Index, Load, Op, Size, Var
from attncc.ir.affine import expr, linear_in
from attncc.ir.analysis import uses
from attncc.ir.bounds import TILE_HI, TILE_LO
from attncc.ir.expr import Kind, substitute, walk
from attncc.ir.streams import STREAM_END


class Level(IntEnum):
    UNIFORM = 0
    KEY = 1
    ROW = 2
    BOTH = 3  # the bits of KEY and ROW together


SCALAR: dict[Kind, str] = {"int": "int64_t", "bool": "bool", "float": "real"}
VECTOR: dict[Kind, str] = {"int": "vint", "bool": "vmask", "float": "vreal"}
_SPLAT: dict[Kind, str] = {"int": "splat_int", "bool": "splat_mask", "float": "splat"}
_GATHER: dict[Kind, str] = {"int": "gather_int", "bool": "gather_mask", "float": "gather_real"}

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_COMPARE = {"lt": "<", "le": "<=", "eq": "==", "ne": "!="}
_FUNCTIONS = (
    "exp", "log", "log1p", "tanh", "sigmoid", "sqrt", "rsqrt", "erf", "floor", "ceil", "round", "pow", "sin", "cos",
)  # fmt: skip
_DIVISIONS = ("floordiv", "mod", "truncdiv")
_CALLS = {n: n for n in (*_DIVISIONS, "mix")} | {n: f"{n}_of" for n in _FUNCTIONS}
_BY_KIND = {"abs": "absolute", "min": "minimum", "max": "maximum"}
_PICK: dict[Kind, str] = {"int": "pick_int", "bool": "pick_mask", "float": "pick"}


def literal(x: Const, *, double: bool = False) -> str:
    """A constant as a C++ literal of its kind (floats in the compute type)."""
    value = x.value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"int64_t({value})" if value < 0 or value > 2**31 - 1 else f"{value}"
    if math.isnan(value):
        return "real(NAN)"
    if math.isinf(value):
        return "real(INFINITY)" if value > 0 else "real(-INFINITY)"
    return f"real({value!r})" if double else f"{value!r}f"


@dataclass
class Slots:
    """What is computed once: a tile's scalars (`u.`) and its vectors (`r.`), each a struct field with its code."""

    prefix: str
    names: dict[object, str] = field(default_factory=dict[object, str])
    fields: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])  # type, name, code

    def take(self, key: object, ctype: str, code: str) -> str:
        if key not in self.names:
            self.names[key] = f"{self.prefix}{len(self.names)}"
            self.fields.append((ctype, self.names[key], code))
        return self.names[key]


@dataclass(frozen=True)
class Staged:
    """A load over rows and keys, transposed a block at a time: `pointer` at the block's first key, `rows` the field
    that holds each lane's offset, `stride` from key to key."""

    pointer: str
    rows: str
    stride: str


class Printer:
    """Prints the expressions of one attention. `folded` are the batch axes whose members share their keys: they vary
    over lanes, as `i` does."""

    def __init__(self, a: Attention, folded: Iterable[Expr]) -> None:
        self.a = a
        self.rows: tuple[Expr, ...] = (a.i.index, *folded)
        self.double = a.compute_dtype == "f64"
        self.uniforms, self.vectors = Slots("u"), Slots("r")
        self.staged: dict[Load, Staged] = {}
        self.diagonals = Diagonals(a)
        self._levels: dict[Expr, Level] = {}

    def level(self, x: Expr) -> Level:
        for n in walk(x):
            if n not in self._levels:
                own = 0
                if n in self.rows:
                    own = Level.ROW
                elif n is self.a.j.index:
                    own = Level.KEY
                elif isinstance(n, Var):
                    own = Level.BOTH
                for child in n.children:
                    own |= self._levels[child]
                self._levels[n] = Level(own)
        return self._levels[x]

    def scalar(self, x: Expr, names: dict[Expr, str] | None = None) -> str:
        """`x` as a C++ scalar; it mentions no row."""
        return _Scope(self, inside=Level.UNIFORM, names=names).scalar(x)

    def statements(self, roots: dict[str, Expr], *, near: bool = False) -> list[str]:
        """Lines that define each root as a vector of the given name, inside the key loop; `near`: where it may be that
        arguments of tanh are small."""
        scope = _Scope(self, inside=Level.BOTH, shared=_shared(roots.values()), near=near)
        for name, x in roots.items():
            value = scope.vector(x)
            scope.lines.append(f"const {VECTOR[x.kind]} {name} = {value};")
        return scope.lines

    def slants(self) -> list[str]:
        """Lines that define the vector `x0`, `x1`, .. of each table of diagonals at row - key = `distance`."""
        i, j = self.a.i.index, self.a.j.index
        roots = [substitute(x, {j: Const(0)}) for x in self.diagonals.tables]
        scope = _Scope(self, inside=Level.ROW, shared=_shared(roots), names={i: "distance"}, prefix="y")
        for n, x in enumerate(roots):
            value = scope.vector(x)
            scope.lines.append(f"const vreal x{n} = {value};")
        return scope.lines

    def row_code(self, x: Expr) -> str:
        """`x`, which mentions no key, as a vector of the rows at lane `at`."""
        return _Scope(self, inside=Level.ROW).vector(x)

    def row(self, x: Expr) -> str:
        """`x`, a row expression, as the name of a field of the tile's vectors."""
        return self.vectors.take(x, VECTOR[x.kind], self.row_code(x))

    def uniform(self, x: Expr) -> str:
        return self.uniforms.take(x, SCALAR[x.kind], _Scope(self, inside=Level.UNIFORM).scalar(x))


def _shared(roots: Iterable[Expr]) -> set[Expr]:
    """Operations and loads that occur more than once below the roots."""
    return {n for n, count in uses(*roots).items() if count > 1 and isinstance(n, Op | Load)}


class _Scope:
    """One place of the program: which levels vary there, what has a name already."""

    def __init__(
        self, p: Printer, inside: Level, shared: set[Expr] | None = None, names: dict[Expr, str] | None = None,
        prefix: str = "x", *, near: bool = False,
    ) -> None:  # fmt: skip
        self.p, self.inside, self.shared, self.prefix = p, inside, shared or set[Expr](), prefix
        self.near = near
        self.names: dict[tuple[Expr, bool], str] = {}
        self.leaves: dict[Expr, str] = names or {}
        self.lines: list[str] = []

    def scalar(self, x: Expr) -> str:
        level = self.p.level(x)
        if level == Level.UNIFORM and self.inside != Level.UNIFORM and isinstance(x, Op | Load | Index):
            return f"u.{self.p.uniform(x)}"
        if (x, False) in self.names:
            return self.names[x, False]
        code = self._scalar(x)
        return self._named(x, code, SCALAR[x.kind], vector=False)

    def vector(self, x: Expr) -> str:
        level = self.p.level(x)
        if level in (Level.UNIFORM, Level.KEY):
            return f"{_SPLAT[x.kind]}({self.scalar(x)})"
        if self.inside == Level.BOTH and (at := self.p.diagonals.place(x)) is not None:
            return f"load(u.slanted + {at} * SLANT_ROOM + (j - u.j0) * u.slant)"
        if level == Level.ROW and self.inside == Level.BOTH:
            return f"r.{self.p.row(x)}"
        if (x, True) in self.names:
            return self.names[x, True]
        return self._named(x, self._vector(x), VECTOR[x.kind], vector=True)

    def _named(self, x: Expr, code: str, ctype: str, *, vector: bool) -> str:
        if x not in self.shared:
            return code
        name = f"{self.prefix}{len(self.names)}"
        self.lines.append(f"const {ctype} {name} = {code};")
        self.names[x, vector] = name
        return name

    def _scalar(self, x: Expr) -> str:
        match x:
            case Const():
                return literal(x, double=self.p.double)
            case Size(name):
                return f"c.z_{name}"
            case Index(name):
                tile = {TILE_LO: "t.i0", TILE_HI: "t.i1", self.p.a.j.index: "j"}
                return self.leaves.get(x) or tile.get(x) or f"b.x_{name}"
            case Load(tensor, index):
                return f"value(c.t_{tensor}[{self._offset(tensor, index)}])"
            case Op(name, args):
                return scalar_op(name, x, [self.scalar(a) for a in args])
            case _:
                raise TypeError(f"no scalar for {type(x).__name__}")

    def _offset(self, tensor: str, index: tuple[Expr, ...]) -> str:
        parts = [f"{_tight(self.scalar(x))} * c.s_{tensor}[{n}]" for n, x in enumerate(index) if x != Const(0)]
        return " + ".join(parts) or "0"

    def _vector(self, x: Expr) -> str:
        match x:
            case Var(name):
                return name
            case Index():
                return self.leaves.get(x) or f"lane_values(t, {self.p.rows.index(x)}, at)"
            case Load(tensor, index):
                return self._gather(x, tensor, index)
            case Op("tanh", (arg,)) if self.near:
                return f"tanh_in<NEAR>({self.vector(arg)}, reach)"
            case Op(name, args):
                return vector_op(name, x, [self.vector(a) for a in args])
            case _:
                raise TypeError(f"no vector for {type(x).__name__}")

    def _gather(self, x: Load, tensor: str, index: tuple[Expr, ...]) -> str:
        """Scalars into the pointer; row terms kept a tile as offsets; the rest a lane."""
        scalars: list[str] = []
        rows: list[str] = []
        key = list[object](["offset", tensor])
        both: list[str] = []
        for n, at in enumerate(index):
            level, stride = self.p.level(at), f"c.s_{tensor}[{n}]"
            if level in (Level.UNIFORM, Level.KEY):
                if at != Const(0):
                    scalars.append(f"{_tight(self.scalar(at))} * {stride}")
            elif level == Level.ROW and self.inside == Level.BOTH:
                rows.append(f"to_long({_Scope(self.p, Level.ROW).vector(at)}) * {stride}")
                key += [n, at]
            else:
                both.append(f"to_long({self.vector(at)}) * {stride}")
        if rows:
            offsets = self.p.vectors.take(tuple(key), "vlong", " + ".join(rows))
            stride = None if both or x.kind == "int" else self._key_stride(tensor, index)
            if stride is not None:
                return self._stage(x, offsets, stride)
            both.insert(0, f"r.{offsets}")
        pointer = " + ".join([f"c.t_{tensor}", *scalars])
        return f"{_GATHER[x.kind]}({pointer}, {' + '.join(both)})"


    def _key_stride(self, tensor: str, index: tuple[Expr, ...]) -> str | None:
        """Elements from one key to the next, where that is the same everywhere."""
        terms: list[str] = []
        for n, at in enumerate(index):
            if self.p.level(at) != Level.KEY:
                continue
            split = linear_in(at, self.p.a.j.index)
            if split is None or any(not isinstance(f, Size) for m in split[0] for f in m):
                return None
            terms.append(f"{_tight(self.scalar(expr(split[0])))} * c.s_{tensor}[{n}]")
        return " + ".join(terms) or None

    def _stage(self, x: Load, offsets: str, stride: str) -> str:
        first = _Scope(self.p, Level.BOTH, names={self.p.a.j.index: "u.j0"})
        terms = [
            f"{_tight(first.scalar(at))} * c.s_{x.tensor}[{n}]"
            for n, at in enumerate(x.index)
            if self.p.level(at) in (Level.UNIFORM, Level.KEY) and at != Const(0)
        ]
        self.p.staged.setdefault(x, Staged(" + ".join([f"c.t_{x.tensor}", *terms]), offsets, stride))
        at = list(self.p.staged).index(x)
        value = f"load(u.near + ({at} * KEYS + j - u.j0) * LANES)"
        return value if x.kind == "float" else f"({value} != 0)"


def _tight(code: str) -> str:
    return code if code.replace("_", "").replace(".", "").isalnum() or code.endswith(")") else f"({code})"


def scalar_op(name: str, x: Op, args: list[str]) -> str:
    """An operation on C++ scalars, given the text of its arguments."""
    kind = x.args[0].kind
    if name in _INFIX or name in _COMPARE:
        return f"({args[0]} {_INFIX.get(name) or _COMPARE[name]} {args[1]})"
    if name in ("and", "or"):
        return f"({args[0]} {'&&' if name == 'and' else '||'} {args[1]})"
    if name in _CALLS:
        casts = [f"int64_t({a})" for a in args] if kind == "int" else args
        return f"{_CALLS[name]}({', '.join(casts)})"
    if name in _BY_KIND:
        casts = [f"int64_t({a})" for a in args] if kind == "int" else args
        return f"{_BY_KIND[name]}{'_int' if kind == 'int' else ''}({', '.join(casts)})"
    simple = {
        "not": "(!{0})", "neg": "(-{0})", "where": "({0} ? {1} : {2})", "float": "real({0})", "int": "int64_t({0})",
        "bf16": "{0}", "f16": "{0}", "f32": "{0}", "isnan": "({0} != {0})",
    }  # fmt: skip
    return simple[name].format(*args)


def vector_op(name: str, x: Op, args: list[str]) -> str:
    """The same on vectors."""
    kind = x.args[0].kind
    if name in _INFIX:
        return f"({args[0]} {_INFIX[name]} {args[1]})"
    if name in _COMPARE:
        compared = f"({args[0]} {_COMPARE[name]} {args[1]})"
        return f"narrow{compared}" if kind == "int" else compared
    if name in ("and", "or"):
        return f"({args[0]} {'&' if name == 'and' else '|'} {args[1]})"
    if name in _CALLS:
        return f"{_CALLS[name]}({', '.join(args)})"
    if name in _BY_KIND:
        return f"{_BY_KIND[name]}{'_int' if kind == 'int' else ''}({', '.join(args)})"
    if name == "where":
        return f"{_PICK[x.kind]}({', '.join(args)})"
    to_float = "mask_to_real({0})" if kind == "bool" else "to_real({0})" if kind == "int" else "{0}"
    to_int = "(widen({0}) & 1)" if kind == "bool" else "to_int({0})" if kind == "float" else "{0}"
    simple = {
        "not": "(~{0})", "neg": "(-{0})", "float": to_float, "int": to_int, "bf16": "{0}", "f16": "{0}", "f32": "{0}",
        "isnan": "({0} != {0})",
    }  # fmt: skip
    return simple[name].format(*args)


#: The entry refuses sizes beyond it, so that 32-bit lanes hold what `fits_32_bits` proves; kernels made for larger
#: sizes have 64-bit lanes.
INDEX_BOUND, WIDE_BOUND = 2**24, 2**40
_LOAD_BOUND = {"i64": 2**63, "i32": 2**31 - 1, "i16": 2**15, "i8": 2**7, "u8": 2**8, "bool": 1}


def fits_32_bits(a: Attention, *roots: Expr) -> bool:
    """Whether every integer below the roots fits a 32-bit lane, sizes that a call decides being at most 2^24."""
    dtypes = {t.name: t.dtype for t in a.tensors}
    most: dict[Expr, int] = {
        x.index: int(x.extent.value) if isinstance(x.extent, Const) else INDEX_BOUND for x in a.axes
    }
    for n in walk(*roots):
        if n.kind == "int" and n not in most:
            most[n] = _magnitude(n, most, dtypes)
    return all(m < 2**31 for m in most.values())


def _magnitude(n: Expr, most: dict[Expr, int], dtypes: dict[str, str]) -> int:
    match n:
        case Const(value):
            return abs(int(value))
        case Index() | Size():
            return INDEX_BOUND
        case Load(tensor, _):
            return _LOAD_BOUND.get(dtypes[tensor], 2**63)
        case Op("add" | "sub", (x, y)):
            return most[x] + most[y]
        case Op("mul", (x, y)):
            return most[x] * most[y]
        case Op("mod", (_, y)):
            return most[y]
        case Op("floordiv" | "truncdiv" | "neg" | "abs", (x, *_)):
            return most[x] + 1
        case Op("min" | "max", (x, y)):
            return max(most[x], most[y])
        case Op("where", (_, x, y)):
            return max(most[x], most[y])
        case Op("int", (x,)) if x.kind == "bool":
            return 1
        case Op("mix", _):
            return STREAM_END - 1
        case _:
            return 2**63
