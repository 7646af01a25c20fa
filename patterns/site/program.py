"""From the sites that take one place in a graph to a program: their attentions, and what joins and arranges results.

    terms of one product                 merge by sum
    several values of one softmax        a correction for each (its columns, a factor) and a rearrangement
    pieces of one softmax                merge by softmax, each piece's share of its rows put back beside its output
    sums over heads, order, shape        a rearrangement
    sums of exponentials of the rows     a correction (their base, floor and dtype) and a rearrangement
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import fx

from attncc.ir import Axis, Const, Correct, Expr, Node, Program, Rearrange, Size, Step, Tensor, verify_program
from attncc.ir.affine import expr, poly
from attncc.ir.build import ONE, add, const, maximum, mul
from attncc.ir.evaluate import NAME_OF
from attncc.ir.expr import Load, free, substitute
from attncc.ir.merge import merge_of
from attncc.ir.node import kind_of
from attncc.ir.rearrange import Dims
from attncc.patterns.site.assemble import Columns, Lifted
from attncc.patterns.site.parts import Lse, Rows
from attncc.patterns.site.reading import Facts, noticed, order_in_memory


@dataclass(frozen=True)
class SiteProgram:
    """`program` with its place in the graph: the nodes that its inputs are, the dtypes they are cast to and whether
    their gradients are stopped, what its sizes are over the graph's symbols, which of these are products of others, and
    the nodes whose values it gives. `in_pieces`: these are the products of one softmax, one for each site."""

    program: Program
    inputs: tuple[fx.Node, ...]
    dtypes: tuple[torch.dtype, ...]
    stopped: tuple[bool, ...]
    sizes: tuple[Expr, ...]
    factors: tuple[tuple[Size, Expr], ...]
    outputs: tuple[fx.Node, ...]
    in_pieces: bool


def program_of(sites: Sequence[Lifted], facts: Facts) -> SiteProgram:
    """The program of sites that one node of the graph is the sum of, or that are the pieces of one softmax."""
    b = _Builder(facts)
    outs: list[str] = []
    places: list[int] = []
    for site in sites:
        places.append(len(b.steps))
        outs.append(b.attention(site))
    if sites[0].piece is not None:
        shares = _shares(b, sites, places)
        for site, out, share in zip(sites, outs, shares, strict=True):
            b.give(site.node, b.laid_out(b.arranged(site, b.weighed(site, out, share)), site.node))
    elif sites[0].columns:
        for part in sites[0].columns:
            b.give(part.node, b.laid_out(b.part(sites[0], outs[0], part), part.node))
    else:
        arranged = [b.arranged(site, out) for site, out in zip(sites, outs, strict=True)]
        b.give(sites[0].node, b.laid_out(b.summed(arranged), sites[0].node))
        if sites[0].lse is not None:
            b.give(sites[0].lse.node, b.row_sums(sites[0], sites[0].lse, places[0]))
    return b.finish(in_pieces=sites[0].piece is not None or bool(sites[0].columns))


class _Builder:
    """Grows a program over the symbols of a graph: every expression that is no constant becomes a size of its own."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.steps: list[Step] = []
        self.values: dict[str, Tensor] = {}
        self._sizes: dict[Expr, Size] = {}
        self._spelled: dict[Size, Expr] = {}
        self._inputs: dict[tuple[fx.Node, torch.dtype, bool], str] = {}
        self._factors: dict[Size, Expr] = {}
        self._given: dict[fx.Node, str] = {}

    def size(self, x: Expr) -> Const | Size:
        """The program's name for an integer over the graph's symbols."""
        known = expr(poly(x))
        if isinstance(known, Const):
            return known
        found = self._sizes.setdefault(known, Size(f"p{len(self._sizes)}"))
        self._spelled.setdefault(found, x)  # as the graph has it, where it can be found
        return found

    def shape(self, n: fx.Node) -> tuple[Expr, ...]:
        return tuple(self.size(x) for x in self.facts.shape(n))

    def step(self, node: Node, arguments: Sequence[str], results: Sequence[str] = ()) -> tuple[str, ...]:
        """The names of what a node gives, whose sizes are those of the program."""
        names = tuple(results) or tuple(f"{t.name}_{len(self.steps)}" for t in kind_of(node).gives(node))
        made = Step(names, node, tuple(arguments), node.sizes)
        self._add(made)
        return names

    def _add(self, made: Step) -> None:
        self.steps.append(made)
        self.values |= {t.name: t for t in made.given()}

    def attention(self, site: Lifted) -> str:
        """The name of a site's output."""
        a = site.attention
        sizes = tuple(self.size(x) for x in site.sizes)
        table: dict[Expr, Expr] = dict(zip(a.sizes, sizes, strict=True))
        self._factors |= {
            own: substitute(x, table) for s, x in site.factors.items() if isinstance(own := table[s], Size)
        }
        arguments: list[str] = []
        for n, dtype, t in zip(site.tensors, site.dtypes, a.tensors, strict=True):
            key = n, dtype, n in site.stopped
            known = self._inputs.get(key)
            if known is None:
                known = self._inputs[key] = f"x{len(self._inputs)}"
                self.values[known] = Tensor(known, NAME_OF[dtype], tuple(substitute(x, table) for x in t.shape))
            arguments.append(known)
        names = tuple(f"{t.name}_{len(self.steps)}" for t in kind_of(a).gives(a))
        self._add(Step(names, a, tuple(arguments), sizes))
        return names[a.outputs.index("out")]

    def output(self, place: int, name: str) -> str:
        """A value that the attention at a place among the steps gives."""
        step = self.steps[place]
        return step.results[[t.name for t in kind_of(step.node).gives(step.node)].index(name)]

    def axes(self, site: Lifted) -> tuple[Axis, ...]:
        """Those of the site's output, (*batch, i, e), in sizes of the program."""
        table = dict(zip(site.attention.sizes, site.sizes, strict=True))

        def size(x: Const | Size) -> Const | Size:
            return self.size(table[x]) if isinstance(x, Size) else x

        return tuple(Axis(x.name, size(x.extent)) for x in site.attention.out_axes)

    def rearranged(
        self, x: str, axes: Sequence[Axis], source: Dims, target: Dims, shape: Sequence[Expr] | None = None,
        memory: tuple[int, ...] = (),
    ) -> str:  # fmt: skip
        """A value rearranged, and in `shape` where that is given."""
        view: tuple[Expr, ...] = ()
        if shape is not None:
            extents = [(n, next(a.extent for a in axes if a.name == n)) for g in target for n in g]
            found = _groups(extents, shape)
            target, view = (target, tuple(shape)) if found is None else (found, ())
        if source == target and not memory and not view:
            return x
        given = Tensor("x", self.values[x].dtype, self.values[x].shape)
        sizes = _used((*(a.extent for a in axes), *given.shape, *view))
        (name,) = self.step(Rearrange(sizes, tuple(axes), (given,), source, target, memory, view), (x,))
        return name

    def arranged(self, site: Lifted, out: str) -> str:
        """A site's output in the shape of the node that it gives: summed, permuted and viewed."""
        axes = self.axes(site)
        kept = [x for n, x in enumerate(axes) if n not in site.summed]
        target = tuple((kept[n].name,) for n in site.order)
        return self.rearranged(out, axes, tuple((x.name,) for x in axes), target, self.shape(site.node))

    def part(self, site: Lifted, out: str, columns: Columns) -> str:
        """What some columns of a site's output are for, in the shape of its node."""
        a, given = site.attention, self.values[out]
        own = replace(site, attention=replace(a, e=replace(a.e, extent=const(columns.count))), node=columns.node,
                      summed=columns.summed, order=columns.order)  # fmt: skip
        axes = self.axes(own)
        at = (*(x.index for x in axes[:-1]), add(axes[-1].index, const(columns.first)))
        value: Expr = Load("x", at, "float")
        value = value if columns.factor == 1.0 else mul(value, const(columns.factor))
        tensor = Tensor("x", given.dtype, given.shape)
        made = Correct(_used((*(x.extent for x in axes), *given.shape)), axes, (tensor,), value, given.dtype)
        (x,) = self.step(made, (out,))
        return self.arranged(own, x)

    def summed(self, parts: Sequence[str]) -> str:
        if len(parts) == 1:
            return parts[0]
        first = self.values[parts[0]]
        columns = _axes_of(first)
        merge = merge_of(_used(first.shape), (), columns, len(parts), how="sum", dtype=first.dtype)
        return self.step(merge, parts)[0]

    def laid_out(self, x: str, shadow: fx.Node) -> str:
        """A value in memory as the model's own is, where somebody would notice."""
        if not noticed(self.facts, shadow):
            return x
        axes = _axes_of(self.values[x])
        dims = tuple((a.name,) for a in axes)
        return self.rearranged(x, axes, dims, dims, memory=order_in_memory(self.facts.value(shadow)))

    def row_sums(self, site: Lifted, lse: Lse, place: int) -> str:
        """The logarithm of the sums of exponentials as the graph has it."""
        x = self.output(place, "lse")
        given = self.values[x]
        dtype = NAME_OF[self.facts.dtype(lse.node)]
        axes = self.axes(site)[:-1]
        value: Expr = Load("x", tuple(a.index for a in axes), "float")
        value = mul(value, const(math.log2(math.e))) if lse.base_two else value
        value = value if site.floor is None else maximum(value, const(site.floor))
        if not isinstance(value, Load) or dtype != given.dtype:
            own = Tensor("x", given.dtype, given.shape)
            (x,) = self.step(Correct(_used(given.shape), axes, (own,), value, dtype), (x,))
        digits, source, order = self._rows(site, lse.rows)
        shape = self.shape(lse.node)
        return self.rearranged(x, digits, source, order, shape, tuple(range(len(shape))))

    def _rows(self, site: Lifted, rows: Rows) -> tuple[tuple[Axis, ...], Dims, Dims]:
        """The axes that the rows (*batch, i) of a site are counted through by, those in groups of its dimensions, and
        in the order of the model."""
        own = self.axes(site)[:-1]
        if not rows.order:
            return own, tuple((x.name,) for x in own), tuple((x.name,) for x in own)
        digits = tuple(Axis(f"r{n}", self.size(x)) for n, x in enumerate(rows.shape))
        extents = [(x.name, rows.shape[n]) for n, x in enumerate(digits)]
        table = dict(zip(site.attention.sizes, site.sizes, strict=True))
        source = _groups(extents, [substitute(x.extent, {**table}) for x in site.attention.out_axes[:-1]])
        assert source is not None  # the digits of each axis were found by their product
        return digits, source, tuple((f"r{n}",) for n in rows.order)

    def flat_rows(self, site: Lifted, rows: Rows, x: str, count: Const | Size) -> str:
        """A value over (*batch, i) as one dimension of `count` rows, in the order of the model."""
        digits, source, order = self._rows(site, rows)
        return self.rearranged(x, digits, source, order, (count,))

    def from_flat_rows(self, site: Lifted, rows: Rows, x: str, count: Const | Size) -> str:
        """The inverse of `flat_rows`."""
        digits, source, order = self._rows(site, rows)
        extents = {a.name: a.extent for a in digits}
        split = self.rearranged(x, (Axis("r", count),), (("r",),), (("r",),), [extents[n] for (n,) in order])
        return self.rearranged(split, digits, order, source, tuple(a.extent for a in self.axes(site)[:-1]))

    def weighed(self, site: Lifted, out: str, share: str) -> str:
        """A site's output times what it counts for, over its rows."""
        axes, given = self.axes(site), self.values[out]
        tensors = (Tensor("x", given.dtype, given.shape), Tensor("u", self.values[share].dtype, given.shape[:-1]))
        at = tuple(a.index for a in axes)
        value = mul(Load("x", at, "float"), Load("u", at[:-1], "float"))
        return self.step(Correct(_used(given.shape), axes, tensors, value, given.dtype), (out, share))[0]

    def give(self, n: fx.Node, x: str) -> None:
        self._given[n] = x

    def finish(self, *, in_pieces: bool) -> SiteProgram:
        p = Program(
            tuple(self._sizes.values()), tuple(self.values[x] for x in self._inputs.values()), tuple(self.steps),
            tuple(self._given.values()),
        )  # fmt: skip
        nodes, dtypes, stopped = zip(*self._inputs, strict=True)
        return SiteProgram(
            verify_program(p), nodes, dtypes, stopped, tuple(self._spelled[s] for s in self._sizes.values()),
            tuple(self._factors.items()), tuple(self._given), in_pieces,
        )  # fmt: skip


