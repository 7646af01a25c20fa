"""`attncc convert`: a program in, the same program with its attentions rewritten out, checked before it is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from attncc.convert import onnx_exporting, onnx_files
from attncc.convert.aoti import Packing
from attncc.convert.checking import CheckError, check
from attncc.convert.exported import Rewritten, rewritten
from attncc.convert.exporting import exported, other_inputs
from attncc.convert.portable import portable_form
from attncc.convert.writing import replacing
from attncc.driver.planning import Following
from attncc.driver.recording import report
from attncc.errors import PlanError, unforeseen
from attncc.frontends.targets import Target, TargetError, load, one_line
from attncc.passes.policies import CERTIFIED
from attncc.plans.plan import Plan
from attncc.plans.plan import load as load_plan
from attncc.progress import step
from attncc.report.model import Report

if TYPE_CHECKING:
    from attncc.convert.onnx_surgery import Asked

Kind = Literal["pt2", "onnx", "mlir", "aoti"]
#: Policies that leave out weights by what a kernel finds.
DROPPING = {x.name for x in CERTIFIED}
OnnxTarget = Literal["onnx", "onnxruntime", "onnxruntime+attncc"]
Provider = Literal["cpu", "cuda"]
Dialect = Literal["torch", "linalg"]
SUFFIXES: dict[str, Kind] = {".pt2": "pt2", ".onnx": "onnx", ".mlir": "mlir"}


@dataclass(frozen=True)
class Wish:
    """What is asked for. `output` None: nothing is written. `portable`: operators of torch alone. `measure`: kernels
    are measured, and slower ones left out. `decompose`: MLIR holds no attention as one operation. `isas`: what the
    kernels of a package or a library are compiled for, this machine where none is named. `target`, `provider`: what
    runs an ONNX file; `onnxruntime+attncc` calls attncc's kernels from a library beside it. `opset`: of its standard
    operators. `dialect`: of MLIR."""

    source: str
    output: Path | None
    to: Kind
    portable: bool = False
    dynamic: tuple[str, ...] = ()
    checked: bool = True
    plan: Path | None = None
    measure: bool = True
    decompose: bool = False
    isas: tuple[str, ...] = ()
    target: OnnxTarget = "onnx"
    provider: Provider = "cpu"
    opset: int = 23
    dialect: Dialect = "torch"


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
    return to


def convert(wish: Wish) -> Converted:
    """Convert, check, and write. Raises TargetError and PlanError for bad input, CheckError where the result computes
    something else; nothing is written then."""
    step("loading the model")
    if wish.source.lower().endswith(".onnx"):
        return _of_onnx(wish)
    target = load(wish.source)
    step("exporting the model")
    program = exported(target, wish.dynamic)
    if wish.to == "onnx":
        return _to_onnx(wish, program)
    return _program(wish, target, program)


def _of_onnx(wish: Wish) -> Converted:
    if wish.dynamic:
        raise TargetError(f"{wish.source}: an ONNX file says which of its dimensions are open; drop --dynamic")
    if wish.to != "onnx":
        step("exporting the model")
        return _program(wish, Target(wish.source, None), onnx_files.exported(wish.source))
    if wish.plan is not None:
        raise PlanError(f"{wish.source}: a plan speaks of the modules of a model; give --plan a module:factory")
    try:
        with replacing(wish.output) if wish.output is not None else nullcontext() as path:
            found = onnx_files.rewrite(wish.source, path, checked=wish.checked, measure=wish.measure,
                                       asked=_asked(wish))  # fmt: skip
    except (TargetError, CheckError):
        raise
    except Exception as error:
        raise TargetError(f"{wish.source}: {unforeseen('converting an ONNX file', error)}") from error
    return Converted(found.report, found.checked)


def _to_onnx(wish: Wish, program: ExportedProgram) -> Converted:
    """Through torch's own exporter, whose file is then rewritten as any other. A plan is followed before that."""
    notes: tuple[str, ...] = ()
    source = program
    if wish.plan is not None:
        planner = Following(load_plan(wish.plan))
        source = rewritten(program, kernels=False, planner=planner, form=portable_form).program
        notes = (*planner.notes, *_exact_in_onnx(planner.plan))
    step("writing the model as ONNX")
    folder, file = onnx_exporting.export(source, wish.source)
    try:
        with replacing(wish.output) if wish.output is not None else nullcontext() as path:
            found = onnx_files.rewrite(str(file), path, checked=wish.checked, measure=wish.measure,
                                       asked=_asked(wish))  # fmt: skip
            said = found.checked
            if path is not None and wish.checked:
                said = _check_onnx(wish, source, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Converted(replace(found.report, notes=(*found.report.notes, *notes)), said)


def _exact_in_onnx(plan: Plan) -> list[str]:
    """What of a plan no operator says: weights that a kernel may leave out are computed, which is within the form."""
    forms = {r.form.partition("{")[0] for s in plan.sites for r in s.rules}
    return [f"{x}: nothing is left out in ONNX, whose operators compute every weight" for x in sorted(forms & DROPPING)]


def _asked(wish: Wish) -> Asked:
    from attncc.convert.onnx_kernels import KernelLibrary  # noqa: PLC0415 needs onnx-ir
    from attncc.convert.onnx_surgery import Asked  # noqa: PLC0415 needs onnx-ir

    runtime, _, own = wish.target.partition("+")
    return Asked(runtime, wish.provider, wish.opset, KernelLibrary(wish.isas) if own else None)


def _check_onnx(wish: Wish, program: ExportedProgram, path: Path) -> str:
    """The written file against the program that it was made of."""
    if program.example_inputs is None:
        raise TargetError(f"{wish.source}: holds no example inputs to check with; --no-check leaves that out")
    if not onnx_files.runs(wish.provider):
        return f"not checked: onnxruntime has no {wish.provider.upper()} provider here"
    session = onnx_files.Session(path, wish.provider)

    def run(*args: Any, **kwargs: Any) -> Any:
        return session(*_tensors((args, kwargs)))

    return check(_flat(program.module()), run, [program.example_inputs, *other_inputs(program)])


def _program(wish: Wish, target: Target, program: ExportedProgram) -> Converted:
    operators = wish.to == "aoti" or (wish.to == "pt2" and not wish.portable)
    packing = Packing(wish.isas) if wish.to == "aoti" else None
    planner = None if wish.plan is None else Following(load_plan(wish.plan))
    form = packing.form if packing is not None else None if operators else portable_form
    made = rewritten(program, kernels=operators, measure=wish.measure, planner=planner, form=form)
    shown = _shown(made, operators)
    if planner is not None:
        shown = replace(shown, notes=(*shown.notes, *planner.notes))
    if wish.output is None:
        return Converted(shown)
    if planner is not None:  # what is written computes what the plan says, and is compared with that
        program = rewritten(program, kernels=False, planner=planner, form=portable_form).program
    with replacing(wish.output) as path:
        step(f"writing {wish.output.name}")
        if packing is not None:
            after = packing.write(made.program, path, target.name)
        else:
            after = _written(wish, path, made.program, target)
        said = ""
        if not wish.checked:
            pass
        elif after is None:
            said = "not checked: iree-base-compiler and iree-base-runtime are not installed"
        else:
            if program.example_inputs is None:
                raise TargetError(f"{target.name}: holds no example inputs to check with; --no-check leaves that out")
            before = _flat(program.module()) if wish.to == "mlir" else program.module()
            said = check(before, after, [program.example_inputs, *other_inputs(program)])
    return Converted(shown, said)


def _flat(call: Callable[..., Any]) -> Callable[..., Any]:
    """A program as a function that gives the tuple of its tensors."""
    return lambda *args, **kwargs: tuple(_tensors(call(*args, **kwargs)))


def _tensors(x: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, torch.Tensor)]


def _written(wish: Wish, path: Path, program: ExportedProgram, target: Target) -> Callable[..., Any] | None:
    """Write a program; what was written, as it is read again. None where nothing here can run it."""
    if wish.to == "mlir":
        from attncc.convert import mlir  # noqa: PLC0415 needs torch-mlir

        return mlir.write(program, path, target.name, decompose=wish.decompose, dialect=wish.dialect)
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
