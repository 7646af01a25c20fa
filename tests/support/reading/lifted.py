"""What is found in a model without compiling it: its sites, and what the graph would hold with these in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from attncc.ir import interpret
from attncc.ir.evaluate import Evaluator
from attncc.patterns.graph.facts import Facts
from attncc.patterns.lift import Refusal, lift_all
from attncc.patterns.site.assemble import Lifted
from reading.asked import Asked, Q


@dataclass(frozen=True)
class Found:
    of: Asked
    sites: tuple[Any, ...]

    @property
    def lifted(self) -> list[Lifted]:
        return [x for x in self.sites if isinstance(x, Lifted)]

    @property
    def refused(self) -> list[Refusal]:
        return [x for x in self.sites if isinstance(x, Refusal)]


def found(model: nn.Module, *inputs: Q, dtype: torch.dtype = torch.float64) -> Found:
    """The sites of a model, in `dtype`, as its forward traces without Dynamo."""
    model = model.to(dtype).eval()
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    names = list(state)

    def call(*given: Q) -> Any:
        return torch.func.functional_call(model, dict(zip(names, given, strict=False)), given[len(names) :])

    with torch.no_grad():
        given = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
        of = Asked(call, *(x.detach() for x in state.values()), *given)
    placed = [n for n in of.facts.nodes if n.op == "placeholder"]
    learned = {n for n, name in zip(placed, names, strict=False) if name in dict(model.named_parameters())}
    of.facts = Facts(of.module.graph, parameters=frozenset(learned))
    return Found(of, tuple(lift_all(of.facts)))


def differences(f: Found) -> dict[str, float]:
    """How far each node is that sites take the place of from what the interpreter makes of these, relative to its
    largest element. Those whose rows are merged from pieces are left out."""
    by_node: dict[fx.Node, list[Lifted]] = defaultdict(list)
    for site in f.lifted:
        by_node[site.node].append(site)
    whole = {n: sites for n, sites in by_node.items() if all(site.piece is None for site in sites)}
    with torch.no_grad():  # a graph that is left in the middle does not turn gradients on again
        held = f.of.held_when({n.name for n in whole})
    return {
        n.name: _difference(sum(_in_place(site, held[n.name]) for site in sites), held[n.name][n.name])
        for n, sites in whole.items()
    }


def _in_place(site: Lifted, held: Mapping[str, Any]) -> Any:
    a = site.attention
    tensors = {t.name: held[n.name] for t, n in zip(a.tensors, site.tensors, strict=True)}
    sizes = [int(Evaluator({}, {}, torch.float64)(x)) for x in site.sizes]
    out = interpret(a, tensors, sizes, compute=torch.float64)["out"]
    if site.summed:
        out = out.sum(site.summed)
    return out.permute(site.order).reshape(held[site.node.name].shape)


def _difference(got: Q, want: Q) -> float:
    same = got.isnan() == want.isnan()
    if not bool(same.all()):
        return float("inf")
    return float((got - want).nan_to_num(0.0).abs().max() / want.nan_to_num(0.0).abs().max().clamp(min=1e-3))
