"""Data read by key bounds the loop through a table made once per call.

A literal of the mask such as `doc[b, i] == doc[b, j]` or `pad[b, j]` has, for each row, a first and a last key where it
holds. With both in a table,

    outer = first[i] <= j <= last[i]                          implied by the literal: bounds the visit
    inner = the same where every key between them holds       implies the literal: bounds the full keys

which is exact for what is contiguous (documents in order, padding at one end) and sound for anything. What is added to
the scores masks too where it is as low as a mask's fill: of a row that any key is added more to, those keys weigh
nothing, and no row sees one of them that need not see all. A table costs
O(N log N) for N keys and holds four numbers a row, or four alone where the literal does not depend on the row. What is
not contiguous, block masks above all, gets a map of bits (`attncc.passes.bounds.block_maps`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from attncc.ir import Attention, Bounds, Expr, Load, Op, Tensor, W
from attncc.ir.analysis import comparison_sides, runs_of
from attncc.ir.attention import fresh_name
from attncc.ir.build import FALSE, ONE, TRUE, ZERO, add, and_, const, le, lt, op, where
from attncc.ir.evaluate import DTYPE_OF, Evaluator
from attncc.ir.interpret import extent, size_table
from attncc.ir.rewrite import rewrite, substitute
from attncc.ir.terms import free, mentions
from attncc.passes.bounds.block_maps import BlockMap, block_map, by_pair, map_tables, quick
from attncc.passes.bounds.bounds import analyse
from attncc.passes.bounds.predicates import map_literals, reads

_FIRST, _END, _SOLID_FIRST, _SOLID_END = range(4)


@dataclass(frozen=True)
class Span:
    """One table, i32[*batch axes the literal mentions, N if it mentions the row, 4]: first key, end, and the same where
    no key between them is missing. No keys are M and 0. `relation` compares `row` with `key` (`row relation key`);
    without a relation `key` is the literal itself, a boolean. With `else_all` a row without such keys has all."""

    tensor: Tensor
    index: tuple[Expr, ...]
    relation: str | None
    row: Expr
    key: Expr
    else_all: bool = False

    @property
    def sources(self) -> tuple[Expr, ...]:
        """What the table is made from."""
        return self.row, self.key


@dataclass(frozen=True)
class Spanned:
    """`attention` declares the tables after its own tensors; its mask is unchanged. `bounds` read them.

    `more_by_looking` says that a literal was left out that is `quick` to look at."""

    attention: Attention
    bounds: Bounds
    spans: tuple[Span, ...] = ()
    maps: tuple[BlockMap, ...] = ()
    rows_exact: bool = False
    more_by_looking: bool = False


#: What is added to a score counts as a mask from here on down: models add the lowest number there is, or -1e30.
FILL = -9e29
#: Which literals are looked at pair by pair: all that have no span and no blocks; those where that is `quick`; none.
Looked = Literal["all", "quick", "none"]


def spanned(a: Attention, group: int = 64, *, by_looking: Looked = "all", fills: bool = True) -> Spanned:
    """`a` with tables for the literals of its mask that read data by key, and its bounds. Rows may be scanned.

    A literal whose row and key sides part gets a `Span`, any other a `BlockMap`, whose bounds hold for tiles that do
    not cross a multiple of `group` rows.

    A map of a literal without blocks looks at every pair. Those that `by_looking` leaves out neither bound the visit
    nor give full keys, and what the rest of the mask says stands. Without `fills`, what is added to the scores is not
    taken for a mask: seen from its keys, an attention's rows say nothing of what else a row of scores holds."""
    j = a.j.index
    if a.i.extent is ONE:
        a = replace(a, mask=substitute(a.mask, {a.i.index: ZERO}))
    filled = _fills(a) if fills else []
    if not reads(a.mask, j) and not filled:
        plain = analyse(a, rows=True)
        return Spanned(a, plain.bounds, rows_exact=plain.rows_exact)
    spans: dict[Expr, Span] = {}
    maps: dict[Expr, BlockMap] = {}
    taken = {t.name for t in a.tensors} | {x.name for x in a.axes} | {s.name for s in a.sizes}

    literals: list[Expr] = []
    left_out: list[Expr] = []

    def find(literal: Expr) -> Expr:
        literals.append(literal)
        if reads(literal, j) and literal not in spans and literal not in maps:
            span = _span(literal, a, fresh_name(f"span{len(spans)}", taken))
            if span is not None:
                spans[literal] = replace(span, else_all=literal in filled)
            elif not by_pair(literal, a) or by_looking == "all" or (by_looking == "quick" and quick(literal, a)):
                made = block_map(literal, a, fresh_name(f"map{len(maps)}", taken), group)
                maps[literal] = replace(made, else_all=literal in filled)
            else:
                left_out.append(literal)
        return literal

    def with_spans(literal: Expr, first: int, end: int, otherwise: Expr) -> Expr:
        if literal in spans:
            return _between(spans[literal], first, end, j)
        return literal if literal in maps or not reads(literal, j) else otherwise

    mask = map_literals(a.mask, find)
    outer = map_literals(and_(mask, *map(find, filled)), lambda x: with_spans(x, _FIRST, _END, TRUE))
    inner = map_literals(mask, lambda x: with_spans(x, _SOLID_FIRST, _SOLID_END, FALSE))
    found = analyse(a, rows=True, outer=outer, inner=inner, maps=maps)
    tables = (*spans.values(), *maps.values())
    declared = replace(a, tensors=(*a.tensors, *(t.tensor for t in tables)))
    read = {x for x in literals if reads(x, j)}
    exact = found.rows_exact and not maps and read <= set(spans)
    more = any(quick(x, a) for x in left_out)
    return Spanned(declared, found.bounds, tuple(spans.values()), tuple(maps.values()), exact, more)


