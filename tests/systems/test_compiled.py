"""Each row compiled, every attention of it by its kernel: outputs, and gradients where it trains, beside float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from systems.compiled import compiled

from attncc.bench.systems.catalogue import SYSTEMS
from attncc.bench.systems.system import System

#: Attentions whose weights or scores the model needs itself, or of which one reads what another gives: kept.
KEPT = {
    "12 SparseD (step that selects)": 1,
    "13 Rectified SpaAttn (written out)": 1,
    "24 Cost aggregation (scores come out)": 1,
    "29 Grad-SAM (maps come out)": 2,
    "44 Graph of tokens (router after attention)": 1,
    "44 Graph of tokens (router beside attention)": 1,
}
#: Attentions that another one holds the columns of: one softmax, several values.
JOINED = {
    "24 Cost aggregation (one softmax, two values)": 1,
    "28 RefAM (chosen columns)": 1,
    "44 Graph of tokens (router beside attention)": 1,
}
#: A branch is compiled on every change: nothing else reads what the driver does with it.
ALWAYS = ("18 Flux Attention (torch.cond)", "28 RefAM (chosen columns)", "36 Attention-ResUNet (additive gate)")
#: Trained on every change: an attention that is itself where gradients are off.
ALWAYS_TRAINED = ("11 Sparsifiner (scattered mask)",)


def _cases(systems: Sequence[System], always: Sequence[str]) -> list[object]:
    return [pytest.param(s, id=s.title, marks=() if s.title in always else pytest.mark.full) for s in systems]


@pytest.mark.parametrize("system", _cases(SYSTEMS, ALWAYS))
def test_a_row_is_compiled(system: System) -> None:
    found = compiled(system, trains=False)
    assert found.holds(), (found.errors, found.own)
    statuses = [s.status for s in found.sites]
    kept = KEPT.get(system.title, 0) + JOINED.get(system.title, 0)
    assert statuses.count("fused") == system.attentions - kept, [s.reason for s in found.sites]
    assert not Counter(system.left) - Counter(s.code for s in found.sites), "each place is reported, gates too"


@pytest.mark.parametrize("system", _cases([s for s in SYSTEMS if s.trains], ALWAYS_TRAINED))
def test_a_row_is_trained(system: System) -> None:
    found = compiled(system, trains=True)
    assert found.holds(), (found.errors, found.own)
