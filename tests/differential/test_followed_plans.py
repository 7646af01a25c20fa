"""A plan is followed: what it holds for, its gradients, its decoding steps; elsewhere the model is exact."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from planned.followed import FEW, follow
from planned.keyed import Keyed, sample
from planned.made import plan, site
from torch import Tensor, nn

import attncc
from attncc.driver import rewriting
from attncc.driver.planned_times import _gathers
from attncc.driver.planning import Places
from attncc.ir import parse_attention
from attncc.ir.reasons import because
from attncc.passes.bounds.mask_cells import SKIPPED
from attncc.plans import costs


def test_other_weights_and_other_graphs_are_refused() -> None:
    model, other = Keyed().eval(), Keyed().eval()
    with torch.no_grad():
        other.blocks[0].place.mul_(1.5)
    with pytest.raises(RuntimeError, match="the plan is for other weights: 1 of the 4 parameters"), torch.no_grad():
        follow(other, plan(model))(sample(0))
    changed = msgspec.structs.replace(site(), what="2 heads of 32 and 33, f32: softmax(s * 0.5) v")
    with pytest.raises(RuntimeError, match=r"the plan is for another graph: at blocks\.0"), torch.no_grad():
        follow(model, plan(model, changed))(sample(0))


def test_outside_of_the_certified_lengths_the_model_is_exact() -> None:
    model = Keyed().eval()
    known = plan(model, site(heads=(0, 1)), lengths=(300, 512))
    compiled = follow(model, known)
    with torch.no_grad():
        for length, exact in ((256, True), (400, False), (512, False), (257, True)):
            tokens = sample(length, length)
            same = (model(tokens) - compiled(tokens)).abs().max() < 1e-5
            assert bool(same) == exact, length


def test_symbolic_lengths_are_guarded() -> None:
    """One graph for the lengths inside, one for those outside."""
    model = Keyed().eval()
    compiled = follow(model, plan(model, site(heads=(0, 1)), lengths=(300, 512)))
    from torch._dynamo.utils import counters  # noqa: PLC0415 - beside its only use

    before = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for length in (310, 320, 330, 480, 512):
            compiled(sample(1, length))
        few = counters["stats"]["unique_graphs"] - before
        tokens = sample(1, 290)
        assert (model(tokens) - compiled(tokens)).abs().max() < 1e-5
        tokens = sample(1, 340)
        assert (model(tokens) - compiled(tokens)).abs().max() > 1e-5
    assert few <= 2, "one static, one for all lengths"


def test_what_a_site_becomes_is_explained() -> None:
    model = Keyed().eval()
    with torch.no_grad():
        (own,) = attncc.explain_plan(plan(model), model, sample(0)).sites
        (held,) = attncc.explain_plan(plan(model, lengths=(64, 100)), model, sample(0)).sites
    assert own.status == "fused" and own.code == "planned" and own.reason == (
        "as the plan says: streaming{sinks=16,window=64} on heads 0 (30% of the keys, error 1.0e-04), exact on 1; "
        "6.50 ms, exact 10.00 ms"
    )
    assert own.program is not None and "form" in own.program
    assert own.head == 0 and own.cells is not None and own.visible is not None and own.visited is not None
    causal = 2 * 512 * 513 // 2
    assert 0.5 * causal < own.visible < 0.7 * causal and own.visited < causal  # a half of one head, and the other
    assert float((own.cells == SKIPPED).float().mean()) > 0.6
    with torch.no_grad():
        (other,) = attncc.explain_plan(plan(model, site(heads=(1,))), model, sample(0)).sites
    assert other.head == 1 and other.cells is not None and torch.equal(other.cells, own.cells)
    assert "head 1: streaming" in attncc.explain_plan(plan(model, site(heads=(1,))), model, sample(0)).html()
    assert "policy-other-length" in held.code and "exact, although the plan has a form" in held.reason


def test_the_gradients_are_those_of_the_sparse_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training under a plan: the masked program in eager, in float64, is the measure, and eager's own error."""
    model = Keyed(length=128).eval()
    with torch.no_grad():
        model.blocks[0].asks.mul_(0.05)  # less sure: gradients that are nothing but rounding are not compared
    tokens = sample(3, 128)
    keep = torch.ones(2, 128, 128).tril().bool()
    i, j = torch.arange(128)[:, None], torch.arange(128)
    keep[0] &= (j < 16) | (i - j < 64)

    def masked(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        return ((q @ k.mT).masked_fill(~keep, -torch.inf)).softmax(-1) @ v

    def gradients(run: Any, parameters: Any) -> list[Tensor]:
        loss = run(tokens).log_softmax(-1)[0, torch.arange(128), tokens[0]].sum()
        return [g.double() for g in torch.autograd.grad(loss, list(parameters))]

    monkeypatch.setattr(rewriting, "slower", lambda *_: None)
    mine = gradients(follow(model, plan(model)), model.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("planned.keyed.F.scaled_dot_product_attention", masked)
        eager = gradients(model, model.parameters())
        wide = Keyed(length=128).double()
        wide.load_state_dict(model.state_dict())
        exact = gradients(wide, wide.parameters())
    for x, y, z in zip(mine, eager, exact, strict=True):
        assert (x - z).abs().max() <= 2 * (y - z).abs().max() + 1e-5 * z.abs().max()


def test_training_under_a_plan_is_timed_with_its_backward() -> None:
    """What is slower than the model's own form stays as it was, and says so."""
    model = Keyed(length=128).train()
    (own,) = attncc.explain_plan(plan(model), model, sample(0, 128)).sites
    assert own.trains
    assert own.code == "planned" or "plan-slower-training" in own.code, own.reason


class Decoding(nn.Module):
    """The same heads, one token at a time over a cache of fixed size."""

    def __init__(self, model: Keyed) -> None:
        super().__init__()
        self.block = model.blocks[0]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, place: Tensor) -> Tensor:
        seen = torch.arange(k.shape[2]) <= place
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[None, None, None], scale=1.0)


