"""Recurrences over time: a state of d x e numbers that each step decays, writes an outer product to, and reads.

    S = decay * S + k (rate * u)^T,  u = v or v - S^T k,  o = S^T q

One step (decoding) and loops that Dynamo unrolled become a `Linear`, if every step can be shown to be the same. A state
that is carried from chunk to chunk of tokens is a recurrence too, and is said to be one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from attncc.ir.attention import Access, Axis
from attncc.ir.build import ONE, ZERO, const, mul
from attncc.ir.evaluate import NAME_OF
from attncc.ir.expr import Expr, Index, Load, Op, free, loads, rewrite
from attncc.ir.linear import UNIT, Linear, X
from attncc.ir.reasons import Reason, because
from attncc.ir.verify import VerifyError
from attncc.ir.verify_linear import verify_linear
from attncc.patterns.linear.linear import Recognised, Result
from attncc.patterns.linear.normalisers import factors, value_of
from attncc.patterns.linear.products import flat, mapped, product_of
from attncc.patterns.linear.state_reads import reads_of, through
from attncc.patterns.linear.steps import common
from attncc.patterns.site import DOT, VIEW_OPS, Data, Declared, Facts, Point, Unreadable, contraction, op_name

_STEPS = 12
_ZEROS = ("zeros", "zeros_like", "new_zeros")


@dataclass
class Update:
    """One step: `node` is the state after it, `before` the one that it carries on, `written` what it adds."""

    node: fx.Node
    before: fx.Node
    written: fx.Node
    chunk: bool  # the step writes a product over several tokens
    reads: list[fx.Node] = field(default_factory=list[fx.Node])
    leaves: frozenset[fx.Node] = frozenset()  # tensors of all tokens, which are read as they are


@dataclass(frozen=True)
class Step:
    """What one step computes, over the indices of its state: `d` is summed by the query."""

    at: Point
    d: Index
    e: Index
    batch: tuple[Index, ...]
    extents: dict[Expr, Expr]
    decay: Expr
    rate: Expr
    k: Load
    phi_k: Expr
    v: Load
    q: Load
    phi_q: Expr
    delta: bool
    state: Load
    read: fx.Node
    read_at: tuple[Expr, ...]  # the state's index, or 0, along each dimension of what reads it


_PARTS = ("decay", "rate", "k", "phi_k", "v", "q", "phi_q")


class _Unproven(Exception):
    """The step is not a linear attention, or cannot be shown to be one."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


@dataclass(frozen=True)
class Recurrence:
    """A state that is carried over time: the linear attention that it is, or the reason why it cannot be shown to be
    one. `reads` are the products that read the state, `writes` those that are added to it."""

    node: fx.Node
    first: fx.Node
    reads: frozenset[fx.Node]
    writes: frozenset[fx.Node]
    found: Recognised | Reason


def recurrences(f: Facts) -> Iterator[Recurrence]:
    """Each chain of updates of one state."""
    for chain in _chains(f):
        reads = frozenset(y for step in chain for x in step.reads for y in (x, through(x)))
        if reads:
            writes = frozenset(through(step.written) for step in chain)
            yield Recurrence(chain[-1].node, chain[0].node, reads, writes, _found(f, chain))


def _found(f: Facts, chain: list[Update]) -> Recognised | Reason:
    many = len(chain) > 1
    if chain[0].chunk:
        return because("recurrence", f"{len(chain)} chunks" if many else "one chunk")
    found = _lifted(f, chain)
    if not isinstance(found, Reason):
        return found
    # Activations, norms and gates of a token that read several tensors: the tensors that they are, of all tokens.
    again = _lifted(f, [replace(u, leaves=_token_tensors(f, u)) for u in chain])
    if not isinstance(again, Reason):
        return again
    return because("recurrence-unread", f"{len(chain)} steps" if many else "one step", found)


def _lifted(f: Facts, chain: list[Update]) -> Recognised | Reason:
    try:
        return _lift(f, chain)
    except (_Unproven, Unreadable) as error:
        return error.reason
    except VerifyError as error:
        return because("not-expressible", str(error))


