"""Whatever fails inside attncc, the model runs right: each function of it is made to fail, through Inductor."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import CodeType
from typing import Any

import pytest
import torch
from failing_programs import PROGRAMS, Program
from injected import failing, recorded
from torch import Tensor, fx

from attncc.driver import backend, rewriting
from attncc.torch_private.state import settings

assert rewriting  # what is loaded with it is no step of a compilation
#: The net itself: what is left to do when everything else has failed.
NET = {
    "driver/backend.py:rewrite", "driver/rewriting.py:rewrite", "driver/rewriting.py:left_alone",
    "driver/rewriting.py:_undropped", "driver/graph_edits.py:GraphEdits.__init__",
    "attncc/errors.py:unforeseen", "attncc/errors.py:line", "attncc/errors.py:strict",
}  # fmt: skip
#: What is called, or not, by what was built before.
ON_DISK = ("runtime/store", "runtime/cpp.py:CppToolchain", "runtime/compilers", "runtime/libraries")
#: Of the driver's functions and of all others one in so many is made to fail by default, and each in the full run.
DRIVERS, OTHERS = 18, 180


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def forget() -> None:
    """Empty the caches of attncc's functions, so that a compilation goes through all of them again."""
    for name, module in list(sys.modules.items()):
        if name.startswith("attncc") and "torch_private" not in name:
            for value in list(vars(module).values()):
                getattr(value, "cache_clear", lambda: None)()
    from attncc.driver import selection  # noqa: PLC0415 - beside the others whose caches are emptied here

    selection._decided.clear()


class Watched:
    """attncc's backend, with what happens to a graph while it is rewritten inside a context."""

    def __init__(self, around: Callable[[], AbstractContextManager[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
        self.around, self.depth, self.results = around, 0, []
        self._rewrite = backend.rewrite
        monkeypatch.setattr(backend, "rewrite", self.rewrite)

    def rewrite(self, gm: fx.GraphModule, *args: Any, **kwargs: Any) -> fx.GraphModule:
        graph, nodes, kept = gm.graph, list(gm.graph.nodes), [dict(vars(n)) for n in gm.graph.nodes]
        metadata, code = [dict(n.meta) for n in nodes], gm.code
        state = [(s.name, s.read()) for s in settings()]
        with self.around() as result:
            made = self._rewrite(gm, *args, **kwargs)
        self.results.append(result)
        assert [(s.name, s.read()) for s in settings()] == state
        assert list(graph.nodes) == nodes and [dict(vars(n)) for n in nodes] == kept
        assert [dict(n.meta) for n in nodes] == metadata
        for mine, given in zip(gm.graph.find_nodes(op="placeholder"), graph.find_nodes(op="placeholder"), strict=True):
            assert mine._dynamo_source is given._dynamo_source and mine.meta is given.meta
        if gm.graph is graph:
            assert gm.code == code
        return made


def results(program: Program, run: Callable[..., Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    given = [x.detach().requires_grad_(program.grad and x.is_floating_point()) for x in given]
    with torch.set_grad_enabled(program.grad):
        out = run(*given)
    return [out.detach(), *(torch.autograd.grad(out.square().sum(), given) if program.grad else ())]


def check(program: Program, run: Callable[..., Tensor], given: Sequence[Tensor], want: list[Tensor]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="attncc", dynamic=program.dynamic, options={"measure": False})
    have = results(program, compiled, given)
    tolerance = 2e-2 if want[0].dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance)


def chosen(names: dict[str, CodeType], full: bool) -> list[str]:
    """The functions to fail at. What the store and the compiler do depends on what lies on disk: not theirs."""
    steps = [n for n in names if n not in NET and not n.startswith(ON_DISK)]
    driver = [n for n in steps if n.startswith(("driver/", "torch_private/"))]
    others = [n for n in steps if n not in driver]
    return [*driver[:: 1 if full else DRIVERS], *others[:: 1 if full else OTHERS]]


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_failing_step_costs_the_model(
    name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("ATTNCC_CHECK", "off")  # what it calls depends on the store, which remembers
    program = PROGRAMS[name]
    run, given = program.make()
    want = results(program, run, given)
    forget()
    watched = Watched(recorded, monkeypatch)
    check(program, run, given, want)
    names = {name: code for found in watched.results for name, code in found.items()}
    full = request.config.option.full
    steps = [n for n in chosen(names, full) if n not in _tried]
    _tried.update(steps)
    assert len(names) > 2
    wrong: list[str] = []
    for step in steps:
        for _ in range(3):  # what is measured may come out otherwise on a busy machine, and take another way
            forget()
            watched.around, watched.results = lambda step=step: failing(step), []
            try:
                check(program, run, given, want)
            except Exception as error:  # the next steps are tried, too
                wrong.append(f"{step}: {type(error).__name__}: {str(error)[:300]}")
            if any(watched.results):
                break
        if not any(watched.results):
            wrong.append(f"{step} was not called")
    gc.collect()
    assert not wrong, "\n".join(wrong)


#: Steps that an earlier program failed at.
_tried: set[str] = set()
