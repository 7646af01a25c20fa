"""The two sides that a backward is seen from, and the frames of their kernels.

    rows   a tile of query rows goes over the keys that any of them sees:   dq, and sums of loads but those of a key
    keys   a tile of keys goes over the query rows that see any of them:    dk, dv, and sums of loads for each key

Both are an attention: the second is `AttentionGrad.by_key`, whose rows are keys and whose values are the gradient of
the output. What a tile has of its own is `first` (queries, or keys), multiplied with the blocks' keys to scores, and
`second` (the output's gradient, or values), multiplied with the blocks' values to gradients of weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from attncc.codegen.triton.config import TritonConfig
from attncc.codegen.triton.expressions import Scope
from attncc.codegen.triton.frame import Frame, Shaped, count_of
from attncc.codegen.triton.operands import Operand, operand, stride
from attncc.codegen.triton.schedule import Schedule, schedule
from attncc.ir import Access, Axis, Bounds, Const, Expr, Tensor
from attncc.ir.analysis import scaled
from attncc.ir.attention_grad import GIVEN, AttentionGrad, LoadGrad
from attncc.ir.build import ONE, ZERO
from attncc.ir.expr import loads, substitute

#: What is known of each query row before the gradients are: what its weights' gradients sum to, and two numbers that
#: make weights of scores, p = 2^((score - peak) c - rest).
STATISTICS = ("delta", "peak", "rest")


@dataclass(frozen=True)
class Side:
    """One of the two sides. `loads` are the numbers of the loads whose sums are made here."""

    g: AttentionGrad
    p: Schedule
    by_key: bool
    loads: tuple[int, ...]

    @property
    def operands(self) -> tuple[str, ...]:
        """The operands whose gradients are made here."""
        return tuple(n for n in self.g.operands if (n == "q") != self.by_key)

    @property
    def queries(self) -> Axis:
        return self.p.a.j if self.by_key else self.p.a.i

    @cached_property
    def second(self) -> Operand:
        a = self.p.a
        access = a.v if not self.by_key else self.g.attention.v
        if not self.by_key:
            access = Access(self.g.by_key.v.tensor, tuple(x.index for x in (*a.batch, a.i, a.e)))
        found = operand(Access(access.tensor, tuple(substitute(x, self.ones) for x in access.index)), a.axes)
        assert found is not None  # as `unsupported_gradient` would have said
        return found

    @cached_property
    def ones(self) -> dict[Expr, Expr]:
        """What the indices of axes of extent one are."""
        return {x.index: ZERO for x in self.p.a.batch if x.extent is ONE}

    @cached_property
    def slope(self) -> tuple[Expr, float]:
        """d score / d s as an expression and a factor that is left to the end."""
        x = self.here(self.g.by_score)
        return (Const(1.0), float(x.value)) if isinstance(x, Const) else scaled(x)

    @cached_property
    def factor(self) -> Expr:
        """d weight / d w."""
        return self.here(self.g.by_weight)

    def here(self, x: Expr) -> Expr:
        return substitute(x, self.ones)

    @property
    def summed(self) -> tuple[tuple[int, LoadGrad, Expr], ...]:
        """The loads that are summed here, with their slopes."""
        return tuple((n, self.g.loads[n], self.here(self.g.loads[n].slope)) for n in self.loads)

    @property
    def by_distance(self) -> bool:
        return any(x.over == "j - i" for _, x, _ in self.summed)

    @property
    def needed(self) -> bool:
        return bool(self.operands or self.loads)

    @property
    def needs_slopes(self) -> bool:
        """Whether more than the weights themselves is needed."""
        return self.operands != ("v",) or bool(self.loads)

    @property
    def roots(self) -> list[Expr]:
        return [self.slope[0], self.factor, *(x for _, _, x in self.summed)]

    @property
    def held(self) -> tuple[Axis, ...]:
        """The batch axes whose points have tiles of their own."""
        own = self.g.held if self.by_key else self.p.a.batch
        return tuple(x for x in self.p.points if x in own)

    @property
    def members(self) -> tuple[Axis, ...]:
        """The batch axes that a tile goes through, adding up."""
        return tuple(x for x in self.p.points if x not in self.held)


def sides(
    g: AttentionGrad, rows: Bounds, keys: Bounds, by_rows: TritonConfig, by_keys: TritonConfig
) -> tuple[Side, Side]:
    """Both sides of `g`; `rows` are loop bounds of its attention, `keys` those of `g.by_key`."""
    a = replace(g.attention, tensors=g.by_key.tensors)
    of_rows = tuple(n for n, x in enumerate(g.loads) if x.over != "j")
    of_keys = tuple(n for n, x in enumerate(g.loads) if x.over == "j")
    apart = any(x.over == "j - i" for x in g.loads)  # the rows of a tile lie side by side, its keys too
    one = schedule(a, rows, by_rows, fold=not apart, gather=not apart)
    other = schedule(g.by_key, keys, by_keys, fold=False)
    return Side(g, one, False, of_rows), Side(g, other, True, of_keys)


class GradientFrame(Frame):
    """A kernel of a side: programs have tiles of the points in `side.held`. `shared` programs a point take its tiles in
    turn."""

    def __init__(
        self, side: Side, outputs: Mapping[str, Shaped], *, more: Sequence[Expr] = (), reads: Sequence[str] = (),
        shared: bool = False,
    ) -> None:  # fmt: skip
        self.side, self.shared, self.placed = side, shared, 0
        self._roots, self._reads = more, reads
        one = statistics(side)
        super().__init__(side.p, "BLOCK_M", outputs=one | dict(outputs), more=more)

    def tensors(self) -> tuple[Tensor, ...]:
        """Those that this kernel reads; `_reads` are names of what a backward is given."""
        p = self.p
        roots = [p.a.mask, p.raw, *self._roots, *(r.expr for r in p.bounds.rows), *bound_ends(p)]
        read = {x.tensor for x in loads(*roots)} | {p.q.tensor, p.k.tensor, p.v.tensor, self.side.second.tensor}
        read |= {self.given(n) for n in self._reads}
        return tuple(t for t in p.a.tensors if t.name in read)

    @property
    def points(self) -> tuple[Axis, ...]:
        return self.side.held

    def _in_order(self, number: str) -> str:
        return number if self.side.by_key else super()._in_order(number)

    def place(self) -> None:
        if self.shared:
            self._share()
        else:
            super().place()
        self.placed = len(self.scope.lines)

    def _share(self) -> None:
        self.line(f"rows = {self.scope.text(self.p.row_count)}")
        self.line(f"tiles = tl.cdiv(rows, {self.rows})")
        if self.points:
            self.line("point = tl.program_id(1)")
        self.split_up("point", self.points)

    def row_bounds(self) -> None:
        if self.scope.around is not None or not self.side.members:  # else they may differ from member to member
            super().row_bounds()

    def given(self, name: str) -> str:
        """The name of a tensor that a backward is given."""
        return self.p.a.tensors[len(self.side.g.attention.tensors) + GIVEN.index(name)].name

    def of_queries(self, tensor: str, scope: Scope) -> str:
        """Where the numbers of query rows lie in a tensor or an output of the shape (*batch, row, ...)."""
        a = self.p.a
        axes = (*a.batch, self.side.queries)
        like = f".{STATISTICS[0]}" if tensor.startswith(".") else tensor  # statistics lie alike
        terms = [
            (x.index, stride(like, n)) for n, x in enumerate(axes) if x.extent is not ONE or x is self.side.queries
        ]
        return " + ".join(t for t in (self.pointer[tensor], self.offset(scope, terms)) if t)

    def written_at(self, output: str, axes: Sequence[Axis], row: Axis | None) -> str:
        """Where this program's part of an output of the shape (*axes, row, ...) starts."""
        whole = (*axes, row) if row is not None else axes
        terms = [(x.index, stride(f".{output}", n)) for n, x in enumerate(whole) if x.extent is not ONE or x is row]
        return " + ".join(t for t in (self.pointer[f".{output}"], self.offset(self.scope, terms)) if t)

    def enter_members(self) -> Scope:
        """Begin the loop over the members of the group; the scope around it."""
        outer = self.scope
        if self.side.members:
            self.scope = outer.inner()
            self.split_up("member", self.side.members)
            self.row_bounds()
        return outer

    def leave_members(self, outer: Scope) -> None:
        if self.scope is outer:
            return
        count = outer.text(count_of(self.side.members))
        outer.lines += [f"for member in range(0, {count}):", *(f"    {x}" for x in self.scope.lines)]
        self.scope = outer


def statistics(side: Side) -> dict[str, Shaped]:
    """The statistics of query rows; the strides of the first are those of all."""
    shape = tuple(x.extent for x in (*side.p.a.batch, side.queries))
    return {name: ("f32", () if n else shape) for n, name in enumerate(STATISTICS)}


def bound_ends(p: Schedule) -> list[Expr]:
    """What the loops of a schedule begin and end with."""
    ends = [x for run in (*p.runs.masked, *p.runs.full) for x in (run.start, run.stop)]
    return [*ends, *(b for x in p.runs.striped for b in (x.lo, x.hi, x.base, x.width, x.slots))]
