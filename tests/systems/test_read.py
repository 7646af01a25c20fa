"""What each row of the systems is read as, without compiling: its attentions, whose interpreter gives what the model
has in float64, and what is left alone, with the code of the reason."""

from __future__ import annotations

import pytest
import torch
from reading.lifted import differences, found

from attncc.bench.systems.catalogue import SYSTEMS
from attncc.bench.systems.system import System
from attncc.patterns.lift import Refusal
from attncc.patterns.linear.linear import Recognised

#: What the driver reads by itself: each branch has a graph of its own.
BRANCHES = "torch.cond"
ROWS = range(1, 47)


def test_every_row_is_there() -> None:
    assert {s.number for s in SYSTEMS} == set(ROWS)
    titles = [s.title for s in SYSTEMS]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("system", [s for s in SYSTEMS if s.spelling != BRANCHES], ids=lambda s: s.title)
def test_a_row_is_read(system: System) -> None:
    model, inputs = system.make(False)
    with torch.no_grad():
        out = model(*inputs)
    for x in out if isinstance(out, tuple) else (out,):
        assert bool(x.isfinite().all()), "a row must be a model that works"
    sites = found(model, *inputs)
    linear = [x for x in sites.sites if isinstance(x, Recognised)]
    assert tuple(x.reason.codes for x in sites.refused) == system.left, [str(x.reason) for x in sites.refused]
    assert (len(sites.lifted), len(linear)) == (system.attentions, system.linear)
    for node, difference in differences(sites).items():
        assert difference < 1e-9, node


@pytest.mark.parametrize("system", [s for s in SYSTEMS if s.kind == "none"], ids=lambda s: s.title)
def test_what_has_nothing_to_compile_is_no_attention(system: System) -> None:
    """A gate is reported, and nothing is an attention or a place that looks like one and is not understood."""
    model, inputs = system.make(False)
    assert all(isinstance(x, Refusal) and x.kept for x in found(model, *inputs).sites)