def reads_by_key(a: Attention) -> bool:
    """Whether there is anything to make tables of."""
    return reads(a.mask, a.j.index) or bool(_fills(a))


def tables(
    found: Spanned, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int] = ()
) -> dict[str, torch.Tensor]:
    """Every table of `found` by name, made from the attention's own `tensors`, on their device."""
    a = found.attention
    return span_tables(found.spans, a, tensors, sizes) | map_tables(found.maps, a, tensors, sizes)


def _fills(a: Attention) -> list[Expr]:
    """What every key holds that weighs anything, of a row where any key holds it: what data adds to its score is more
    than a mask's fill."""
    if a.mask is not TRUE or a.normalizer != "softmax" or a.weight is not W:
        return []
    added: Expr | None = None
    rest = [a.score]
    while rest:
        x = rest.pop()
        if isinstance(x, Op) and x.name == "add":
            rest += x.args
        elif isinstance(x, Load) and mentions(x, a.j.index):
            added = x if added is None else add(added, x)
    if added is None:
        return []
    literal = lt(const(FILL), where(op("isnan", added), const(0.0), added))  # NaN weighs
    return [substitute(literal, {a.i.index: ZERO}) if a.i.extent is ONE else literal]


def _between(span: Span, first: int, end: int, j: Expr) -> Expr:
    lo, hi = (Load(span.tensor.name, (*span.index, const(n)), "int") for n in (first, end))
    return and_(le(lo, j), lt(j, hi))


def _span(literal: Expr, a: Attention, name: str) -> Span | None:
    """The table of `literal`, or None where it does not part into a row and a key side."""
    i, j = a.i.index, a.j.index
    axes = [x for x in (*a.batch, a.i) if x.index in free(literal)]
    tensor, index = Tensor(name, "i32", (*(x.extent for x in axes), const(4))), tuple(x.index for x in axes)
    if not mentions(literal, i):
        return None if _comes_in_runs(literal, j) else Span(tensor, index, None, ZERO, literal)
    sides = comparison_sides(literal, j, [i])
    return None if sides is None else Span(tensor, index, sides.relation, sides.row, sides.key)


