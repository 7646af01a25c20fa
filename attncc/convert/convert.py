"""`attncc convert`: a program in, the same program with its attentions rewritten out, checked before it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.export import ExportedProgram

from attncc.convert.checking import check
from attncc.convert.exported import Rewritten, rewritten
from attncc.convert.exporting import exported, other_inputs
from attncc.convert.portable import portable_form
from attncc.convert.writing import replacing
from attncc.driver.explanation import report
from attncc.driver.planning import Following
from attncc.frontends.targets import Target, TargetError, load, one_line
from attncc.plans.plan import load as load_plan
from attncc.progress import step
from attncc.report.model import Report

Kind = Literal["pt2", "aoti", "onnx", "mlir"]
SUFFIXES: dict[str, Kind] = {".pt2": "pt2", ".onnx": "onnx", ".mlir": "mlir"}


@dataclass(frozen=True)
class Wish:
    """What is asked for. `output` None: nothing is written. `portable`: operators of torch alone. `measure`: kernels
    are measured, and slower ones left out."""

    source: str
    output: Path | None
    to: Kind
    portable: bool = False
    dynamic: tuple[str, ...] = ()
    checked: bool = True
    plan: Path | None = None
    measure: bool = True


@dataclass(frozen=True)
class Converted:
    """What became of each attention, and what the user should know."""

    report: Report
    checked: str = ""


def kind_of(output: Path, to: Kind | None) -> Kind:
    """What is to be written, from a name and what was asked for. Raises TargetError."""
    suffix = output.suffix.lower()
    if to is None:
        if suffix not in SUFFIXES:
            raise TargetError(f"{output}: say what it is to be by its suffix ({', '.join(SUFFIXES)}) or by --to")
        return SUFFIXES[suffix]
    wanted = ".pt2" if to == "aoti" else f".{to}"
    if suffix != wanted:
        raise TargetError(f"{output}: --to {to} writes a file whose name ends in {wanted}")
    return to


def convert(wish: Wish) -> Converted:
    """Convert, check, and write. Raises TargetError and PlanError for bad input, CheckError where the result computes
    something else; nothing is written then."""
    step("loading the model")
    target = load(wish.source)
    step("exporting the model")
    program = exported(target, wish.dynamic)
    return _program(wish, target, program)


def _program(wish: Wish, target: Target, program: ExportedProgram) -> Converted:
    operators = wish.to == "pt2" and not wish.portable
    planner = None if wish.plan is None else Following(load_plan(wish.plan))
    made = rewritten(
        program, kernels=operators, measure=wish.measure, planner=planner, form=None if operators else portable_form
    )
    shown = _shown(made, operators)
    if planner is not None:
        shown = replace(shown, notes=(*shown.notes, *planner.notes))
    if wish.output is None:
        return Converted(shown)
    with replacing(wish.output) as path:
        step(f"writing {wish.output.name}")
        after = _written(wish, path, made.program, target)
        said = ""
        if wish.checked:
            if program.example_inputs is None:
                raise TargetError(f"{target.name}: holds no example inputs to check with; --no-check leaves that out")
            said = check(program.module(), after, [program.example_inputs, *other_inputs(program)])
    return Converted(shown, said)


def _written(wish: Wish, path: Path, program: ExportedProgram, target: Target) -> Callable[..., Any]:
    """Write a program; what was written, as it is read again."""
    try:
        torch.export.save(program, path)
        return torch.export.load(path).module()
    except Exception as error:
        raise TargetError(f"{target.name}: torch cannot write this program ({one_line(error)})") from error


def _shown(made: Rewritten, operators: bool) -> Report:
    """The report on a program; without operators of attncc, the sites became operators of torch."""
    found = report(made.found)
    if operators:
        return found
    return replace(found, sites=tuple(_renamed(found.sites)))


def _renamed(sites: Sequence[Any]) -> list[Any]:
    return [replace(s, became="operators of torch", reason="", code="") if s.status == "fused" else s for s in sites]
