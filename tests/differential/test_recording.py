"""`attncc.record`: what compiled graphs did in the user's own program, without compiling anything anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

import attncc
from attncc.codegen import cpp
from attncc.ir import parse_attention
from attncc.report.site import Site

FRESH = {"measure": False}
SCALE = 80**-0.5


class Block(nn.Module):
    def forward(self, x: Tensor, packed_documents: Tensor) -> Tensor:
        mask = packed_documents[:, None] == packed_documents[None]
        return scaled_dot_product_attention(x, x, x, attn_mask=mask, scale=SCALE)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, documents: Tensor, others: Tensor) -> Tensor:
        first, second = self.layers
        return second(first(x, documents), others)


def compiled(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend="attncc", options=FRESH)  # type: ignore[return-value]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Of one length: the tests share one kernel."""
    one, other = (torch.repeat_interleave(torch.arange(n), 1536 // n) for n in (2, 6))
    return torch.randn(1, 4, 1536, 64, generator=torch.Generator().manual_seed(0)), one, other


@torch.no_grad()
def test_a_graph_that_was_compiled_before_is_counted_and_not_compiled_again() -> None:
    model, given = compiled(Two()), inputs()
    graphs = torch._dynamo.utils.counters["stats"]
    start = graphs["unique_graphs"]
    before = model(*given)
    with attncc.record() as report:
        during = model(*given)
    assert graphs["unique_graphs"] == start + 1
    assert torch.equal(before, during) and torch.equal(model(*given), before)
    first, second = report.sites
    assert first.path == "layers.0" and second.path == "layers.1"
    assert (first.visible, second.visible) == (4 * 1536**2 // 2, 4 * 1536**2 // 6)
    assert second.visited is not None and second.visible <= second.visited < first.visited  # type: ignore[operator]
    assert report.notes == ("what was compiled before the recording is shown without its graph and its passes",)
    assert report.report.graph_after == ""


@torch.no_grad()
def test_the_first_call_shows_graph_and_passes() -> None:
    with attncc.record() as report:
        compiled(Two())(*inputs())
    assert "torch.ops.attncc.attention" in report.report.graph_after and not report.notes
    names = [name for name, _ in report.sites[0].stages]
    assert names[0] == "lifting" and "fold-predicates" in names


@torch.no_grad()
def test_two_recordings_and_a_call_outside_of_them() -> None:
    model, given = compiled(Two()), inputs()
    with attncc.record() as outer:
        with attncc.record() as inner:
            model(*given)
        assert len(inner.sites) == 2
        model(*given)
    model(*given)
    with attncc.record() as nothing:
        pass
    assert len(outer.sites) == len(inner.sites) == 2 and not nothing.sites
    assert repr(nothing) == "<attncc report, no attention found>"


@torch.no_grad()
def test_reports_have_the_names_of_the_graph_and_round_numbers() -> None:
    (site,) = attncc.explain(Block(), *inputs()[:2]).sites
    assert site.equation == "softmax(s * 0.1118) v"
    assert site.mask == "packed_documents[j] == packed_documents[i]"
    assert site.ir is not None and f"score  s * {SCALE!r}" in site.ir and "t0[j]" in site.ir
    assert site.names == {"t0": "packed_documents"}


@pytest.mark.parametrize("taken", ["s", "exp"])
@torch.no_grad()
def test_a_name_that_means_something_else_is_not_taken(taken: str) -> None:
    scope: dict[str, object] = {"sdpa": scaled_dot_product_attention, "scale": SCALE}
    mask = f"{taken}[:, None] == {taken}[None]"
    exec(f"def f(x, {taken}): return sdpa(x, x, x, attn_mask={mask}, scale=scale)", scope)
    x, documents, _ = inputs()
    (site,) = attncc.explain(scope["f"], x, documents).sites  # type: ignore[arg-type]
    assert site.mask == "t0[j] == t0[i]"


@torch.no_grad()
def test_variables_of_a_closure_have_its_name_and_places_are_as_written() -> None:
    documents, starts = inputs()[1] % 2, torch.tensor([0, 3])

    def seen(j: Tensor) -> Tensor:
        return starts[documents][:, None] <= j

    def attend(x: Tensor, seen: Any) -> Tensor:
        return scaled_dot_product_attention(x, x, x, attn_mask=seen(torch.arange(1536)), scale=SCALE)

    (site,) = attncc.explain(attend, inputs()[0], seen).sites
    assert site.mask == "seen_1[seen[i]] <= j"


@torch.no_grad()
def test_a_graph_break_is_reported_with_its_line() -> None:
    def broken(x: Tensor, documents: Tensor) -> Tensor:
        y = Block()(x, documents)
        torch._dynamo.graph_break()
        return y + 1

    line = broken.__code__.co_firstlineno + 2
    report = attncc.explain(broken, *inputs()[:2])
    (note,) = report.notes
    assert f"{Path(__file__).name}:{line}" in note and note.startswith("a graph break at ")


@torch.no_grad()
def test_a_branch_on_data_is_a_graph_break_with_its_line() -> None:
    """Dynamo counts it nowhere."""

    def broken(x: Tensor, documents: Tensor) -> Tensor:
        y = Block()(x, documents)
        return y + 1 if y.sum() > 0 else y

    line = broken.__code__.co_firstlineno + 2
    (note,) = attncc.explain(broken, *inputs()[:2]).notes
    assert f"{Path(__file__).name}:{line}: Data-dependent branching" in note


@torch.no_grad()
def test_a_profiler_shows_kernels_under_their_site() -> None:
    model, given = compiled(Two()), inputs()
    model(*given)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        model(*given)
    assert {e.key for e in seen.key_averages()} >= {"attncc: layers.0", "attncc: layers.1"}


@torch.no_grad()
def test_measured_sites_have_their_times_as_values() -> None:
    report = attncc.explain(Block(), *inputs()[:2])
    (site,) = report.sites
    assert set(site.timings) == {"attncc", "SDPA"} and all(us > 0 for us in site.timings.values())
    assert site.speedup == pytest.approx(site.timings["SDPA"] / site.timings["attncc"])
    assert set(report.machine) >= {"processor", "threads", "instruction_set", "float32_precision"}
    assert site.isa and f"{site.isa} kernel" in (site.became if site.status == "fused" else f"{site.isa} kernel")


def test_only_bfloat16_uses_what_is_made_for_it() -> None:
    text = """attention
axis   i = 8, j = 8, d = 8, e = 8
tensor q: {0}[8, 8]
tensor k: {0}[8, 8]
tensor v: {0}[8, 8]
q      q[i, d]
k      k[j, d]
v      v[j, e]
score  s
mask   True
norm   softmax
empty  zero
weight w
give   out
dtype  {0}
layout i, e
"""
    found = {
        (dtype, isa): cpp.instructions(parse_attention(text.format(dtype)), isa)
        for dtype in ("f32", "bf16")
        for isa in cpp.ISAS
    }
    assert {found["bf16", isa] for isa in cpp.ISAS} == set(cpp.ISAS)
    assert [found["f32", isa] for isa in cpp.ISAS] == ["avx512", "avx512", "avx512", "avx2", "neon"]


def test_a_site_is_one_line() -> None:
    assert repr(Site(0, "fused", path="a", kernel="x" * 90_000)) == "<site 0, fused, a: >"


@torch.no_grad()
def test_a_structured_trace_has_the_sites_of_each_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[dict[str, str], dict[str, Any]]] = []

    def trace(name: str, metadata: Any = dict, *, payload_fn: Any = str, **_: Any) -> None:
        """Dynamo and Inductor have artifacts of their own."""
        if name == "artifact" and str(metadata().get("name")).startswith("attncc"):
            taken.append((metadata(), json.loads(payload_fn())))

    monkeypatch.setattr(torch._logging._internal, "trace_structured", trace)
    compiled(Two())(*inputs())
    ((metadata, payload),) = taken
    assert metadata == {"name": "attncc_sites", "encoding": "json"}
    assert [s["path"] for s in payload["sites"]] == ["layers.0", "layers.1"] and "kernels" not in payload
