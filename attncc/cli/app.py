"""The `attncc` command. Bad input ends with one line on standard error and code 2; `--debug` adds the traceback."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

import torch
import typer

from attncc.cli.bench import bench
from attncc.cli.cache import cache
from attncc.cli.convert import convert
from attncc.cli.diff import diff
from attncc.cli.inspect import inspect
from attncc.cli.opt import opt
from attncc.cli.output import Debug, clear_errors
from attncc.cli.plan import plan
from attncc.cli.profile import profile
from attncc.frontends.targets import TargetError
from attncc.version import __version__

app = typer.Typer(
    help="An attention compiler for PyTorch: see what it finds in a model, and try it.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip



def _version(asked: bool) -> None:
    if asked:
        print(f"attncc {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def _attncc(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the versions of "
                                          "attncc, torch and Python.")] = False,
) -> None:  # fmt: skip
    pass


app.command()(inspect)
app.command()(diff)


@app.command()
def demo(
    sentences: Annotated[Path | None, typer.Option(help="A file with one sentence per line.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed rounds; the median counts.")] = 15,
    plan: Annotated[bool, typer.Option("--plan", help="A language model under plans instead: profiled, certified and "
                                       "timed (needs attncc[demo-plan]).")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="With --plan: one budget, shorter texts.")] = False,
    plots: Annotated[Path | None, typer.Option("--plots", metavar="FOLDER", help="With --plan: draw it.")] = None,
    folder: Annotated[Path | None, typer.Option("--folder", metavar="FOLDER", help="With --plan: where plans and "
                                                "progress are kept, to go on after an interrupt.")] = None,
    debug: Debug = False,
) -> None:
    """Embed sentences with a pretrained model: eager, Inductor and attncc side by side."""
    with clear_errors(debug):
        if plan:
            from attncc.cli.demo_plan import run as planned  # noqa: PLC0415 loads transformers

            if not planned(quick=quick, plots=plots, folder=folder):
                raise typer.Exit(1)
            return
        if quick or plots is not None or folder is not None:
            raise TargetError("demo: --quick, --plots and --folder go with --plan")
        from attncc.cli.demo import run  # noqa: PLC0415 loads transformers

        if not run(sentences, rounds=rounds):
            raise typer.Exit(1)


app.command()(convert)
app.command()(bench)
app.command()(opt)
app.command()(profile)
app.add_typer(plan, name="plan")
app.add_typer(cache, name="cache")


def main() -> None:
    app(prog_name="attncc")
