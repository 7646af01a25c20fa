"""Linear attention as code by chunks computes it: identified, and shown to be one by its values.

Chunks with their products of decays, triangular systems and carried states are a rational function of queries, keys,
values and rates, and of exponentials of sums of logarithms of decays; and so is a `Linear`. Two such functions are
equal everywhere if they are at one point drawn at random, but for points of measure zero (Schwartz, 1980; for graphs
of tensors, Wu et al., 2024, arXiv 2405.05751). So the region (`region.py`, analytic operations alone) runs once in
float64, on random tokens of the model's own shapes, and candidates are compared with all of its results. What was
found for one layer holds for those that do the same operations on the same shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import torch
from torch import fx

from attncc.ir import Access, Axis, Const, Index, Linear, Tensor
from attncc.ir.build import const, mul, op
from attncc.ir.evaluate import NAME_OF
from attncc.ir.expr import Load
from attncc.ir.linear import X
from attncc.ir.linear_chunks import by_chunks
from attncc.ir.reasons import because
from attncc.ir.verify_linear import verify_linear
from attncc.patterns.linear.linear import Recognised, Result
from attncc.patterns.linear.region import Cut, Region, cut_at, missing_state, region_of, run, shape_of
from attncc.patterns.site import VIEW_OPS, Facts, op_name

#: Tokens on which candidates are tried before one is compared on all of them.
_FEW = 7
#: Relative difference of equal values in float64.
_SAME = 1e-7
_SUMS = {"cumsum", "sub", "add", "sum", "neg", "masked_fill", "tril", "pad", "constant_pad_nd", "where", "expand"}
_HEAVY = {"matmul", "bmm", "mm", "einsum", "baddbmm", "linalg_solve_triangular", "cumsum"}
_CASTS = {"to", "_to_copy", "contiguous", "clone", "float", "type_as"}


@dataclass(frozen=True)
class Found:
    """Code by chunks that is one linear attention; `nodes` are what it computes on the way."""

    site: Recognised
    nodes: frozenset[fx.Node]


@dataclass(frozen=True)
class _Roles:
    """Which leaf is what, by their places in the cut."""

    q: int
    k: int
    v: int
    decay: int
    rate: int | None
    delta: bool
    state: int | None
    turned: bool = False  # the initial state lies by (e, d)


def chunked(f: Facts) -> Iterator[Found]:
    """Each region of chunks that is a linear attention, in order."""
    known: dict[object, tuple[_Roles, float, tuple[tuple[int, str, tuple[str, ...]], ...]] | None] = {}
    taken: set[fx.Node] = set()
    for n in f.graph.nodes:
        if op_name(n) != "cumsum" or n not in f.live or n in taken:
            continue
        cut = cut_at(f, n)
        if cut is None:
            continue
        region = region_of(f, cut)
        if not taken.isdisjoint(region.nodes):
            continue
        states: list[fx.Node] = []
        state = missing_state(f, cut, region)
        if state is not None:
            states, region = [state], region_of(f, cut, [state])
        key = _likeness(f, cut, region, states)
        if key not in known:
            known[key] = _identified(f, cut, region, states)
        solved = known[key]
        if solved is None:
            continue
        taken |= {*region.nodes}
        roles, scale, results = solved
        leaves = (*cut.leaves, *states)
        linear = verify_linear(_linear(f, leaves, cut, roles, scale, dtype=None))
        given = tuple(Result(region.nodes[at], output, axes) for at, output, axes in results)
        learned = any(f.wants_grad(f.order[x]) for x in leaves)
        if learned and not all(f.wants_grad(f.order[r.node]) for r in given):
            continue  # gradients are off in a part of it
        first = given[0]
        yield Found(
            Recognised(
                linear, first.node, n, because("linear"), first.axes, _tensors(leaves, roles), (),
                frozenset({n}), given,
            ),
            frozenset(region.nodes),
        )


def _likeness(f: Facts, cut: Cut, region: Region, states: Sequence[fx.Node]) -> object:
    """What two regions that compute the same have in common: their operations, and where each reads."""
    place: dict[fx.Node, object] = {n: ("leaf", at) for at, n in enumerate((*cut.leaves, *states))}

    def of(n: fx.Node) -> object:
        if n not in place:
            if n.op == "get_attr":
                place[n] = n
            else:
                place[n] = (str(n.target), repr(fx.map_arg((n.args, dict(n.kwargs)), of)))  # type: ignore[arg-type]
        return place[n]

    listed: list[object] = [(shape_of(f, n), n.args and 0) for n in (*cut.leaves, *states)]
    for at, n in enumerate(region.nodes):
        listed.append((str(n.target), repr(fx.map_arg((n.args, dict(n.kwargs)), of))))  # type: ignore[arg-type]
        place[n] = at
    exits = tuple(region.nodes.index(x) for x in region.exits)
    labels = tuple(x.labels for x in cut.held)
    return cut.axis, cut.tokens, cut.padded, labels, tuple(map(repr, listed)), exits


def _identified(
    f: Facts, cut: Cut, region: Region, states: Sequence[fx.Node]
) -> tuple[_Roles, float, tuple[tuple[int, str, tuple[str, ...]], ...]] | None:  # fmt: skip
    """The roles of the leaves, the factor of the queries, and the results: (place of the node, output, axes)."""
    if not any(len(_leaves_of(f, n, cut, states)) > 2 for n in region.exits):
        return None
    keep = {n for n in region.nodes if f.is_tensor(n) and f.rank(n) == 4 and f.dtype(n).is_floating_point}
    leaves = (*cut.leaves, *states)
    decays = [at for at, n in enumerate(cut.leaves) if _is_exponent(n, region)]
    given = _random(f, cut, states, decays)
    held = run(f, region, given, keep)
    if held is None:
        return None
    for roles in _candidates(f, cut, states, decays):
        if not _fits(f, cut, leaves, roles):
            continue
        found = _agrees(f, cut, region, leaves, roles, given, held)
        if found is not None:
            return roles, *found
    return None


def _leaves_of(f: Facts, n: fx.Node, cut: Cut, states: Sequence[fx.Node]) -> set[fx.Node]:
    stops = {*cut.leaves, *states}
    found: set[fx.Node] = set()
    seen, stack = {n}, [n]
    while stack:
        x = stack.pop()
        for a in (*x.all_input_nodes, *f.writes(x, f.order[x], len(f.order))):
            if a in stops:
                found.add(a)
            elif a not in seen:
                seen.add(a)
                stack.append(a)
    return found


def _is_exponent(leaf: fx.Node, region: Region) -> bool:
    """Whether a leaf goes into sums and then exponentials alone: it is a logarithm of decays."""
    inside = {*region.nodes}
    stack, seen, exponentials = [leaf], {leaf}, 0
    while stack:
        for user in stack.pop().users:
            if user not in inside or user in seen:
                continue
            seen.add(user)
            name = op_name(user)
            if name == "exp":
                exponentials += 1
            elif name in _SUMS or user.target in VIEW_OPS or name in _CASTS:
                stack.append(user)
            else:
                return False
    return exponentials > 0


def _random(f: Facts, cut: Cut, states: Sequence[fx.Node], decays: Sequence[int]) -> dict[fx.Node, torch.Tensor]:
    """Tokens: logarithms of decays below zero, numbers a token between 0 and 1, vectors of length one."""
    generator = torch.Generator().manual_seed(0)
    found: dict[fx.Node, torch.Tensor] = {}
    for at, n in enumerate((*cut.leaves, *states)):
        shape = _shape(f, n)
        x = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
        if at in decays:
            found[n] = -x * 0.3
        elif len(shape) > 3:
            last = cut.held[at].labels.index(3) if at < len(cut.held) else -1
            found[n] = torch.nn.functional.normalize(x - 0.6, dim=last)
        else:
            found[n] = x * 0.8
    return found


def _candidates(
    f: Facts, cut: Cut, states: Sequence[fx.Node], decays: Sequence[int]
) -> Iterator[_Roles]:
    """Roles that the shapes of the leaves allow."""
    if len(decays) != 1:
        return
    shapes = _shapes(f, cut)
    if any(sorted(x.labels) not in ([0, 1, 2], [0, 1, 2, 3]) for x in cut.held):
        return
    wide = [at for at in range(len(shapes)) if at not in decays and len(shapes[at]) == 4]
    rates = [at for at in range(len(shapes)) if at not in decays and len(shapes[at]) == 3]
    if len(wide) != 3 or len(rates) > 1 or cut.axis not in (1, 2):
        return
    batch = {tuple(s for d, s in enumerate(shape[:3]) if d != cut.axis) for shape in shapes}
    if len(batch) != 1:
        return
    state = len(cut.leaves) if states else None
    for q, k, v in permutations(wide):
        if shapes[q][-1] != shapes[k][-1] or (len(shapes[decays[0]]) == 4 and shapes[decays[0]][-1] != shapes[k][-1]):
            continue
        for delta in (True, False):
            plain = _Roles(q, k, v, decays[0], rates[0] if rates else None, delta, state)
            yield plain
            if state is not None:
                yield replace(plain, turned=True)


def _shape(f: Facts, n: fx.Node) -> tuple[int, ...]:
    found = shape_of(f, n)
    assert found is not None  # leaves were found by their shapes
    return found


def _shapes(f: Facts, cut: Cut) -> list[tuple[int, ...]]:
    """The shape of each leaf in the order of the cut's axes."""
    return [tuple(s for _, s in sorted(zip(x.labels, _shape(f, x.node), strict=True))) for x in cut.held]


