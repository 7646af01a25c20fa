"""What trains is decided on forward and backward together, apart from inference; timings are made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import attncc
from attncc.driver import selection, training_selection
from attncc.driver.training_selection import FORWARD, OURS
from attncc.report import words
from attncc.report.site import Site
from attncc.runtime.measure import Timings
from attncc.runtime.memory import peak_bytes
from attncc.runtime.store import Store

pytestmark = pytest.mark.slow


class Bench:
    """Stands for the clock: what a step of attncc takes, the rest taking 100 us. `compared` are the candidates that
    met, and each was run once, so that one that fails is known."""

    def __init__(self) -> None:
        self.step_us, self.forward_us = 50.0, 50.0
        self.bytes: dict[int, int] = {}
        self.compared: list[tuple[str, ...]] = []

    def steps(self, candidates: Mapping[str, Callable[[], object]], *_: object) -> Timings:
        return self._timed(candidates, self.step_us)

    def forwards(self, candidates: Mapping[str, Callable[[], object]], *_: object) -> Timings:
        return self._timed(candidates, self.forward_us)

    def _timed(self, candidates: Mapping[str, Callable[[], object]], own: float) -> Timings:
        if FORWARD not in candidates:  # whose time is taken apart, of a kernel that has won
            self.compared.append(tuple(candidates))
        for call in candidates.values():
            call()
        us = {n: own if n == OURS else 10.0 if n == "products" else 100.0 for n in candidates}
        return Timings(us, 3, {})


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    made = Bench()
    store = Store(tmp_path)
    monkeypatch.setattr(training_selection, "default_store", lambda: store)
    monkeypatch.setattr(selection, "default_store", lambda: store)
    monkeypatch.setattr(training_selection, "compare", made.steps)
    monkeypatch.setattr(selection, "compare", made.forwards)
    monkeypatch.setattr("attncc.runtime.measure.compare", made.forwards)
    monkeypatch.setattr(training_selection, "peak_bytes", lambda *_: 1000)
    monkeypatch.setattr(
        training_selection.torch_private, "inductor_apart_with_backward", lambda module, _: module
    )
    monkeypatch.setattr(selection.torch_private, "inductor_apart", lambda module, _: module)
    monkeypatch.setattr(selection, "_decided", {})
    yield made


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[-2])
    seen = (at[:, None] - at[None, :]).abs() < 8
    return scaled_dot_product_attention(q, k, v, attn_mask=seen)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.25).softmax(-1) @ v


def tensors(*learned: bool) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 48, 16, generator=random).requires_grad_(x) for x in learned]


def site(f: Callable[..., Any], *args: Any) -> Site:
    (found,) = attncc.explain(f, *args).sites
    return found


def test_what_is_slower_with_its_backward_is_kept_and_says_so(bench: Bench) -> None:
    bench.step_us = 130.0
    found = site(windowed, *tensors(True, True, True))
    assert found.status == "kept" and found.trains and found.became == "original graph"
    assert "in training its forward and backward took 1.30 of the time of the model's own" in found.reason
    assert found.speedup == pytest.approx(1 / 1.3)


def test_the_forward_of_a_winner_is_timed_apart(bench: Bench) -> None:
    bench.step_us = 150.0
    assert site(windowed, *tensors(True, True, True)).forward_us is None
    bench.step_us = 80.0
    found = site(windowed, *tensors(True, True, False))
    assert found.status == "fused" and found.forward_us == 100.0 and set(found.timings) == {OURS, "SDPA"}
    assert "attncc's forward 100.0 us, its backward" in words.measured([found])


def test_a_tie_gains_nothing_and_is_kept(bench: Bench) -> None:
    bench.step_us = 99.0
    assert site(windowed, *tensors(True, True, True)).status == "kept"


def test_inference_and_training_of_one_model_are_decided_apart(bench: Bench) -> None:
    bench.step_us = 130.0
    assert site(windowed, *tensors(True, True, True)).status == "kept"
    with torch.no_grad():
        found = site(windowed, *tensors(True, True, True))
    assert found.status == "fused" and not found.trains and found.speedup == pytest.approx(2.0)
    assert site(windowed, *tensors(False, False, False)).status == "fused"
    bench.forward_us, bench.step_us = 130.0, 50.0
    selection._decided.clear()  # the store remembers each by its direction
    assert site(windowed, *tensors(True, True, True)).status == "kept"
    with torch.no_grad():
        assert site(windowed, *tensors(True, True, True)).status == "fused"


def test_what_is_faster_is_fused_and_gives_eagers_gradients(bench: Bench) -> None:
    ours, own = tensors(True, True, True), tensors(True, True, True)
    assert site(windowed, *ours).status == "fused"
    torch._dynamo.reset()
    seed = torch.randn(1, 2, 48, 16, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(windowed, backend="attncc", options={"inductor": False})
    compiled(*ours).backward(seed)
    windowed(*own).backward(seed)
    for x, y in zip(ours, own, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_what_needs_more_memory_is_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([200 << 20, 100 << 20])
    monkeypatch.setattr(training_selection, "peak_bytes", lambda *_: next(peaks))
    found = site(windowed, *tensors(True, True, True))
    assert found.status == "kept"
    assert "would take 200 MiB at the peak, the model's own 100 MiB" in found.reason


def test_the_cheapest_rival_that_decides_is_the_last(bench: Bench) -> None:
    bench.step_us = 130.0
    site(by_hand, *tensors(True, True, True))
    assert bench.compared == [(OURS, "products"), (OURS, "unfused")]  # lost to eager: Inductor is not asked
    bench.compared.clear()
    bench.step_us = 50.0
    assert site(by_hand, *tensors(True, True, False)).status == "fused"
    assert bench.compared == [(OURS, "products"), (OURS, "unfused"), (OURS, "unfused")]
    bench.compared.clear()
    bench.step_us = 10.0
    found = site(by_hand, *tensors(True, False, False))
    assert bench.compared == [(OURS, "products")]
    assert "faster than their matrix products alone" in found.reason


def test_each_set_of_learned_tensors_is_measured(bench: Bench) -> None:
    site(windowed, *tensors(True, True, True))
    site(windowed, *tensors(True, True, True))
    assert len(bench.compared) == 1
    site(windowed, *tensors(False, False, True))
    assert len(bench.compared) == 2


def test_gradients_for_a_table_of_biases_alone(bench: Bench) -> None:
    def biased(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        at = torch.arange(q.shape[-2])
        bias = embedding((at[:, None] - at[None, :]).abs().clamp(max=15), table).permute(2, 0, 1)
        return scaled_dot_product_attention(q, k, v, attn_mask=bias)

    table = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    found = site(biased, *tensors(False, False, False), table.requires_grad_())
    assert found.trains and found.status == "fused"
    assert not site(biased, *tensors(False, False, False), table.detach()).trains


def test_parameters_of_a_model_in_eval_mode_count(bench: Bench) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_v = torch.nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return by_hand(x, x, self.to_v(x))

    model = Model().eval()
    (x,) = tensors(False)
    assert site(model, x).trains
    with torch.no_grad():
        assert not site(model, x).trains
    assert not site(model.requires_grad_(False), x).trains


def test_gradients_off_at_the_call_alone(bench: Bench) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            found = windowed(q, k, v)
        return found + v

    assert not site(model, *tensors(True, True, True)).trains


def test_a_checkpoint_runs_forward_twice(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    step = training_selection.whole_step

    def watched(forward: Any, leaves: Any, around: Any, recomputed: bool) -> Any:
        seen.append(recomputed)
        return step(forward, leaves, around, recomputed)

    monkeypatch.setattr(training_selection, "whole_step", watched)

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(windowed, q, k, v, use_reentrant=False)

    assert site(model, *tensors(True, True, True)).trains
    assert seen and all(seen)


@pytest.mark.parametrize("inside", [False, True])
def test_under_autocast_the_rival_runs_as_the_model_does(bench: Bench, inside: bool) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return by_hand(q, k, v)

    bench.step_us = 130.0
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        found = site(model if inside else by_hand, *tensors(True, True, True))
    assert found.ir is not None and "dtype  bf16" in found.ir
    assert found.status == "kept" and "1.30 of the time" in found.reason


def test_what_cannot_be_measured_stays_as_it_is_in_training(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def untimeable(*_: object, **__: object) -> None:
        raise selection.Untimeable("no data")

    monkeypatch.setattr(selection, "trial", untimeable)
    found = site(windowed, *tensors(True, True, True))
    assert (found.status, found.reason) == ("kept", "in training not measured: no data")
    with torch.no_grad():
        assert site(windowed, *tensors(True, True, True)).status == "fused"


def test_peak_of_memory() -> None:
    cpu = torch.device("cpu")

    def call() -> None:
        torch.ones(32 << 20, dtype=torch.uint8)
        torch.ones(32 << 20, dtype=torch.uint8)

    call()
    found = peak_bytes(call, cpu)
    assert found is None or 30 << 20 < found < 44 << 20
    assert peak_bytes(call, torch.device("meta")) is None
