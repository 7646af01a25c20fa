"""The first use of a kernel on a machine: it is held against the plain-torch form before it computes for anybody.

A compiler can be wrong, and what it made once would be found again for ever. So a kernel runs on made-up data of its
own attention, masks and bounds included, and what it gives is compared with the plain-torch form in float64: all of it
where that is little, else some rows of some batch points. Work that is too much for a trial is left to the first call,
whose own tensors it is then compared on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from attncc.codegen.torch_form import run_part, whole_ranges
from attncc.ir import Attention, Axis, Const
from attncc.ir.evaluate import DTYPE_OF
from attncc.ir.expr import loads, walk
from attncc.kernels.made_up import MadeUp, attempts, blank, reads_through_data
from attncc.runtime.cpp import CppKernelError
from attncc.runtime.op import Kernel
from attncc.runtime.outputs import shapes_of
from attncc.torch_private import apart

#: Made from the tensors of a trial and its sizes: tensors that a kernel takes beside those of its attention.
Extra = Callable[[Mapping[str, torch.Tensor], Sequence[int]], Mapping[str, torch.Tensor]]
Ranges = Mapping[Axis, tuple[int, int]]

#: Pairs of a row and a key that are compared: all of them up to here.
EVERY_PAIR = 1 << 19
#: Pairs of each part, where only parts are compared.
_PART = 1 << 16
#: Multiplications of a kernel that is tried on made-up data: a quarter of a second.
MOST_WORK = 1 << 32
#: Roundings that a kernel may be off beside what the plain-torch form itself is: at the worst place, and on average,
#: where the output's own rounding is all there is in 16 bits, and one of many in 32.
_WORST, _AVERAGE, _AVERAGE_16 = 4, 16, 1
_log = logging.getLogger(__name__)


def wrong(kernel: Kernel, a: Attention, extra: Extra | None = None) -> str | None:
    """What is wrong with a kernel of `a`, nothing if it is right. Raises Untried where made-up data cannot tell.

    `extra` makes the last tensors of `a`, which are worked out from the others."""
    with apart():
        own = len(a.tensors) if extra is None else _own(a)
        reason = "its tensors are too much for a trial"
        for data in attempts(a, own):
            table = dict(zip(a.sizes, data.sizes, strict=True))
            whole = whole_ranges(a, table)
            if min(end for _, end in whole.values()) < 1:
                continue
            parts = _parts(a, whole)
            if _work(whole, a) > MOST_WORK or (parts != [whole] and reads_through_data(a)):
                raise Untried("it takes too much work for a trial")
            named = {t.name: x for t, x in zip(a.tensors, data.tensors, strict=False)}
            try:
                if extra is not None:
                    named |= extra(named, data.sizes)
                    named |= {t.name: blank(t, data.sizes, a) for t in a.tensors if t.name not in named}
                tensors = [named[t.name] for t in a.tensors]
                references = [_Reference(a, tensors, data.sizes, part) for part in parts]
            except (IndexError, ZeroDivisionError, RuntimeError) as error:
                reason = f"the plain-torch form fails on made-up data ({error})"
                continue
            if not any(r.tells for r in references):
                reason = "no data that could be made up has finite results"
                continue
            return _tried(kernel, a, MadeUp(tensors, data.sizes), references)
    raise Untried(reason)


class Untried(Exception):
    """A kernel cannot be tried on made-up data; the message says why."""


#: How the outputs of a call differ from what they should be; nothing if they do not, empty where that cannot be said.
Differs = Callable[[Sequence[torch.Tensor], Sequence[int], Sequence[torch.Tensor]], str | None]


@dataclass(frozen=True)
class Check:
    """How a kernel is held against what it should give: on made-up data (`wrong` raises Untried where that cannot
    tell), and on those of a call."""

    wrong: Callable[[Kernel], str | None]
    differs: Differs


def check_of(a: Attention, extra: Extra | None = None) -> Check:
    """The check of kernels of `a`, against the plain-torch form."""
    return Check(lambda kernel: wrong(kernel, a, extra), lambda *call: differs(a, *call))


class CheckedAtFirst:
    """A kernel whose first call is checked on the call's own tensors. If it is wrong, `report` is told why and gives
    the kernel that runs from then on, this call included."""

    def __init__(self, kernel: Kernel, differs: Differs, report: Callable[[str | None], Kernel]) -> None:
        self.kernel, self._differs, self._report = kernel, differs, report
        self._checked = False

    def __call__(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> None:
        self.kernel(tensors, sizes, outputs)
        if self._checked:
            return
        why = self._differs(tensors, sizes, outputs)
        if why == "":  # nothing to compare: the next call may tell more
            return
        self.kernel, self._checked = self._report(why), True
        if why is not None:
            self.kernel(tensors, sizes, outputs)


def differs(
    a: Attention, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor],
    rounding: float = 0.0,
) -> str | None:  # fmt: skip
    """How the outputs of a call differ from the plain-torch form, on some rows; empty where nothing can be compared.
    `rounding`: how far single products may be off, relative, where that is more than their type says."""
    with apart():
        whole = whole_ranges(a, dict(zip(a.sizes, sizes, strict=True)))
        if min(end for _, end in whole.values()) < 1:
            return ""
        references = [_Reference(a, tensors, sizes, part, rounding) for part in _parts(a, whole)]
        if not any(r.tells for r in references):
            return ""
        return next((why for r in references if (why := r.differs(outputs)) is not None), None)


def _own(a: Attention) -> int:
    """How many tensors an attention reads itself; those after them are tables, which its bounds alone read."""
    read = {x.tensor for x in loads(*a.expressions())} | {x.tensor for x in (a.q, a.k, a.v)}
    return 1 + max(n for n, t in enumerate(a.tensors) if t.name in read)


def _work(whole: Ranges, a: Attention) -> int:
    pairs = prod(whole[x][1] for x in (*a.batch, a.i, a.j))
    return pairs * (whole[a.d][1] + whole[a.e][1])


def _parts(a: Attention, whole: Ranges) -> list[Ranges]:
    """What is compared: everything, or the rows at the begin, the middle and the end of the first, the middle and the
    last batch point."""
    if prod(whole[x][1] for x in (*a.batch, a.i, a.j)) <= EVERY_PAIR:
        return [whole]
    rows, keys = whole[a.i][1], whole[a.j][1]
    run = max(1, min(rows, _PART // keys))
    starts = dict.fromkeys((0, (rows - run) // 2, rows - run))
    points = [{x: at(whole[x][1]) for x in a.batch} for at in (lambda n: 0, lambda n: n // 2, lambda n: n - 1)]
    found: list[Ranges] = []
    for point in points:
        cut = {x: (n, n + 1) for x, n in point.items()}
        found += [{**whole, **cut, a.i: (start, start + run)} for start in starts]
    return [x for n, x in enumerate(found) if x not in found[:n]]


def _tried(kernel: Kernel, a: Attention, data: MadeUp, references: Sequence[_Reference]) -> str | None:
    outputs = [shape.allocate(data.sizes, torch.device("cpu")).fill_(float("nan")) for shape in shapes_of(a)]
    try:
        kernel(data.tensors, data.sizes, outputs)
    except CppKernelError as error:  # no memory, no leave to use the processor's matrix unit
        raise Untried(str(error)) from error
    return next((why for r in references if (why := r.differs(outputs)) is not None), None)


class _Reference:
    """A part of the outputs as the plain-torch form gives it, in float64 and in the attention's own types."""

    def __init__(
        self, a: Attention, tensors: Sequence[torch.Tensor], sizes: Sequence[int], part: Ranges, rounding: float = 0.0
    ) -> None:
        self.attention, self.part, self.least = a, part, rounding
        self.exact = run_part(a, tensors, sizes, part, compute=torch.float64)
        self.plain = run_part(a, tensors, sizes, part)
        floats = (x for x in tensors if x.is_floating_point() and x.numel())
        self._largest = max(float(x.abs().max()) for x in floats)

    @property
    def tells(self) -> bool:
        """Whether anything can be compared."""
        return any(bool(self._finite(n).any()) for n in range(len(self.exact)))

    def _finite(self, n: int) -> torch.Tensor:
        return self.exact[n].isfinite() & self.plain[n].isfinite()

    def differs(self, outputs: Sequence[torch.Tensor]) -> str | None:
        """How the outputs of a kernel differ, if by more than roundings."""
        for n, (name, whole) in enumerate(zip(self.attention.outputs, outputs, strict=True)):
            finite = self._finite(n)
            if not finite.any():
                continue
            axes = (*self.attention.batch, self.attention.i)
            cut = tuple(slice(*self.part[x]) for x in axes)
            given, want = whole[cut][finite].double(), self.exact[n][finite]
            if not bool(given.isfinite().all()):
                return f"{name} is {float(given[~given.isfinite()][0])} where it should be finite"
            own, error = (self.plain[n][finite].double() - want).abs(), (given - want).abs()
            unit, scale = self._rounding(name, float(want.abs().max()))
            spare = _spared(self.attention) * self._largest
            worst = _WORST * (float(own.max()) + unit * scale) + spare
            typical = max(_root(want), scale if name == "lse" else 0.0)
            average = _WORST * _root(own) + (_AVERAGE_16 if unit > 1e-4 else _AVERAGE) * unit * typical + spare
            if float(error.max()) > worst or _root(error) > average:
                at = int(error.argmax())
                return f"{name} is {float(given[at]):.6g} where it should be {float(want[at]):.6g}"
        return None

    def _rounding(self, name: str, largest: float) -> tuple[float, float]:
        """One rounding of an output, relative, and what it is relative to."""
        a = self.attention
        compute = DTYPE_OF[a.compute_dtype]
        dtype = DTYPE_OF[a.dtype] if name == "out" else compute
        unit, scale = max(torch.finfo(dtype).eps, torch.finfo(compute).eps, self.least), largest
        if a.compute_dtype == "f64":  # the plain form's own error is not seen: both sum in float64
            return max(unit, 1e-13), max(scale, 1.0) * max(self._largest, 1.0)
        if all(a.tensor(x.tensor).dtype == "bf16" for x in (a.q, a.k, a.v)):
            # weights round to bfloat16 before their product with V; their powers of two are good to 7.5e-5
            bfloat16 = torch.finfo(torch.bfloat16).eps
            return (max(unit, bfloat16), max(scale, self._largest)) if name == "out" else (7.5e-5, max(scale, 1.0))
        return unit, scale


def _spared(a: Attention) -> float:
    """How far an output may be off by the weights that a kernel may leave out, for values of at most one: 2 eps."""
    if a.spare is None:
        return 0.0
    return 2 * max((float(x.value) for x in walk(a.spare) if isinstance(x, Const) and x.kind == "float"), default=1.0)


def _root(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())
