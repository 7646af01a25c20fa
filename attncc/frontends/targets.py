"""Loading what the command line is pointed at: `module:factory`, `path/file.py:factory`, or a `.pt2` file.

The factory is called without arguments and returns one of

    (model, args)              args: a tuple, or a single tensor
    (model, args, kwargs)      kwargs: a mapping
    (model, kwargs)
    model                      with an attribute `example_inputs` (or `dummy_inputs`, as in transformers): a tuple of
                               args, a mapping of kwargs, or a method that returns either

`module` is imported with the current directory first on the path, as `python -m` does. A name may be dotted.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from attncc.frontends.archives import unsafe

INPUTS = ("example_inputs", "dummy_inputs")


class TargetError(Exception):
    """The target cannot be loaded. The message is one line that names it and says why."""


@dataclass(frozen=True)
class Target:
    """A model to run on example inputs, or a program that was exported with its own."""

    name: str
    model: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def exported(self) -> bool:
        return isinstance(self.model, torch.export.ExportedProgram)


def one_line(error: BaseException) -> str:
    """`ValueError: its message`, in one line and shortened where that is long."""
    name, message = type(error).__name__, str(error)
    return textwrap.shorten(f"{name}: {message}" if message.strip() else name, 200, placeholder=" ...")


def load(text: str) -> Target:
    """The target that `text` names; `TargetError` where it cannot be had."""
    if text.endswith(".pt2"):
        return _program(text)
    if text.endswith(".py") and Path(text).is_file():
        raise TargetError(f"{text}: name a factory in it, that returns (model, args): {text}:FACTORY")
    factory = load_object(
        text, "a target is `module:factory`, `path/file.py:factory`, `hf:TYPE`, a .pt2 or a .onnx file"
    )
    if not callable(factory) or isinstance(factory, torch.nn.Module):
        return _with_inputs(text, factory)
    try:
        made = factory()
    except (Exception, SystemExit) as error:
        raise TargetError(f"{text}: the factory raised {one_line(error)}") from error
    return _with_inputs(text, made)


def load_object(text: str, wanted: str = "what is wanted is `module:name`") -> Any:
    """What `module:name` names; TargetError where there is no such thing."""
    module, colon, name = text.rpartition(":")
    if not colon or not module or not name:
        raise TargetError(f"{text}: {wanted}")
    return _find_in_file(text, Path(module), name) if module.endswith(".py") else _find(text, module, name)


def _program(text: str) -> Target:
    path = Path(text)
    if not path.is_file():
        raise TargetError(f"{text}: no such file")
    with _logged_errors("torch.export") as logged:
        try:
            why = unsafe(path)
            program = None if why else torch.export.load(path)
        except Exception as error:
            # torch tries two formats, logs why the first failed, and raises what the second one said
            why = one_line(logged[-1] if logged else error).split(". ")[0]
            raise TargetError(f"{text}: not a whole .pt2 archive as torch.export.save writes it ({why})") from error
    if program is None:
        raise TargetError(f"{text}: not loaded: {why}")
    return Target(text, program)


@contextmanager
def _logged_errors(name: str) -> Iterator[list[BaseException]]:
    """The exceptions that the logger reports meanwhile, instead of their printing."""
    errors: list[BaseException] = []

    def take(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            errors.append(record.exc_info[1])
        return False

    logger, level = logging.getLogger(name), logging.root.manager.disable
    logger.addFilter(take)
    logging.disable(logging.NOTSET)  # a caller may have silenced all logging
    try:
        yield errors
    finally:
        logging.disable(level)
        logger.removeFilter(take)


def _find(text: str, module: str, name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:  # and left there: the factory may import its neighbours when it runs
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise TargetError(f"{text}: no module named {error.name!r} here or installed") from error
        raise TargetError(f"{text}: importing {module} raised {one_line(error)}") from error
    except (Exception, SystemExit) as error:
        raise TargetError(f"{text}: importing {module} raised {one_line(error)}") from error
    return _named(text, found, module, name)


def _find_in_file(text: str, path: Path, name: str) -> Any:
    """From a file that is run as a module of its own name, with its folder first on the path, as a script has it."""
    if not path.is_file():
        raise TargetError(f"{text}: there is no file {path}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # it ends with .py
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # where dataclasses and pickles look
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if before is None:
            del sys.modules[path.stem]
        else:
            sys.modules[path.stem] = before
        raise TargetError(f"{text}: running {path} raised {one_line(error)}") from error
    return _named(text, module, str(path), name)


def _named(text: str, found: Any, module: str, name: str) -> Any:
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise TargetError(f"{text}: {module} has no {name!r}") from error
    return found


def _with_inputs(text: str, made: Any) -> Target:
    match made:
        case (model, Mapping() as kwargs):
            return _checked(text, model, (), kwargs)
        case (model, args):
            return _checked(text, model, args, {})
        case (model, args, Mapping() as kwargs):
            return _checked(text, model, args, kwargs)
    for name in INPUTS:
        inputs = getattr(made, name, None)
        if inputs is None:
            continue
        try:
            inputs = inputs() if callable(inputs) else inputs
        except Exception as error:
            raise TargetError(f"{text}: {name}() raised {one_line(error)}") from error
        return _checked(text, made, (), inputs) if isinstance(inputs, Mapping) else _checked(text, made, inputs, {})
    raise TargetError(
        f"{text}: gives {_a(made)}; a factory returns (model, args), (model, args, kwargs), or a model with "
        f"{' or '.join(INPUTS)}"
    )


def _checked(text: str, model: Any, args: Any, kwargs: Mapping[Any, Any]) -> Target:
    if not callable(model):
        raise TargetError(f"{text}: the model is {_a(model)}, which cannot be called")
    items = tuple(cast("list[Any]", args)) if isinstance(args, (tuple, list)) else (args,)
    return Target(text, model, items, {str(name): value for name, value in kwargs.items()})


def _a(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"