def _comes_in_runs(literal: Expr, j: Expr) -> bool:
    """Whether a literal of keys alone should hold in several runs, which a map can hold: pages, and places counted from
    the start of the key's own segment."""
    counted = rewrite(literal, lambda x: Load("loaded", (), x.kind) if isinstance(x, Load) else None)
    return runs_of(literal, j) is not None or mentions(counted, j)


def span_tables(
    spans: Sequence[Span], a: Attention, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int] = ()
) -> dict[str, torch.Tensor]:
    """The tables by name, on the device of `tensors`, for the attention `spanned` was given or gave."""
    table = size_table(a, sizes)
    n, m = extent(a.i.extent, table), extent(a.j.extent, table)
    result: dict[str, torch.Tensor] = {}
    for span in spans:
        device = next(iter(tensors.values())).device
        leaves: dict[Expr, torch.Tensor] = {s: torch.full((), v, device=device) for s, v in table.items()}
        axes = [x for x in a.batch if x.index in span.index]
        counts = [extent(x.extent, table) for x in axes]
        for at, axis in enumerate(axes):
            view = [1] * (len(axes) + 1)
            view[at] = -1
            leaves[axis.index] = torch.arange(counts[at], device=device).view(view)
        leaves[a.i.index] = torch.arange(n, device=device)
        leaves[a.j.index] = torch.arange(m, device=device)
        ev = Evaluator(leaves, tensors, DTYPE_OF[a.compute_dtype])
        key = ev(span.key).expand(*counts, m)
        if span.relation is None:
            found = _where_true(key)
        else:
            row = ev(span.row).expand(*counts, n)
            found = _RELATIONS[span.relation](row.contiguous(), key.contiguous())
        result[span.tensor.name] = _packed(*found, m, else_all=span.else_all)
    return result


Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # first key, last key, how many


def _packed(
    first: torch.Tensor, last: torch.Tensor, count: torch.Tensor, m: int, *, else_all: bool
) -> torch.Tensor:
    """No keys are (m, 0), which the smallest first key and the largest end over several rows pass over."""
    none, solid = count == 0, count == last - first + 1
    nothing = (0, m) if else_all else (m, 0)
    lo, hi = torch.where(none, nothing[0], first), torch.where(none, nothing[1], last + 1)
    inside = (torch.where(solid, lo, m), torch.where(solid, hi, 0))
    return torch.stack([lo, hi, *inside], -1).to(torch.int32).contiguous()


def _where_true(key: torch.Tensor) -> Found:
    m = key.shape[-1]
    at = torch.arange(m, dtype=torch.int32, device=key.device)
    return torch.where(key, at, m).amin(-1), torch.where(key, at, -1).amax(-1), key.sum(-1)


def _equal(row: torch.Tensor, key: torch.Tensor) -> Found:
    values, order = key.sort(dim=-1, stable=True)
    left, right = torch.searchsorted(values, row), torch.searchsorted(values, row, right=True)
    most = key.shape[-1] - 1
    return order.gather(-1, left.clamp(max=most)), order.gather(-1, (right - 1).clamp(min=0)), right - left


def _at_most(row: torch.Tensor, key: torch.Tensor) -> Found:
    """Keys with row <= key: the running maximum from either end reaches the row's value at the first and last key."""
    m = key.shape[-1]
    first = torch.searchsorted(key.cummax(-1).values, row)
    last = m - 1 - torch.searchsorted(key.flip(-1).cummax(-1).values, row)
    return first, last, m - torch.searchsorted(key.sort(-1).values, row)


def _unequal(row: torch.Tensor, key: torch.Tensor) -> Found:
    """Keys with another value: the ends of the keys, or where the run of equal keys at that end stops."""
    m = key.shape[-1]
    count = m - _equal(row, key)[2]
    ends: list[torch.Tensor] = []
    for k in (key, key.flip(-1)):
        head = k[..., :1]
        stop = (k != head).to(torch.int32).argmax(-1, keepdim=True)
        ends.append(torch.where(row != head, 0, stop))
    return ends[0], m - 1 - ends[1], count


_RELATIONS = {"eq": _equal, "le": _at_most, "ne": _unequal}