def _token_tensors(f: Facts, u: Update) -> frozenset[fx.Node]:
    """What a step selects its token from."""
    found: set[fx.Node] = set()
    ring, seen = [u.node, *u.reads], {u.before, u.node, *u.reads}
    for _ in range(_STEPS):
        inputs = [a for n in ring for a in n.all_input_nodes if a not in seen]
        seen.update(inputs)
        found |= {a.all_input_nodes[0] for a in inputs if op_name(a) == "select"}
        ring = [a for a in inputs if op_name(a) != "select" and a.op == "call_function"]
    return frozenset(x for x in found if f.rank(x) >= 3)


def _chains(f: Facts) -> list[list[Update]]:
    """Updates of one state after another, in order."""
    data = Data(f)
    chains: dict[fx.Node, list[Update]] = {}  # by the last state
    for n in f.graph.nodes:
        if n in f.live and n in data and op_name(n) in ("add", "add_") and f.is_tensor(n) and f.rank(n) >= 2:
            update = _update(f, n, data, chains)
            if update is not None:
                chains[n] = [*chains.pop(update.before, []), update]
    return list(chains.values())


def _update(f: Facts, n: fx.Node, data: Data, chains: dict[fx.Node, list[Update]]) -> Update | None:
    sides = [a for a in n.args[:2] if isinstance(a, fx.Node) and f.is_tensor(a)]
    if len(sides) != 2 or n.kwargs.get("alpha", 1) != 1:
        return None
    for carried, written in (sides, sides[::-1]):
        before = _state_behind(f, carried, f.shape(n), chains)
        if before is None or written not in data:
            continue
        product = contraction(f, through(written))
        chunk = product is not None and product.extent is not ONE and product.lhs in data and product.rhs in data
        if chunk or _is_outer(f, written):
            reads = [x for x in reads_of(f, n) if x in data]
            return Update(n, before, written, chunk, reads)
    return None


def _state_behind(
    f: Facts, n: fx.Node, shape: Sequence[Expr], chains: dict[fx.Node, list[Update]]
) -> fx.Node | None:
    """The state that `n` decays: the one after an earlier step, one that the model is called with, or zeros."""
    stack = [n]
    for _ in range(_STEPS):
        if not stack:
            break
        n = stack.pop(0)
        if {*f.shape(n)[-2:]} != {*shape[-2:]}:
            continue
        if n in chains or (n.op == "placeholder" and n not in f.parameters) or op_name(n) in _ZEROS:
            return n
        if n.op == "call_function" and (n.target in VIEW_OPS or op_name(n) in ("mul", "mul_", "to", "_to_copy")):
            stack += [a for a in n.all_input_nodes if f.is_tensor(a) and f.rank(a) >= 2]
    return None


def _is_outer(f: Facts, n: fx.Node) -> bool:
    """Whether each element of the last two dimensions is a product of something of the one and of the other."""
    at: Point = tuple(ZERO if s is ONE else Index(f"o{x}") for x, s in enumerate(f.shape(n)))
    extents: dict[Expr, Expr] = {x: s for x, s in zip(at, f.shape(n), strict=True) if x is not ZERO}
    value = _opened(f, value_of(f, (n, at), extents, f.order[n]), extents)
    if value is None or len(at) < 2 or ZERO in at[-2:]:
        return False
    seen = [free(x) & set(at[-2:]) for x in flat(value)]
    return all(frozenset((x,)) in seen for x in at[-2:])


def _opened(
    f: Facts, x: Expr | None, extents: dict[Expr, Expr], leaves: frozenset[fx.Node] = frozenset()
) -> Expr | None:
    """An expression with its outer products, which sum over one element, as the products that they are."""

    def rule(y: Expr) -> Expr | None:
        if not isinstance(y, Load) or not y.tensor.startswith(DOT):
            return None
        product = contraction(f, f.by_name[y.tensor.removeprefix(DOT)])
        if product is None or product.extent is not ONE:
            return None
        sides = zip((product.lhs, product.rhs), product.maps(y.index, ZERO), strict=True)
        left, right = (value_of(f, side, extents, f.order[product.node], leaves) for side in sides)
        return None if left is None or right is None else mul(left, right)

    return None if x is None else rewrite(x, rule)


