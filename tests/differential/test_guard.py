"""The guard of a plan: calls whose approximate form is too far off run exact, and are counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from planned.keyed import Keyed, sample
from planned.made import plan, site
from policies.situations import SITUATIONS, Situation

import attncc
from attncc.driver.guarding import ROWS, error_of, forget, rows_of
from attncc.ir import interpret


@pytest.fixture(autouse=True)
def _counts_from_nothing() -> Iterator[None]:
    forget()
    torch.compiler.reset()
    yield
    forget()


def bounded(model: Any, bound: float | None, head: int = 0, **more: Any) -> Any:
    return plan(model, msgspec.structs.replace(site(heads=(head,)), bound=bound), **more)


def run(model: Any, known: Any, x: torch.Tensor, *, times: int = 1, **options: Any) -> tuple[torch.Tensor, Any]:
    torch.compiler.reset()
    compiled = torch.compile(model, backend="attncc", options={"plan": known, "inductor": False, **options})
    with torch.no_grad(), attncc.record() as report:
        found = [compiled(x) for _ in range(times)]
    return found[-1], report


@pytest.mark.parametrize("s", SITUATIONS, ids=str)
def test_rows_of_the_exact_attention(s: Situation) -> None:
    """What the guard compares with is the attention itself, at the rows that it looks at."""
    a, data = s.attention(), s.tensors()
    tensors = [data[t.name] for t in a.tensors]
    out = interpret(a, data, s.sizes)["out"]
    for call in range(3):
        assert error_of(a, tensors, s.sizes, out, call) < 1e-5
        off = out.clone()
        off[:, :, int(rows_of(s.n, call)[5])] += 1.0
        assert error_of(a, tensors, s.sizes, off, call) > 0.1
    assert error_of(a, tensors, s.sizes, out * float("nan"), 0) == float("inf")


def test_every_row_is_looked_at_in_some_call() -> None:
    for n in (1, 5, 37, 200):
        found = [rows_of(n, call) for call in range(40)]
        assert all(x.shape == (ROWS,) and int(x.min()) >= 0 and int(x.max()) < n for x in found)
        assert len(torch.cat(found).unique()) == n


def test_calls_within_the_bound_keep_their_form() -> None:
    model, x = Keyed().eval(), sample(1)
    sparse, _ = run(model, bounded(model, 0.9), x)
    found, report = run(model, bounded(model, 0.9), x, guard=True, times=3)
    assert torch.equal(found, sparse)
    (own,) = report.guard
    assert own.site == "blocks.0, prefill" and own.calls == 3 and own.trips == 0 and 0 < own.worst < 0.9
    assert report.to_dict()["guard"][0]["calls"] == 3
    assert any("0 of 3 calls" in note for note in report.notes)


def test_calls_beyond_it_run_exact_and_are_counted() -> None:
    model, x = Keyed().eval(), sample(1)
    with torch.no_grad():
        exact = model(x)
    sparse, _ = run(model, bounded(model, 1e-3, head=1), x)  # which is to look far, and cannot
    found, report = run(model, bounded(model, 1e-3, head=1), x, guard=True, times=2)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sparse, exact, rtol=1e-4, atol=1e-4)
    assert report.guard[0].trips == report.guard[0].calls == 2


@pytest.mark.full
def test_under_inductor() -> None:
    model, x = Keyed().eval(), sample(1)
    with torch.no_grad():
        exact = model(x)
    found, report = run(model, bounded(model, 1e-7), x, guard=True, inductor=True)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    assert report.guard[0].trips == 1


def test_calls_of_other_lengths_are_counted() -> None:
    model, x = Keyed().eval(), sample(1)
    _, report = run(model, bounded(model, 0.9, lengths=(600, 700)), x, times=2)
    assert report.outside == 2 and report.guard == ()
    assert any("2 calls had lengths" in note for note in report.notes)


def test_what_cannot_be_guarded_says_so() -> None:
    model, x = Keyed().eval(), sample(1)
    with pytest.warns(UserWarning, match="no bounds for its guard"):
        _, report = run(model, bounded(model, None), x, guard=True)
    assert report.guard == () and any("no bounds" in note for note in report.notes)
    with pytest.raises(Exception, match="the option 'guard' needs a plan"):
        torch.compile(model, backend="attncc", options={"guard": True})(x)
