"""Every hand-written form of the zoo, read without compiling it: its sites are found, and the interpreter makes of them
what the model has there. Compiled they run in `tests/zoo`, few on every change."""

from __future__ import annotations

import pytest
import torch
from reading.lifted import differences, found
from zoo.blocks import BLOCKED
from zoo.case import Case
from zoo.forms import FORMS
from zoo.guards import GUARDS
from zoo.images import IMAGES
from zoo.joint import JOINT
from zoo.memory import MEMORY
from zoo.reported import REPORTED
from zoo.sizes import SIZES
from zoo.sliding import SLIDING
from zoo.spellings import SPELLINGS
from zoo.wild import WILD

from attncc.patterns.site.beside import joined

#: Forms that go through float32 by their own words, which a float64 model is left alone for.
NARROW = frozenset({"in-float32", "lowest-maximum", "differential"})
#: What the driver does while it reads: functions under `torch.vmap`, and einsums of several factors taken apart.
BY_DYNAMO = frozenset({"by-vmap", "three-factors"})
#: Scores compared with one of themselves: computed twice, which of the two is larger depends on the order of their sums
#: (and so the driver keeps such a site, whose scores exist anyway).
TIED = frozenset({"strongest"})
FORMS_OF_ALL = (
    *SPELLINGS, *GUARDS, *WILD, *FORMS, *JOINT, *IMAGES, *MEMORY, *SLIDING, *BLOCKED, *SIZES, *REPORTED,
)
CASES = [case for case in FORMS_OF_ALL if case.name not in BY_DYNAMO]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sites_give_what_the_model_has(case: Case) -> None:
    model, inputs, more = case.make()
    assert not more
    narrow = case.name in NARROW
    sites = found(model, *inputs, dtype=torch.float32 if narrow else torch.float64)
    reasons = [x.reason for x in sites.refused]
    beside = joined(list(sites.lifted), sites.of.facts)  # several values of one softmax are one attention
    gone = sum(x is None for x in beside.values())
    assert (len(sites.sites) - len(reasons) - gone, len(reasons)) == (case.sites, case.refused), reasons
    for node, difference in differences(sites).items() if case.name not in TIED else ():
        assert difference < (1e-4 if narrow else 1e-9), node