def _lift(f: Facts, chain: list[Update]) -> Recognised:
    steps = [_step(f, update) for update in chain]
    one = steps[0]
    alike = all((s.d, s.e, s.delta) == (one.d, one.e, one.delta) for s in steps)
    if not alike or any(s.state.index != s.at for s in steps[1:]):
        raise _Unproven(because("steps-differ"))
    time = Index("j") if len(steps) > 1 else ZERO
    parts = {name: common([getattr(s, name) for s in steps], time) for name in _PARTS}
    if any(x is None for x in parts.values()):
        raise _Unproven(because("steps-read-others"))
    names: dict[Expr, str] = {x: f"b{at}" for at, x in enumerate(one.batch)}
    names |= {one.d: "d", one.e: "e"}
    declared = Declared(f, one.extents, {x: Index(name) for x, name in names.items()})
    rows, phi_q = (_at_row(parts[name], time) for name in ("q", "phi_q"))
    count = const(len(steps))

    def access(name: str, x: Expr | None) -> Access:
        assert isinstance(x, Load)
        return declared.access(name, f.by_name[x.tensor], x.index)

    before = chain[0].before
    state = None if op_name(before) in _ZEROS else (before, one.state.index)

    def axis(x: Expr) -> Axis:
        return Axis(names[x], declared.extent(one.extents[x]))

    q, k, v = access("q", rows), access("k", parts["k"]), access("v", parts["v"])
    linear, sizes = declared.close(Linear(
        sizes=(), batch=tuple(axis(x) for x in one.batch), i=Axis("i", count), j=Axis("j", count), d=axis(one.d),
        e=axis(one.e), tensors=(), q=q, k=k, v=v,
        phi_q=declared.expr(phi_q), phi_k=declared.expr(parts["phi_k"] or X),
        decay=declared.expr(parts["decay"] or UNIT), rate=declared.expr(parts["rate"] or UNIT),
        rule="delta" if one.delta else "add", sees="past",
        state=None if state is None else declared.access("s0", *state), outputs=("out", "state"),
        dtype=NAME_OF[f.dtype(chain[0].node)],
    ))  # fmt: skip
    axes = tuple("" if s is ONE else names.get(Index(f"o{x}"), "") for x, s in enumerate(f.shape(chain[-1].node)))
    done = because("linear-step") if len(steps) == 1 else because("linear")
    results = [Result(chain[-1].node, "state", axes)]
    for at, step in enumerate(steps):
        results.append(Result(step.read, "out", tuple(names.get(x, "") for x in step.read_at), at))
    return Recognised(
        verify_linear(linear), chain[-1].node, chain[0].node, done, axes, tuple(declared.held), sizes,
        frozenset(chain[-1].reads), tuple(results) if _only_read(f, chain, results) else (),
    )  # fmt: skip


def _only_read(f: Facts, chain: list[Update], results: Sequence[Result]) -> bool:
    """Whether nothing but the results reads the states after the first."""
    return len({x.node for x in results}) == len(results) and all(
        {x for x in update.reads if x in f.live} <= {x.node for x in results} | _own_reads(f, chain) for update in chain
    )


def _own_reads(f: Facts, chain: list[Update]) -> set[fx.Node]:
    """What reads a state for the next update of it."""
    found: set[fx.Node] = set()
    for update in chain:
        stack = [update.written]
        while stack:
            n = stack.pop()
            if n not in found and f.order[n] > f.order[chain[0].before]:
                found.add(n)
                stack += n.all_input_nodes
    return found


def _at_row(x: Expr | None, time: Expr) -> Expr:
    """Queries are rows: their time is `i`."""
    assert x is not None
    return rewrite(x, lambda y: Index("i") if y is time and y is not ZERO else None)


