"""Sites that are fused together or not at all: the terms of one product, and attentions that share scores.

Scores that two attentions read need not exist once both are fused; scores that anything else reads must, and then
nothing is to be gained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from attncc.patterns.graph.facts import Facts
from attncc.patterns.reader.contractions import contraction
from attncc.patterns.site.assemble import Lifted


@dataclass(frozen=True)
class SiteGroup:
    """`sites` in the order of the graph; `user` is who needs their scores or weights, if somebody does."""

    sites: tuple[Lifted, ...]
    user: fx.Node | None = None


def together(sites: Sequence[Lifted], facts: Facts) -> list[SiteGroup]:
    """The sites in groups, each to be decided as one."""
    made = {id(s): _Scores(s, facts) for s in sites}
    fused = list(sites)
    blocked: dict[fx.Node, fx.Node] = {}  # the node of a site -> who needs its scores
    while True:
        gone = {n for s in fused for n in (*made[id(s)].nodes, *s.nodes)}
        found = {s.node: u for s in fused for u in reversed(made[id(s)].users) if u not in gone}
        if not found:
            break
        blocked |= found
        fused = [s for s in fused if s.node not in found]
    groups: list[list[Lifted]] = []
    for s in fused:
        linked = [g for g in groups if any(_linked(made[id(s)], made[id(t)]) for t in g)]
        groups = [g for g in groups if g not in linked] + [[*(t for g in linked for t in g), s]]
    kept = {n: tuple(s for s in sites if s.node is n) for n in blocked}
    return [*(SiteGroup(tuple(g)) for g in groups), *(SiteGroup(g, blocked[n]) for n, g in kept.items())]


def _linked(a: _Scores, b: _Scores) -> bool:
    return a.site.node is b.site.node or a.reaches(b) or b.reaches(a)


class _Scores:
    """The scores and weights that a site computes on its way (`nodes`), and who uses them outside (`users`)."""

    def __init__(self, site: Lifted, facts: Facts) -> None:
        self.site = site
        self.nodes: set[fx.Node] = set()
        self.users: list[fx.Node] = list(site.other_users)
        stops = sources(site.tensors, facts)
        inside = between(site.nodes, stops, facts)
        within = set(inside)
        moving = sources(operands(site), facts)
        for n in inside:
            if n in stops or n in site.nodes[1:] or facts.is_number(n) or moving.isdisjoint(n.all_input_nodes):
                continue
            moving.add(n)
            product = contraction(facts, n)
            scored = product is not None and product.lhs in moving and product.rhs in moving
            if n is site.node or not (scored or any(a in self.nodes for a in n.all_input_nodes)):
                continue
            self.nodes.add(n)
            self.users += [
                u for u in n.users if u in facts.live and not facts.is_number(u) and (u not in within or u in stops)
            ]

    def reaches(self, other: _Scores) -> bool:
        return any(u in other.nodes or u in other.site.nodes for u in self.users)


def operands(site: Lifted) -> list[fx.Node]:
    """The nodes that queries, keys and values are read from."""
    a = site.attention
    names = {a.q.tensor, a.k.tensor, a.v.tensor}
    return [n for n, t in zip(site.tensors, a.tensors, strict=True) if t.name in names]


def sources(tensors: Iterable[fx.Node], facts: Facts) -> set[fx.Node]:
    """Nodes of the graph itself that tensors are, or are made from."""
    found: set[fx.Node] = set()
    stack = list(tensors)
    while stack:
        n = stack.pop()
        if n in facts.made:
            stack += n.all_input_nodes
        else:
            found.add(n)
    return found


def between(nodes: Sequence[fx.Node], stops: set[fx.Node], facts: Facts) -> list[fx.Node]:
    """Everything that some nodes of a graph are computed from, back to `stops`, in graph order, with what is written
    into tensors made on the way."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    last = max(facts.order[n] for n in nodes) if nodes else 0
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            if n not in stops:
                inputs = n.all_input_nodes
                stack += inputs
                if n.op == "call_function" and not any(facts.aliases(n, a) for a in inputs):
                    stack += facts.writes(n, facts.order[n], last)
    return facts.in_order(seen)
