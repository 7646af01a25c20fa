"""Several values of one softmax as one attention: each is what the model has, and what must stay apart does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reading.lifting import read, values
from torch import fx

from attncc.bench.systems.catalogue import SYSTEMS
from attncc.bench.systems.system import System
from attncc.ir.program import interpret_program
from attncc.patterns.graph.facts import Facts
from attncc.patterns.lift import lift_all
from attncc.patterns.site.assemble import Lifted
from attncc.patterns.site.beside import joined
from attncc.patterns.site.program import program_of

WHOLE = {
    "24 Cost aggregation (one softmax, two values)": 2,
    "28 RefAM (chosen columns)": 2,
    "44 Graph of tokens (router beside attention)": 2,
}
#: The second values are computed from what the first give, or the model writes to memory between the two products.
APART = ("44 Graph of tokens (router after attention)", "28 RefAM (product with the words)")


def reading(system: System) -> tuple[list[Lifted], Facts, fx.GraphModule, list[Any]]:
    """The attentions that hold the columns of several, and what they were read from."""
    model, inputs = system.make(False)
    with torch.no_grad():
        facts, shadow, given = read(model, *inputs)
    sites = [x for x in lift_all(facts) if isinstance(x, Lifted)]
    return [x for x in joined(sites, facts).values() if x is not None], facts, shadow, given


@pytest.mark.parametrize("system", [s for s in SYSTEMS if s.title in WHOLE], ids=lambda s: s.title)
def test_columns_are_what_the_model_has(system: System) -> None:
    (site,), facts, shadow, inputs = reading(system)
    assert len(site.columns) == len(site.nodes) == WHOLE[system.title]
    held = values(shadow, inputs)
    program = program_of([site], facts)
    for n in facts.in_order(n for n in program.inputs if n in facts.made):
        made(n, held)
    given = {t.name: held[n.name] for t, n in zip(program.program.inputs, program.inputs, strict=True)}
    found = interpret_program(program.program, given, [])
    for n, x in zip(program.outputs, found.values(), strict=True):
        torch.testing.assert_close(x.double(), held[n.name], rtol=1e-5, atol=1e-6)


def made(n: fx.Node, held: dict[str, Any]) -> Any:
    """What a node beside the graph holds."""
    if n.name not in held:
        target: Any = n.target
        held[n.name] = target(*fx.map_arg(n.args, lambda x: made(x, held)), **n.kwargs)
    return held[n.name]


@pytest.mark.parametrize("system", [s for s in SYSTEMS if s.title in APART], ids=lambda s: s.title)
def test_what_must_stay_apart_does(system: System) -> None:
    assert reading(system)[0] == []
