"""Boxes: the most that a product with any key of a page can be, from the least and largest component of its keys.

    least(b.., p, d)  = min of k(b.., j, d) over the j of page p that are seen      largest: max; 0 where there are none
    out[b.., i, p]    = sum_d max( q(b.., i, d) least(b.., p, d),  q(b.., i, d) largest(b.., p, d) )

The page of j is (j + shift(b..)) // size. Pages are chosen by it at decode (Tang et al., 2024: Quest, arXiv
2406.10774). As least and largest depend on the keys alone, they can be kept beside a cache from call to call
(`attncc.runtime.kept`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from attncc.ir.analysis import blocks_of
from attncc.ir.attention import Access, Axis, Tensor, fresh_name
from attncc.ir.build import ONE, TRUE, ZERO, add, and_, const, le, lt, maximum, minimum, mul, sub
from attncc.ir.evaluate import Evaluator
from attncc.ir.expr import Const, Expr, Load, Size, mentions, substitute
from attncc.ir.interpret import Result, extent, index_grid, size_table
from attncc.ir.lines import Lines, Writer, declared_lines, tensor_lines
from attncc.ir.reduce import Reduce, interpret_reduce
from attncc.ir.text import ParseError
from attncc.ir.verify import check_access, check_declarations, check_scope, require


@dataclass(frozen=True)
class Boxes:
    """Shapes: `out` is f32[*batch, i, p]; `p` are the pages, `j` the keys. `q` is a float over the batch, i and d; `k`
    is read over the batch, j and d; `seen` is a boolean over the batch and j, `shift` an integer over the batch; all of
    them over the sizes and loads too. `size`: keys of a page."""

    sizes: tuple[Size, ...]
    batch: tuple[Axis, ...]
    i: Axis
    p: Axis
    j: Axis
    d: Axis
    tensors: tuple[Tensor, ...]
    q: Expr
    k: Access
    size: int
    shift: Expr = ZERO
    seen: Expr = TRUE

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Those of the output."""
        return (*self.batch, self.i, self.p)

    @property
    def gives(self) -> tuple[Tensor, ...]:
        return (Tensor("out", "f32", tuple(x.extent for x in self.axes)),)

    def expressions(self) -> Iterator[Expr]:
        yield from (self.q, *self.k.index, self.shift, self.seen)


def verify_boxes(a: Boxes) -> Boxes:
    """`a` itself if it is well formed. Raises VerifyError otherwise."""
    tensors = check_declarations((*a.axes, a.j, a.d), a.sizes, a.tensors, ())
    batch = frozenset[Expr](a.sizes) | frozenset[Expr](x.index for x in a.batch)
    require(a.size > 0, f"a page holds at least one key, not {a.size}")
    for name, x, kind, allowed in (
        ("q", a.q, "float", batch | {a.i.index, a.d.index}), ("shift", a.shift, "int", batch),
        ("seen", a.seen, "bool", batch | {a.j.index}),
    ):  # fmt: skip
        require(x.kind == kind, f"{name} is a {x.kind}, not a {kind}")
        check_scope(name, x, tensors, allowed)
    check_access("k", a.k, tensors, batch | {a.j.index, a.d.index})
    return a


def interpret_boxes(
    a: Boxes, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int] = (), *, compute: torch.dtype | None = None
) -> Result:
    """`out`, computed in `compute`, float32 where it is not given. What is chosen by it has no gradient."""
    read = {name: x.detach() for name, x in tensors.items()}
    lead, k, shift, seen = over_keys(a)
    r = Axis(fresh_name("r", {x.name for x in (*a.axes, a.j, a.d, *a.sizes, *a.tensors)}), Const(a.size))
    at = sub(add(mul(a.p.index, Const(a.size)), r.index), shift)
    there = and_(le(ZERO, at), lt(at, a.j.extent))
    at = minimum(maximum(at, ZERO), sub(a.j.extent, ONE))
    value = Load(k.tensor, tuple(substitute(x, {a.j.index: at}) for x in k.index), "float")
    there = and_(there, substitute(seen, {a.j.index: at}))
    nodes = (Reduce(a.sizes, (*lead, a.p, a.d), r, a.tensors, op, value, there, const(0.0)) for op in ("min", "max"))
    least, largest = (interpret_reduce(n, read, sizes, compute=compute)["out"] for n in nodes)
    return {"out": bounds(queries(a, read, sizes, compute), least, largest)}


def queries(
    a: Boxes, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int] = (), compute: torch.dtype | None = None
) -> torch.Tensor:
    """(*batch, i, d)"""
    table, axes = size_table(a, sizes), (*a.batch, a.i, a.d)
    wide, device = compute or torch.float32, next(iter(tensors.values())).device
    ev = Evaluator(index_grid(axes, table, device), tensors, wide, checked=True)
    return ev(a.q).to(wide).expand([extent(x.extent, table) for x in axes])


