"""Which tensors of an attention its gradients flow into, and which stops in its expressions that leaves."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from torch import fx

from attncc.ir.attention import S, W
from attncc.ir.expr import Expr, Load, loads
from attncc.ir.gradients import followed, unstopped
from attncc.ir.reasons import because
from attncc.patterns.site.parts import Lse, Parts
from attncc.patterns.site.reading import Facts, Gradients, Unreadable


@dataclass(frozen=True)
class Flow:
    """`moving` are the tensors that gradients flow into, `product` says whether queries or keys are among them through
    their product. `stopped` are those that gradients would flow into but for the model's stops: they are detached as a
    whole, so that no gradient comes of them, not even one of zeros."""

    moving: frozenset[fx.Node] = frozenset()
    product: bool = False
    stopped: frozenset[fx.Node] = frozenset()

    def of(self, x: Expr, by_name: dict[str, fx.Node]) -> bool:
        """Whether gradients flow into a part of an expression."""
        found = followed(x)
        loaded = any(isinstance(y, Load) and by_name[y.tensor] in self.moving for y in found)
        return loaded or (S in found and self.product)


def agrees(f: Facts, node: fx.Node, tensors: Iterable[fx.Node], moving: Collection[fx.Node]) -> bool:
    """Whether attentions in the place of `node` pass gradients to those of their tensors that the model does: so it is
    if every stop between was read."""
    g, use = f.gradients, f.order[node]
    if g is None or not f.wants_grad(use):
        return True
    ends = {n: _sources(f, n) for n in tensors}
    known = frozenset[fx.Node]().union(*ends.values())
    direct, stops = _reached(f, g, node, known)
    if not stops:
        return True
    through, _ = _reached(f, g, node, frozenset())

    def in_any(n: fx.Node, found: Collection[fx.Node]) -> bool:
        return any(x in found and g.follows(x, use) for x in ends[n])

    gets = {n for n in ends if n in moving and g.follows(n, use)}
    return all(in_any(n, through) if n in gets else not in_any(n, direct) for n in ends)


def _reached(f: Facts, g: Gradients, node: fx.Node, ends: Collection[fx.Node]) -> tuple[set[fx.Node], bool]:
    """What gradients flow into from a node, no further than to `ends`, and whether they are stopped anywhere."""
    use, stops = f.order[node], False
    seen, stack = {node}, [node]
    while stack:
        n = stack.pop()
        if n in ends:
            continue
        at = f.order[n]
        below = [*n.all_input_nodes, *f.writes(n, at, use)]
        stops = stops or any(g.stopped(a, max(at, f.order[a] + 1)) for a in below)
        fresh = [a for a in below if a not in seen and g.follows(a, max(at, f.order[a] + 1))]
        seen.update(fresh)
        stack += fresh
    return seen, stops


def _sources(f: Facts, n: fx.Node) -> frozenset[fx.Node]:
    """Nodes of the graph itself that a tensor is, or is made from."""
    if n not in f.made:
        return frozenset({n})
    return frozenset[fx.Node]().union(*(_sources(f, a) for a in n.all_input_nodes))


def settled(p: Parts, node: fx.Node, lse: Lse | None) -> tuple[Parts, Flow]:
    """`p` with the stops that its tensors do not make superfluous, and its flow. Raises Unreadable where only one of
    its outputs has gradients."""
    f, use = p.facts, p.facts.order[node]
    g = f.gradients
    if lse is not None and f.wants_grad(use) != f.wants_grad(f.order[lse.node]):
        raise Unreadable(lse.node, because("stopped-one-side"))
    if g is None or not f.wants_grad(use):
        return p, Flow()
    inner = [p.score] if p.sink is None else [p.score, p.sink]
    reached = followed(p.weight)
    if W in reached or lse is not None:
        reached |= followed(*inner)

    def flowing(nodes: Iterable[fx.Node]) -> frozenset[fx.Node]:
        return frozenset(n for n in nodes if g.follows(n, use))

    operands = [p.q.node, p.k.node] if S in reached else []
    moving = flowing([p.v.node, *operands, *(f.by_name[x.tensor] for x in reached if isinstance(x, Load))])
    read = [f.by_name[x.tensor] for x in loads(p.weight, p.mask, *inner)]
    below = {p.q.node, p.k.node, *(f.by_name[x.tensor] for x in loads(*inner))}

    def superfluous(x: Expr) -> bool:
        if isinstance(x, Load):
            return f.by_name[x.tensor] not in moving
        return not moving & ({p.q.node, p.k.node} if x is S else below)

    def bare(x: Expr) -> Expr:
        return unstopped(x, superfluous)

    parts = replace(p, score=bare(p.score), weight=bare(p.weight), sink=None if p.sink is None else bare(p.sink))
    return parts, Flow(moving, bool(flowing(operands)), flowing([p.q.node, p.k.node, *read]) - moving)
