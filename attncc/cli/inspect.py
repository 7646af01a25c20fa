"""`attncc inspect`: each attention of a model, what it became, or why it was left alone."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from torch.utils._pytree import tree_leaves

import attncc
from attncc.cli.output import Debug, clear_errors, print_report, print_source, print_text, quiet
from attncc.convert.writing import replacing
from attncc.environment import variable
from attncc.errors import PlanError
from attncc.frontends.small import random_model
from attncc.frontends.targets import Target, TargetError, load, one_line
from attncc.progress import reporting
from attncc.report.mask_image import LEGEND, mask_image
from attncc.report.model import Report
from attncc.report.page import PageError
from attncc.report.site import Site
from attncc.runtime.measure import REMEASURE

HF = "hf:"
LANGUAGES = {"cpp": "cpp", "triton": "python", "torch": "python"}


def inspect(
    target: Annotated[str, typer.Argument(help="`module:factory`, `path/file.py:factory`, a .pt2 or a .onnx file; the "
                                          "factory returns (model, args). Or `hf:TYPE`, a type of transformers' models "
                                          "such as hf:bert, with random weights.")],
    ir: Annotated[bool, typer.Option("--ir", help="Print the IR of each site.")] = False,
    print_after: Annotated[str, typer.Option("--print-after", metavar="PASS", help="Print the program of each site "
                                             "after this pass, or after `all`.")] = "",
    kernel: Annotated[int | None, typer.Option("--kernel", metavar="N", help="Print the kernel of site N.")] = None,
    graph: Annotated[Literal["before", "after"] | None, typer.Option(help="Print the model's graph.")] = None,
    mask: Annotated[int | None, typer.Option("--mask", metavar="N", help="Draw the mask of site N.")] = None,
    picture: Annotated[Path | None, typer.Option("--picture", metavar="PATH", help="Draw each mask and what the kernel "
                                                 "visits, into a folder; or one (--mask N) into FILE.png.")] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one page for a "
                                              "browser, complete in itself.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    every: Annotated[bool, typer.Option("--all", help="One row per site, also where equal "
                                       "layers would share a row.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Show training beside inference: the model in train mode, with "
                                        "gradients. Parts (--ir, --kernel, ...) are then those of training.")] = False,
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Layers of an hf:TYPE (2).")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=8, help="Tokens of its texts (256).")] = None,
    plan: Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="Show what each site becomes under a plan."
                                              )] = None,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Measure every site anew, and remember that.")] = False,
    debug: Debug = False,
) -> None:
    """Show each attention of a model: what was found, what it became, or why it was left alone."""
    with clear_errors(debug):
        with quiet(debug), variable(REMEASURE, "all") if remeasure else nullcontext():
            loaded = loaded_from(target, layers, tokens)
            reports = {"inference": examine(loaded, plan=plan)}
            if train:
                reports["training"] = examine(training(loaded), gradients=True, plan=plan)
        report = list(reports.values())[-1]
        if html is not None:
            write_page(report, html, target)
            return
        console = Console(soft_wrap=not sys.stdout.isatty())
        if as_json:
            every_way = {name: each.to_dict() for name, each in reports.items()}
            print(json.dumps(every_way if train else report.to_dict(), indent=2))
            return
        if not (ir or print_after) and all(part is None for part in (kernel, graph, mask, picture)):
            for name, each in reports.items():
                if train:
                    print_text(console, f"{name}:")
                print_report(each, every=every)
        if ir:
            for site in report.sites:
                body = site.program or site.ir or f"# {site.status}: {site.reason}"
                print_text(console, f"# site {site.index}: {site.path}\n{body}\n")
        if print_after:
            print_stages(console, report, print_after)
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


def loaded_from(target: str, layers: int | None, tokens: int | None) -> Target:
    """What the command line names: an ONNX file and a type of models here, what has inputs of its own elsewhere."""
    if target.startswith(HF):
        model, inputs = random_model(target.removeprefix(HF), layers or 2, tokens or 256)
        return Target(target, model, (), inputs)
    if layers or tokens:
        raise TargetError(f"{target}: --layers and --tokens go with hf:TYPE")
    if target.lower().endswith(".onnx"):
        from attncc.convert import onnx_files  # noqa: PLC0415 needs onnx

        return Target(target, onnx_files.exported(target))
    return load(target)


def print_stages(console: Console, report: Report, name: str) -> None:
    """The programs after the passes of a name, or after all of them."""
    found = [(made_by, text) for made_by, text in report.stages if name in ("all", made_by)]
    if not found:
        ran = ", ".join(dict.fromkeys(made_by for made_by, _ in report.stages)) or "none"
        raise TargetError(f"--print-after {name}: no such pass ran; those that ran: {ran}")
    for made_by, text in found:
        print_text(console, f"# after {made_by}\n{text}\n")


def write_page(report: Report, path: Path, target: str) -> None:
    """The page of a report into a file, which is replaced by a complete one only."""
    try:
        whole = report.html(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(whole, encoding="utf-8")
    except (OSError, PageError) as error:
        raise TargetError(f"{path}: {one_line(error)}") from error
    print(f"{path}: {report.summary}")


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


def examine(target: Target, *, gradients: bool = False, plan: Path | None = None) -> Report:
    """The report on a target, without gradients or with them; what the model raises becomes a `TargetError`."""
    try:
        with torch.enable_grad() if gradients else torch.no_grad(), reporting():
            if target.exported:
                if plan is not None:
                    raise PlanError(f"{target.name}: an exported program follows no plan; give --plan a module:factory")
                return attncc.explain_program(target.model)
            if plan is not None:
                return attncc.explain_plan(plan, target.model, *target.args, **target.kwargs)
            return attncc.explain(target.model, *target.args, **target.kwargs)
    except Exception as error:
        refused = error if isinstance(error, PlanError) else getattr(error, "inner_exception", None)
        if isinstance(refused, PlanError):
            raise refused from error
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
    first, last = report.sites[0].index, report.sites[-1].index
    known = f"sites are {first} to {last}" if last > first else f"the only one is site {first}"
    raise TargetError(f"{target}: there is no site {number}; {known}")


def _part(site: Site, part: str | None, name: str, target: str) -> str:
    if part is None:
        why = f"{site.status}: {site.reason}" if site.reason else site.status
        raise TargetError(f"{target}: site {site.index} has no {name} ({why})")
    return part
