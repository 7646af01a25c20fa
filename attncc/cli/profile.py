"""`attncc profile`: a plan for a model, from the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from attncc.cli.output import Debug, clear_errors, quiet
from attncc.cli.plan import print_plan
from attncc.frontends.targets import TargetError, load, load_object, one_line


def profile(
    target: Annotated[str, typer.Argument(help="`module:factory`; the factory returns (model, args).")],
    data: Annotated[str, typer.Option("--data", metavar="MODULE:NAME", help="An iterable of inputs, or a function that "
                                      "returns one: tensors, tuples of arguments or mappings of keyword arguments.")],
    budget: Annotated[str, typer.Option("--budget", help="METRIC<=LIMIT@SHARE%: kl, flips, rel or module:function."
                                        )] = "kl<=0.02@95%",
    speed: Annotated[float | None, typer.Option("--speed", help="Instead of a budget: the least error at this speed "
                                                "of attention (exact attention: 1).")] = None,
    form: Annotated[list[str] | None, typer.Option("--form", metavar="POLICY", help="A form to try, as "
                                                   "'streaming{sinks=64,window=256}'; may be repeated.")] = None,
    forms: Annotated[int, typer.Option("--forms", min=1, max=4, help="Forms that the heads of one attention may take "
                                       "together, the exact one included.")] = 2,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Elements of the data that are profiled.")] = 16,
    probes: Annotated[int, typer.Option("--probes", min=1, help="Backward passes per element.")] = 2,
    tune: Annotated[int, typer.Option("--tune", min=1, help="Elements of the data that the plan is chosen on.")] = 8,
    certify: Annotated[int | None, typer.Option("--certify", min=1, help="Elements of the data that certify it; the "
                                                "fewest that the share allows by default.")] = None,
    delta: Annotated[float, typer.Option("--delta", help="The probability of a false certificate.")] = 0.05,
    tests: Annotated[int, typer.Option("--tests", min=1, max=3, help="Plans to certify, the safest first.")] = 2,
    uncertified: Annotated[bool, typer.Option("--uncertified", help="Make a plan without a certificate.")] = False,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    out: Annotated[Path, typer.Option("--output", "-o", help="The file to write the plan to.")] = Path("model.plan"),
    plots: Annotated[Path | None, typer.Option("--plots", metavar="FOLDER", help="Draw error against speed, and each "
                                               "head's form.")] = None,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Find which approximate form each head of a model takes within a budget, and certify it on unseen data."""
    with clear_errors(debug):
        from attncc.plans.profile import Settings  # noqa: PLC0415 loads the driver
        from attncc.plans.profile import profile as run  # noqa: PLC0415

        if not out.parent.is_dir():
            raise TargetError(f"{out}: there is no folder {out.parent}")
        settings = Settings(samples, probes, tune, certify, delta, tests, forms, seed)
        with quiet(debug):
            model = load(target).model
            batches = read_data(data)
            metric, _, rest = budget.partition("<=")
            loss = None
            if ":" in metric:
                loss, budget = user_loss(metric.strip()), f"{metric.rpartition(':')[2]}<={rest}"
        with bars() as shown, quiet(debug):
            plan = run(
                model, batches, budget, speed=speed, forms=form, settings=settings,
                uncertified=uncertified, loss=loss, resume=out.with_name(f"{out.name}.part"), progress=shown,
            )  # fmt: skip
        plan.save(out)
        print_plan(plan)
        print(f"{out}: written")
        if plots is not None:
            from attncc.plans.plots import draw  # noqa: PLC0415 loads matplotlib

            for file in draw(plan, plots):
                print(f"{file}: written")


def read_data(text: str) -> Iterable[Any]:
    """The data that `module:name` is, or returns. Raises TargetError."""
    found = load_object(text)
    if callable(found) and not isinstance(found, Iterable):
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise TargetError(f"{text}: raised {one_line(error)}") from error
    if not isinstance(found, Iterable):
        raise TargetError(f"{text}: gives {type(found).__name__}, which is not an iterable of inputs")
    return found


def user_loss(text: str) -> Callable[..., Any]:
    found = load_object(text)
    if not callable(found):
        raise TargetError(f"{text}: is not a function (exact, planned, inputs) -> float")
    return found


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """Shows progress with the time that is left, where standard error is a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        tasks: dict[str, Any] = {}

        def shown(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield shown
