"""`attncc convert`: a model into a file, with its attentions rewritten."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from attncc.cli.output import Debug, clear_errors, print_report, print_text, quiet
from attncc.frontends.targets import TargetError
from attncc.progress import reporting


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="`module:factory`, a .pt2 or a .onnx file.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="OUT", help="The file to write; its suffix "
                                                "says what: .pt2, .onnx or .mlir.")] = None,
    to: Annotated[Literal["pt2", "onnx", "mlir", "aoti"] | None, typer.Option(
        "--to", help="What to write, where the suffix does not say it; `aoti`: an AOTInductor package (.pt2) with the "
        "kernels inside.")] = None,
    isa: Annotated[str, typer.Option("--isa", metavar="amx,avx512,avx2", help="What a package's kernels are compiled "
                                     "for, one of which is chosen where it is loaded (this machine).")] = "",
    target: Annotated[Literal["onnx", "onnxruntime", "onnxruntime+attncc"], typer.Option(
        "--target", help="What runs an .onnx file: anything that knows the standard's operators; onnxruntime, by its "
        "own ones where these are faster; or onnxruntime with attncc's kernels, in a library beside the file."
    )] = "onnx",
    provider: Annotated[Literal["cpu", "cuda"], typer.Option("--provider", help="What onnxruntime runs it on.")
                        ] = "cpu",
    opset: Annotated[int, typer.Option("--opset", min=23, max=27, help="Version of the standard operators of an .onnx "
                                       "file; one that is newer stays so.")] = 23,
    portable: Annotated[bool, typer.Option("--portable", help="Operators of torch alone: attncc is not needed to run "
                                           "it.")] = False,
    dynamic: Annotated[str, typer.Option("--dynamic", metavar="batch,length", help="Leave these dimensions of a "
                                         "module:factory open.")] = "",
    plan: Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="Follow a plan (approximate).")] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Run both programs, and write nothing where they "
                                        "disagree (code 3).")] = True,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Leave out kernels that are slower here.")
                       ] = True,
    decompose: Annotated[bool, typer.Option("--decompose", help="For .mlir: attention as products and a softmax, "
                                            "not as one operation.")] = False,
    dialect: Annotated[Literal["torch", "linalg"], typer.Option("--dialect", help="For .mlir: torch-mlir's own, or "
                                                                "linalg.")] = "torch",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would become of each attention; write nothing."
                                          )] = False,
    every: Annotated[bool, typer.Option("--all", help="One row per site, also where equal "
                                       "layers would share a row.")] = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Convert a model: find its attentions, rewrite them, check the result, write it."""
    from attncc.convert import convert as converting  # noqa: PLC0415 loads the compiler
    from attncc.convert.checking import CheckError  # noqa: PLC0415

    with clear_errors(debug):
        if output is None and not dry_run:
            raise TargetError("convert: name the file to write with -o, or look first with --dry-run")
        kind = (to or "pt2") if output is None else converting.kind_of(output, to)
        if portable and kind != "pt2":
            raise TargetError(f"convert: --portable is for .pt2 programs, not for {kind}")
        if kind != "onnx":
            for option, given in (("--target", target != "onnx"), ("--opset", opset != 23)):
                if given:
                    raise TargetError(f"convert: {option} is for .onnx files, not for {kind}")
        if kind != "mlir" and (decompose or dialect != "torch"):
            raise TargetError(f"convert: --decompose and --dialect are for .mlir files, not for {kind}")
        if provider != "cpu" and target != "onnxruntime":
            raise TargetError("convert: --provider goes with --target onnxruntime")
        if isa and kind != "aoti" and target != "onnxruntime+attncc":
            raise TargetError("convert: --isa goes with --to aoti or --target onnxruntime+attncc; others are built as "
                              "they run")  # fmt: skip
        if kind == "aoti" and output is not None and output.suffix != ".pt2":
            raise TargetError(f"{output}: torch loads packages from files named .pt2")
        wish = converting.Wish(
            source, None if dry_run else output, kind, portable, tuple(x for x in dynamic.split(",") if x), check, plan,
            measure, decompose, tuple(x for x in isa.split(",") if x), target, provider, opset, dialect,
        )  # fmt: skip
        try:
            with quiet(debug), reporting():
                done = converting.convert(wish)
        except CheckError as error:
            if debug:
                raise
            Console(stderr=True, soft_wrap=True).print(Text(f"attncc: {source}: not converted: {error}", style="red"))
            raise typer.Exit(3) from None
        print_report(done.report, every=every)
        console = Console(soft_wrap=not sys.stdout.isatty())
        if done.checked:
            print_text(console, done.checked)
        if wish.output is not None:
            print_text(console, f"{wish.output}: written")
