"""The guard of a plan: some rows of each call are computed exactly, beside the approximate form.

    e = |O'[R] - O[R]| / |O[R]|        R: 16 rows, evenly spread, others in each call; all heads and sequences

Where e exceeds the bound that profiling found for the site, the call runs exact, and is counted. The largest e of n
calls is exceeded by the next one like them with a chance of 1 / (n + 1) at most; the bound is half as much again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock

import torch

from attncc.codegen.torch_form import run_blocked
from attncc.ir import Attention, Const, Expr, Load, Program, Tensor, print_attention
from attncc.ir.attention import fresh_name
from attncc.ir.evaluate import int_value
from attncc.report.model import Guard
from attncc.runtime.outputs import signature_of

#: Rows of a call that are computed exactly.
ROWS = 16
#: The bound of a site, as a multiple of the largest error that unseen samples had.
ROOM = 1.5


@dataclass
class _Counts:
    """What a guarded site did in this process."""

    bound: float
    calls: int = 0
    trips: int = 0
    worst: float = 0.0


_counts: dict[tuple[str, float], _Counts] = {}
_outside = [0]
_lock = Lock()


def guards() -> tuple[Guard, ...]:
    """What guarded sites did so far in this process."""
    with _lock:
        return tuple(Guard(name, c.calls, c.trips, c.worst, c.bound) for (name, _), c in _counts.items())


def outside_calls() -> int:
    """How many calls of graphs so far had attentions that ran exact, as their plan does not hold for their lengths."""
    return _outside[0]


def forget() -> None:
    """Counts from nothing again."""
    with _lock:
        _counts.clear()
        _outside[0] = 0


def count_outside() -> None:
    """Counts a call of a graph with such attentions."""
    with _lock:
        _outside[0] += 1


@lru_cache(maxsize=256)
def of_rows(a: Attention) -> Attention:
    """`a` for the rows that a tensor lists, its last: `rows: i64[16]`."""
    name = fresh_name("rows", {x.name for x in (*a.axes, *a.sizes, *a.tensors)})
    table: dict[Expr, Expr] = {a.i.index: Load(name, (a.i.index,), "int")}
    i = replace(a.i, extent=Const(ROWS))
    rows = Tensor(name, "i64", (Const(ROWS),))
    return replace(a.substitute(table), i=i, tensors=(*a.tensors, rows), outputs=("out",), layout=(), drop=None)


def rows_of(count: int, call: int) -> torch.Tensor:
    """Some rows of `count`, spread over all of them; those of one call are not those of the next."""
    return ((torch.arange(ROWS) * count + (call * 7919) % max(count, 1)) // ROWS + call) % count


def error_of(
    a: Attention, tensors: Sequence[torch.Tensor], sizes: Sequence[int], out: torch.Tensor, call: int
) -> float:
    """By how much rows of `out` are off what the exact attention `a` gives there, relative; infinity where they are no
    numbers."""
    at = len(a.batch)
    rows = rows_of(out.shape[at], call).to(out.device)
    (exact,) = run_blocked(of_rows(a), [*tensors, rows], sizes)
    exact, own = exact.double(), out.index_select(at, rows).double()
    error = float((own - exact).norm() / exact.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def exact_call(planned: Program, exact: Program) -> tuple[Attention, list[int], list[int]] | None:
    """The attention of a program without a plan, and which tensors and sizes of the planned one's attention are its;
    None where it reads others, or the plan makes several of it."""
    other, *more = [step for step in planned.steps if isinstance(step.node, Attention)]
    found = [step for step in exact.steps if isinstance(step.node, Attention)]
    alone = len(found) == 1 and not more
    if not alone or not {*found[0].arguments} <= {*other.arguments} or not {*found[0].sizes} <= {*other.sizes}:
        return None
    a = found[0].node
    assert isinstance(a, Attention)
    if a.out_axes != getattr(other.node, "out_axes", None) or a.outputs != ("out",):
        return None
    tensors = [other.arguments.index(x) for x in found[0].arguments]
    return a, tensors, [other.sizes.index(x) for x in found[0].sizes]


@torch.library.custom_op("attncc::guarded", mutates_args=())
def guarded(
    tensors: list[torch.Tensor], sizes: list[int], spec: str, exact: str, own_tensors: list[int], own_sizes: list[int],
    name: str, bound: float,
) -> list[torch.Tensor]:  # fmt: skip
    """`attncc::attention` under a guard: `exact` is the attention without its plan, which reads some of the tensors."""
    (out,) = torch.ops.attncc.attention(tensors, sizes, spec)
    given, counts = [tensors[n] for n in own_tensors], [sizes[n] for n in own_sizes]
    with _lock:
        c = _counts.setdefault((name, bound), _Counts(bound))
        c.calls += 1
        call = c.calls
    error = error_of(signature_of(exact).attention, given, counts, out, call)
    with _lock:
        c.worst = max(c.worst, error)
        c.trips += error > bound
    if error <= bound:
        return [out]
    (found,) = torch.ops.attncc.attention(given, counts, exact)
    return [out.copy_(found)]


@guarded.register_fake
def _(
    tensors: Sequence[torch.Tensor], sizes: Sequence[int], spec: str, exact: str, own_tensors: Sequence[int],
    own_sizes: Sequence[int], name: str, bound: float,
) -> list[torch.Tensor]:  # fmt: skip
    return signature_of(spec).allocate(tensors, sizes)


def guarded_arguments(
    planned: Program, exact: Program, name: str, bound: float
) -> tuple[str, list[int], list[int], str, float] | None:
    """What `attncc::guarded` is given behind the arguments of `attncc::attention`; None where it cannot guard."""
    known = exact_call(planned, exact)
    if known is None:
        return None
    a, tensors, sizes = known
    return print_attention(a), tensors, sizes, name, bound


def measured(program: Program, values: Mapping[str, torch.Tensor], sizes: Mapping[Expr, int], out: torch.Tensor,
             call: int) -> float | None:  # fmt: skip
    """The error of an output against the only attention of an exact program; None where that reads what was made."""
    found = [step for step in program.steps if isinstance(step.node, Attention)]
    if len(found) != 1 or not {*found[0].arguments} <= {*values}:
        return None
    a = found[0].node
    assert isinstance(a, Attention)
    given = [values[x] for x in found[0].arguments]
    shape = [int_value(x.extent, dict(zip(a.sizes, _sizes(found[0].sizes, sizes), strict=True))) for x in a.out_axes]
    return error_of(a, given, _sizes(found[0].sizes, sizes), out.view(shape), call)


def _sizes(wanted: Sequence[Expr], known: Mapping[Expr, int]) -> list[int]:
    return [int_value(x, known) for x in wanted]
