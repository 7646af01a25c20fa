"""Where the tokens of an attention stand: what rules of distances are written in.

    row(i)    the position of row i among the keys: the last key that its causal mask leaves it; that of the sequence
              for a row that is alone, as at decode, where nothing is left of such a mask; i where rows are keys
    start     the first key of the sequence: 0, or, where data hides keys (padding, documents), the first of them that
              the row may see

Positions are counted from `start`, so that padding or a document before a sequence changes nothing of it. Without a
causal mask, rows that are padding themselves stand at the end of the sequence that is nearer, so that they keep a key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from attncc.ir import Attention, Axis, Expr, Reduce
from attncc.ir.affine import expr, poly
from attncc.ir.analysis import members
from attncc.ir.build import ONE, ZERO, add, and_, maximum, minimum, mul, sub
from attncc.ir.expr import Const, Op, free, loads, mentions
from attncc.ir.reasons import Reason, because
from attncc.ir.reduce import Reduction


@dataclass(frozen=True)
class Places:
    """Integer expressions over the indices and sizes of one attention, positions counted from the start of the
    sequence. `length` is the number of keys from there on."""

    row: Expr
    key: Expr
    length: Expr
    head: Expr | None
    causal: bool


def places(a: Attention, start: Expr = ZERO, last: Expr | None = None) -> Places | None:
    """The positions of an attention's rows and keys; None where they have none in common. `last`: the last key that a
    row may see, where data hides keys and no causal mask does."""
    row = _last_key(a)
    if row is None and a.i.extent is ONE:
        row = sub(a.j.extent, ONE) if last is None else last
    causal = row is not None
    if row is None:
        if poly(a.i.extent) != poly(a.j.extent):
            return None
        row = a.i.index if last is None else minimum(maximum(a.i.index, start), last)
    return Places(sub(row, start), sub(a.j.index, start), sub(a.j.extent, start), _head(a), causal)


def no_distance(a: Attention) -> Reason | None:
    """Why an attention has no distances between rows and keys, or None."""
    return because("policy-no-distance") if places(a) is None else None


def _last_key(a: Attention) -> Expr | None:
    """x of the part `j <= x` of the mask that mentions rows, or where there is a single one: the last key that a causal
    mask leaves a row."""
    for part in members("and", a.mask):
        if isinstance(part, Op) and part.name in ("le", "lt") and part.args[0].kind == "int":
            slack = poly(sub(part.args[1], part.args[0]))  # >= 0, or > 0
            keyed = [m for m in slack if any(mentions(f, a.j.index) for f in m)]
            rows = a.i.extent is ONE or any(mentions(f, a.i.index) for m in slack for f in m)
            if rows and keyed == [(a.j.index,)] and slack[keyed[0]] == -1:
                row = expr({m: c for m, c in slack.items() if m != keyed[0]})
                return row if part.name == "le" else sub(row, ONE)
    return None


def heads_of(a: Attention) -> tuple[Axis, ...]:
    """The axes that the heads of queries are counted through by, where their extents are known: the batch axes that do
    not index the first dimension of q, which counts sequences. None where q has one such dimension alone."""
    own = {x.index for x in a.batch}
    dims = [x for x in a.q.index if x is not a.i.index and x is not a.d.index]
    if len(dims) < 2:
        return ()
    axes = tuple(x for x in a.batch if x.index in own - free(dims[0]))
    return axes if all(isinstance(x.extent, Const) for x in axes) else ()


def head_count(a: Attention) -> int:
    """How many heads of queries there are; 1 where they cannot be told apart."""
    return prod(int(x.extent.value) for x in heads_of(a) if isinstance(x.extent, Const))


def _head(a: Attention) -> Expr | None:
    """The number of the query head."""
    head: Expr | None = None
    for x in heads_of(a):
        head = x.index if head is None else add(mul(head, x.extent), x.index)
    return head


def kv_head(a: Attention) -> Expr:
    """The number of the head of keys that a query head reads. Where k is read by several dimensions of heads, or with
    its components in one, it is that of the query head."""
    heads = {x.index for x in heads_of(a)}
    dims = [x for x in a.k.index if heads & free(x)]
    if len(dims) == 1 and not mentions(dims[0], a.d.index):
        return dims[0]
    head = _head(a)
    assert head is not None  # asked where there are heads
    return head


def ends_of(a: Attention) -> dict[str, Reduce]:
    """The nodes that find `start`, and `last` where no causal mask does, of each sequence; none where no data hides
    keys."""
    wanted: dict[str, Reduction] = {"start": "min"} if _last_key(a) is not None else {"start": "min", "last": "max"}
    nodes = {name: _end(a, reduction) for name, reduction in wanted.items()}
    return {name: node for name, node in nodes.items() if node is not None}


def _end(a: Attention, reduction: Reduction) -> Reduce | None:
    """The first or the last key which data leaves each sequence, or each row of one; None where no data hides keys."""
    parts = [x for x in members("and", a.mask) if loads(x) and mentions(x, a.j.index) and not bounds_rows(x, a)]
    if not parts:
        return None
    seen = and_(*parts)
    leaves, names = free(seen), {x.tensor for x in loads(seen)}
    axes = tuple(x for x in (*a.batch, a.i) if x.index in leaves)
    tensors = tuple(t for t in a.tensors if t.name in names)
    return Reduce(a.sizes, axes, a.j, tensors, reduction, a.j.index, seen, ZERO)


def bounds_rows(x: Expr, a: Attention) -> bool:
    """Whether a part of a mask is a causal one by positions that are data."""
    return isinstance(x, Op) and x.name in ("le", "lt") and _last_key(replace(a, mask=x)) is not None