def _fits(f: Facts, cut: Cut, leaves: Sequence[fx.Node], roles: _Roles) -> bool:
    """Whether the initial state, if there is one, has as many rows and columns as keys and values have channels."""
    if roles.state is None:
        return True
    shapes, state = _shapes(f, cut), _shape(f, leaves[roles.state])
    k, v = shapes[roles.k], shapes[roles.v]
    return state[-2:] == ((v[-1], k[-1]) if roles.turned else (k[-1], v[-1]))


def _tensors(leaves: Sequence[fx.Node], roles: _Roles) -> tuple[fx.Node, ...]:
    order = (roles.q, roles.k, roles.v, roles.decay, roles.rate, roles.state)
    return tuple(leaves[at] for at in order if at is not None)


def _linear(
    f: Facts, leaves: Sequence[fx.Node], cut: Cut, roles: _Roles, scale: float, dtype: str | None,
    tokens: int | None = None,
) -> Linear:  # fmt: skip
    """The node that the roles make, over the first `tokens`; in the leaves' own types, or in one `dtype`."""
    shapes = _shapes(f, cut)
    b = [Index("b0"), Index("b1")]
    count = Const(cut.tokens if tokens is None else tokens)

    def index(at: int, row: str, last: str) -> tuple[Index, ...]:
        own = [*b]
        own.insert(cut.axis, Index(row))
        return tuple((*own, Index(last))[x] for x in cut.held[at].labels)

    names = {"q": roles.q, "k": roles.k, "v": roles.v, "g": roles.decay, "r": roles.rate, "s0": roles.state}
    kinds = {name: NAME_OF[f.dtype(leaves[at])] for name, at in names.items() if at is not None}
    tensors = tuple(
        Tensor(name, dtype or kinds[name], tuple(Const(s) for s in _shape(f, leaves[at])))
        for name, at in names.items() if at is not None
    )  # fmt: skip
    outer = [s for at, s in enumerate(shapes[roles.q][:3]) if at != cut.axis]
    state = None
    if roles.state is not None:
        last = ("e", "d") if roles.turned else ("d", "e")
        state = Access("s0", (*b, *(Index(x) for x in last)))
    return Linear(
        sizes=(), batch=tuple(Axis(x.name, Const(s)) for x, s in zip(b, outer, strict=True)), i=Axis("i", count),
        j=Axis("j", count), d=Axis("d", Const(shapes[roles.k][-1])), e=Axis("e", Const(shapes[roles.v][-1])),
        tensors=tensors, q=Access("q", index(roles.q, "i", "d")),
        k=Access("k", index(roles.k, "j", "d")), v=Access("v", index(roles.v, "j", "e")),
        phi_q=X if scale == 1.0 else mul(X, const(scale)),
        decay=op("exp", Load("g", index(roles.decay, "j", "d"), "float")),
        rate=const(1.0) if roles.rate is None else Load("r", index(roles.rate, "j", ""), "float"),
        rule="delta" if roles.delta else "add", sees="past", state=state, outputs=("out", "state"),
        dtype=dtype or "f32",
    )  # fmt: skip


