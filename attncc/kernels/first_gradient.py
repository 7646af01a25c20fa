"""The first use of a backward kernel on a machine: it is held against the equations of the gradient in plain torch.

On made-up data, all of it where that is little; else the gradients of some rows, which need all their keys, and those
of some keys, which need all rows that see them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from attncc.codegen.torch_backward import is_rough
from attncc.codegen.torch_form import run_blocked, whole_ranges
from attncc.ir.attention import Axis
from attncc.ir.attention_grad import GIVEN, AttentionGrad, interpret_grad, shapes_of_grad
from attncc.ir.evaluate import DTYPE_OF
from attncc.kernels.first_use import EVERY_PAIR, MOST_WORK, Check, Extra, Ranges, Untried
from attncc.kernels.made_up import attempts
from attncc.runtime.cpp import CppKernelError
from attncc.runtime.op import Kernel
from attncc.torch_private import apart

#: Pairs of each part, where only parts are compared.
_PART = 1 << 18
#: Roundings that a kernel may be off beside what the equations in its own type are: at the worst place, and on average.
_WORST, _AVERAGE, _AVERAGE_16 = 6, 24, 1
#: Products of a backward: twice the scores, and one for each gradient.
_PRODUCTS = 3


def gradient_check(g: AttentionGrad, extra: Extra | None = None) -> Check:
    """The check of kernels of `g`; `extra` makes the tables that its loop bounds read, in their order."""
    return Check(lambda kernel: _wrong(g, kernel, extra), lambda *call: differs(g, *call))


def _wrong(g: AttentionGrad, kernel: Kernel, extra: Extra | None) -> str | None:
    a = g.attention
    with apart(), torch.no_grad():
        reason = "its tensors are too much for a trial"
        for data in attempts(a, len(a.tensors)):
            whole = whole_ranges(a, dict(zip(a.sizes, data.sizes, strict=True)))
            if min(end for _, end in whole.values()) < 1:
                continue
            if prod(whole[x][1] for x in (*a.batch, a.i, a.j, a.d)) * 2 * _PRODUCTS > MOST_WORK:
                raise Untried("it takes too much work for a trial")
            try:
                made = dict(zip(a.outputs, run_blocked(a, data.tensors, data.sizes), strict=True))
            except (IndexError, ZeroDivisionError, RuntimeError) as error:
                reason = f"the plain-torch form fails on made-up data ({error})"
                continue
            if not bool(made["out"].isfinite().all()) or is_rough(made["lse"]):
                reason = "no data that could be made up has finite results, and sums that weights can be made of"
                continue
            random = torch.Generator().manual_seed(1)
            grads = [torch.randn(x.shape, generator=random).to(x.dtype) for x in (made["out"], made["lse"])]
            tensors = [*data.tensors, grads[0], made["out"], made["lse"], grads[1]]
            if extra is not None:
                named = {t.name: x for t, x in zip(g.by_key.tensors, tensors, strict=True)}
                tensors += extra(named, data.sizes).values()
            outputs = [
                torch.full(n, float("nan"), dtype=DTYPE_OF[a.compute_dtype]) for n in shapes_of_grad(g, data.sizes)
            ]
            for out, x in zip(outputs[len(g.operands) :], g.loads, strict=True):
                if x.over == "i, j":
                    out.zero_()  # what no tile visits is not written
            try:
                kernel(tensors, data.sizes, outputs)
            except CppKernelError as error:
                raise Untried(str(error)) from error
            return differs(g, tensors, data.sizes, outputs) or None
    raise Untried(reason)


def differs(
    g: AttentionGrad, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor], *,
    rounding: torch.dtype | None = None,
) -> str | None:  # fmt: skip
    """How the outputs of a call differ from the equations: None where they do not, empty where nothing can be told.
    `rounding` is what products may take their factors in, if not what those of C++ kernels do."""
    a = g.attention
    count = len(a.tensors)
    given = tensors[count : count + len(GIVEN)]
    named = {t.name: x for t, x in zip(a.tensors, tensors, strict=False)}
    with apart(), torch.no_grad():
        whole = whole_ranges(a, dict(zip(a.sizes, sizes, strict=True)))
        if min(end for _, end in whole.values()) < 1:
            return ""
        told = False
        least = torch.finfo(DTYPE_OF[a.compute_dtype]).eps * size_of_terms(g, tensors) * _rows_off(given)
        for part, axis in _parts(g, whole):
            exact, plain = (
                interpret_grad(g, named, given, sizes, ranges=part, compute=x) for x in (torch.float64, None)
            )
            for n, (name, found) in enumerate(zip(_names(g), outputs, strict=True)):
                if axis is not None and not _whole_over(g, n, axis):
                    continue
                own = found[_cut(g, n, part)].double()
                why = _compared(name, own, exact[n], plain[n].double(), rounding or _rounding(g), least)
                told = told or why != ""
                if why:
                    return why
    return None if told else ""


def _rows_off(given: Sequence[torch.Tensor]) -> float:
    """By how many roundings weights made of the sums of rows alone may be off, as those of the equations are: a kernel
    may divide them by what they sum to."""
    lse = given[list(GIVEN).index("lse")]
    finite = lse[lse.isfinite()]
    return max(1.0, float(finite.abs().max())) if finite.numel() else 1.0


def _names(g: AttentionGrad) -> list[str]:
    return [*(f"the gradient of {n}" for n in g.operands), *(f"the gradient of {x.load!r}" for x in g.loads)]


def _over(g: AttentionGrad, n: int) -> str:
    """What output `n` is kept apart by."""
    if n < len(g.operands):
        return "i" if g.operands[n] == "q" else "j"
    return g.loads[n - len(g.operands)].over


def _whole_over(g: AttentionGrad, n: int, axis: Axis) -> bool:
    """Whether a part of `axis` has all of what output `n` is summed over."""
    return _over(g, n) in ("i, j", "i" if axis == g.attention.i else "j")


def _cut(g: AttentionGrad, n: int, part: Ranges) -> tuple[slice, ...]:
    a, over = g.attention, _over(g, n)
    held = n < len(g.operands) and g.operands[n] != "q"
    axes = [*(g.held if held else a.batch), *{"i": [a.i], "j": [a.j], "i, j": [a.i, a.j]}.get(over, [])]
    return tuple(slice(*part[x]) for x in axes)


def _parts(g: AttentionGrad, whole: Ranges) -> list[tuple[Ranges, Axis | None]]:
    """What is compared, and the axis of which it is a part: rows, then keys, at the begin and the end of the first and
    of the last point that holds keys."""
    a = g.attention
    if prod(whole[x][1] for x in (*a.batch, a.i, a.j)) <= EVERY_PAIR:
        return [(whole, None)]
    group = prod(whole[x][1] for x in a.batch if x not in g.held)
    found: list[tuple[Ranges, Axis | None]] = []
    for last in (False, True):
        point = {x: (whole[x][1] - 1, whole[x][1]) if last else (0, 1) for x in g.held}
        for axis, other in ((a.i, a.j), (a.j, a.i)):
            length = whole[axis][1]
            run = max(1, min(length, _PART // (whole[other][1] * group)))
            start = length - run if last else 0
            found.append(({**whole, **point, axis: (start, start + run)}, axis))
    return found


def _rounding(g: AttentionGrad) -> torch.dtype:
    """What products may take their factors in: bfloat16 operands stay so, their weights and gradients become so."""
    a = g.attention
    halves = all(a.tensor(x.tensor).dtype == "bf16" for x in (a.q, a.k, a.v)) and a.dtype == "bf16"
    return torch.bfloat16 if halves else DTYPE_OF[a.compute_dtype]


def product_type(g: AttentionGrad) -> torch.dtype:
    """The coarsest type that a matrix unit may take factors in, which are rounded to that of what they meet."""
    a = g.attention
    types = {a.dtype, *(a.tensor(x.tensor).dtype for x in (a.q, a.k, a.v))}
    return next((DTYPE_OF[t] for t in ("bf16", "f16") if t in types), DTYPE_OF[a.compute_dtype])


def size_of_terms(g: AttentionGrad, tensors: Sequence[torch.Tensor]) -> float:
    """About how large what a gradient is the sum of is: where it cancels, as that of a row with a single key does, its
    rounding is that of its terms."""
    a = g.attention
    named = {t.name: x for t, x in zip(g.by_key.tensors, tensors, strict=False)}
    q, k, v, grad = (_root(named[n].double()) for n in (a.q.tensor, a.k.tensor, a.v.tensor, g.by_key.v.tensor))
    return 2 * grad * v * max(1.0, q, k) * named[g.by_key.v.tensor].shape[-1] ** 0.5


def _compared(
    name: str, given: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, rounding: torch.dtype, least: float,
) -> str | None:  # fmt: skip
    finite = exact.isfinite() & plain.isfinite()
    if not bool(finite.any()):
        return ""
    given, exact, plain = given[finite], exact[finite], plain[finite]
    if not bool(given.isfinite().all()):
        return f"{name} is {float(given[~given.isfinite()][0])} where it should be finite"
    own, error = (plain - exact).abs(), (given - exact).abs()
    scale = float(exact.abs().max())
    unit = max(torch.finfo(rounding).eps, 1e-13)  # in float64 the plain form's own error is not seen
    worst = _WORST * (float(own.max()) + unit * scale + least)
    average = (_AVERAGE_16 if rounding is torch.bfloat16 else _AVERAGE) * (_root(own) + unit * _root(exact) + least)
    if float(error.max()) > worst or _root(error) > average:
        return f"{name} is off by {float(error.max()):.3g} at the worst place, where {worst:.3g} are roundings"
    return None


def _root(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())
