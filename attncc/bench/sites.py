"""`attncc bench --suite sites`: how much of the attention of real models attncc and Inductor find, in one run.

Every model type of the installed transformers that can be made small (`attncc.frontends.small`), with its attention
written out or as SDPA, in float32. What its eager run asks of softmax and SDPA is counted; attncc compiles it, every
lifted site runs its generated kernel, and the results are compared with a float64 run; Inductor's passes read the same
model and say how many attentions their patterns replaced.
"""

from __future__ import annotations

import copy
import json as json_format
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from attncc import torch_private
from attncc.bench.chosen import NONE
from attncc.bench.windows import limited
from attncc.driver.backend import Collected, attncc_backend, collecting
from attncc.driver.recording import report
from attncc.frontends.small import NotSmall, model_types, small_models
from attncc.frontends.targets import TargetError

SPELLINGS = ("eager", "sdpa")
#: What a model's eager run must not need more of, and what compiling and running it with one peer must not.
_SECONDS = 90.0
#: How much larger than eager's own error that of the compiled model may be.
_TIMES = 3.0
#: How many roundings of the largest result eager's own error may be where no run in float64 tells.
_UNKNOWN = 64
_KEYED = ("_softmax", "_safe_softmax", "_scaled_dot_product")


class _Counted(TorchDispatchMode):
    """How many softmaxes and whole attentions ran."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func._schema.name.removeprefix("aten::").startswith(_KEYED)
        return func(*args, **(kwargs or {}))


def run(quick: bool = False, json: Path | None = None, *, only: str = "") -> dict[str, Any]:
    """Measure the models whose names are among the words of `only` (by commas), print them, and write `json` after
    each; rows that it holds already are not measured again. `quick` takes every tenth type, written out."""
    words = [w.strip() for w in only.split(",") if w.strip()]
    known = list(model_types())
    rows_of = {x for name in known for x in (name, *(f"{name} {spelling}" for spelling in SPELLINGS))}
    strange = [w for w in words if w not in rows_of and w != NONE]
    if strange:
        raise TargetError(f"bench: no model type is called {', '.join(map(repr, strange))} in this transformers")
    rows: dict[str, Any] = json_format.loads(json.read_text())["rows"] if json is not None and json.exists() else {}
    for name in known[:: 10 if quick else 1]:
        for spelling in SPELLINGS[: 1 if quick else None]:
            row = f"{name} {spelling}"
            if row in rows or (words and name not in words and row not in words):
                continue
            rows[row] = measured(name, spelling)
            print(line(row, rows[row]), flush=True)
            if json is not None:
                json.write_text(json_format.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    found = {"torch": torch.__version__, "rows": rows}
    print(table(found))
    return found


@torch.no_grad()
def measured(name: str, spelling: str) -> dict[str, Any]:
    """What became of one model: `calls` of softmax and SDPA in its eager run, sites by status, with reasons, whether
    numbers are `wrong`, `error` and eager's `own` beside float64 (where that does not run, `error` is beside eager and
    `own` None), and what Inductor fused. Or why it was `skipped`."""
    torch._dynamo.reset()
    found = None
    why = "no way to call it"
    try:
        for model, inputs in small_models(name, spelling):
            try:
                with limited(_SECONDS), _Counted() as counted:
                    found = model, inputs, _results(model, inputs), counted.calls
                break
            except Exception as error:
                why = f"does not run: {_line(error)}"
    except NotSmall as error:
        why = str(error)
    if found is None:
        return {"skipped": why}
    model, inputs, eager, calls = found
    if not calls:
        return {"skipped": "no softmax and no SDPA"}
    row: dict[str, Any] = {"calls": calls}
    try:
        with limited(_SECONDS):
            exact = _results(copy.deepcopy(model).double(), _cast(inputs))
        if not _error(eager, exact) < float("inf"):
            exact = None
    except Exception:
        exact = None
    try:
        with limited(_SECONDS):
            row |= _by_attncc(model, inputs, eager, exact)
    except Exception as error:
        row["failed"] = _line(error)
        if not _compiles(model, inputs):
            return {"skipped": f"torch.compile does not run it: {_line(error)}"}
    torch._dynamo.reset()
    before = torch_private.fused_by_inductor()
    try:
        with limited(_SECONDS):
            torch.compile(model, backend=torch_private.inductor_rewrites)(**inputs)
        row["inductor"] = torch_private.fused_by_inductor() - before
    except Exception as error:
        row["inductor"] = None
        row["inductor failed"] = _line(error)
    return row


def _compiles(model: nn.Module, inputs: dict[str, Any]) -> bool:
    torch._dynamo.reset()
    try:
        torch.compile(model, backend="eager")(**inputs)
    except Exception:
        return False
    return True


def _by_attncc(
    model: nn.Module, inputs: dict[str, Any], eager: list[Tensor], exact: list[Tensor] | None
) -> dict[str, Any]:
    found = Collected()
    token = collecting.set(found)
    before = torch_private.graph_breaks()
    try:
        compiled = torch.compile(model, backend=attncc_backend, options={"inductor": False, "measure": False})
        got = _results(compiled, inputs)
    finally:
        collecting.reset(token)
    sites = report(found).sites
    error, own = _error(got, eager if exact is None else exact), None if exact is None else _error(eager, exact)
    rounding = torch.finfo(torch.float32).eps * max((_largest(x) for x in eager), default=0.0)
    most = _UNKNOWN * rounding if own is None else _TIMES * own + 4 * rounding
    return {
        "lifted": sum(s.status != "refused" and bool(s.equation) for s in sites),  # a gate has no equation
        "fused": sum(s.status == "fused" for s in sites),
        "reasons": [f"{s.reason} ({s.path} {s.where})" for s in sites if s.status == "refused"],
        "codes": [s.code for s in sites if s.status == "refused"],
        "breaks": sum((torch_private.graph_breaks() - before).values()),
        "error": error, "own": own, "wrong": not error <= most,
    }  # fmt: skip


def _results(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """What a model gives, noise that it draws from a fixed seed."""
    torch.manual_seed(0)
    return _floats(model(**inputs))


def _floats(result: Any) -> list[Tensor]:
    plain = result.to_tuple() if hasattr(result, "to_tuple") else result
    return [x for x in tree_leaves(plain) if isinstance(x, Tensor) and x.is_floating_point()]


def _cast(inputs: dict[str, Any]) -> dict[str, Any]:
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest difference in a finite element; infinite where others are finite or there."""
    if [x.shape for x in found] != [x.shape for x in exact]:
        return float("inf")
    largest = 0.0
    for x, y in zip(found, exact, strict=True):
        if not torch.equal(x.isfinite(), y.isfinite()):
            return float("inf")
        largest = max(largest, _largest(x.double() - y))
    return largest


