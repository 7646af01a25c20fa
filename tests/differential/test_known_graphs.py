"""Edits of graphs that an earlier process made are made again without reading, exactly; whatever is not known to be the
same is read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from failing_programs import PROGRAMS
from torch import Tensor, fx

from attncc.driver import capture, known_edits, known_graphs, selection
from attncc.driver.backend import attncc_backend
from attncc.driver.ran import Ran
from attncc.ir.reasons import because
from attncc.kernels import build
from attncc.report.site import Site
from attncc.runtime import measure
from attncc.runtime.store import Store

Run = Callable[..., Tensor]
FAST = {"inductor": False, "measure": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(autouse=True)
def fresh(folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels of all tests, and edits of none but the test's own."""
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(folder))
    monkeypatch.setenv("ATTNCC_EDITS", "on")
    monkeypatch.setattr(known_graphs, "own_code", lambda: request.node.name)
    yield
    torch._dynamo.reset()


class Compiled:
    """What one compilation came to: the edited graph's code, the sites, the result, and whether the graph was read."""

    def __init__(self, run: Run, given: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, **options: bool) -> None:
        self.reads, self.codes, self.sites = 0, list[str](), list[Site]()
        read = capture.read

        def counted(*args: Any) -> capture.Reading:
            self.reads += 1
            return read(*args)

        def compiled(gm: fx.GraphModule, inputs: Any) -> Run:
            made = attncc_backend(gm, inputs, options=FAST | options)
            self.codes.append(str(gm.code))
            self.sites += made.found.sites if isinstance(made, Ran) else []
            return made

        torch._dynamo.reset()
        selection._decided.clear()
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(capture, "read", counted)
            self.result = torch.compile(run, backend=compiled, dynamic=False)(*given)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = (q @ k.mT * 0.25).softmax(-1) @ v
    return F.scaled_dot_product_attention(F.relu(x) + 1, k, v)


def refused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).amax(-1) + v.sum(-1)


def given(dtype: torch.dtype = torch.float32, n: int = 9) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 2, n, 16, generator=torch.Generator().manual_seed(at)).to(dtype) for at in range(3))


EXACT: dict[str, tuple[Run, tuple[Tensor, ...]]] = {
    "attention": (attention, given()),
    "refused": (refused, given()),
    **{name: PROGRAMS[name].make() for name in ("two sites", "in pieces", "einsums") if name in PROGRAMS},
}


def some(names: Iterable[str], *always: str) -> list[Any]:
    """All of the names with `full`, some of them on every change."""
    return [pytest.param(x, marks=() if x in always else pytest.mark.full) for x in names]


@pytest.mark.parametrize("name", some(EXACT, "attention"))
def test_what_is_known_is_edited_alike_and_not_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = (Compiled(*EXACT[name], monkeypatch) for _ in range(2))
    assert (first.reads, again.reads) == (1, 0)
    assert again.codes == first.codes and first.sites
    for old, new in zip(first.sites, again.sites, strict=True):
        for f in fields(Site):
            assert getattr(old, f.name) == getattr(new, f.name), f.name
    assert torch.equal(first.result, again.result)


def other_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = (q @ k.mT * 0.26).softmax(-1) @ v
    return F.scaled_dot_product_attention(F.relu(x) + 1, k, v)


DIFFERENT: dict[str, Callable[[pytest.MonkeyPatch], tuple[Run, tuple[Tensor, ...], dict[str, bool]]]] = {
    "a number": lambda _: (other_scale, given(), {}),
    "dtype": lambda _: (attention, given(torch.bfloat16), {}),
    "shape": lambda _: (attention, given(n=10), {}),
    "strides": lambda _: (attention, tuple(x.mT.contiguous().mT for x in given()), {}),
    "one tensor": lambda _: (attention, (given()[0], *(given()[1],) * 2), {}),
    "one memory": lambda _: (attention, tuple(torch.stack(given()).unbind()), {}),
    "an option": lambda _: (attention, given(), {"measure": True}),
    "instruction set": lambda p: (p.setenv("ATTNCC_ISA", "avx2"), (attention, given(), {}))[1],
    "attncc's code": lambda p: (p.setattr(known_graphs, "own_code", lambda: "other"), (attention, given(), {}))[1],
    "choices made anew": lambda p: (anew(), (attention, given(), {}))[1],
    "asked to choose": lambda p: (p.setenv("ATTNCC_REMEASURE", "all"), (attention, given(), {}))[1],
    "off": lambda p: (p.setenv("ATTNCC_EDITS", "off"), (attention, given(), {}))[1],
}  # fmt: skip


def anew() -> None:
    assert build.default_store().remember(measure._GENERATION, {"of": "another"})


