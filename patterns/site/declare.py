"""Canonical names for what a linear attention mentions: tensors, indices, sizes."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from attncc.ir.affine import simplify
from attncc.ir.attention import Access, Axis, Tensor
from attncc.ir.evaluate import NAME_OF
from attncc.ir.expr import Const, Expr, Index, Load, Size, free, rewrite, substitute
from attncc.ir.linear import Linear
from attncc.patterns.site.reading import Facts, Point


class Declared:
    """Collects the tensors that a node reads, in the order in which they are met."""

    def __init__(self, f: Facts, extents: dict[Expr, Expr], names: dict[Expr, Index]) -> None:
        self.f, self.extents, self.names = f, extents, dict[Expr, Expr](names)
        self.held: dict[fx.Node, str] = {}
        self.compound: dict[Expr, Size] = {}

    def access(self, name: str, n: fx.Node, at: Point) -> Access:
        return Access(self._tensor(n, name), tuple(self.expr(x) for x in at))

    def expr(self, x: Expr) -> Expr:
        def rule(y: Expr) -> Expr | None:
            if isinstance(y, Load):
                return Load(self._tensor(self.f.by_name[y.tensor], ""), y.index, y.kind)
            return self.names.get(y)

        return rewrite(simplify(x, self.extents), rule)

    def extent(self, x: Expr) -> Const | Size:
        return x if isinstance(x, Const | Size) else self.compound.setdefault(x, Size(f"m{len(self.compound)}"))

    def close(self, a: Linear) -> tuple[Linear, tuple[Expr, ...]]:
        """`a` with its tensors declared and its sizes named n0, n1, ... as they appear, and what each of them is."""
        tensors = tuple(
            Tensor(name, NAME_OF.get(self.f.dtype(n), str(self.f.dtype(n))), self.f.shape(n))
            for n, name in self.held.items()
        )
        used: dict[Expr, None] = {}
        for x in (*(axis.extent for axis in a.axes), *(s for t in tensors for s in t.shape), *a.expressions()):
            used |= {s: None for s in sorted(free(x), key=repr) if isinstance(s, Size)}
        table: dict[Expr, Expr] = {s: Size(f"n{at}") for at, s in enumerate(used)}

        def on(x: Expr) -> Expr:
            return substitute(x, table)

        def axis(x: Axis) -> Axis:
            extent = on(x.extent)
            assert isinstance(extent, Const | Size)
            return Axis(x.name, extent)

        def access(x: Access) -> Access:
            return Access(x.tensor, tuple(on(i) for i in x.index))

        whole = {size: x for x, size in self.compound.items()}
        return replace(
            a, sizes=tuple(s for s in table.values() if isinstance(s, Size)), batch=tuple(axis(x) for x in a.batch),
            i=axis(a.i), j=axis(a.j), d=axis(a.d), e=axis(a.e),
            tensors=tuple(Tensor(t.name, t.dtype, tuple(on(s) for s in t.shape)) for t in tensors),
            q=access(a.q), k=access(a.k), v=access(a.v), phi_q=on(a.phi_q), phi_k=on(a.phi_k), decay=on(a.decay),
            rate=on(a.rate), over=None if a.over is None else on(a.over),
            state=None if a.state is None else access(a.state),
        ), tuple(whole.get(s, s) for s in used if isinstance(s, Size))  # fmt: skip

    def _tensor(self, n: fx.Node, name: str) -> str:
        known = self.held.get(n)
        if known is None:
            count = sum(x.startswith("t") for x in self.held.values())
            known = self.held[n] = name or f"t{count}"
        return known