def _largest(x: Tensor) -> float:
    """The largest magnitude of a finite element."""
    finite = x[x.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120] if lines else ''}"


def line(name: str, row: dict[str, Any]) -> str:
    if "skipped" in row:
        return f"{name}: skipped, {row['skipped']}"
    if "failed" in row:
        return f"{name}: {row['calls']} calls, FAILED, {row['failed']}"
    wrong = " WRONG" if row["wrong"] else ""
    own = "unknown one" if row["own"] is None else f"{row['own']:.1e}"
    text = (f"{name}: {row['calls']} calls, {row['lifted']} lifted ({row['fused']} fused), "
            f"{len(row['reasons'])} refused, error {row['error']:.1e} of eager's {own}{wrong}, "
            f"Inductor {row['inductor']}")  # fmt: skip
    return "\n    ".join([text, *dict.fromkeys(row["reasons"])])


def table(found: dict[str, Any]) -> str:
    """Markdown: totals of each spelling, and how often each code of a reason was given."""
    lines = ["| attention as | models | calls of softmax or SDPA | lifted | refused, with a reason | wrong | failed | "
             "fused by Inductor |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for spelling in SPELLINGS:
        rows = [r for name, r in found["rows"].items() if name.endswith(f" {spelling}") and "skipped" not in r]
        good = [r for r in rows if "failed" not in r]
        cells = [len(rows), sum(r["calls"] for r in rows), sum(r["lifted"] for r in good),
                 sum(len(r["reasons"]) for r in good), sum(r["wrong"] for r in good), len(rows) - len(good),
                 sum(r["inductor"] or 0 for r in rows)]  # fmt: skip
        lines.append(f"| {spelling} | " + " | ".join(map(str, cells)) + " |")
    refused = [r for r in found["rows"].values() if "codes" in r]
    given = [x for r in refused for x in zip(r["codes"], r["reasons"], strict=True)]
    lines += ["", "| sites | code | reason, for one of them |", "|---|---|---|"]
    for code, n in Counter(code for code, _ in given).most_common():
        example = next(reason for other, reason in given if other == code).rsplit(" (", 1)[0]
        lines.append(f"| {n} | `{code}` | {example} |")
    return "\n".join(lines)
