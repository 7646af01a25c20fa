"""`attncc opt`: passes run on the text of a program, as a compiler's developers run them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from attncc.cli.output import WIDTH, Debug, clear_errors
from attncc.frontends.targets import TargetError, one_line
from attncc.ir import ParseError, Program, VerifyError, parse_program, print_program, verify_program
from attncc.ir.node import KINDS
from attncc.ir.program import program_of_node
from attncc.passes.pipeline import PassError, Pipeline, Stage, parse_pipeline, standard

#: A larger file is no program that attncc wrote.
MOST_BYTES = 8 << 20


def opt(
    file: Annotated[Path, typer.Argument(help="The text of a program, or of one node; `-` for standard input.")],
    passes: Annotated[str | None, typer.Option("--passes", "-p", help="Comma-separated, parameters as name{key=value}; "
                                               "the standard pipeline by default.")] = None,
    print_after: Annotated[str, typer.Option("--print-after", metavar="PASS", help="Print the program after this pass, "
                                             "or after `all`.")] = "",
    time_passes: Annotated[bool, typer.Option("--time-passes", help="Print the time that each pass took.")] = False,
    verify_each: Annotated[bool, typer.Option("--verify-each", help="Verify after every pass.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the program to a file.")] = None,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Run passes on the text of a program, and print the program that they make."""
    with clear_errors(debug):
        stages: list[Stage] = []
        try:
            chosen = standard().passes if passes is None else parse_pipeline(passes)
            names = {p.name for p in chosen}
            if print_after not in ("", "all", *names):
                there = ", ".join(sorted(names))
                raise TargetError(f"opt: --print-after {print_after}: no such pass runs; there are {there}")
            after = Pipeline(chosen, verify_each=verify_each).run(read_program(file), stages.append)
        except PassError as error:
            raise TargetError(f"opt: {error}") from error
        except ValueError as error:
            raise TargetError(f"opt: {one_line(error)}") from error
        for stage in stages:
            if print_after in ("all", stage.made_by.name):
                changed = "" if stage.after != stage.before else " (nothing changed)"
                print(f"# after {stage.made_by.name}{changed}\n{print_program(stage.after)}")
        if output is not None:
            write_whole(output, print_program(after))
        elif not print_after:
            print(print_program(after), end="")
        if time_passes:
            table = Table("pass", "milliseconds", "changed")
            for stage in stages:
                changed = "yes" if stage.after != stage.before else "no"
                table.add_row(stage.made_by.name, f"{stage.seconds * 1e3:.2f}", changed)
            Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH).print(table)


def read_program(file: Path) -> Program:
    """The verified program in a file; one node alone becomes a program of one step.

    Raises TargetError where the file cannot be read, ParseError and VerifyError where it holds no program."""
    try:
        if str(file) == "-":
            text = sys.stdin.read(MOST_BYTES + 1)
        else:
            with file.open(encoding="utf-8") as opened:
                text = opened.read(MOST_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"{file}: {one_line(error)}") from error
    if len(text) > MOST_BYTES:
        raise TargetError(f"{file}: over {MOST_BYTES >> 20} MiB, too large for a program of attncc")
    title = next((line.strip() for line in text.splitlines() if line.strip()), "")
    try:
        for kind in KINDS:
            if title == kind.title:
                return verify_program(program_of_node(kind.verify(kind.parse(text))))
        return verify_program(parse_program(text))
    except (ParseError, VerifyError) as error:
        raise type(error)(f"{file}: {error}") from error


def write_whole(file: Path, text: str) -> None:
    """Write a file, or leave what was there: never half. Raises TargetError."""
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise TargetError(f"{file}: {one_line(error)}") from error