def _agrees(
    f: Facts, cut: Cut, region: Region, leaves: Sequence[fx.Node], roles: _Roles, given: Mapping[fx.Node, torch.Tensor],
    held: Mapping[fx.Node, torch.Tensor],
) -> tuple[float, tuple[tuple[int, str, tuple[str, ...]], ...]] | None:  # fmt: skip
    """The factor of the queries and the results, if every exit is one of those of the linear attention."""
    tensors = dict(zip((t.name for t in _linear(f, leaves, cut, roles, 1.0, "f64").tensors),
                       (given[n] for n in _tensors(leaves, roles)), strict=True))  # fmt: skip
    few = min(_FEW, cut.tokens)
    short = by_chunks(_linear(f, leaves, cut, roles, 1.0, "f64", few), tensors, compute=torch.float64)["out"]
    outs = {x: match for x, value in held.items() if (match := _as_out(value, short, cut)) is not None}
    if not outs:
        return None
    scale = next(iter(outs.values()))[1]
    whole = by_chunks(_linear(f, leaves, cut, roles, scale, "f64"), tensors, compute=torch.float64)
    known: dict[fx.Node, tuple[str, tuple[str, ...]]] = {}
    for x, value in held.items():
        if x in outs and outs[x][1] == scale and _same(_as(value, outs[x][0], cut), whole["out"], cut):
            known[x] = "out", outs[x][0]
        elif x not in outs and (axes := _as_state(value, whole["state"])) is not None:
            known[x] = "state", axes
    read = _read(f, region, {*known})
    if read is None or not any(known[x][0] == "out" for x in read):
        return None
    place = {n: at for at, n in enumerate(region.nodes)}
    return scale, tuple(sorted(((place[x], *known[x]) for x in read), key=lambda r: r[1]))


