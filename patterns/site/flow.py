"""Which tensors of an attention its gradients flow into, and which stops in its expressions that leaves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import fx

from attncc.ir.attention import S, W
from attncc.ir.expr import Expr, Load, loads
from attncc.ir.gradients import followed, unstopped
from attncc.patterns.reader.value import Unreadable

if TYPE_CHECKING:
    from attncc.patterns.site.assemble import Lse, Parts


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


def settled(p: Parts, node: fx.Node, lse: Lse | None) -> tuple[Parts, Flow]:
    """`p` with the stops that its tensors do not make superfluous, and its flow. Raises Unreadable where only one of
    its outputs has gradients."""
    f, use = p.facts, p.facts.order[node]
    g = f.gradients
    if lse is not None and f.watched(use) != f.watched(f.order[lse.node]):
        raise Unreadable(lse.node, "gradients are stopped for the values alone, or for the sums of the rows alone")
    if g is None or not f.watched(use):
        return p, Flow()
    inner = [p.score] if p.sink is None else [p.score, p.sink]
    reached = followed(p.weight)
    if W in reached or lse is not None:
        reached |= followed(*inner)

    def flowing(nodes: Iterable[fx.Node]) -> frozenset[fx.Node]:
        return frozenset(n for n in nodes if g.follows(n, use))

    operands = [p.q.node, p.k.node] if S in reached else []
    moving = flowing([p.v.node, *operands, *(f.by_name[x.tensor] for x in reached if isinstance(x, Load))])
    read = [f.by_name[x.tensor] for x in loads(p.weight, *inner) if x.kind == "float"]
    below = {p.q.node, p.k.node, *(f.by_name[x.tensor] for x in loads(*inner))}

    def superfluous(x: Expr) -> bool:
        if isinstance(x, Load):
            return f.by_name[x.tensor] not in moving
        return not moving & ({p.q.node, p.k.node} if x is S else below)

    def bare(x: Expr) -> Expr:
        return unstopped(x, superfluous)

    parts = replace(p, score=bare(p.score), weight=bare(p.weight), sink=None if p.sink is None else bare(p.sink))
    return parts, Flow(moving, bool(flowing(operands)), flowing([p.q.node, p.k.node, *read]) - moving)
