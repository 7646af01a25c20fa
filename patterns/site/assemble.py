"""The last step of lifting: canonical names, declared tensors and sizes, and the place of the output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import fx

from attncc.ir.affine import simplify
from attncc.ir.attention import Access, Attention, Axis, Tensor
from attncc.ir.build import NEG_INF, ONE, TRUE, ZERO, and_, lt, not_, or_
from attncc.ir.evaluate import NAME_OF
from attncc.ir.expr import Const, Expr, Index, Load, Op, Size, free, rewrite, substitute
from attncc.ir.reasons import because
from attncc.ir.verify import verify
from attncc.patterns.site.flow import settled
from attncc.patterns.site.masks import Masked, hides_by_score, split_mask
from attncc.patterns.site.materialised import Source
from attncc.patterns.site.parts import Lse, Parts, Rows
from attncc.patterns.site.reading import Reach, Unreadable, contraction, hint, noticed, order_in_memory


@dataclass(frozen=True)
class Piece:
    """An attention over some columns of the softmax of `anchor`, `keys` of them, to be merged with the others by the
    sums of their rows. `rows` says how those lie in the softmax. `share` is what the piece counts for in a row that
    sees no key in any of them."""

    anchor: fx.Node
    rows: Rows
    keys: Expr
    share: float | None = None


@dataclass(frozen=True)
class Columns:
    """Some columns of an attention's values, `count` from `first` on: what these give, times `factor`, summed over the
    axes `summed`, permuted by `order` and viewed in its shape, is the value of `node`."""

    node: fx.Node
    first: int
    count: int
    factor: float
    summed: tuple[int, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class Lifted:
    """An attention found in a graph: `node` computes it and can be replaced.

    `tensors` are the graph's nodes for the IR's tensors, in order, to be cast to `dtypes`; `sizes` the expressions,
    over the graph's symbols, of its sizes; `factors` says which sizes are products of others. The IR's output
    (*batch, i, e), permuted by `order` and viewed in the shape of `node`, is its value. `other_users` are users of the
    weights other than the product with the values. `lse` says where the model has the logarithm of the sums of
    exponentials, if it uses them; a row that sees no key then has `floor`, where the model's masks are finite. Axes of
    the output that are `summed` are summed over first. Several sites with one `node` add up to it. No gradient flows
    into the tensors that are `stopped`. Where there are `columns`, they say what the output is for, and not `order`."""

    attention: Attention
    node: fx.Node
    anchor: fx.Node
    tensors: tuple[fx.Node, ...]
    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[Expr, ...]
    factors: dict[Size, Expr]
    order: tuple[int, ...]
    other_users: tuple[fx.Node, ...] = ()
    lse: Lse | None = None
    summed: tuple[int, ...] = ()
    floor: float | None = None
    piece: Piece | None = None
    stopped: frozenset[fx.Node] = frozenset()
    columns: tuple[Columns, ...] = ()

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The nodes whose values it gives."""
        beside = [x.node for x in self.columns if x.node is not self.node]
        return (self.node, *beside) if self.lse is None else (self.node, self.lse.node)


