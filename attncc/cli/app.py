"""The `attncc` command. Bad input ends with one line on standard error and code 2; `--debug` adds the traceback."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from torch.utils._pytree import tree_leaves

import attncc
from attncc.frontends.targets import Target, TargetError, load, one_line
from attncc.progress import reporting
from attncc.report.mask_image import LEGEND, mask_image
from attncc.report.model import WIDTH, Report, Site
from attncc.runtime.store import Store, StoreError

LANGUAGES = {"cpp": "cpp", "triton": "python", "torch": "python"}

app = typer.Typer(
    help="An attention compiler for PyTorch: see what it finds in a model, and try it.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextlib.contextmanager
def clear_errors(debug: bool) -> Iterator[None]:
    try:
        yield
    except TargetError as error:
        if debug:
            traceback.print_exc()
        Console(stderr=True, soft_wrap=True).print(Text(f"attncc: {error}", style="red"))
        raise typer.Exit(2) from None


@contextlib.contextmanager
def quiet(debug: bool) -> Iterator[None]:
    """What a model prints, logs and warns of while it loads and runs is not part of the answer."""
    level = logging.root.manager.disable
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(level)


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(help="`module:factory` or a .pt2 file. The factory returns (model, args).")],
    ir: Annotated[bool, typer.Option("--ir", help="Print the IR of each site.")] = False,
    kernel: Annotated[int | None, typer.Option("--kernel", metavar="N", help="Print the kernel of site N.")] = None,
    graph: Annotated[Literal["before", "after"] | None, typer.Option(help="Print the model's graph.")] = None,
    mask: Annotated[int | None, typer.Option("--mask", metavar="N", help="Draw the mask of site N.")] = None,
    picture: Annotated[Path | None, typer.Option("--picture", metavar="PATH", help="Draw each mask and what the kernel "
                                                 "visits, into a folder; or one (--mask N) into FILE.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    every: Annotated[bool, typer.Option("--all", help="One row a site, where equal layers would share one.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Show training beside inference: the model in train mode, with "
                                        "gradients. Parts (--ir, --kernel, ...) are then those of training.")] = False,
    debug: Debug = False,
) -> None:
    """Show each attention of a model: what was found, what it became, or why it was left alone."""
    with clear_errors(debug):
        with quiet(debug):
            loaded = load(target)
            reports = {"inference": examine(loaded)}
            if train:
                reports["training"] = examine(training(loaded), gradients=True)
        report = list(reports.values())[-1]
        console = Console(soft_wrap=not sys.stdout.isatty())
        if as_json:
            every_way = {name: each.to_dict() for name, each in reports.items()}
            print(json.dumps(every_way if train else report.to_dict(), indent=2))
            return
        parts = {"ir": ir, "kernel": kernel is not None, "graph": graph is not None, "mask": mask is not None}
        if not any(parts.values()) and picture is None:
            for name, each in reports.items():
                if train:
                    print_text(console, f"{name}:")
                print_report(each, every=every)
        if ir:
            for site in report.sites:
                body = site.program or site.ir or f"# {site.status}: {site.reason}"
                print_text(console, f"# site {site.index}: {site.path}\n{body}\n")
        if kernel is not None:
            site = pick(report, kernel, target)
            source = _part(site, site.kernel, "kernel", target)
            print_source(console, source, LANGUAGES.get(site.language or "", "text"))
        if graph is not None:
            print_source(console, report.graph_before if graph == "before" else report.graph_after, "python")
        if mask is not None:
            site = pick(report, mask, target)
            print_text(console, _part(site, site.picture, "picture of a mask", target))
        if picture is not None:
            draw(report, picture, target, mask)


def draw(report: Report, path: Path, target: str, number: int | None) -> None:
    """Into the file `path` site `number`, or the only one; into the folder `path` every site that has a mask."""
    found = [s for s in report.sites if s.picture is not None] if number is None else [pick(report, number, target)]
    if not found:
        raise TargetError(f"{target}: no site has a mask to draw")
    for site in found:
        _part(site, site.picture, "picture of a mask", target)
    single = path.suffix.lower() == ".png"
    if single and len(found) > 1:
        raise TargetError(f"{target}: {len(found)} sites have masks; say which with --mask N, or name a folder")
    try:
        (path.parent if single else path).mkdir(parents=True, exist_ok=True)
        for site in found:
            file = path if single else path / f"site-{site.index}.png"
            file.write_bytes(mask_image(site))
            print(f"{file}: {LEGEND}")
    except OSError as error:
        raise TargetError(f"{path}: {one_line(error)}") from error


def training(target: Target) -> Target:
    """A target as it is trained: in train mode; where none of its parameters learns, its inputs do."""
    if target.exported:
        raise TargetError(f"{target.name}: an exported program is not trained; give --train a module:factory")
    learns = False
    if isinstance(target.model, torch.nn.Module):
        target.model.train()
        learns = any(p.requires_grad for p in target.model.parameters())
    if not learns:
        for x in tree_leaves((target.args, target.kwargs)):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                x.requires_grad_()
    return target


def examine(target: Target, *, gradients: bool = False) -> Report:
    """The report on a target, without gradients or with them; what the model raises becomes a `TargetError`."""
    try:
        with torch.enable_grad() if gradients else torch.no_grad(), reporting():
            if target.exported:
                return attncc.explain_program(target.model)
            return attncc.explain(target.model, *target.args, **target.kwargs)
    except Exception as error:
        raise TargetError(f"{target.name}: {_why(target, error)}") from error


def _why(target: Target, error: Exception) -> str:
    """The model's own exception where it raises in eager too: Dynamo's words for the same say less."""
    if not target.exported:
        try:
            with torch.no_grad():
                target.model(*target.args, **target.kwargs)
        except Exception as own:
            return f"running the model raised {one_line(own)}"
    return f"compiling the model raised {one_line(error)}"


def pick(report: Report, number: int, target: str) -> Site:
    for site in report.sites:
        if site.index == number:
            return site
    if not report.sites:
        raise TargetError(f"{target}: there is no site {number}; no attention was found")
    last = report.sites[-1].index
    raise TargetError(f"{target}: there is no site {number}; sites are {report.sites[0].index} to {last}")


def _part(site: Site, part: str | None, name: str, target: str) -> str:
    if part is None:
        why = f"{site.status}: {site.reason}" if site.reason else site.status
        raise TargetError(f"{target}: site {site.index} has no {name} ({why})")
    return part


def print_report(report: Report, *, every: bool = False) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    console.print(report.table(every=every))


def print_text(console: Console, text: str) -> None:
    console.print(Text(text.rstrip("\n")))


def print_source(console: Console, source: str, language: str) -> None:
    """Highlighted on a terminal, byte for byte elsewhere so that it can be piped into a file."""
    if console.is_terminal:
        console.print(Syntax(source, language, background_color="default", word_wrap=False))
    else:
        print(source.rstrip("\n"))


@app.command()
def demo(
    sentences: Annotated[Path | None, typer.Option(help="A file with one sentence a line.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed rounds; the median counts.")] = 15,
    debug: Debug = False,
) -> None:
    """Embed sentences with a pretrained model: eager, Inductor and attncc side by side."""
    with clear_errors(debug):
        from attncc.cli.demo import run  # noqa: PLC0415 loads transformers

        if not run(sentences, rounds=rounds):
            raise typer.Exit(1)


@app.command()
def bench(
    suite: Annotated[
        Literal["cpu", "gpu", "windows", "compile", "sites"],
        typer.Option("--suite", help="Which machine to measure; or on this one, models with long windows, what "
                     "compiling costs, or how much of the attention of transformers' models is found."),
    ] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes and rounds.")] = False,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results to FILE too.")] = None,
    only: Annotated[str, typer.Option("--rows", metavar="WORDS", help="Rows whose names hold one of these, by commas; "
                                      "`none` measures nothing (cpu, compile, windows, sites).")] = "",
    lengths: Annotated[str, typer.Option("--lengths", metavar="TOKENS", help="By commas (windows).")] = "",
    dtypes: Annotated[str, typer.Option("--dtypes", metavar="TYPES", help="Of f32,bf16,f16 (cpu).")] = "",
    rivals: Annotated[str, typer.Option("--rivals", metavar="NAMES", help="By commas: sdpa, sdpa gqa, inductor, flex, "
                                        "flex + mask, plain, read (cpu).")] = "",
    threads: Annotated[list[int] | None, typer.Option("--threads", min=1, help="May be repeated (cpu).")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the results (cpu).")] = None,
    table: Annotated[Path | None, typer.Option("--table", metavar="FILE", help="Write Markdown tables (cpu).")] = None,
    debug: Debug = False,
) -> None:
    """Measure attncc against SDPA, FlexAttention and Inductor in one run."""
    with clear_errors(debug):
        of_cpu = {"only": only, "dtypes": _words(dtypes), "rivals": _words(rivals), "threads": threads or [],
                  "picture": picture, "table": table}  # fmt: skip
        of_windows = {"only": only, "lengths": _numbers(lengths)}
        rows = {"only": only}
        taken = {"cpu": of_cpu, "compile": rows, "sites": rows, "windows": of_windows}.get(suite, {})
        given = {name for name, value in (of_cpu | of_windows).items() if value}
        foreign = [f"--{_OPTION.get(name, name)}" for name in sorted(given - set(taken))]
        if foreign:
            raise TargetError(f"bench: --suite {suite} has no {', '.join(foreign)}")
        _suite(suite)(quick=quick, json=out, **taken)


_OPTION = {"only": "rows", "picture": "plot"}


def _numbers(text: str) -> list[int]:
    try:
        return [int(x) for x in _words(text)]
    except ValueError as error:
        raise TargetError(f"bench: {text!r} is no list of lengths") from error


def _words(text: str) -> list[str]:
    return [w.strip() for w in text.split(",") if w.strip()]


def _suite(name: str) -> Callable[..., object]:
    try:
        return importlib.import_module(f"attncc.bench.{name}").run
    except ImportError as error:
        raise TargetError(f"bench --suite {name} is not available here ({one_line(error)})") from error


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove every kernel and every measurement.")] = False,
    debug: Debug = False,
) -> None:
    """Show the kernels that were built, in the order of their last use, or remove them."""
    with clear_errors(debug):
        try:
            store = Store()
            if store.note:
                raise TargetError(f"cache: {store.note}")
            if clear:
                print(f"removed {_kernels(store.clear())} from {store.root}")
                return
            entries = sorted(store.entries(), key=lambda entry: -entry.used)
        except (StoreError, OSError) as error:
            raise TargetError(f"cache: {one_line(error)}") from error
        table = Table("last used", "size", "kernel")
        for entry in entries:
            when = datetime.fromtimestamp(entry.used).isoformat(sep=" ", timespec="minutes")
            table.add_row(when, f"{entry.size / 1024:.0f} KiB", Text(entry.path.name))
        console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
        if entries:
            console.print(table)
        total = sum(entry.size for entry in entries) / 2**20
        console.print(Text(f"{_kernels(len(entries))}, {total:.1f} MiB, in {store.root}"), soft_wrap=True)


def _kernels(count: int) -> str:
    return f"{count} kernel" if count == 1 else f"{count} kernels"


def main() -> None:
    app(prog_name="attncc")
