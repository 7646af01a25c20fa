"""Many different sites in one model: what is shared between equal ones is not shared with others."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attncc.driver import capture, rewriting
from attncc.driver.backend import Collected, collecting
from attncc.passes.pipeline import Pipeline
from attncc.patterns.reader.value import Reader

FAST = {"inductor": False, "measure": False}


class Layers(nn.Module):
    """Layers that take turns: windowed or not, 2 or 4 heads, with a graph break in the middle. `windows` are those of
    the layers, one after the other and again from the first; none is all tokens."""

    def __init__(self, layers: int, width: int = 32, windows: tuple[int | None, ...] = (5, None)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.windows = windows
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        half = len(self.qkv) // 2
        x = self.part(x, range(half))
        torch._dynamo.graph_break()
        return self.part(x, range(half, 2 * half))

    def part(self, x: Tensor, which: range) -> Tensor:
        n = x.shape[1]
        distance = torch.arange(n)[:, None] - torch.arange(n)[None, :]
        for at in which:
            window, heads = self.windows[at % len(self.windows)] or n, (2, 4)[at // 2 % 2]
            q, k, v = self.qkv[at](x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            scores = (q @ k.mT) * q.shape[-1] ** -0.5
            hidden = (distance < 0) | (distance >= window)
            x = x + (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return x


def assert_accurate(got: Tensor, model: nn.Module, x: Tensor) -> None:
    """Not much further from float64 than the model itself in its dtype."""
    own, exact = model(x), copy.deepcopy(model).double()(x.double())
    error, rounding = (own - exact).abs().max(), torch.finfo(x.dtype).eps * exact.abs().max()
    assert (got - exact).abs().max() <= 2 * error + 2 * rounding


@torch.no_grad()
def test_layers_in_turn_and_two_dtypes() -> None:
    """16 layers of 4 kinds over a graph break, compiled for one dtype and then for another in one process."""
    model, x = Layers(16).eval(), torch.randn(2, 24, 32)
    torch._dynamo.reset()
    texts: dict[torch.dtype, list[str]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        found = Collected()
        token = collecting.set(found)
        try:
            model, given = model.to(dtype), x.to(dtype)
            got = torch.compile(model, backend="attncc", options=FAST)(given)
        finally:
            collecting.reset(token)
        assert_accurate(got, model, given)
        assert [s.status for s in found.sites] == ["fused"] * 16
        texts[dtype] = [s.ir or "" for s in found.sites]
        for at, text in enumerate(texts[dtype]):
            assert ("b1 = 2" if at // 2 % 2 == 0 else "b1 = 4") in text
            assert ("i - 4" in text or "i < j + 5" in text or "j + 4" in text) == (at % 2 == 0), text
            assert text == texts[dtype][at % 4]
    assert set(texts[torch.float32]).isdisjoint(texts[torch.bfloat16])


def work(layers: int, windows: tuple[int | None, ...], dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How much was traced, read, planned and built for so many layers; results and sites are those of the model."""
    model, x = Layers(layers, windows=windows).eval(), torch.randn(2, 24, 32)
    counts: Counter[str] = Counter()

    def counting(owner: Any, name: str) -> None:
        plain: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return plain(*args, **kwargs)

        patch.setattr(owner, name, counted)

    rewriting._run_passes.cache_clear()
    torch._dynamo.reset()
    found = Collected()
    token = collecting.set(found)
    with monkeypatch.context() as patch:
        counting(capture._Shadow, "call_function")
        counting(Reader, "_read")
        counting(Pipeline, "run")
        try:
            got = torch.compile(model, backend="attncc", dynamic=dynamic, options=FAST)(x)
        finally:
            collecting.reset(token)
    assert_accurate(got, model, x)
    assert [s.status for s in found.sites] == ["fused"] * layers
    return counts


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
def test_more_layers_of_four_kinds_are_no_more_to_trace_or_plan(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (work(layers, (5, None), dynamic, monkeypatch) for layers in (8, 16))
    assert few["call_function"] == many["call_function"] > 0
    assert few["run"] == many["run"] == 4


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
def test_work_grows_with_layers_that_differ_and_no_faster(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer has a window of its own: every further one costs as much as the one before."""
    counts = [work(n, tuple(range(2, 2 + n)), dynamic, monkeypatch) for n in (4, 6, 8)]
    assert [c["run"] for c in counts] == [4, 6, 8]
    for name in ("call_function", "_read"):
        first, second = counts[1][name] - counts[0][name], counts[2][name] - counts[1][name]
        assert second <= first, name
