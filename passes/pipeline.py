"""The pipeline: passes in order, the program verified after each, timed and shown on request. The only place that knows
the order."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from time import perf_counter
from typing import Any, cast

from attncc.ir import Expr, Program, Size, print_program, verify_program
from attncc.passes.policies import CERTIFIED, CLOSED_FORMS, EFFECTS, SELECTED
from attncc.passes.protocol import Pass
from attncc.passes.rewrites.drop_rounding import DropRounding
from attncc.passes.rewrites.fold_predicates import FoldPredicates
from attncc.passes.rewrites.layouts import CancelLayouts, DropUnused, TileTokens
from attncc.passes.rewrites.orders import ClusterTokens, CurveTokens, OrderTokens
from attncc.passes.rewrites.rearrangements import MergeRearrangements
from attncc.passes.rewrites.split_axes import SplitAxes

#: Every pass that can be named: those that keep what a program computes, and the policies of a plan.
ORDERS = TileTokens, OrderTokens, CurveTokens, ClusterTokens
EXACT = SplitAxes, DropRounding, FoldPredicates, CancelLayouts, MergeRearrangements, DropUnused, *ORDERS
POLICIES = *CLOSED_FORMS, *SELECTED, *CERTIFIED, *EFFECTS
PASSES: dict[str, type[Any]] = {kind.name: kind for kind in (*EXACT, *POLICIES)}


def standard(factors: Sequence[tuple[Size, Expr]] = ()) -> Pipeline:
    """What every program goes through before its attentions become kernels; all of it exact."""
    exact = SplitAxes(tuple(factors)), DropRounding(), FoldPredicates(), CancelLayouts(), MergeRearrangements()
    return Pipeline((*exact, DropUnused()))


@dataclass(frozen=True)
class Stage:
    """What one pass did, and how long it took in seconds."""

    made_by: Pass
    before: Program
    after: Program
    seconds: float


class PassError(Exception):
    """A pass failed, or made a program that does not verify. The message names the pass and how to repeat it."""

    def __init__(self, failed: Pass, error: Exception, repro: Path | None) -> None:
        self.failed, self.repro = failed, repro
        repeat = "" if repro is None else f"; to repeat it: attncc opt {repro} -p '{spelled(failed)}' --verify-each"
        super().__init__(f"the pass {failed.name} failed: {error}{repeat}")


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. `verify_each` checks the program after every one, not at the end alone. A pass that fails leaves
    the program that it was given in `repros` (a folder; that of temporary files where it is None)."""

    passes: tuple[Pass, ...]
    verify_each: bool = True
    repros: Path | None = None

    def run(self, p: Program, observe: Callable[[Stage], object] | None = None) -> Program:
        """The program after all passes. Raises PassError; VerifyError where `p` itself is malformed."""
        verify_program(p)
        for each in self.passes:
            start = perf_counter()
            try:
                after = each(p)
                if self.verify_each or each is self.passes[-1]:
                    verify_program(after)
            except Exception as error:
                raise PassError(each, error, self._repro(p)) from error
            if observe is not None:
                observe(Stage(each, p, after, perf_counter() - start))
            p = after
        return p

    def _repro(self, p: Program) -> Path | None:
        """The file that the program was written to; None where the folder cannot be written to."""
        text = print_program(p)
        folder = self.repros or Path(tempfile.gettempdir())
        path = folder / f"attncc-{hashlib.sha256(text.encode()).hexdigest()[:12]}.ir"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError:
            return None
        return path


_PASS = re.compile(r"\s*(?P<name>[a-z-]+)(\{(?P<values>[^{}]*)\})?\s*$")


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """The passes that a text names: `fold-predicates,tile-tokens{grid=8x8,tile=4x4}`. Raises ValueError, naming what is
    wrong and what there is."""
    return tuple(_parse_pass(part) for part in re.split(r",(?![^{]*\})", text) if part.strip())


def _parse_pass(text: str) -> Pass:
    found = _PASS.match(text)
    kind = PASSES.get(found["name"]) if found else None
    if found is None or kind is None:
        raise ValueError(f"no pass {text.strip()!r}; there are {', '.join(PASSES)}")
    given: dict[str, Any] = {}
    known = {f.name: str(f.type) for f in fields(kind)}
    for part in (found["values"] or "").split(","):
        name, _, value = part.strip().partition("=")
        if not name:
            continue
        if name not in known:
            raise ValueError(f"{found['name']} has no parameter {name!r}; it has {', '.join(known) or 'none'}")
        try:
            given[name] = _READ[known[name]](value)
        except (KeyError, ValueError):
            raise ValueError(f"{found['name']}: {name} cannot be {value!r}") from None
    try:
        return cast(Pass, kind(**given))
    except TypeError as error:
        raise ValueError(f"{found['name']}: {error}") from None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split("x"))


#: How parameters are read, by their type: an integer, a number, integers as `8x8`.
_READ: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "tuple[int, ...]": _numbers}


def spelled(p: Pass) -> str:
    """A pass as `parse_pipeline` reads it; parameters that have no spelling are left out."""
    values: list[str] = []
    for f in fields(cast(Any, p)):
        value: Any = getattr(p, f.name)
        if str(f.type) in _READ:
            shown = "x".join(str(n) for n in value) if str(f.type).startswith("tuple") else str(value)
            values.append(f"{f.name}={shown}")
    return f"{p.name}{{{','.join(values)}}}" if values else p.name
