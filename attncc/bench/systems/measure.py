"""`attncc bench --suite systems`: every row of the systems, compiled by attncc, by Inductor and with FlexAttention.

One model of a layer or a block each, float32, inference. Calls take turns; medians count, of the time of the thread
where there is one (another program's load is then not counted), else of the clock. Memory is the most that a call adds.
Errors are beside the same model in float64. A row of a policy follows a plan by hand, whose error is beside the exact
model. Rows that a file holds are kept, so that a run can be taken up again.
"""

from __future__ import annotations

import copy
import json as json_format
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attncc.bench.chosen import chosen
from attncc.bench.systems.catalogue import SYSTEMS
from attncc.bench.systems.planned import plan_of
from attncc.bench.systems.system import System
from attncc.bench.systems.table import document, line
from attncc.bench.windows import limited, machine
from attncc.driver.backend import Collected, attncc_backend, collecting
from attncc.driver.recording import report
from attncc.runtime.memory import peak_bytes

Call = Callable[[], Any]
#: What compiling with one peer and its first call may take, and what all timed calls of a row may.
_COMPILE_S, _ROW_S = 240.0, 3.0
_MOST_ROUNDS = 25


def run(
    *, quick: bool = False, json: Path | None = None, only: str = "", table: Path | None = None
) -> dict[str, Any]:  # fmt: skip
    """Measures every row, or those whose titles hold a word of `only`, prints them, and writes `json` after each and
    `table`, a page of Markdown. `quick`: of each row its first spelling, of few tokens."""
    titles = {s.title.replace(",", ""): s for s in SYSTEMS}
    if quick:
        first = {s.number: name for name, s in reversed(titles.items())}
        titles = {name: titles[name] for name in sorted(first.values(), key=lambda name: titles[name].number)}
    rows: dict[str, Any] = json_format.loads(json.read_text())["rows"] if json is not None and json.exists() else {}
    for name in chosen(titles, only):
        if name in rows:
            continue
        rows[name] = measured(titles[name], full=not quick)
        print(line(titles[name], rows[name]), flush=True)
        if json is not None:
            json.write_text(json_format.dumps({**machine(), "rows": rows}, indent=1) + "\n")
    found = {**machine(), "rows": rows}
    missing = [s for name, s in titles.items() if name not in rows]
    page = document([(titles[name], row) for name, row in rows.items() if name in titles], missing)
    print(page)
    if table is not None:
        table.write_text(page)
    return found


@torch.no_grad()
def measured(system: System, *, full: bool) -> dict[str, Any]:
    """One row: `sites` by status with their codes, `errors` and `ms` and `bytes` of each peer, `absent` peers and why.
    What fails is recorded, as a suite must go on."""
    torch._dynamo.reset()
    model, inputs = system.make(full)
    exact = _results(copy.deepcopy(model).double()(*(x.double() if x.is_floating_point() else x for x in inputs)))
    row: dict[str, Any] = {"absent": {}, "shape": [list(x.shape) for x in inputs]}
    calls: dict[str, Call] = {"eager": lambda: model(*inputs)}
    found = Collected()
    makers: dict[str, Callable[[], Call]] = {
        "attncc": lambda: _compiled(model, inputs, attncc_backend, found),
        "inductor": lambda: _compiled(model, inputs, "inductor", None),
    }
    if system.flex is not None:
        makers["flex"] = lambda flex=system.flex: _bound(flex(model), inputs)
    if system.form and full:
        makers["planned"] = lambda: _planned(model, inputs, system.form, row)
    for peer, maker in makers.items():
        try:
            with limited(_COMPILE_S):
                call = maker()
                call()
            calls[peer] = call
        except Exception as error:
            row["absent"][peer] = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
    sites = report(found).sites
    row["sites"] = [[s.status, s.code, s.became if s.status == "fused" else ""] for s in sites]
    row["errors"] = {peer: _error(_results(call()), exact) for peer, call in calls.items()}
    row["ms"], row["rounds"] = _times(calls)
    row["bytes"] = {peer: peak_bytes(call, torch.device("cpu")) for peer, call in calls.items()}
    return row


def _bound(run_it: Callable[..., Any], inputs: Sequence[Tensor]) -> Call:
    return lambda: run_it(*inputs)


def _compiled(model: nn.Module, inputs: Sequence[Tensor], backend: Any, found: Collected | None) -> Call:
    token = None if found is None else collecting.set(found)
    try:
        run_it = torch.compile(model, backend=backend, dynamic=False)
        run_it(*inputs)
    finally:
        if token is not None:
            collecting.reset(token)
    return lambda: run_it(*inputs)


def _planned(model: nn.Module, inputs: Sequence[Tensor], form: str, row: dict[str, Any]) -> Call:
    """The model under its plan; the plan's sites are recorded too."""
    planned = copy.deepcopy(model)
    plan = plan_of(planned, inputs, form)
    found = Collected()
    token = collecting.set(found)
    try:
        options: Any = {"plan": plan}
        run_it = torch.compile(planned, backend="attncc", options=options, dynamic=False)
        run_it(*inputs)
    finally:
        collecting.reset(token)
    row["planned"] = [[s.status, s.code] for s in report(found).sites]
    return lambda: run_it(*inputs)


def _results(out: Any) -> list[Tensor]:
    return [x for x in (out if isinstance(out, tuple) else (out,)) if x.is_floating_point()]


def _error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest difference, by the largest element of the same result."""
    pairs = zip(found, exact, strict=True)
    return max(float((x.double() - y).abs().max() / y.abs().max().clamp(min=1e-6)) for x, y in pairs)


def _times(calls: dict[str, Call]) -> tuple[dict[str, float], int]:
    """Milliseconds of each, the median of calls that take turns."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    for turn in range(_MOST_ROUNDS):
        if turn >= 3 and time.perf_counter() - begun > _ROW_S:
            break
        for name, call in calls.items():
            start = clock()
            call()
            samples[name].append(clock() - start)
    return {name: statistics.median(x) * 1e3 for name, x in samples.items()}, len(samples["eager"])

