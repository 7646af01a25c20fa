"""Decisions about a kernel file, made once: what is folded, which runs of key blocks are walked, in which types."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from attncc.codegen.triton.config import TritonConfig
from attncc.codegen.triton.operands import Operand, chunks, operands
from attncc.codegen.triton.rows import row_axes
from attncc.codegen.triton.segments import Segments, segments
from attncc.ir import Attention, Axis, Const, Expr, Interval, W
from attncc.ir.analysis import keeps_nan, linear_factor, scaled
from attncc.ir.bounds import TILE_HI, TILE_LO, Bounds, Stripe
from attncc.ir.build import ONE as ONE_
from attncc.ir.build import TRUE, ZERO, add, mul
from attncc.ir.expr import free, substitute

TYPES = {
    "f64": "fp64", "f32": "fp32", "bf16": "bf16", "f16": "fp16", "i64": "i64", "i32": "i32", "i16": "i16", "i8": "i8",
    "u8": "u8", "bool": "i1",
}  # fmt: skip
TL_TYPES = {"f64": "tl.float64", "f32": "tl.float32", "bf16": "tl.bfloat16", "f16": "tl.float16"}


@dataclass(frozen=True)
class Schedule:
    """Decisions about a kernel file, made once. All expressions are those of `a`, whose axes of extent 1 are gone."""

    a: Attention
    bounds: Bounds
    config: TritonConfig
    folded: tuple[Axis, ...]
    points: tuple[Axis, ...]
    q: Operand
    k: Operand
    v: Operand
    d_chunks: tuple[tuple[int, int], ...]
    e_chunks: tuple[tuple[int, int], ...]
    runs: Segments
    every: Segments
    raw: Expr
    scale: float
    factor: Expr | None
    extents: dict[Expr, Expr]

    @property
    def softmax(self) -> bool:
        return self.a.normalizer == "softmax"

    @property
    def two_pass(self) -> bool:
        """The weights are needed normalised: a first pass finds the largest score and the sum, a second applies them.

        NaN times a factor is NaN, but a choice may leave the NaN of a row without keys out."""
        chosen = self.a.empty == "nan" and self.a.mask is not TRUE and not keeps_nan(self.a.weight, W)
        return self.softmax and (self.factor is None or chosen or "weights" in self.a.outputs)

    @property
    def empty(self) -> str:
        """What a row whose weights sum to zero gives. Without a mask every row sees keys, and a sum of zero means that
        all scores are minus infinity, which softmax makes NaN."""
        if self.a.sink is not None:
            return "zero" if self.a.empty == "zero" else "nan"
        return "nan" if self.a.mask is TRUE else self.a.empty

    @property
    def split(self) -> bool:
        """Whether partial results over some of the keys can be joined later."""
        awkward = self.empty == "mean" and self.factor is not _PLAIN
        return self.config.split and not self.two_pass and "weights" not in self.a.outputs and not awkward

    @property
    def listed(self) -> bool:
        """Whether the blocks to visit come as lists."""
        return self.config.lists and bool(self.runs.masked) and self.a.j.index in free(self.a.mask)

    @property
    def list_points(self) -> tuple[Axis, ...]:
        """The batch points that have lists of their own."""
        ends = [x for run in (*self.runs.masked, *self.runs.full) for x in (run.start, run.stop)]
        used = free(self.a.mask).union(*(free(x) for x in (*ends, *(r.expr for r in self.bounds.rows))))
        return tuple(x for x in self.points if x.index in used)

    @property
    def persistent(self) -> int:
        """How many programs a processor share all tiles, 0 where each tile has its own."""
        return 0 if self.split else self.config.persistent

    @property
    def descriptors(self) -> bool:
        """Whether keys and values may come through descriptors, which step along them."""
        return self.config.descriptors and self.a.j.name in self.k.strides and self.a.j.name in self.v.strides

    @property
    def group(self) -> Expr:
        """How many rows share one value of i."""
        result: Expr = ONE_
        for axis in self.folded:
            result = mul(result, axis.extent)
        return result

    @property
    def row_count(self) -> Expr:
        return mul(self.group, self.a.i.extent)

    @property
    def row_leaves(self) -> frozenset[Expr]:
        return frozenset([self.a.i.index, *(x.index for x in self.folded)])

    @property
    def ragged(self) -> bool:
        """Whether the last block of keys may reach past the keys."""
        m = self.a.j.extent
        return not (isinstance(m, Const) and int(m.value) % self.config.block_n == 0)

    @property
    def d_size(self) -> int:
        return _const(self.a.d)

    @property
    def e_size(self) -> int:
        return _const(self.a.e)

    @property
    def even(self) -> int:
        """8 or 4 where only that divides both head sizes, else 0. Rows lie at multiples of it, which Triton is told
        for loads of several elements at once: it looks for multiples of 16 alone."""
        common = math.gcd(16, self.d_size, self.e_size)
        return common if common in (4, 8) else 0

    @property
    def dot_type(self) -> str:
        """The type both factors of q . k have: their own if they agree, else float32."""
        q, k = (self.a.tensor(x.tensor).dtype for x in (self.a.q, self.a.k))
        return q if q == k else "f32"

    @property
    def value_type(self) -> str:
        v = self.a.tensor(self.a.v.tensor).dtype
        return v if v == self.dot_type else "f32"


_PLAIN = Const(1.0)


def schedule(
    a: Attention, bounds: Bounds, config: TritonConfig, *, fold: bool = True, gather: bool = True
) -> Schedule:
    """`fold` puts the rows of heads that share their keys into one tile, `gather` lets keys of stripes fill whole
    blocks. Raises ValueError for what `unsupported` names."""
    bounds = _of_runs(bounds)
    table: dict[Expr, Expr] = {x.index: ZERO for x in a.batch if x.extent is ONE_}
    if table:
        a, bounds = a.substitute(table), _bounds_at(bounds, table)
    found = operands(a)
    if found is None:
        raise ValueError("an operand's index is not affine in the axes; split its axes before emitting")
    extents: dict[Expr, Expr] = {x.index: x.extent for x in a.axes}
    extents |= {TILE_LO: a.i.extent, TILE_HI: add(a.i.extent, ONE_)}
    *together, _ = row_axes(a, bounds, lists=config.lists)
    folded = tuple(x for x in together if x.extent is not ONE_) if fold else ()
    most_rows = 0 if config.lists or not gather else _most_rows(folded, config)
    points = tuple(x for x in a.batch if x not in folded and x.extent is not ONE_)
    raw, scale = scaled(a.score) if a.normalizer == "softmax" else (a.score, 1.0)
    everything = Bounds((_whole(a),), (_whole(a),)) if a.mask is TRUE else Bounds((_whole(a),))
    q, k, v = found
    return Schedule(
        a=a, bounds=bounds, config=config, folded=folded, points=points, q=q, k=k, v=v,
        d_chunks=chunks(_const(a.d)), e_chunks=chunks(_const(a.e)),
        runs=segments(bounds, a.j.extent, config.block_n, extents, most_rows),
        every=segments(everything, a.j.extent, config.block_n, extents),
        raw=raw, scale=scale, factor=linear_factor(a.weight, W), extents=extents,
    )  # fmt: skip


def _most_rows(folded: tuple[Axis, ...], config: TritonConfig) -> int:
    """How many values of the row index a tile may hold."""
    group = math.prod(int(x.extent.value) if isinstance(x.extent, Const) else 1 for x in folded)
    return config.block_m // group + (config.block_m % group > 0) + (group > 1)


def _const(axis: Axis) -> int:
    if not isinstance(axis.extent, Const):
        raise ValueError(f"the extent of {axis.name} is not a constant")
    return int(axis.extent.value)


def _whole(a: Attention) -> Interval:
    return Interval(ZERO, a.j.extent)


def _of_runs(b: Bounds) -> Bounds:
    """`b` without what these kernels do not use: the keys that some row does not see, and the rows read for them."""
    named = set[Expr]().union(*(free(n) for x in (*b.visit, *b.full, *b.full_parts) for n in x.expressions))
    return replace(b, hidden=None, rows=tuple(r for r in b.rows if r.index in named))


def _bounds_at(b: Bounds, table: dict[Expr, Expr]) -> Bounds:
    def on(x: Expr) -> Expr:
        return substitute(x, table)

    def stripe(x: Stripe) -> Stripe:
        return Stripe(on(x.step), on(x.offset), on(x.width))

    def interval(x: Interval) -> Interval:
        first = None if x.stripe is None else stripe(x.stripe)
        return replace(x, lo=on(x.lo), hi=on(x.hi), stripe=first, finer=tuple(map(stripe, x.finer)))

    visit, full, striped = (tuple(map(interval, xs)) for xs in (b.visit, b.full, b.full_parts))
    rows = tuple(replace(r, expr=on(r.expr)) for r in b.rows)
    return replace(b, visit=visit, full=full, full_parts=striped, residue=None, rows=rows)
