"""Several values that one softmax weighs, as one attention of all their columns: its scores are computed once.

    w @ v1,  (sum_h w[h] / H) @ v2    from    w @ [v1 | v2]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from attncc.ir.attention import Access, Attention, Tensor, W, fresh_name
from attncc.ir.build import ZERO, const
from attncc.ir.evaluate import NAME_OF
from attncc.ir.expr import Const, Expr, Index, Op, loads
from attncc.ir.verify import VerifyError, verify
from attncc.patterns.site.assemble import Columns, Lifted
from attncc.patterns.site.reading import Facts, is_operator, written_args

aten = torch.ops.aten
#: Columns of one attention: kernels keep a row of them.
_MOST_COLUMNS = 512


def joined(sites: Sequence[Lifted], f: Facts) -> dict[int, Lifted | None]:
    """By `id` of a site, what takes its place: an attention of the columns of several, or nothing, where another one
    holds its columns. Sites that stay as they are are not in it."""
    found: dict[int, Lifted | None] = {}
    by_anchor: dict[fx.Node, list[Lifted]] = {}
    for site in sites:
        by_anchor.setdefault(site.anchor, []).append(site)
    for group in by_anchor.values():
        whole = _whole(group, f) if len(group) > 1 else None
        if whole is not None:
            found |= {id(x): None for x in group}
            found[id(group[0])] = whole
    return found


def _whole(group: Sequence[Lifted], f: Facts) -> Lifted | None:
    """All sites of a softmax as one; None where they differ in more than their values, or one needs another."""
    nodes = [x.node for x in group]
    first = group[0]
    keys = {_scores(x) for x in group}
    factors = [_factor(x.attention.weight) for x in group]
    counts = [x.attention.e.extent for x in group]
    plain = all(x.piece is None and x.lse is None and not x.columns and not x.stopped for x in group)
    if len(set(nodes)) < len(nodes) or len(keys) > 1 or not plain or any(x.floor != first.floor for x in group):
        return None
    known = [int(n.value) for n in counts if isinstance(n, Const)]
    if len(known) < len(group) or sum(known) > _MOST_COLUMNS or any(x is None for x in factors):
        return None
    last = max(f.order[n] for n in nodes)
    if any(f.writes(n, f.order[x.node] - 1, last) for x in group for n in x.tensors) or _nested(group, f):
        return None
    between = f.nodes[min(f.order[n] for n in nodes) : last]
    if any(written_args(n) or _draws(n) for n in between):  # what uses the first moves behind the last
        return None
    values = _values(group, f, last)
    if values is None:
        return None
    node, access, tensor = values
    columns: list[Columns] = []
    for site, count, factor in zip(group, known, factors, strict=True):
        at = sum(x.count for x in columns)
        columns.append(Columns(site.node, at, count, factor or 0.0, site.summed, site.order))
    a = first.attention
    kept = [(t, n, d) for t, n, d in zip(a.tensors, first.tensors, first.dtypes, strict=True) if t.name in _read(a)]
    made = replace(
        a, v=access, e=replace(a.e, extent=const(sum(known))), weight=W, layout=(),
        tensors=(*(t for t, _, _ in kept), tensor),
    )  # fmt: skip
    try:
        verify(made)
    except VerifyError:
        return None
    users = tuple(dict.fromkeys(u for x in group for u in x.other_users if u not in nodes))
    return replace(
        first, attention=made, tensors=(*(n for _, n, _ in kept), node),
        dtypes=(*(d for _, _, d in kept), first.dtypes[[t.name for t in a.tensors].index(a.v.tensor)]),
        other_users=users, summed=(), order=tuple(range(len(made.out_axes))), columns=tuple(columns),
    )  # fmt: skip


def _draws(n: fx.Node) -> bool:
    target: Any = n.target
    return is_operator(n) and torch.Tag.nondeterministic_seeded in target.tags


def _scores(x: Lifted) -> object:
    """What sites must have in common: all but values, weight and what becomes of the output."""
    a = x.attention
    bare = replace(a, v=a.q, e=a.d, weight=W, tensors=(), layout=())
    named = {t.name: n for t, n in zip(a.tensors, x.tensors, strict=True)}
    return bare, tuple(sorted((name, named[name].name) for name in _read(a))), x.sizes


def _read(a: Attention) -> set[str]:
    """The tensors that an attention reads beside its values."""
    own = replace(a, v=a.q, weight=W)
    return {a.q.tensor, a.k.tensor, *(y.tensor for y in loads(*own.expressions()))}


def _factor(weight: Expr) -> float | None:
    """c, where the weight is c * w."""
    match weight:
        case _ if weight is W:
            return 1.0
        case Op("mul", (Const(c), x)) | Op("mul", (x, Const(c))):
            inner = _factor(x)
            return None if inner is None else inner * float(c)
        case Op("div", (x, Const(c))) if c:
            inner = _factor(x)
            return None if inner is None else inner / float(c)
        case _:
            return None


def _nested(group: Sequence[Lifted], f: Facts) -> bool:
    """Whether what one site reads is computed from what another one gives."""
    nodes = {x.node for x in group}
    first = min(f.order[n] for n in nodes)
    seen: set[fx.Node] = set()
    stack = [n for x in group for n in x.tensors]
    while stack:
        n = stack.pop()
        if n in nodes:
            return True
        if n not in seen and f.order[n] >= first:
            seen.add(n)
            stack += n.all_input_nodes
    return False


def _values(group: Sequence[Lifted], f: Facts, at: int) -> tuple[fx.Node, Access, Tensor] | None:
    """The values of all sites side by side, over the batch axes that one of them has; None where one is read at other
    points than its own batch, key and component."""
    a = group[0].attention
    present = [x for x in a.batch if any(x.index in y.attention.v.index for y in group)]
    if any(not isinstance(x.extent, Const) for x in present):
        return None
    dtypes = {f.dtype(_value(x)) for x in group}
    if len(dtypes) > 1 or dtypes.pop() not in NAME_OF:
        return None
    made: list[fx.Node] = []
    for site in group:
        v, own = _value(site), site.attention
        index = list(own.v.index)
        for dim in reversed(range(len(index))):
            if index[dim] is ZERO:
                v = f.make(aten.select.int, (v, dim, 0), at)
                del index[dim]
        wanted = [*(x.index for x in present), own.j.index, own.e.index]
        if own.e.extent is const(1) and own.e.index not in index:
            v, index = f.make(aten.unsqueeze.default, (v, len(index)), at), [*index, own.e.index]
        if not all(isinstance(x, Index) and x in wanted for x in index) or len(set(index)) < len(index):
            return None
        v = f.make(aten.permute.default, (v, [index.index(x) for x in wanted if x in index]), at)
        for dim, x in enumerate(wanted):
            if x not in index:
                v = f.make(aten.unsqueeze.default, (v, dim), at)
        sizes = [int(x.extent.value) if isinstance(x.extent, Const) else -1 for x in present]
        made.append(f.make(aten.expand.default, (v, [*sizes, -1, -1]), at))
    node = f.make(aten.cat.default, (made, -1), at)
    name = fresh_name("v", _read(a))
    return node, Access(name, (*(x.index for x in present), a.j.index, a.e.index)), _declared(name, node, group, f)


def _value(x: Lifted) -> fx.Node:
    return x.tensors[[t.name for t in x.attention.tensors].index(x.attention.v.tensor)]


def _declared(name: str, node: fx.Node, group: Sequence[Lifted], f: Facts) -> Tensor:
    a = group[0].attention
    rank = f.rank(node)
    total = sum(int(x.attention.e.extent.value) for x in group if isinstance(x.attention.e.extent, Const))
    batch = [x.extent for x in a.batch if any(x.index in y.attention.v.index for y in group)]
    shape = (*batch, a.j.extent, const(total))
    assert len(shape) == rank
    return Tensor(name, NAME_OF[f.dtype(node)], shape)
