"""`attncc bench`: suites that measure attncc beside its peers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from attncc.cli.output import Debug, clear_errors
from attncc.frontends.targets import TargetError, one_line


def bench(
    suite: Annotated[
        Literal["cpu", "gpu", "windows", "longcontext", "context", "compile", "sites", "policies", "train", "models",
                "linear", "onnx", "systems"],
        typer.Option("--suite", help="Which machine to measure; or on this one, models with long windows, the masks of "
                     "long contexts with their backward, rows and keys cut over processes, what compiling costs, how "
                     "much of the attention of transformers' models is found, what choosing keys costs, forward and "
                     "backward together, whole models, linear attention by chunks, operators of onnxruntime, or "
                     "forty-six papers' systems."),
    ] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes and rounds.")] = False,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results to FILE too.")] = None,
    only: Annotated[str, typer.Option("--rows", metavar="WORDS", help="Only rows whose names contain one of these, "
                                      "comma-separated; `none` measures nothing (every suite but gpu).")] = "",
    lengths: Annotated[str, typer.Option("--lengths", metavar="TOKENS",
                                          help="Comma-separated (windows, longcontext).")] = "",
    dtypes: Annotated[str, typer.Option("--dtypes", metavar="TYPES",
                                         help="Comma-separated, of f32, bf16 and f16 (cpu, train, models).")] = "",
    rivals: Annotated[str, typer.Option("--rivals", metavar="NAMES", help="Comma-separated, of sdpa, sdpa gqa, "
                                        "inductor, flex, flex + mask, plain and read (cpu).")] = "",
    threads: Annotated[
        list[int] | None, typer.Option("--threads", min=1, help="May be repeated (cpu, train, models).")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the results (cpu, models).")
    ] = None,
    table: Annotated[
        Path | None, typer.Option("--table", metavar="FILE", help="Write Markdown tables (cpu, models, systems).")
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure attncc against SDPA, FlexAttention and Inductor in one run."""
    with clear_errors(debug):
        of_cpu = {"only": only, "dtypes": _words(dtypes), "rivals": _words(rivals), "threads": threads or [],
                  "picture": picture, "table": table}  # fmt: skip
        of_windows = {"only": only, "lengths": _numbers(lengths)}
        rows = {"only": only}
        of_train = {"only": only, "dtypes": _words(dtypes), "threads": threads or []}
        of_models = of_train | {"picture": picture, "table": table}
        suites = {"cpu": of_cpu, "train": of_train, "models": of_models, "compile": rows, "context": rows,
                  "sites": rows, "policies": rows, "linear": rows, "onnx": rows, "windows": of_windows,
                  "longcontext": of_windows, "systems": rows | {"table": table}}  # fmt: skip
        taken = suites.get(suite, {})
        given = {name for name, value in (of_cpu | of_windows).items() if value}
        foreign = [f"--{_OPTION.get(name, name)}" for name in sorted(given - set(taken))]
        if foreign:
            raise TargetError(f"bench: --suite {suite} has no {', '.join(foreign)}")
        for option, path in (("--json", out), ("--plot", picture), ("--table", table)):
            if path is not None and (not path.parent.is_dir() or path.is_dir()):
                why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
                raise TargetError(f"bench: {option} {path} cannot be written: {why}")
        _suite(suite)(quick=quick, json=out, **taken)


#: Suites whose entry is not the module of their name.
_MODULES = {"systems": "systems.measure"}
_OPTION = {"only": "rows", "picture": "plot"}


def _numbers(text: str) -> list[int]:
    try:
        return [int(x) for x in _words(text)]
    except ValueError as error:
        raise TargetError(f"bench: {text!r} is not a list of lengths") from error


def _words(text: str) -> list[str]:
    return [w.strip() for w in text.split(",") if w.strip()]


def _suite(name: str) -> Callable[..., object]:
    try:
        return importlib.import_module(f"attncc.bench.{_MODULES.get(name, name)}").run
    except ImportError as error:
        raise TargetError(f"bench --suite {name} is not available here ({one_line(error)})") from error