def _step(f: Facts, u: Update) -> Step:
    n = u.node
    at: Point = tuple(ZERO if s is ONE else Index(f"o{x}") for x, s in enumerate(f.shape(n)))
    extents: dict[Expr, Expr] = {x: s for x, s in zip(at, f.shape(n), strict=True) if x is not ZERO}
    value = _opened(f, value_of(f, (n, at), extents, f.order[n] + 1, u.leaves | {u.before}), extents, u.leaves)
    one, other = at[-2:]
    if not isinstance(value, Op) or value.name != "add" or not isinstance(one, Index) or not isinstance(other, Index):
        raise _Unproven(because("state-not-sum"))
    carried, written = value.args if _mentions(value.args[0], u.before) else value.args[::-1]
    held = [x for x in flat(carried) if isinstance(x, Load) and x.tensor == u.before.name]
    decay = product_of([x for x in flat(carried) if x not in held])
    if len(held) != 1 or _mentions(decay, u.before):
        raise _Unproven(because("state-not-decayed"))
    q, phi_q, d, read, read_at = _query(f, u, at, extents)
    e = other if d is one else one
    keys = [x for x in flat(written) if d in free(x) and e not in free(x)]
    values = [x for x in flat(written) if e in free(x) and d not in free(x)]
    rest = [x for x in flat(written) if x not in keys and x not in values]
    key = product_of(keys)
    if any(d in free(x) and e in free(x) for x in rest):
        raise _Unproven(because("writes-no-product"))
    error = next((x for x in values if isinstance(x, Op) and x.name == "sub"), None)
    if error is not None:
        v, memory = error.args
        whole = _looked_up(f, memory, carried, d, extents, u) if isinstance(memory, Load) else None
        if whole is None or [x for x in flat(whole) if d in free(x)] != keys:
            raise _Unproven(because("delta-other-value"))
        for x in (x for x in flat(whole) if d not in free(x)):  # a norm of the key is part of it
            if x not in rest:
                raise _Unproven(because("delta-other-key"))
            rest.remove(x)
        key = whole
        rest += [x for x in values if x is not error]
    else:
        v = next((x for x in reversed(values) if isinstance(x, Load) and x not in loads(decay)), UNIT)
        rest += [x for x in values if x is not v]
    k, phi_k = mapped(key, d)
    if k is None:
        raise _Unproven(because("key-of-several"))
    if not isinstance(v, Load) or v.tensor.startswith(DOT) or _mentions(v, u.before):
        raise _Unproven(because("value-of-several"))
    rate = product_of(rest)
    if _mentions(rate, u.before) or any(x.tensor.startswith(DOT) for y in (rate, decay) for x in loads(y)):
        raise _Unproven(because("rate-is-product"))
    batch = tuple(x for x in at[:-2] if isinstance(x, Index))
    delta = error is not None
    return Step(at, d, e, batch, extents, decay, rate, k, phi_k, v, q, phi_q, delta, held[0], read, read_at)


def _mentions(x: Expr, n: fx.Node) -> bool:
    return any(y.tensor == n.name for y in loads(x))


def _query(
    f: Facts, u: Update, at: Point, extents: dict[Expr, Expr]
) -> tuple[Load, Expr, Index, fx.Node, tuple[Expr, ...]]:
    """What the state is read with, as a map of an element, and the axis of the state that it sums over; who reads it,
    and where."""
    for read in u.reads:
        out = tuple(ZERO if s is ONE else Index(f"r{x}") for x, s in enumerate(f.shape(read)))
        c = Index("c")
        inner = extents | {x: s for x, s in zip(out, f.shape(read), strict=True) if x is not ZERO}
        summed = Load(read.name, out, "float")
        if contraction(f, read) is not None or read.target in VIEW_OPS:
            summed = value_of(f, (read, out), inner, f.order[read] + 1)
        for state, query in factors(f, summed, c) if isinstance(summed, Load) else ():
            value = value_of(f, state, inner, f.order[read], frozenset({u.node}))
            if not isinstance(value, Load) or value.tensor != u.node.name or c not in value.index[-2:]:
                continue
            there: dict[Expr, Expr] = {x: y for x, y in zip(value.index, at, strict=True) if isinstance(x, Index)}
            d = there[c]
            assert isinstance(d, Index)  # the state has both of its last axes
            asked = value_of(f, query, inner, f.order[read], u.leaves)
            q, phi = (None, X) if asked is None else mapped(rewrite(asked, there.get), d)
            if q is None:
                q = Load(query[0].name, tuple(rewrite(x, there.get) for x in query[1]), "float")
            allowed = frozenset[Expr](at[:-2]) | {d}
            if free(q) <= allowed and d in free(q):
                return q, phi, d, read, tuple(there.get(x, ZERO) for x in out)
    raise _Unproven(because("state-unread"))


def _looked_up(
    f: Facts, x: Load, carried: Expr, d: Index, extents: dict[Expr, Expr], u: Update
) -> Expr | None:
    """The key, where a load is sum_d key[d] * (decay * S)[d, e]."""
    for state, other in factors(f, x, d):
        if value_of(f, state, extents, f.order[u.node], u.leaves | {u.before}) is carried:
            return value_of(f, other, extents, f.order[u.node], u.leaves)
    return None
