"""Warm starts: AOTAutograd's cache takes the graphs that attncc edits, and the store finds kernels without compiling or
checking them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from failing_programs import PROGRAMS
from torch import fx
from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache, check_node_safe

from attncc import torch_private
from attncc.driver import backend, selection
from attncc.kernels import build, compiled, first_use
from attncc.runtime import measure
from attncc.runtime.measure import Timings

#: What these hold besides attention, AOTAutograd's cache does not take.
UNCACHED = {"checkpoint", "vmap", "torch.func.grad", "autocast"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in UNCACHED])
def test_what_is_edited_can_be_cached(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, *_: Any) -> Callable[..., Any]:
        seen.append(gm)
        return gm.forward

    monkeypatch.setattr(torch_private, "inductor", keep)
    program = PROGRAMS[name]
    run, given = program.make()
    given = tuple(x.requires_grad_(program.grad and x.is_floating_point()) for x in given)
    with torch.set_grad_enabled(program.grad):
        torch.compile(run, backend="attncc", dynamic=program.dynamic, options={"measure": False})(*given)
    fused = [n for gm in seen for n in gm.graph.nodes if n.target is torch.ops.attncc.attention.default]
    assert fused or name == "other sites"
    for gm in seen:
        for n in gm.graph.nodes:
            try:
                check_node_safe(n)
            except BypassAOTAutogradCache as error:
                pytest.fail(f"{n.format_node()}: {error}")


@pytest.mark.slow
def test_a_warm_start_neither_compiles_nor_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if build.find_toolchain() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(tmp_path))
    done: list[str] = []
    compile_, check = compiled.CppToolchain.compile, first_use.wrong
    monkeypatch.setattr(
        compiled.CppToolchain, "compile", lambda self, *args: done.append("compiled") or compile_(self, *args)
    )
    monkeypatch.setattr(first_use, "wrong", lambda *args: done.append("checked") or check(*args))
    program = PROGRAMS["two sites"]
    run, given = program.make()
    for _ in range(2):
        build._built.cache_clear()
        selection._decided.clear()
        torch._dynamo.reset()
        torch.compile(run, backend=backend.attncc_backend, options={"measure": False, "inductor": False})(*given)
    assert sorted(done) == ["checked", "checked", "compiled", "compiled"]


@pytest.mark.slow
@pytest.mark.parametrize("wins", [True, False])
def test_a_warm_start_measures_nothing(wins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where the first one compared a kernel with more than the two products alone, nor where it did not."""
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(tmp_path))
    compared: list[set[str]] = []

    def timed(candidates: dict[str, Callable[[], object]], *_: object) -> Timings:
        compared.append(set(candidates))
        us = dict.fromkeys(candidates, 1.0) | {"products": 2.0 if wins else 0.5}
        return Timings({name: us[name] for name in candidates}, 3, {})

    monkeypatch.setattr(selection, "compare", timed)
    monkeypatch.setattr(measure, "compare", timed)
    program = PROGRAMS["two sites"]
    run, given = program.make()
    counts: list[int] = []
    for _ in range(2):
        build._built.cache_clear()
        selection._decided.clear()
        torch._dynamo.reset()
        torch.compile(run, backend=backend.attncc_backend, options={"inductor": False})(*given)
        counts.append(len(compared))
    assert {"attncc", "products"} in compared and ({"attncc", "unfused"} in compared) != wins
    assert counts[0] == counts[1] > 0