@pytest.mark.parametrize("name", some(DIFFERENT, "a number", "attncc's code"))
def test_what_differs_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "instruction set" and build.target_of(torch.device("cpu")).arch == "avx2":
        pytest.skip("the machine has no other")
    monkeypatch.setattr(selection, "_measure", lambda *_: selection.Choice(True, None, because("measuring-off")))
    assert Compiled(attention, given(), monkeypatch).reads == 1
    assert Compiled(attention, given(), monkeypatch).reads == 0
    with monkeypatch.context() as patch:
        run, tensors, options = DIFFERENT[name](patch)
        other = Compiled(run, tensors, monkeypatch, **options)
    assert other.reads == 1
    torch.testing.assert_close(other.result, run(*tensors), atol=2e-2, rtol=2e-2)


UNKNOWN: dict[str, Callable[[], tuple[Run, tuple[Any, ...]]]] = {
    "gradients": lambda: (lambda *x: attention_with_gradients(*x), given()),
    "own operator": lambda: (lambda *x: attention(*x) + noise(x[0]), given()),
}


@torch.library.custom_op("attncc_tests::noise", mutates_args=())
def noise(x: Tensor) -> Tensor:
    return x * 2


@noise.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def attention_with_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.enable_grad():
        return torch.autograd.grad(attention(q.requires_grad_(), k, v).sum(), q)[0]


@pytest.mark.parametrize("name", some(["own operator", *(n for n, p in PROGRAMS.items() if p.grad or p.dynamic)]))
def test_what_is_not_known_for_certain_has_no_digest(name: str) -> None:
    if name in UNKNOWN:
        run, tensors, grad, dynamic = *UNKNOWN[name](), False, False
    else:
        program = PROGRAMS[name]
        run, tensors = program.make()
        tensors = tuple(x.requires_grad_(program.grad and x.is_floating_point()) for x in tensors)
        grad, dynamic = program.grad, bool(program.dynamic)
    found: list[str | None] = []

    def keep(gm: fx.GraphModule, inputs: Any) -> Run:
        found.append(known_graphs.digest(gm, inputs))
        return gm.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        torch.compile(run, backend=keep, dynamic=dynamic)(*tensors)
    assert found and set(found) == {None}


@pytest.mark.parametrize("spoilt", some(["nodes", "text", "sites", "kernel"], "text"))
def test_a_record_that_does_not_fit_is_not_used(spoilt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sealed, so that no accident makes it; and still nothing comes of it."""
    assert Compiled(attention, given(), monkeypatch).reads == 1
    recall = Store.recall

    def changed(self: Store, key: str) -> dict[str, Any] | None:
        found = recall(self, key)
        if found is not None and "nodes" in found:
            found = json.loads(json.dumps(found))
            if spoilt == "nodes":
                found["nodes"].pop(3)
            elif spoilt == "text":
                found["text"] = "0" * 64
            elif spoilt == "sites":
                found["sites"][0]["status"] = "melted"
            else:
                found["sites"][0]["language"] = "triton"
        return found

    monkeypatch.setattr(Store, "recall", changed)
    again = Compiled(attention, given(), monkeypatch)
    assert again.reads == 1
    torch.testing.assert_close(again.result, attention(*given()))


def test_what_was_noted_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that something unusual happened to is read the next time, too."""
    monkeypatch.setattr(known_edits, "_difference", lambda *_: pytest.fail("kept"))

    def noted(gm: fx.GraphModule, graph: Any, found: Any, edits: Any) -> None:
        found.notes.append("something")
        known_edits.remember(gm, graph, found, edits)

    monkeypatch.setattr("attncc.driver.backend.remember", noted)
    assert Compiled(attention, given(), monkeypatch).reads == 1


@pytest.mark.parametrize("step", some(["digest", "_difference", "_plain", "_graph", "_site", "_text", "default_store"],
                                     "_graph", "_difference"))  # fmt: skip
def test_a_step_that_fails_costs_nothing(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is read then, the first time and later."""
    monkeypatch.setenv("ATTNCC_STRICT", "0")

    def fails(*_: object, **__: object) -> Any:
        raise OSError("on purpose")

    with monkeypatch.context() as patch:
        if step not in ("_graph", "_site"):
            patch.setattr(known_edits, step, fails)
        assert Compiled(attention, given(), monkeypatch).reads == 1
        patch.setattr(known_edits, step, fails)
        again = Compiled(attention, given(), monkeypatch)
    assert again.reads == 1
    torch.testing.assert_close(again.result, attention(*given()))


def test_the_backend_alone_loads_nothing_that_reads_graphs() -> None:
    code = (
        "import sys, attncc.dynamo\n"
        "slow = ('attncc.patterns', 'attncc.passes.policies', 'attncc.plans', 'attncc.codegen.triton.',"
        " 'attncc.report.table', 'attncc.driver.rewriting', 'rich', 'msgspec')\n"
        "print([x for x in sys.modules if x.startswith(slow)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
