"""Profiling models whose attention is known, and running them under plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from memory.allocations import allocations
from planned.followed import FEW, NEAR, follow, samples
from planned.keyed import Keyed, answer, sample, wanted
from planned.made import WHAT, costs_by_density, plan
from rich.console import Console
from torch import Tensor, nn

import attncc
from attncc.cli import demo_plan
from attncc.errors import PlanError
from attncc.plans import costs, losses
from attncc.plans.plan import load, policy_of
from attncc.plans.profile import Settings, profile_for


@pytest.fixture
def by_density(monkeypatch: pytest.MonkeyPatch) -> None:
    costs_by_density(monkeypatch)


@pytest.mark.usefixtures("by_density")
def test_a_budget_keeps_what_the_model_looks_up(tmp_path: Path) -> None:
    """The near head becomes sparse; the one that finds the key stays exact, although the model is so sure of its answer
    that the divergence of its own predictions would not see it go."""
    model = Keyed().eval()
    before = [p.requires_grad for p in model.parameters()]
    found = attncc.profile(model, samples(40), "kl<=0.001@90%", forms=NEAR, settings=FEW)
    assert [p.requires_grad for p in model.parameters()] == before
    (own,) = found.sites
    assert own.what == WHAT and own.path == "blocks.0" and own.keys == (512, 512) and found.lengths == (512, 512)
    assert [r.heads for r in own.rules] == [(0,)]
    assert found.certificate is not None and found.certificate.failures == 0 and found.certificate.samples == 29
    assert found.certificate.worst <= 0.001 and own.ms < own.exact_ms
    assert own.bound is not None and 0 < own.bound < 0.1  # of what its guard may see
    found.save(tmp_path / "keyed.plan")
    assert load(tmp_path / "keyed.plan") == found
    compiled = follow(model, tmp_path / "keyed.plan")
    with torch.no_grad():
        for tokens in samples(4, 1000):
            exact, planned = model(tokens), compiled(tokens)
            assert answer(planned) == answer(exact) == wanted(tokens)
            assert losses.kl(exact, planned) <= 0.001
            assert not torch.equal(exact, planned), "the plan is followed"


@pytest.mark.usefixtures("by_density")
def test_at_a_speed_the_error_is_what_it_takes() -> None:
    found = attncc.profile(Keyed().eval(), samples(40), "kl<=1@90%", speed=3.0, settings=FEW)
    (own,) = found.sites
    assert sorted(h for r in own.rules for h in r.heads) == [0, 1]
    assert found.speed() >= 3 and found.budget.speed == 3 and found.certificate is not None
    with pytest.raises(PlanError, match="no plan is 50 times as fast: the fastest of these forms is"):
        attncc.profile(Keyed().eval(), samples(40), "kl<=1@90%", speed=50.0, settings=FEW)


@pytest.mark.usefixtures("by_density")
def test_predicted_errors_are_the_measured_ones() -> None:
    """For outputs that are compared by their squares the prediction is exact to first order: kappa is near 1 where one
    linear layer follows the attention."""
    torch.manual_seed(0)

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 48)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(o.transpose(1, 2).flatten(2))

    data = [torch.randn(1, 256, 32, generator=torch.Generator().manual_seed(n)) for n in range(70)]
    settings = Settings(samples=8, probes=8, tune=2)
    forms = [f"streaming{{sinks=4,window={w}}}" for w in (32, 64, 128)]
    found = attncc.profile(Linear().eval(), data, "rel<=0.2@90%", forms=forms, settings=settings)
    assert found.kappa == pytest.approx(1.0, abs=0.35)
    assert found.certificate is not None and 0 < found.certificate.worst <= 0.2


def test_an_interrupted_profile_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the costs that it began with: other costs would have other plans than those that it tested."""
    timed = costs_by_density(monkeypatch)
    model, file = Keyed().eval(), tmp_path / "x.part"
    whole = attncc.profile(model, samples(40), "kl<=0.001@90%", settings=FEW)
    seen: list[tuple[str, int]] = []

    def interrupted(what: str, done: int, total: int) -> None:
        if (what, done) == ("certifying", 5):
            raise KeyboardInterrupt

    def noted(what: str, done: int, total: int) -> None:
        seen.append((what, done))

    given: dict[str, Any] = {"settings": FEW, "resume": file}
    with pytest.raises(KeyboardInterrupt):
        attncc.profile(model, samples(40), "kl<=0.001@90%", progress=interrupted, **given)
    assert file.is_file()
    monkeypatch.setattr(costs, "timed", lambda *given: {name: 11 - ms for name, ms in timed(*given).items()})
    again = attncc.profile(model, samples(40), "kl<=0.001@90%", progress=noted, **given)
    assert again == whole and not file.exists()
    assert ("probing", 0) not in seen and ("certifying", 28) in seen