def test_a_decoding_step_is_the_next_row_of_a_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forms that go by positions hold for it too, where they are faster."""
    model = Decoding(Keyed())
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 32, generator=g) for n in (1, 512, 512))
    place = torch.tensor([300])
    what = "2 heads of 32 and 32, f32: softmax(s) v"
    known = plan(model, msgspec.structs.replace(site("", (0,)), what=what))
    monkeypatch.setattr(rewriting, "slower", lambda *_: None)
    with torch.no_grad():
        found = follow(model, known)(q, k, v, place)
        j = torch.arange(512)
        keep = (j <= 300).expand(2, 512).clone()
        keep[0] &= (j < 16) | (300 - j < 64)
        scores = (q @ k.mT)[0, :, 0].masked_fill(~keep, -torch.inf)
        torch.testing.assert_close(found[0, :, 0], torch.einsum("hj,hje->he", scores.softmax(-1), v[0]))
        monkeypatch.setattr(rewriting, "slower", lambda *_: because("plan-slower", "1.0", "2.0"))
        (own,) = attncc.explain_plan(known, model, q, k, v, place).sites
    assert "its form is no faster here: exact 1.0 us, planned 2.0 us" in own.reason


def test_a_form_that_is_slower_here_is_not_taken() -> None:
    """Measured for what the plan was not profiled for: a long cache, of which a form reads little, is faster."""
    model = Decoding(Keyed())
    q, k, v = (torch.randn(1, 2, n, 64) for n in (1, 16384, 16384))
    what = "2 heads of 64 and 64, f32: softmax(s) v"
    known = plan(model, msgspec.structs.replace(site("", (0, 1)), what=what), lengths=(64, 16384))
    with torch.no_grad():
        (own,) = attncc.explain_plan(known, model, q, k, v, torch.tensor([16000])).sites
    assert own.code == "planned" or "plan-slower" in own.code
    assert own.ir is not None and not _gathers(parse_attention(own.ir))


def test_no_plan_speaks_of_an_attention_whose_length_no_dimension_tells() -> None:
    """Heads and rows in one dimension, whose extent is a size: it is passed over, and the model is compiled."""
    a = parse_attention(
        "attention\nsize   n\nbatch  h = 2\naxis   i = n, j = n, d = 8, e = 8\ntensor x: f32[2 * n, 8]\n"
        "q      x[i * 2 + h, d]\nk      x[j * 2 + h, d]\nv      x[j * 2 + h, e]\nscore  s\nmask   True\n"
        "norm   softmax\nempty  zero\nweight w\ngive   out\ndtype  f32\n"
    )
    lifted: Any = SimpleNamespace(attention=a, tensors=())
    facts: Any = None
    assert Places().site("layers.0", lifted, facts) is None


def test_a_plan_of_decoding_calls_is_followed_at_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forms were timed on the model's own tensors, so they are not timed anew on made-up ones."""

    class Step(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v)

    def data(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(1, 2, n, 16, generator=g) for n in (1, 600, 600))
        k[:, :, :4] += q * 3
        return q, k, v

    def refused(*_: object) -> None:
        raise AssertionError("timed anew")

    monkeypatch.setattr(costs, "timed", lambda seen, forms, known: {x: 5.0 if x else 10.0 for x in forms})
    monkeypatch.setattr(rewriting, "slower", refused)
    form = "certified-skip{eps=0.03}"
    found = attncc.profile(Step().eval(), map(data, range(40)), "rel<=0.9@90%", forms=[form], settings=FEW)
    (own,) = found.sites
    assert own.phase == "decode" and [(r.form, r.heads) for r in own.rules] == [(form, (0, 1))]
    assert found.predicted > 0 and own.bound is not None and 0 < own.bound < 0.9  # its kernel did leave out something
    with torch.no_grad(), attncc.record() as report:
        follow(Step().eval(), found)(*data(99))
    assert report.sites[0].code == "planned" and "drop   0.03" in (report.sites[0].ir or "")
