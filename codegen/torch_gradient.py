"""A backward around a kernel: what it takes, where it writes, and the gradients of tensors from what it gives.

    q[b, i, h, d]            the kernel writes the gradient of q where it belongs
    k[b, h // 4, j, d]       the gradient of each h is added up
    table[bucket(i - j)]     sums for each distance are added to the elements that the distances read
    sink                     -exp(sink - lse) delta, a number a row
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, cast

import torch

from attncc.codegen.torch_form import Blocks, Ranges, operand, whole_ranges
from attncc.ir import Access, Attention, Axis, Expr, Size
from attncc.ir.attention_grad import AttentionGrad, LoadGrad, shapes_of_grad
from attncc.ir.build import ZERO
from attncc.ir.evaluate import DTYPE_OF, Evaluator
from attncc.ir.expr import loads, mentions, substitute


class GradientKernel(Protocol):
    """Writes what `interpret_grad` gives, in the compute type, given the tensors of an attention and those of `GIVEN`.
    """

    def __call__(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> None: ...


def learned_by_sink(a: Attention, wanted: Sequence[str]) -> list[str]:
    """The wanted tensors that the sink reads."""
    return [] if a.sink is None else [x.tensor for x in loads(a.sink) if x.tensor in wanted]


class Gradients:
    """A backward: a gradient with its kernel. Where that writes is worked out once for each layout of a tensor."""

    def __init__(self, g: AttentionGrad, kernel: GradientKernel) -> None:
        self.g, self.kernel = g, kernel
        a = g.attention
        self.access: dict[str, tuple[Access, Axis, Axis]] = {
            "q": (a.q, a.i, a.d), "k": (a.k, a.j, a.d), "v": (a.v, a.j, a.e)
        }  # fmt: skip
        self.alone = {n for n in g.operands if _alone(a, self.access[n][0].tensor)}
        self._layouts: dict[tuple[object, ...], _Layout | None] = {}

    def __call__(
        self, grads: Mapping[str, torch.Tensor], tensors: Sequence[torch.Tensor], outputs: Mapping[str, torch.Tensor],
        sizes: Sequence[int], wanted: Sequence[str],
    ) -> list[torch.Tensor]:  # fmt: skip
        """The gradients of the `wanted` tensors, in their order; `grads` and `outputs` are those of out and lse.
        Gradients may be of a wider type than their tensors."""
        return _Run(self, tensors, sizes, wanted)(grads, outputs)

    def layout(self, name: str, source: torch.Tensor, sizes: Sequence[int]) -> _Layout | None:
        """Where the gradient of an operand lies in that of its tensor; None where it is not all of it, each element
        once."""
        key = (name, source.shape, source.stride(), *sizes)
        if key not in self._layouts:
            if len(self._layouts) >= _MOST_LAYOUTS:  # shapes that never come back must not pile up
                self._layouts.clear()
            self._layouts[key] = self._layout(name, source, sizes)
        return self._layouts[key]

    def _layout(self, name: str, source: torch.Tensor, sizes: Sequence[int]) -> _Layout | None:
        a, (access, row, last) = self.g.attention, self.access[name]
        like = torch.empty_strided(source.shape, source.stride(), device="meta")
        table = dict(zip(a.sizes, sizes, strict=True))
        named = {t.name: like for t in a.tensors}
        view = Blocks(a, named, table, whole_ranges(a, table)).view(access.tensor, access.index)
        if view is None:
            return None
        axes = (*(a.batch if name == "q" else self.g.held), row, last)
        view = view.squeeze([n for n, x in enumerate(a.axes) if x not in axes])
        want = shapes_of_grad(self.g, sizes)[self.g.operands.index(name)]
        if list(view.shape) != want or view.numel() != source.numel() or not _apart(view):
            return None
        return view.shape, view.stride(), int(view.storage_offset())


_Layout = tuple[Sequence[int], Sequence[int], int]  # size, strides, offset
_MOST_LAYOUTS = 256


def _alone(a: Attention, tensor: str) -> bool:
    """Whether a tensor is read as one operand and nothing else."""
    uses = sum(x.tensor == tensor for x in (a.q, a.k, a.v))
    roots = [a.score, a.mask, a.weight, *([] if a.sink is None else [a.sink])]
    return uses == 1 and all(x.tensor != tensor for x in loads(*roots))


@dataclass(frozen=True)
class _Place:
    """Where the gradient of an operand goes: `written` by the kernel, `source` then being all of the tensor's gradient;
    without a source, `view` is the operand, through which the gradient is passed back."""

    written: torch.Tensor
    source: torch.Tensor | None
    view: torch.Tensor | None


class _Run:
    def __init__(
        self, own: Gradients, tensors: Sequence[torch.Tensor], sizes: Sequence[int], wanted: Sequence[str]
    ) -> None:  # fmt: skip
        self.own, self.g, self.a, self.sizes, self.wanted = own, own.g, own.g.attention, sizes, wanted
        self.tensors = [x.detach() for x in tensors]
        self.named = {t.name: x for t, x in zip(self.a.tensors, self.tensors, strict=True)}
        self.wide = DTYPE_OF[self.a.compute_dtype]
        self.sums: dict[str, torch.Tensor] = {}
        self.device = self.tensors[0].device

    @cached_property
    def table(self) -> dict[Size, int]:
        return dict(zip(self.a.sizes, self.sizes, strict=True))

    @cached_property
    def whole(self) -> Ranges:
        return whole_ranges(self.a, self.table)

    @cached_property
    def leaves(self) -> dict[str, torch.Tensor]:
        return {n: self.named[n].detach().requires_grad_() for n in self.wanted}

    def __call__(
        self, grads: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
    ) -> list[torch.Tensor]:
        a, g = self.a, self.g
        given = [grads["out"].to(DTYPE_OF[a.dtype]), outputs["out"], outputs["lse"], self._grad_lse(grads, outputs)]
        places = {n: self._place(n) for n in g.operands}
        shapes = shapes_of_grad(g, self.sizes)[len(places) :] if g.loads else []
        # pairs that no tile visits are not written
        totals = [torch.zeros(shape, dtype=self.wide, device=self.device) for shape in shapes]
        self.own.kernel([*self.tensors, *given], self.sizes, [*(x.written for x in places.values()), *totals])
        for x, total in zip(g.loads, totals, strict=True):
            self._add(x, total)
        if learned_by_sink(a, self.wanted):
            self._add_sink(*given)
        return self._result(places)

    def _grad_lse(self, grads: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if "lse" in grads:
            return grads["lse"].to(self.wide)
        return torch.zeros((), dtype=self.wide, device=self.device).expand(outputs["lse"].shape)

    def _place(self, name: str) -> _Place:
        """The tensor's gradient itself, where the operand is all of it, each element once."""
        access, row, last = self.own.access[name]
        if name in self.own.alone:
            source = torch.empty_like(self.named[access.tensor], dtype=self.wide)
            layout = self.own.layout(name, source, self.sizes)
            if layout is not None:
                return _Place(source.as_strided(*layout), source, None)
        shape = shapes_of_grad(self.g, self.sizes)[self.g.operands.index(name)]
        with torch.enable_grad():
            ev = Blocks(self.a, {**self.named, **self.leaves}, self.table, self.whole)
            value = operand(ev, self.a, access, row, last)
        return _Place(torch.empty(shape, dtype=self.wide, device=self.device), None, value)

    def _result(self, places: Mapping[str, _Place]) -> list[torch.Tensor]:
        a = self.a
        source = {"q": a.q.tensor, "k": a.k.tensor, "v": a.v.tensor}
        whole = {source[n]: x.source for n, x in places.items() if x.source is not None}
        pairs = [(x.view, self._full(n, x)) for n, x in places.items() if x.view is not None]
        names = [n for n in self.wanted if n not in whole]
        back: Sequence[torch.Tensor | None] = [None] * len(names)
        if pairs and names:
            made, seeds = [x for x, _ in pairs], [s for _, s in pairs]
            back = torch.autograd.grad(made, [self.leaves[n] for n in names], seeds, allow_unused=True)
        found: dict[str, torch.Tensor | None] = {**whole, **dict(zip(names, back, strict=True))}
        result: list[torch.Tensor] = []
        for n in self.wanted:
            parts = [x for x in (found[n], self.sums.get(n)) if x is not None]
            result.append(sum(parts[1:], parts[0]) if parts else torch.zeros_like(self.named[n]))
        return result

    def _full(self, name: str, x: _Place) -> torch.Tensor:
        """The gradient of an operand in the operand's shape: axes that it does not depend on are summed over."""
        assert x.view is not None
        axes = self.a.batch if name == "q" else self.g.held
        grad = x.written
        for n, axis in enumerate(self.a.batch):
            if axis not in axes:
                grad = grad.unsqueeze(n)
        return grad.sum_to_size(x.view.shape).to(x.view.dtype)

    # ---- loads -----------------------------------------------------------------------------------------------------
    def _add(self, x: LoadGrad, total: torch.Tensor) -> None:
        """Add the sums of a load to the elements that it reads."""
        a = self.a
        index: tuple[Expr, ...] = x.load.index
        axes = [*a.batch, *{"": [], "i": [a.i], "j": [a.j], "j - i": [a.i], "i, j": [a.i, a.j]}[x.over]]
        if x.over == "j - i":  # a distance stands for every row and key that are so far apart
            index = tuple(substitute(n, {a.j.index: ZERO}) for n in index)
        used = [n for n, axis in enumerate(axes) if any(mentions(e, axis.index) for e in index)]
        gone = [n for n in range(len(axes)) if n not in used]
        total = total.sum(gone) if gone else total
        leaves: dict[Expr, torch.Tensor] = {s: torch.tensor(n, device=self.device) for s, n in self.table.items()}
        for at, n in enumerate(used):
            axis = axes[n]
            values = torch.arange(self.whole[axis][1], device=self.device)
            if x.over == "j - i" and axis is a.i:
                rows, keys = self.whole[a.i][1], self.whole[a.j][1]
                values = rows - 1 - torch.arange(rows + keys - 1, device=self.device)
            leaves[axis.index] = values.view([-1 if m == at else 1 for m in range(len(used))])
        ev = Evaluator(leaves, self.named, self.wide)
        into = self._into(x.load.tensor)
        if not index:
            into.add_(total)
            return
        into.index_put_(tuple(ev(e).expand(total.shape) for e in index), total, accumulate=True)

    def _into(self, tensor: str) -> torch.Tensor:
        if tensor not in self.sums:
            x = self.named[tensor]
            self.sums[tensor] = torch.zeros_like(x, dtype=self.wide, memory_format=torch.contiguous_format)
        return self.sums[tensor]

    def _add_sink(
        self, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, grad_lse: torch.Tensor
    ) -> None:  # fmt: skip
        a = self.a
        assert a.sink is not None
        ev = Blocks(a, {**self.named, **self.leaves}, self.table, self.whole)
        with torch.enable_grad():
            value = ev(a.sink)
            value = value[..., 0, 0, 0] if value.ndim else value  # a sink is of rows alone
        if not value.requires_grad:
            return
        delta = (grad.to(self.wide) * out).sum(-1) - grad_lse
        weight = (value.detach() - lse).exp()
        seed = (-weight * delta).masked_fill(lse == float("-inf"), 0.0).sum_to_size(value.shape)
        names = learned_by_sink(a, self.wanted)
        made = torch.autograd.grad(value, [self.leaves[n] for n in names], seed, allow_unused=True)
        found = cast("Sequence[torch.Tensor | None]", made)
        for n, x in zip(names, found, strict=True):
            if x is not None:
                self._into(n).add_(x)


def _apart(x: torch.Tensor) -> bool:
    """Whether no two elements of a view lie in one place."""
    reach = 0
    for stride, n in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride <= reach:
            return False
        reach += stride * (n - 1)
    return True