def pages(
    a: Boxes, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """`seen` as bool (*lead, j) and `shift` as i64 (*lead), of extent 1 where they do not depend on an axis."""
    lead, _, shift, seen = over_keys(a)
    table, device = size_table(a, sizes), next(iter(tensors.values())).device

    def over(x: Expr, axes: Sequence[Axis]) -> torch.Tensor:
        found = Evaluator(index_grid(axes, table, device), tensors, torch.float32, checked=True)(x)
        return found.reshape([1] * (len(axes) - found.dim()) + list(found.shape))

    visible = over(seen, (*lead, a.j))
    visible = visible.expand([*visible.shape[:-1], extent(a.j.extent, table)])
    return visible.to(torch.bool).contiguous(), over(shift, lead).to(torch.int64)


def bounds(q: torch.Tensor, least: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """(*batch, i, p) from q (*batch, i, d) and boxes (*lead, p, d), of which heads of a group have one in common."""
    folded = q.reshape(*least.shape[:-2], -1, q.shape[-1])
    out = folded.clamp_min(0) @ largest.mT + folded.clamp_max(0) @ least.mT
    return out.reshape(*q.shape[:-1], least.shape[-2])


def over_keys(a: Boxes) -> tuple[tuple[Axis, ...], Access, Expr, Expr]:
    """The batch axes over which keys differ, with `k`, `shift` and `seen` over those: heads of a group have one box."""
    if not a.batch or not isinstance(a.batch[-1].extent, Const):
        return a.batch, a.k, a.shift, a.seen
    *outer, last = a.batch
    heads = int(last.extent.value)  # type: ignore[union-attr]
    own = (*a.k.index, a.shift, a.seen)
    found = [blocks_of(x, last.index) if mentions(x, last.index) else (x, heads) for x in own]
    known = [x for x in found if x is not None]
    group = min(x[1] for x in known)
    if len(known) < len(own) or any(x[1] not in (group, heads) for x in known) or heads % group:
        return a.batch, a.k, a.shift, a.seen
    *index, shift, seen = (x[0] for x in known)
    return (*outer, Axis(last.name, Const(heads // group))), Access(a.k.tensor, tuple(index)), shift, seen


def order_of(a: Boxes) -> tuple[int, ...] | None:
    """The dimensions of the tensor of keys in the order (*lead, j, d), -1 for one of extent 1 that it lacks; it is read
    at 0 of the others. None where it is read otherwise, or heads have several axes."""
    lead, k, *_ = over_keys(a)
    single = {x.index for x in lead if x.extent is ONE} - set(k.index)
    wanted = [*(x.index for x in lead), a.j.index, a.d.index]
    rest = [n for n, x in enumerate(k.index) if isinstance(x, Const) and x.value == 0]
    own = [x for x in wanted if x not in single]
    if len(lead) > 2 or len(rest) + len(own) != len(k.index) or any(k.index.count(x) != 1 for x in own):
        return None
    return tuple(-1 if x in single else k.index.index(x) for x in wanted)


def print_boxes(a: Boxes) -> str:
    """The canonical text of `a`: `parse_boxes(print_boxes(a)) == a`."""
    axes = (a.i, a.p, a.j, a.d)
    writer = Writer((x.name for x in (*a.batch, *axes, *a.sizes, *a.tensors)), a.expressions())
    lines = ["boxes", *declared_lines(a.sizes, a.batch, axes), *tensor_lines(a.tensors), *writer.lets]
    lines += [f"q      {writer.show(a.q)}", f"k      {writer.access(a.k)}"]
    lines += [f"pages  {a.size}", f"shift  {writer.show(a.shift)}", f"seen   {writer.show(a.seen)}"]
    return "\n".join(lines) + "\n"


def parse_boxes(text: str) -> Boxes:
    """The node that `text` describes. Raises ParseError on anything that is not canonical."""
    lines = Lines(text, "boxes", axes="ipjd")
    i, p, j, d = lines.axes["axis"]
    q, k, size = lines.expr(lines.take("q")), lines.access("k"), lines.take("pages")
    if not size.isdecimal():
        raise ParseError(f"a page holds a number of keys, not {size!r}")
    shift, seen = (lines.expr(lines.take(word)) for word in ("shift", "seen"))
    result = Boxes(lines.sizes, lines.axes["batch"], i, p, j, d, tuple(lines.tensors), q, k, int(size), shift, seen)
    lines.finish()
    return result