def _read(f: Facts, region: Region, known: set[fx.Node]) -> list[fx.Node] | None:
    """The nodes among the `known` ones that the exits are computed from; none where an exit needs other products."""
    inside = {*region.nodes}
    found: dict[fx.Node, None] = {}
    stack, seen = list(region.exits), set[fx.Node]()
    while stack:
        n = stack.pop()
        if n in seen or n not in inside:
            continue
        seen.add(n)
        if n in known:
            found[n] = None
            continue
        if op_name(n) in _HEAVY:
            return None
        stack += [*n.all_input_nodes, *f.writes(n, f.order[n], len(f.order))]
    return f.in_order(found)


def _as_out(x: torch.Tensor, want: torch.Tensor, cut: Cut) -> tuple[tuple[str, ...], float] | None:
    """The axes of a tensor, and its factor, if its first tokens are those of `want` (*batch, few, e) times that."""
    if x.ndim != 4:
        return None
    extents = {"b0": want.shape[0], "b1": want.shape[1], "e": want.shape[3]}
    for axes in permutations(("b0", "b1", "i", "e")):
        fits = all(s == extents[name] if name in extents else s in (cut.tokens, cut.padded)
                   for name, s in zip(axes, x.shape, strict=True))  # fmt: skip
        if not fits:
            continue
        given = _as(x, axes, cut)[..., : want.shape[-2], :]
        scale = float((given * want).sum() / want.square().sum())
        if scale and float((given - scale * want).abs().max()) <= _SAME * float(given.abs().max()):
            rounded = float(f"{scale:.12g}")
            return axes, 1.0 if abs(scale - 1.0) < 1e-10 else rounded if abs(rounded - scale) < 1e-13 else scale
    return None


def _as(x: torch.Tensor, axes: Sequence[str], cut: Cut) -> torch.Tensor:
    return x.permute([axes.index(name) for name in ("b0", "b1", "i", "e")])


def _same(x: torch.Tensor, want: torch.Tensor, cut: Cut) -> bool:
    """Whether all tokens agree, and what is padded behind them is zero."""
    scale = float(want.abs().max())
    n = want.shape[-2]
    difference = float((x[..., :n, :] - want).abs().max())
    return difference <= _SAME * scale and (x.shape[-2] == n or not bool(x[..., n:, :].any()))


def _as_state(x: torch.Tensor, want: torch.Tensor) -> tuple[str, ...] | None:
    if x.ndim != 4:
        return None
    for axes in permutations(("b0", "b1", "d", "e")):
        order = [axes.index(name) for name in ("b0", "b1", "d", "e")]
        y = x.permute(order)
        if y.shape == want.shape and float((y - want).abs().max()) <= _SAME * float(want.abs().max()):
            return axes
    return None



