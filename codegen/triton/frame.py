"""What both kernels of a file share: their parameters, the tile of rows a program owns, addresses and loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attncc.codegen.triton.expressions import Names, Scope, used_twice
from attncc.codegen.triton.operands import Operand, stride
from attncc.codegen.triton.schedule import TYPES, Schedule
from attncc.ir import Axis, Const, Expr, Interval, Load, Tensor
from attncc.ir.bounds import TILE_HI, TILE_LO, RowBound
from attncc.ir.build import ONE as ONE_
from attncc.ir.build import ZERO, add, mul
from attncc.ir.expr import free

#: Names that the emitted text uses itself.
RESERVED = (
    "tl", "triton", "torch", "range", "float", "pid", "tile", "tiles", "points", "point", "row", "rows", "row_ok",
    "BLOCK_M", "BLOCK_N", "acc", "acc0", "acc1", "m", "l", "m_new", "block", "t", "j0", "j_ok", "jv", "jv_ok", "s", "x",
    "p", "w", "visible", "split", "splits", "part_ptr", "stat_ptr", "PARTIAL", "attention", "join", "launch",
    "SIGNATURES", "CONTIGUOUS", "TMA", "aligned", "boxed", "together", "first", "width", "sizes", "tensors", "outputs",
    "look", "pack", "flags_ptr", "blocks_ptr", "counts_ptr", "block_count", "list_at", "flag", "at", "full", "part",
    "some", "every", "EVEN", "even", "steps", "step",
    "slot", "slot0", "programs", "processors", "rate", "base", "shrink", "lift", "lifted", "seen", "each",
    "inverse", "far", "top", "total",
    "member", "ds", "u", "pw", "ws", "delta", "peak", "rest", "rough", "grad", "kept", "turned", "around", "share",
    "gradient_statistics", "gradient_rows", "gradient_keys", "x_new", "z",
)  # fmt: skip

#: What a kernel writes: element type and shape.
Shaped = tuple[str, tuple[Expr, ...]]


@dataclass(frozen=True)
class Parameter:
    """One argument of a kernel: its name, Triton's type for it, what the launcher passes, and what a contiguous tensor
    makes of it: 1, a multiple of 16, or 0 for neither."""

    name: str
    type: str
    value: str
    contiguous: int = 0


class Frame:
    """One kernel under construction: its names, its outermost scope and its parameters."""

    def __init__(
        self, p: Schedule, rows: str, *, outputs: Mapping[str, Shaped] | None = None, more: Sequence[Expr] = ()
    ) -> None:
        """`rows` is the number of rows a program owns, as text; `outputs` are what it writes, if not the outputs of
        the attention; `more` are expressions that it computes beside those of the attention."""
        a = p.a
        self.p, self.rows = p, rows
        self.written = self._outputs() if outputs is None else outputs
        self.names = Names(RESERVED)
        roots = [a.mask, p.raw, a.weight if p.factor is None or not p.softmax else p.factor]
        roots += [x for x in (a.sink, a.spare) if x is not None]
        roots += [b for run in (*p.runs.masked, *p.runs.full) for b in (run.start, run.stop)]
        roots += [b for x in p.runs.striped for b in (x.lo, x.hi, x.base, x.width, x.slots)]
        roots += more
        self.scope = Scope(self.names, p.extents, used_twice(roots), self._load)
        self.pointer: dict[str, str] = {}
        self.parameters: list[Parameter] = []
        self._declare()

    def line(self, text: str = "") -> None:
        self.scope.lines.append(text)

    def comment(self, text: str) -> None:
        self.scope.lines.append(f"# {text}")

    def _declare(self) -> None:
        a = self.p.a
        for t in self.tensors():
            self._pointer(t.name, t.dtype, t.shape)
        for size in a.sizes:
            name = self.names.fresh(size.name)
            self.scope.define(size, name)
            self.parameters.append(Parameter(name, "i32", size.name))
        for output, shape in self.written.items():
            self._pointer(f".{output}", *shape, order=a.layout if output == "out" else ())

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the kernel is given."""
        return self.p.a.tensors

    def _outputs(self) -> dict[str, Shaped]:
        a = self.p.a
        shapes: dict[str, Shaped] = {
            "out": (a.dtype, tuple(x.extent for x in a.out_axes)),
            "lse": ("f32", tuple(x.extent for x in (*a.batch, a.i))),
            "weights": (a.dtype, tuple(x.extent for x in (*a.batch, a.i, a.j))),
        }
        return {n: shapes[n] for n in a.outputs}

    def _pointer(self, tensor: str, dtype: str, shape: tuple[Expr, ...], order: tuple[str, ...] = ()) -> None:
        """A pointer parameter and its strides. Outputs have a dot before their name, so that no tensor is one."""
        plain = tensor.removeprefix(".")
        self.pointer[tensor] = self.names.fresh(f"{plain}_ptr")
        value = plain if tensor.startswith(".") else f"tensors[{tensor!r}]"
        self.parameters.append(Parameter(self.pointer[tensor], f"*{TYPES[dtype]}", value))
        inner = self._inner_extents(shape, order)
        for dim in range(len(shape)):
            name = self.names.fresh(f"{plain}_s{dim}")
            self.scope.define(stride(tensor, dim), name)
            self.parameters.append(Parameter(name, "i32", f"{value}.stride({dim})", inner[dim]))

    def _inner_extents(self, shape: tuple[Expr, ...], order: tuple[str, ...]) -> list[int]:
        """For each dimension 1, 16 or 0: the stride is one, a multiple of 16, or neither is known."""
        places = list(range(len(shape)))
        if order:
            names = [x.name for x in self.p.a.out_axes]
            places = [names.index(n) for n in order]
        result, step, known = [0] * len(shape), 1, True
        for dim in reversed(places):
            result[dim] = 1 if step == 1 and known else 16 if step % 16 == 0 else 0
            extent = shape[dim]
            known = known and isinstance(extent, Const)
            step *= int(extent.value) if isinstance(extent, Const) else 1
        return result

    @property
    def steps(self) -> list[Parameter]:
        """The strides of the operands, but for those along a head of a contiguous tensor."""
        starts = tuple(f"tensors[{x.tensor!r}].stride(" for x in (self.p.q, self.p.k, self.p.v))
        return [x for x in self.parameters if x.value.startswith(starts) and x.contiguous != 1]

    def wide(self, x: Expr) -> str:
        """`x` as a 64-bit integer: offsets into large tensors pass 2**31."""
        text = self.scope.atom(x)
        return text if isinstance(x, Const) else f"{text}.to(tl.int64)"

    def offset(self, scope: Scope, terms: Sequence[tuple[Expr, Expr]]) -> str:
        """The sum of index * stride as text, or an empty text for no terms."""
        parts: list[str] = []
        for index, step in terms:
            if index is ZERO or step is ZERO:
                continue
            text = scope.atom(index)
            if not isinstance(index, Const):
                text += ".to(tl.int64)"
            parts.append(text if step is ONE_ else f"{text} * {scope.atom(step)}")
        return " + ".join(parts)

    def origin(self, o: Operand) -> str:
        """The pointer of an operand at this program's batch point, as text."""
        terms = [(axis.index, o.along(axis)) for axis in self.p.points]
        parts = [self.pointer[o.tensor], self.offset(self.scope, terms)]
        parts.append("" if o.base is ZERO else self.scope.text(o.base))
        return " + ".join(x for x in parts if x)

    def output_stride(self, output: str, dim: int) -> Expr:
        return stride(f".{output}", dim)

    def output(self, output: str, axes: tuple[Axis, ...]) -> str:
        """Where this program's rows of an output start: a pointer for each row."""
        order = [x.name for x in (*self.p.a.batch, self.p.a.i)]
        terms = [(x.index, self.output_stride(output, order.index(x.name))) for x in axes]
        return " + ".join(t for t in (self.pointer[f".{output}"], self.offset(self.scope, terms)) if t)

    @property
    def points(self) -> tuple[Axis, ...]:
        """The batch axes whose points programs share out among them."""
        return self.p.points

    @property
    def point_count(self) -> Expr:
        return count_of(self.points)

    @property
    def point_index(self) -> Expr:
        return index_in(self.points)

    def begin(self) -> None:
        """Which rows of which batch point this program owns, and the indices there."""
        self.place()
        self.line(f"row = (tile * {self.rows} + tl.arange(0, {self.rows}))[:, None]")
        self.line("row_ok = row < rows")
        self._rows()
        self.row_bounds()

    def place(self) -> None:
        """The lines that find `tile` and the batch point of this program."""
        p, a, scope = self.p, self.p.a, self.scope
        together = p.config.together if p.bounds.visit != (Interval(ZERO, a.j.extent),) else 0
        count = self.point_count
        if not p.persistent:
            self.line("pid = tl.program_id(0)")
        self.line(f"rows = {scope.text(p.row_count)}")
        self.line(f"tiles = tl.cdiv(rows, {self.rows})")
        if self.points and together and self.rows != "1":
            self.comment(f"{together} batch points at a time, the longest rows first")
            self.line(f"points = {scope.text(count)}")
            self.line(f"first = pid // ({together} * tiles) * {together}")
            self.line(f"width = tl.minimum(points - first, {together})")
            self.line(f"point = first + pid % ({together} * tiles) % width")
            self.line(f"tile = {self._in_order(f'pid % ({together} * tiles) // width')}")
        elif self.points:
            self.line("tile = pid % tiles")
            self.line("point = pid // tiles")
        else:
            self.line(f"tile = {self._in_order('pid')}" if together else "tile = pid")
        self.split_up("point", self.points)

    def _in_order(self, number: str) -> str:
        """The tile that is the `number`-th to be started: those with the most to do first."""
        return f"tiles - 1 - {number}"

    def split_up(self, name: str, axes: Sequence[Axis]) -> None:
        """Name the indices of `axes`, of which `name` is the point as one number, last axis fastest."""
        scope, left = self.scope, name
        for n, axis in enumerate(reversed(axes)):
            last = n == len(axes) - 1
            extent = scope.atom(axis.extent)
            scope.define(axis.index, scope.name(axis.name, left if last else f"{left} % {extent}"))
            left = left if last else scope.name(name, f"{left} // {extent}")

    def _rows(self) -> None:
        p, a, scope = self.p, self.p.a, self.scope
        group = scope.atom(p.group)
        alone = p.group is ONE_
        scope.define(a.i.index, scope.name(a.i.name, "row" if alone else f"row // {group}"))
        left = f"row % {group}"
        for n, axis in enumerate(reversed(p.folded)):
            last = n == len(p.folded) - 1
            extent = scope.atom(axis.extent)
            inside = left if last else f"{left} % {extent}" if n == 0 else f"({left}) % {extent}"
            scope.define(axis.index, scope.name(axis.name, inside))
            left = f"({left}) // {extent}"
        first, last_row = f"tile * {self.rows}", f"tl.minimum(tile * {self.rows} + {self.rows}, rows) - 1"
        scope.define(TILE_LO, scope.name("i0", first if alone else f"({first}) // {group}"))
        end = f"{last_row} + 1" if not alone else last_row.removesuffix(" - 1")
        scope.define(TILE_HI, scope.name("i1", end if alone else f"({last_row}) // {group} + 1"))

    def row_bounds(self) -> None:
        """Name what the loop bounds read of the rows of the tile."""
        for bound in self.p.bounds.rows:
            self._row_bound(bound)

    def _row_bound(self, bound: RowBound) -> None:
        scope, text = self.scope, self.scope.atom(bound.expr)
        if free(bound.expr) & self.p.row_leaves:
            limit = 2**31 - 1 if bound.op == "min" else -(2**31) + 1
            text = f"tl.{bound.op}(tl.where(row_ok, {text}, {limit}))"
        scope.define(bound.index, scope.name("bound", text))

    def _load(self, scope: Scope, x: Load) -> str:
        """A load in the scope it belongs to; rows and keys that do not exist read nothing."""
        p = self.p
        tensor = p.a.tensor(x.tensor)
        terms: list[str] = []
        guards: set[str] = set()
        for dim, index in enumerate(x.index):
            leaves = free(index)
            step = scope.atom(stride(x.tensor, dim))
            rowed, keyed = bool(leaves & p.row_leaves), p.a.j.index in leaves
            guards |= {"row_ok"} if rowed else set()
            guards |= {scope.guard} if keyed and scope.guard else set()
            if index is ZERO:
                continue
            text = scope.atom(index)
            wide = not (rowed and keyed) and not isinstance(index, Const)
            terms.append(f"{text}{'.to(tl.int64)' if wide else ''} * {step}")
        address = " + ".join([self.pointer[x.tensor], *terms])
        mask = f", mask={' & '.join(sorted(guards, reverse=True))}, other=0" if guards else ""
        cast = ""
        if tensor.kind == "float" and tensor.dtype != "f32":
            cast = ".to(tl.float32)"
        elif tensor.dtype in ("i16", "i8", "u8"):
            cast = ".to(tl.int32)"
        elif tensor.dtype == "bool":
            cast = ".to(tl.int1)"
        return scope.name(x.tensor, f"tl.load({address}{mask}){cast}")


def count_of(axes: Sequence[Axis]) -> Expr:
    count: Expr = ONE_
    for axis in axes:
        count = mul(count, axis.extent)
    return count


def index_in(axes: Sequence[Axis]) -> Expr:
    """A point of these axes as one number, last axis fastest."""
    result: Expr = ZERO
    for axis in axes:
        result = add(mul(result, axis.extent), axis.index)
    return result
