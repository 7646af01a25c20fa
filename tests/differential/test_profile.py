"""Profiling models whose attention is known, and running them under plans."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from memory.allocations import allocations
from planned.keyed import Keyed, answer, sample, wanted
from planned.made import WHAT, costs_by_density, plan, site
from rich.console import Console
from torch import Tensor, nn

import attncc
from attncc.cli import demo_plan
from attncc.driver import rewriting
from attncc.driver.planned_times import _gathers
from attncc.driver.planning import Places
from attncc.errors import PlanError
from attncc.ir import parse_attention
from attncc.ir.reasons import because
from attncc.passes.bounds.mask_cells import SKIPPED
from attncc.plans import costs, losses
from attncc.plans.plan import load, policy_of
from attncc.plans.profile import Settings, profile_for

FEW = Settings(samples=4, probes=2, tune=2)
NEAR = ["streaming{sinks=16,window=64}", "streaming{sinks=64,window=128}"]


def samples(count: int, first: int = 100) -> Iterator[Tensor]:
    return (sample(seed) for seed in range(first, first + count))


def follow(model: nn.Module, known: object, **options: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(model, backend="attncc", options={"plan": known, "inductor": False, **options})


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