def _shares(b: _Builder, sites: Sequence[Lifted], places: Sequence[int]) -> list[str]:
    """What each piece of a softmax counts for in its rows."""
    pieces = [site.piece for site in sites if site.piece is not None]
    count = b.size(_product(sites[0]))
    flat = [
        b.flat_rows(site, piece.rows, b.output(place, "lse"), count)
        for site, piece, place in zip(sites, pieces, places, strict=True)
    ]
    empty = tuple(piece.share for piece in pieces if piece.share is not None)
    merge = merge_of(
        _used((count,)), (Axis("r", count),), (), len(sites), outputs=("share",), empty=empty,
        weigher=b.values[flat[0]].dtype,
    )  # fmt: skip
    found = b.step(merge, flat)
    return [
        b.from_flat_rows(site, piece.rows, x, count) for site, piece, x in zip(sites, pieces, found, strict=True)
    ]


def _product(site: Lifted) -> Expr:
    """How many rows a site has."""
    table = dict(zip(site.attention.sizes, site.sizes, strict=True))
    return reduce(mul, (substitute(x.extent, {**table}) for x in site.attention.out_axes[:-1]), ONE)


def _axes_of(t: Tensor) -> tuple[Axis, ...]:
    """An axis per dimension of a tensor whose extents are constants or sizes."""
    return tuple(Axis(f"a{n}", x) for n, x in enumerate(t.shape) if isinstance(x, Const | Size))


def _used(extents: Sequence[Expr]) -> tuple[Size, ...]:
    found = {s for x in extents for s in free(x) if isinstance(s, Size)}
    return tuple(sorted(found, key=lambda s: s.name))


def _groups(axes: Sequence[tuple[str, Expr]], shape: Sequence[Expr]) -> Dims | None:
    """The axes in runs whose products are the extents of `shape`; None where they are no such runs."""
    found: list[tuple[str, ...]] = []
    at = 0
    for n in shape:
        run = 0
        while poly(reduce(mul, (x for _, x in axes[at : at + run]), ONE)) != poly(n):
            run += 1
            if at + run > len(axes):
                return None
        found.append(tuple(name for name, _ in axes[at : at + run]))
        at += run
    if any(x is not ONE for _, x in axes[at:]) or (at < len(axes) and not found):
        return None
    if at < len(axes):
        found[-1] = (*found[-1], *(name for name, _ in axes[at:]))
    return tuple(found)