@pytest.mark.usefixtures("by_density")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": list(samples(10))}, "the data has 10 samples, 25 too few: 4 to profile, 2 to tune and 29 to certify"),
        ({"budget": "kl<=1e-12@90%", "forms": ["streaming{sinks=0,window=2}"]}, "only the exact model meets kl<=1e-12"),
        ({"budget": "loss<=1"}, "there is no metric 'loss'; there are kl, flips, rel"),
        ({"forms": ["streaming{window=9999}"]}, "no form is faster than the exact kernel here"),
        ({"forms": ["streaming{width=3}"]}, "streaming has no parameter 'width'"),
        ({"forms": []}, "name a form to try"),
        ({"speed": 0.5}, "a speed is above 1, not 0.5"),
        ({"loss": lambda exact, planned, inputs: float("nan"), "budget": "own<=1@90%"}, "is not a number"),
    ],
    ids=["data", "budget", "metric", "useless forms", "parameter", "no forms", "speed", "nan"],
)
def test_what_cannot_be_profiled_is_said_in_one_line(given: dict[str, Any], message: str) -> None:
    arguments = {"data": samples(40), "budget": "kl<=0.001@90%", "settings": FEW, **given}
    with pytest.raises(PlanError) as raised:
        attncc.profile(Keyed().eval(), **arguments)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_models_that_cannot_be_profiled() -> None:
    with pytest.raises(PlanError, match="the model has no attention"):
        attncc.profile(nn.Linear(4, 4).eval(), (torch.randn(2, 4) for _ in range(40)), "rel<=0.1@90%", settings=FEW)
    with pytest.raises(PlanError, match="in training mode"):
        attncc.profile(Keyed(), samples(40))
    broken = Keyed().eval()
    broken.strength.fill_(float("inf"))
    with pytest.raises(PlanError, match="the exact model gives NaN or infinity on the data") as raised:
        attncc.profile(broken, samples(40), "kl<=0.001@90%", forms=NEAR[:1], settings=FEW)
    assert "\n" not in str(raised.value)


@pytest.mark.full
@pytest.mark.usefixtures("by_density")
def test_profiling_makes_nothing_of_the_size_of_the_scores() -> None:
    model, n = Keyed(length=1024).eval(), 1024
    data = (sample(seed, n) for seed in range(6))
    forms = [*NEAR, "block-means{rows=64,keys=64,take=fraction,amount=0.25}"]
    made = allocations(
        lambda: attncc.profile(model, data, "kl<=1@90%", speed=1.2, forms=forms, settings=FEW, uncertified=True)
    )
    assert max(made) < 2 * n * n, "bytes of the largest block: a mask of both heads has so many"


def test_a_plan_without_a_certificate_says_so() -> None:
    with pytest.MonkeyPatch.context() as patch:
        costs_by_density(patch)
        found = attncc.profile(Keyed().eval(), samples(6), "kl<=0.001@90%", settings=FEW, uncertified=True)
    assert not found.certified
    assert any(line.startswith("NOT CERTIFIED") for line in found.summary())


def test_losses() -> None:
    g = torch.Generator().manual_seed(0)
    exact, planned = torch.randn(1, 9, 5, generator=g), torch.randn(1, 9, 5, generator=g)
    p, q = exact.double().softmax(-1), planned.double().softmax(-1)
    assert losses.kl(exact, planned) == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    assert losses.kl(exact, exact) == losses.flips(exact, exact) == losses.rel(exact, exact) == 0
    best = p.topk(2, -1).values
    sure = (best[..., 0] - best[..., 1]) >= losses.MARGIN
    changed = (exact.argmax(-1) != planned.argmax(-1)) & sure
    assert losses.flips(exact, planned) == pytest.approx((changed.sum() / sure.sum()).item())
    valid = torch.arange(9)[None] < 4
    assert losses.kl(exact, planned, valid) == pytest.approx(losses.kl(exact[:, :4], planned[:, :4]))
    assert losses.rel(exact, planned, valid) == pytest.approx(losses.rel(exact[:, :4], planned[:, :4]))


def test_a_policy_is_read_from_its_text() -> None:
    assert policy_of("streaming{sinks=16,window=64}") == policy_of("streaming{window=64,sinks=16}")


@pytest.mark.usefixtures("by_density")
@pytest.mark.parametrize("name", ["block-means", pytest.param("pooled-rest", marks=pytest.mark.full)])
def test_forms_that_select_keys_are_profiled_and_followed(name: str) -> None:
    """What the certificate was taken of is what the compiled model does."""
    model = Keyed().eval()
    form = name + "{rows=32,keys=32,take=fraction,amount=0.25}"
    found = attncc.profile(model, samples(40), "kl<=1@90%", speed=1.5, forms=[form], settings=FEW)
    (own,) = found.sites
    assert own.sparse and own.rules[0].form == form and own.rules[0].density < 0.6
    compiled = follow(model, found)
    with torch.no_grad():
        losses_ = [losses.kl(model(tokens), compiled(tokens)) for tokens in samples(8, 2000)]
    assert found.certificate is not None
    assert 0 < sum(losses_) / 8 == pytest.approx(found.certificate.mean, rel=1.0, abs=1e-6)


@pytest.mark.usefixtures("by_density")
def test_a_budget_that_is_missed_leaves_the_others() -> None:
    said: list[str] = []
    budgets = ["kl<=1e-12@90%", "kl<=0.001@90%"]
    more: dict[str, Any] = {"forms": NEAR, "settings": FEW}
    (found,) = profile_for(Keyed().eval(), samples(40), budgets, missed=said.append, **more)
    assert found.budget.limit == 0.001 and len(said) == 1 and "only the exact model meets kl<=1e-12" in said[0]
    with pytest.raises(PlanError, match="no plan of these forms meets any"):
        profile_for(Keyed().eval(), samples(40), budgets[:1], missed=said.append, **more)


def test_the_demo_uses_the_plans_that_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = Keyed().eval(), list[object]()

    def profiled(model: nn.Module, *_: object, **options: Any) -> list[Any]:
        made.append(options["resume"])
        return [plan(model)]

    monkeypatch.setattr(demo_plan, "profile_for", profiled)
    console, seen = Console(quiet=True), [sample(1)]

    def plans(tokens: Tensor, of: nn.Module = model) -> list[Any]:
        return demo_plan.kept_plans(console, of, demo_plan.QUICK, seen, [tokens], tmp_path)

    assert plans(sample(2)) == plans(sample(2)) == [plan(model)] and len(made) == 1
    plans(sample(3))  # other data
    other = Keyed().eval()
    other.blocks[0].values.data.mul_(2)
    assert plans(sample(2), other) == [plan(other)] and len(made) == 3


