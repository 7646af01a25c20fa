"""`attncc profile`, `attncc plan` and `attncc inspect --plan`, from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from planned.keyed import Keyed
from planned.made import costs_by_density, plan, site
from typer.testing import CliRunner, Result

from attncc.cli.app import app
from attncc.plans.plan import load

TARGET = '''
from planned.keyed import Keyed, sample

def factory():
    return Keyed().eval(), (sample(0),)

def batches():
    return (sample(seed) for seed in range(100, 150))

def few():
    return [sample(1)]

def loss(exact, planned, inputs):
    return float((exact - planned).abs().max())

number = 3
'''


@pytest.fixture(autouse=True)
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "attncc_plan_target.py").write_text(TARGET)
    costs_by_density(monkeypatch)


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(x) for x in args])


DATA = ("--data", "attncc_plan_target:batches")
NEAR = ("--form", "streaming{sinks=16,window=64}", "--form", "streaming{sinks=64,window=128}")
FEW = (*NEAR, "--samples", 4, "--tune", 2, "--budget", "kl<=0.001@90%")


def test_a_plan_is_made_shown_and_followed(tmp_path: Path) -> None:
    done = run("profile", "attncc_plan_target:factory", *DATA, *FEW, "-o", "x.plan", "--plots", "pictures")
    assert done.exit_code == 0, done.output
    assert "1 of 2 heads approximate" in done.stdout and "certified: 0 of 29 unseen samples" in done.stdout
    assert load("x.plan").certified and not list(tmp_path.glob("*.part"))
    pictures = {f"{name}.{kind}" for name in ("heads", "speed") for kind in ("png", "svg")}
    assert {p.name for p in Path("pictures").iterdir()} == pictures
    assert all(p.stat().st_size > 1000 for p in Path("pictures").iterdir())
    shown = run("plan", "show", "x.plan")
    assert shown.exit_code == 0 and "holds for 512 to 512 keys" in shown.stdout
    inspected = run("inspect", "attncc_plan_target:factory", "--plan", "x.plan")
    assert inspected.exit_code == 0 and "as the plan says" in " ".join(inspected.stdout.split())
    checked = run("plan", "check", "x.plan", "attncc_plan_target:factory")
    assert checked.exit_code == 0, checked.output
    assert "1 attentions follow the plan, which has forms for 1" in checked.stdout


def test_a_loss_of_the_users(tmp_path: Path) -> None:
    budget = "attncc_plan_target:loss<=0.01@90%"
    done = run("profile", "attncc_plan_target:factory", *DATA, *FEW[:-1], budget, "--uncertified")
    assert done.exit_code == 0, done.output
    assert "NOT CERTIFIED" in done.stdout and not load("model.plan").certified


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((*DATA, "--budget", "kl"), "the budget 'kl' is not like"),
        (("--data", "attncc_plan_target:missing"), "has no 'missing'"),
        (("--data", "attncc_plan_target:number"), "gives int, which is not an iterable of inputs"),
        (("--data", "attncc_plan_target:few"), "the data has 1 samples"),
        (("--data", "nothing"), "what is wanted is `module:name`"),
        ((*DATA, "-o", "no/such/folder.plan"), "there is no folder no/such"),
        ((*DATA, "--form", "streaming{a=1}"), "streaming has no parameter 'a'"),
        ((*DATA, "--delta", "2"), "delta is between 0 and 1"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(args: tuple[str, ...], message: str) -> None:
    done = run("profile", "attncc_plan_target:factory", *args)
    assert done.exit_code == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not Path("model.plan").exists()


def test_plans_are_compared() -> None:
    model = Keyed()
    plan(model).save("one.plan")
    plan(model, site(heads=(0, 1)), lengths=(64, 1024)).save("two.plan")
    same = run("plan", "diff", "one.plan", "one.plan")
    assert same.exit_code == 0 and same.stdout == ""
    other = run("plan", "diff", "one.plan", "two.plan")
    assert other.exit_code == 1 and other.stdout.splitlines() == [
        "lengths: (64, 512)  |  (64, 1024)",
        "blocks.0 (prefill): streaming{sinks=16,window=64} on 0  |  streaming{sinks=16,window=64} on 0-1",
    ]


def test_a_plan_for_another_model_is_no_plan_for_this_one() -> None:
    plan(Keyed(layers=2, length=64)).save("other.plan")
    for command in (("plan", "check", "other.plan"), ("inspect", "--plan", "other.plan")):
        done = run(*command, "attncc_plan_target:factory")
        assert done.exit_code == 2 and "the plan is for other weights" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    Path("broken.plan").write_text("{")
    done = run("plan", "check", "broken.plan")
    assert done.exit_code == 2 and "broken.plan: not a plan of attncc" in done.stderr