def assembled(
    p: Parts, node: fx.Node, anchor: fx.Node, other_users: tuple[fx.Node, ...] = (), lse: Lse | None = None
) -> Lifted:
    """The verified attention that `p` describes, with its place in the graph. Raises Unreadable and VerifyError."""
    p, flow = settled(p, node, lse)
    own = [x for x in p.out if x is not ZERO and x is not p.i and x is not p.e]
    batch = [*own, *p.summed]
    names = {x: Index(f"b{n}") for n, x in enumerate(batch)}
    names |= {p.j: Index("j"), p.d: Index("d")}
    names |= {x: Index(n) for x, n in ((p.i, "i"), (p.e, "e")) if x is not None}
    wants_grad = partial(flow.of, by_name=p.facts.by_name)
    masked = split_mask(p.score, half=p.half, infinite_empty=p.empty, wants_grad=wants_grad)
    if hides_by_score(masked.score):
        raise Unreadable(anchor, because("mask-of-scores"))
    mask = and_(masked.mask, p.mask)
    if p.empty == "zero":  # a row of -inf gives zero, where a plain softmax gives NaN: hide what data makes -inf
        mask = and_(mask, _not_hidden_by_data(p, masked.score))
    renamer = _Renamer(p, names)
    operands = [
        renamer.operand(name, source, dtype)
        for name, source, dtype in (("q", p.q, p.product_dtype), ("k", p.k, p.product_dtype), ("v", p.v, p.dtype))
    ]
    score, mask, weight = (renamer.expr(x) for x in (masked.score, mask, p.weight))
    sink = None if p.sink is None else renamer.expr(p.sink)
    for n in renamer.nodes:
        if n in p.facts.made and p.facts.clobbered(n, p.facts.order[node]):
            raise Unreadable(node, because("written-before"))

    def axis(name: str, index: Expr | None) -> Axis:
        return Axis(name, renamer.extent(ONE if index is None else p.extents[index]))

    attention = Attention(
        sizes=(),
        batch=tuple(axis(names[x].name, x) for x in batch),
        i=axis("i", p.i), j=axis("j", p.j), d=axis("d", p.d), e=axis("e", p.e),
        tensors=renamer.declared(), q=operands[0], k=operands[1], v=operands[2],
        score=score, mask=mask, sink=sink, weight=weight, normalizer=p.normalizer, outputs=p.outputs,
        # a sink outweighs every finite fill, so a row that sees nothing else gives zero
        empty="zero" if p.sink is not None or p.zeroed else masked.empty, dtype=NAME_OF[p.dtype],
        layout=_layout(p, node, [*batch, p.i], names),
    )  # fmt: skip
    attention, sizes, factors = renamer.close(attention)
    positions = {x: n for n, x in enumerate([*own, p.i, p.e]) if x is not None}
    absent = [n for n in range(len(own) + 2) if n not in positions.values()]  # one query, or one channel
    order = [positions[x] if x is not ZERO else absent.pop(0) for x in p.out if x is not ZERO or absent]
    order += absent
    attention = replace(attention, slope=_slope(attention, masked, anchor))
    return Lifted(
        verify(attention), node, anchor, tuple(renamer.nodes), tuple(renamer.dtypes), sizes, factors, tuple(order),
        other_users, lse, tuple(range(len(own), len(batch))), masked.floor, stopped=flow.stopped,
    )  # fmt: skip


def _slope(a: Attention, masked: Masked, at: fx.Node) -> float:
    """By how much the scores of a row that sees nothing move its weights. Raises Unreadable where the IR cannot say."""
    slopes = masked.slopes - {0.0} if len(masked.slopes) == 1 else masked.slopes
    if not slopes or a.empty != "mean" or sees_itself(a):
        return 0.0
    if len(slopes) > 1:
        raise Unreadable(at, because("hidden-gradients"))
    if "lse" in a.outputs:
        raise Unreadable(at, because("hidden-sums"))
    return next(iter(slopes))


def sees_itself(a: Attention) -> bool:
    """Whether each query sees the key at its own place."""
    reach = Reach({x.index: x.extent for x in a.axes})
    return a.i.extent is a.j.extent and reach.proves((), substitute(a.mask, {a.j.index: a.i.index}))


def _not_hidden_by_data(p: Parts, x: Expr) -> Expr:
    """Where no tensor that a score reads makes it -inf: one that it reads of some keys only hides no others."""
    match x:
        case Load():
            return lt(NEG_INF, x) if x.kind == "float" and not _learned(p, x) else TRUE
        case Op("where", (c, a, b)):
            first, second = _not_hidden_by_data(p, a), _not_hidden_by_data(p, b)
            return and_(first if first is TRUE else or_(not_(c), first), second if second is TRUE else or_(c, second))
        case _:
            return and_(*(_not_hidden_by_data(p, a) for a in x.children))


def _learned(p: Parts, x: Load) -> bool:
    """Whether a tensor holds parameters, products, numbers of a call, or values computed from them alone: then nothing
    in it is -inf by intent."""
    seen: set[fx.Node] = set()
    stack = [p.facts.by_name[x.tensor]]
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        if contraction(p.facts, n) is not None:
            continue
        value = p.facts.value(n)
        if isinstance(value, torch.SymFloat):
            continue
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        if n.op == "placeholder" and floats and n not in p.facts.parameters:
            return False
        if any(a == float("-inf") for a in n.args if isinstance(a, float)):
            return False
        stack += n.all_input_nodes
    return True


