"""Real models, compiled: the numbers of the eager model, every attention found, nothing else taken for one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from zoo.case import Case
from zoo.models import CASES, QUICK
from zoo.run import outcome

#: Another order of summation may be worse than eager's by this much.
FACTOR = 3.0

#: Models of which operands are made: rows of length one, tables by distance, mixed heads, centred points.
MAKING = {
    "autocast-off", "bucketed", "cosine-similarities", "mixed-twice", "mt5-encoder", "radial", "rolled-rows",
    "spread-out", "squared-cdist", "t5", "talking-before", "talking-by-query", "talking-in-turn", "talking-residual",
    "talking-to-one-query", "talking-with-biases", "wavlm", "weighed-features",
}  # fmt: skip
assert {case.name for case in CASES} >= MAKING

pytestmark = pytest.mark.filterwarnings("ignore")


def marked(case: Case, *values: object, name: str, whole: bool = False, rare: bool = False) -> object:
    marks = [] if case.name in QUICK and not rare else [pytest.mark.full]
    if whole and case.missing:
        marks.append(pytest.mark.xfail(reason=case.missing, strict=True))
    return pytest.param(case, *values, id=name, marks=marks)


def titled(case: Case, dtype: torch.dtype) -> str:
    return case.name if dtype == torch.float32 else f"{case.name}-{str(dtype).removeprefix('torch.')}"


#: Types of 16 bits on every change where something of the form is rounded; the others have them with `--full`.
ROUNDED = frozenset({"llama-eager"})
runs = [
    marked(case, dtype, name=titled(case, dtype), rare=dtype != torch.float32 and case.name not in ROUNDED)
    for case in CASES for dtype in case.dtypes
]  # fmt: skip
each = pytest.mark.parametrize("case", [marked(case, name=case.name, whole=True) for case in CASES])


@pytest.mark.parametrize(("case", "dtype"), runs)
def test_numbers(case: Case, dtype: torch.dtype) -> None:
    for error in outcome(case, dtype).errors:
        assert error.fine(FACTOR), error


@each
def test_sites(case: Case) -> None:
    report = outcome(case, case.dtypes[0]).report
    assert not report.notes
    reasons = [f"{s.status}: {s.reason}" for s in report.sites if s.reason]
    assert not any("could not be read: " in reason for reason in reasons), reasons
    assert (report.fused, report.kept, report.refused) == (case.sites - case.kept, case.kept, case.refused), reasons


@pytest.mark.parametrize("case", [marked(case, name=case.name) for case in CASES])
def test_questions_change_no_graph(case: Case) -> None:
    """What lifting needs beyond the graph is made beside it."""
    liftings = outcome(case, case.dtypes[0]).liftings
    assert all(x.same for x in liftings)
    assert bool(liftings) or not case.sites
    assert case.name not in MAKING or any(x.made for x in liftings)


@pytest.mark.parametrize("case", [marked(c, name=c.name) for c in CASES if c.golden is not None])
def test_ir_text(case: Case, golden: Callable[[str, str], None]) -> None:
    sites = outcome(case, case.dtypes[0]).report.sites
    assert case.golden is not None and case.golden < len(sites)
    golden(f"zoo/{case.name}.txt", sites[case.golden].ir or "")
