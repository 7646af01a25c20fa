"""What one iteration of a backward does with a block: weights again, their gradients, and the sums over the block.

    s = first . k            p = 2^((x - peak) c - rest) where visible
    u = second . v           t = p (weight' u - delta)
    sums += (t score') k     values += (weight' p) v        of a load: (d x / d load) t, along its own index structure
"""

from __future__ import annotations

from attncc.codegen.triton.block import Block, Mode
from attncc.codegen.triton.expressions import Scope
from attncc.codegen.triton.gradient_frame import STATISTICS, GradientFrame, Side
from attncc.codegen.triton.operands import Operand
from attncc.codegen.triton.peak import LOG2E, number
from attncc.codegen.triton.schedule import TL_TYPES
from attncc.codegen.triton.segments import Striped
from attncc.ir import Const
from attncc.ir.build import ONE

_PLAIN = (Const(1.0), ONE)


class GradientBlock(Block):
    """The lines of one side's kernel. `mode` "stats" finds the largest score of each row and the sum of its weights
    again, "plain" the gradients."""

    def __init__(self, frame: GradientFrame, side: Side) -> None:
        super().__init__(frame)
        self.frame, self.side = frame, side
        self.c2 = self.p.scale * LOG2E
        a, first = self.p.a, side.second.tensor
        types = {a.tensor(t).dtype for t in (first, self.p.v.tensor)}
        #: The type both factors of second . v have: their own if they agree, else float32.
        self.pair_type = types.pop() if len(types) == 1 else "f32"

    # ---- before the loops ------------------------------------------------------------------------------------------
    def columns(self) -> None:
        """Numbers of channels, and offsets inside a block, that no iteration changes."""
        f, p = self.f, self.p
        f.line("keys = tl.arange(0, BLOCK_N)[:, None]")
        for who, o, axis, letter, parts in (("k", p.k, p.a.d, "d", p.d_chunks), ("v", p.v, p.a.e, "e", p.e_chunks)):
            step, inner = f.scope.atom(o.along(p.a.j)), f.scope.atom(o.along(axis))
            for n, (width, start) in enumerate(parts):
                name = self._chunk(letter, n, parts)
                f.line(f"{name} = {f'{start} + ' if start else ''}tl.arange(0, {width})[None, :]")
                f.line(f"{self._chunk(f'{who}_in', n, parts)} = keys * {step} + {name} * {inner}")

    def bases(self) -> None:
        """Where the keys and values of this batch point begin."""
        for who, o in (("k", self.p.k), ("v", self.p.v)):
            self.f.line(f"{who}_at = {self.f.origin(o)}")

    def tile(self, name: str, o: Operand, parts: tuple[tuple[int, int], ...], dtype: str) -> None:
        """Load what the rows of the tile have of an operand; its channels are d where it is multiplied with keys."""
        f, p = self.f, self.p
        letter, axis, size = ("d", p.a.d, p.d_size) if name == "q" else ("e", p.a.e, p.e_size)
        rows = f.offset(f.scope, [(x.index, o.along(x)) for x in (*p.folded, p.a.i)])
        f.line(f"{name}_at = {f.origin(o)}" + (f" + ({rows})" if rows else ""))
        step = f.scope.atom(o.along(axis))
        for n, part in enumerate(parts):
            column = self._chunk(letter, n, parts)
            at = f"{name}_at + {column} * {step}" + ("" if rows else " + tl.zeros([BLOCK_M, 1], tl.int32)")
            mask = self._guard("row_ok", column, part, size)
            f.line(f"{self._chunk(name, n, parts)} = tl.load({at}, {mask}, other=0){self._to(o.tensor, dtype)}")

    def load_tiles(self) -> None:
        self.tile("q", self.p.q, self.p.d_chunks, self.p.dot_type)
        if self.side.needs_slopes:
            self.tile("w", self.side.second, self.p.e_chunks, self.pair_type)

    @property
    def sums(self) -> list[tuple[str, int]]:
        """The accumulators of (t score') k, and their widths."""
        wanted = self.side.operands and self.side.operands != ("v",)
        return [(self._chunk("acc", n, self.p.d_chunks), w) for n, (w, _) in enumerate(self.p.d_chunks) if wanted]

    @property
    def values(self) -> list[tuple[str, int]]:
        """The accumulators of (weight' p) v, and their widths."""
        wanted = "v" in self.side.operands
        return [(self._chunk("values", n, self.p.e_chunks), w) for n, (w, _) in enumerate(self.p.e_chunks) if wanted]

    # ---- an iteration ----------------------------------------------------------------------------------------------
    def body(self, mode: Mode, *, masked: bool, stripes: Striped | None = None) -> Scope:
        scope = self.f.scope.inner()
        self.gathered = stripes is not None and not self.in_whole_blocks(stripes)
        if stripes is None:
            scope.lines.append("j0 = block * BLOCK_N")
        self._keys(scope, self.j, "[None, :]", masked=masked, stripes=stripes)
        ok = self._visible_columns(scope, masked=masked, stripes=stripes)
        self._product(scope, ok)
        visible = self._visible(scope, masked=masked)
        scope.lines.append(f"x = {self._pair(scope, self.p.raw)}")
        if mode == "stats":
            self._again(scope, visible)
            return scope
        if self.side.by_key:
            self._statistics_of_block(scope)
        p = f"tl.exp2((x - peak) * {number(self.c2)} - rest)"
        scope.lines.append(f"p = {self._where(visible, p)}")
        self._block(scope, "v")
        for n, part in enumerate(self.p.e_chunks):
            guard = self._guard(ok, self._chunk("e", n, self.p.e_chunks), part, self.p.e_size)
            guard = f", {guard}, other=0" if guard else ""
            self._load(scope, "v", n, guard, self._to(self.p.v.tensor, self.pair_type), whole=False)
        self._add_values(scope, visible)
        if self.side.needs_slopes:
            self._slopes(scope, visible)
            self._add_loads(scope)
            self._add_sums(scope)
        return scope

    def _where(self, visible: str, x: str) -> str:
        return f"tl.where({visible}, {x}, 0.0)" if visible else x

    def _again(self, scope: Scope, visible: str) -> None:
        """The largest score so far, and the sum of the weights taken against it."""
        lines = scope.lines
        if visible:
            lines.append(f'x = tl.where({visible}, x, float("-inf"))')
        lines += [
            "x_new = tl.maximum(m, tl.max(x, 1)[:, None])",
            'base = tl.where(x_new == float("-inf"), 0.0, x_new)',
            f"l = l * tl.exp2((m - base) * {number(self.c2)})"
            f" + tl.sum(tl.exp2((x - base) * {number(self.c2)}), 1)[:, None]",
            "m = x_new",
        ]

    def _statistics_of_block(self, scope: Scope) -> None:
        """What is known of the query rows of the block; of those that are not there, that they see nothing."""
        for name in STATISTICS:
            at = self.frame.of_queries(f".{name}", scope)
            other = 'float("inf")' if name == "rest" else "0.0"
            guard = f", mask={scope.guard}, other={other}" if scope.guard else ""
            scope.lines.append(f"{name} = tl.load({at}{guard})")

    def _factor(self, scope: Scope, of: str) -> str:
        """`of` times d weight / d w."""
        factor = self.side.factor
        return of if factor in _PLAIN else f"{of} * {scope.atom(factor)}"

    def _add_values(self, scope: Scope, visible: str) -> None:
        if not self.values:
            return
        pw = self._factor(scope, "p")
        if pw != "p" and not isinstance(self.side.factor, Const):
            pw = self._where(visible, pw)
        scope.lines.append(f"pw = {self._cast(self.pair_type, pw)}")
        for n, (acc, _) in enumerate(self.values):
            v = self._chunk("v", n, self.p.e_chunks)
            scope.lines.append(f"{acc} = tl.dot(pw, {v}, {acc}, {self._precision(self.pair_type)})")

    @staticmethod
    def _cast(dtype: str, x: str) -> str:
        """`x` in the type that a product takes."""
        if dtype == "f32":
            return x
        return f"{x if x.isidentifier() else f'({x})'}.to({TL_TYPES[dtype]})"

    def _slopes(self, scope: Scope, visible: str) -> None:
        """u, the gradients of weights, and t, those of the logarithms of weights."""
        for n, _ in enumerate(self.p.e_chunks):
            w, v = (self._chunk(x, n, self.p.e_chunks) for x in ("w", "v"))
            plus = "" if n == 0 else "u, "
            scope.lines.append(f"u = tl.dot({w}, tl.trans({v}), {plus}{self._precision(self.pair_type)})")
        scope.lines.append(f"ws = p * ({self._factor(scope, 'u')} - delta)")
        if visible:
            scope.lines.append(f"ws = tl.where({visible}, ws, 0.0)")

    def _add_sums(self, scope: Scope) -> None:
        if not self.sums:
            return
        slope = self.side.slope[0]
        ds = "ws" if slope in _PLAIN else f"ws * {scope.atom(slope)}"
        scope.lines.append(f"ds = {self._cast(self.p.dot_type, ds)}")
        for n, (acc, _) in enumerate(self.sums):
            k = self._chunk("k", n, self.p.d_chunks)
            scope.lines.append(f"{acc} = tl.dot(ds, {k}, {acc}, {self._precision(self.p.dot_type)})")

    # ---- gradients of loads ----------------------------------------------------------------------------------------
    def _add_loads(self, scope: Scope) -> None:
        for n, x, slope in self.side.summed:
            term = scope.name("z", "ws" if slope in _PLAIN else f"ws * {scope.atom(slope)}")
            match x.over:
                case "j - i":
                    self._add_distances(scope, n, term)
                case "i, j":
                    self._store_pairs(scope, n, term)
                case _:
                    scope.lines.append(f"total{n} += tl.sum({term}, 1)[:, None]")

    def _add_distances(self, scope: Scope, n: int, term: str) -> None:
        """Add a block's sums along its diagonals to those of the program. Rows are turned to bring diagonals upright:
        row r by r places; what comes around at the end belongs BLOCK_N distances lower."""
        lines = scope.lines
        lines += [
            f"kept = tl.where(row_ok, {term}, 0.0)",
            "turned = tl.arange(0, BLOCK_M)[:, None] + tl.arange(0, BLOCK_N)[None, :]",
            "kept = tl.gather(kept, turned % BLOCK_N, 1)",
            "around = turned >= BLOCK_N",
        ]
        for value, back in (("tl.where(around, 0.0, kept)", ""), ("tl.where(around, kept, 0.0)", " - BLOCK_N")):
            lines += [
                f"at = share{n}_at + (j0 - tile * BLOCK_M{back} + tl.arange(0, BLOCK_N))",
                f"tl.store(at, tl.load(at) + tl.sum({value}, 0))",
                "tl.debug_barrier()",  # the next sums reach the same places from other threads
            ]

    def _store_pairs(self, scope: Scope, n: int, term: str) -> None:
        f = self.frame
        at = f.written_at(f"sum{n}", self.p.a.batch, self.p.a.i)
        step = f.scope.atom(f.output_stride(f"sum{n}", len(self.p.a.batch) + 1))
        j = scope.text(self.p.a.j.index)
        ok = f"row_ok & {scope.guard}" if scope.guard else "row_ok"
        scope.lines.append(f"tl.store({at} + {j}.to(tl.int64) * {step}, {term}, mask={ok})")