class _Renamer:
    """Gives tensors, indices and sizes their canonical names, and remembers what each stands for."""

    def __init__(self, p: Parts, names: dict[Expr, Index]) -> None:
        self.p, self.names = p, dict[Expr, Expr](names)
        self.keys: dict[tuple[fx.Node, torch.dtype], str] = {}
        self.nodes: list[fx.Node] = []
        self.dtypes: list[torch.dtype] = []
        self.compound: dict[Expr, Size] = {}

    def operand(self, name: str, source: Source, dtype: torch.dtype) -> Access:
        known = self._tensor(source.node, dtype, name)
        return Access(known, tuple(self.expr(x) for x in source.at))

    def _tensor(self, n: fx.Node, dtype: torch.dtype, name: str) -> str:
        known = self.keys.get((n, dtype))
        if known is None:
            known = self.keys[n, dtype] = name
            self.nodes.append(n)
            self.dtypes.append(dtype)
        return known

    def expr(self, x: Expr) -> Expr:
        f = self.p.facts

        def rule(y: Expr) -> Expr | None:
            if isinstance(y, Load):
                node = f.by_name[y.tensor]
                count = sum(name.startswith("t") for name in self.keys.values())
                return Load(self._tensor(node, f.dtype(node), f"t{count}"), y.index, y.kind)
            return self.names.get(y)

        return rewrite(simplify(x, self.p.extents), rule)

    def extent(self, x: Expr) -> Const | Size:
        """An extent the IR can hold: compound ones become a size of their own."""
        if isinstance(x, Const | Size):
            return x
        return self.compound.setdefault(x, Size(f"m{len(self.compound)}"))

    def declared(self) -> tuple[Tensor, ...]:
        return tuple(
            Tensor(name, NAME_OF[dtype], self.p.facts.shape(node)) for (node, dtype), name in self.keys.items()
        )

    def close(self, a: Attention) -> tuple[Attention, tuple[Expr, ...], dict[Size, Expr]]:
        """`a` with its sizes named n0, n1, ... in order of appearance, what each is, and which are made of others."""
        used: dict[Size, None] = {}
        for x in (axis.extent for axis in a.axes):
            used |= {s: None for s in free(x) if isinstance(s, Size)}
        for x in (*(s for t in a.tensors for s in t.shape), *a.expressions()):
            used |= {s: None for s in sorted(free(x), key=repr) if isinstance(s, Size)}
        table: dict[Expr, Expr] = {s: Size(f"n{n}") for n, s in enumerate(used)}
        origin: dict[Expr, Expr] = {size: x for x, size in self.compound.items()}

        def axis(x: Axis) -> Axis:
            extent = table.get(x.extent, x.extent)
            assert isinstance(extent, Const | Size)
            return Axis(x.name, extent)

        tensors = tuple(Tensor(t.name, t.dtype, tuple(substitute(s, table) for s in t.shape)) for t in a.tensors)
        renamed = a.substitute(table)
        closed = Attention(
            sizes=tuple(s for s in table.values() if isinstance(s, Size)),
            batch=tuple(axis(x) for x in a.batch), i=axis(a.i), j=axis(a.j), d=axis(a.d), e=axis(a.e),
            tensors=tensors, q=renamed.q, k=renamed.k, v=renamed.v, score=renamed.score, mask=renamed.mask,
            normalizer=a.normalizer, empty=a.empty, sink=renamed.sink, weight=renamed.weight, outputs=a.outputs,
            dtype=a.dtype, layout=a.layout,
        )  # fmt: skip
        factors = {table[size]: substitute(x, table) for x, size in self.compound.items() if size in table}
        return closed, tuple(origin.get(s, s) for s in used), {k: v for k, v in factors.items() if isinstance(k, Size)}


def _layout(p: Parts, node: fx.Node, rows: list[Expr | None], names: dict[Expr, Index]) -> tuple[str, ...]:
    """The rows in the order in which the queries lie in memory, as SDPA lays its output out; in that of the node that
    is replaced where somebody would notice."""
    order = [("i" if x is None or x is p.i else names[x].name) for x in rows]
    whole = len(p.out) == p.facts.rank(node)  # rows in chunks lie as one axis does
    like, at = (node, p.out) if whole and noticed(p.facts, node) else (p.q.node, p.q.at)
    value = p.facts.value(like)
    found = [name for dim in order_in_memory(value) for x, name in zip(rows, order, strict=True) if at[dim] is x]
    repeated = any(hint(value.stride(dim)) == 0 for dim, x in enumerate(at) if x in rows)
    return (*(found if len(found) == len(order) and not repeated else order), "e")
