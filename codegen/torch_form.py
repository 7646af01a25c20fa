"""The plain-torch form of an attention: blocks of rows in eager torch, on any device, differentiable.

    for each block of rows i:   s = q[i] @ k^T;  w = normalize(score(s) where mask);  out[i] = weight(w) @ v

A block holds all keys that its rows see, so no running maximum is needed; its rows are as many as a budget of elements
allows, so no N x M object is made for all heads at once. When gradients are wanted, each block is recomputed in the
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils import checkpoint

from attncc.codegen.torch_keys import Keys, skips, visited_keys
from attncc.ir import Access, Attention, Axis, Bounds, Expr, Index, Kind, Load, Op, S, Size, W
from attncc.ir.affine import poly
from attncc.ir.analysis import scaled
from attncc.ir.build import TRUE
from attncc.ir.evaluate import DTYPE_OF, NAME_OF, Evaluator
from attncc.ir.interpret import equal_scores

#: Elements of one block's scores: 4 MiB in float32 on a CPU, so that a block stays near the caches (measured best of
#: 2^18 to 2^24), and enough to fill a large device.
CPU_BUDGET, DEVICE_BUDGET = 1 << 20, 1 << 24
#: Blocks are larger where gradients are wanted, because each adds to the gradients of whole tensors.
GRADIENT_FACTOR = 8
#: Fewer rows than this make poor matrix products; the batch is split before the rows get fewer.
LEAST_ROWS = 16

_checkpoint = cast(Callable[..., list[torch.Tensor]], checkpoint.checkpoint)  # pyright: ignore[reportUnknownMemberType]

Ranges = Mapping[Axis, tuple[int, int]]  # axis -> first index and one past the last


def run_blocked(
    a: Attention, tensors: Sequence[torch.Tensor], sizes: Sequence[int], *, budget: int | None = None,
    bounds: Bounds | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """The outputs of `a` in the order of `a.outputs`; `tensors` in the order of `a.tensors`, `sizes` of `a.sizes`.

    `bounds` are loop bounds of `a`: blocks then leave out the keys that none of their rows sees. `budget` is the number
    of elements a block's scores may have. Memory order of the results is not promised. A load past the end of its
    tensor raises IndexError. Autocast regions are of no effect: the IR says what is rounded."""
    device = tensors[0].device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return run_blocked(a, tensors, sizes, budget=budget, bounds=bounds)
    named = {t.name: x for t, x in zip(a.tensors, tensors, strict=True)}
    table = dict(zip(a.sizes, sizes, strict=True))
    whole = whole_ranges(a, table)
    if is_plain(a) and whole[a.j][1] > 0:
        return [_library(a, named, table, whole)]
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if budget is None:
        budget = (CPU_BUDGET if device == "cpu" else DEVICE_BUDGET) * (GRADIENT_FACTOR if differentiated else 1)
    split, rows = _split(a, whole, budget)
    recomputed = differentiated and (split > 0 or rows < whole[a.i][1])
    skipping = skips(a, bounds, device)

    def part(ranges: Ranges) -> list[torch.Tensor]:
        """All rows of some batch points. The operands are brought into shape once for all their blocks."""
        ev = Blocks(a, named, table, ranges)
        q, k, v = (operand(ev, a, *x).to(ev.compute) for x in operands(a))
        k, v = k.contiguous(), v.contiguous()

        def block(cut: Ranges) -> list[torch.Tensor]:
            start, end = cut[a.i]
            keys: Keys | None = None
            k_seen, v_seen = k, v
            if skipping and bounds is not None:
                keys = visited_keys(a, bounds, named, table, cut)
                if a.empty == "mean" and a.normalizer == "softmax" and _hides_a_row(a, named, table, cut, keys):
                    keys = None  # such a row takes the mean over all
            if isinstance(keys, tuple):
                cut = {**cut, a.j: keys}
                k_seen, v_seen, keys = k[..., slice(*keys), :], v[..., slice(*keys), :], None
            elif keys is not None:
                keys = keys.to(k.device)
                k_seen, v_seen = k.index_select(-2, keys), v.index_select(-2, keys)
            args = (a, table, cut, keys, tuple(named), q[..., start:end, :], k_seen, v_seen, *named.values())
            if recomputed:  # a block keeps its inputs alone for the backward pass
                return _checkpoint(one_block, *args, use_reentrant=False, preserve_rng_state=False)
            return one_block(*args)

        return _along(a.i, len(a.batch), rows, ranges, block)

    for level in reversed(range(split)):
        part = partial(_along, a.batch[level], level, 1, inner=part)
    return part(whole)


def run_part(
    a: Attention, tensors: Sequence[torch.Tensor], sizes: Sequence[int], ranges: Ranges, *,
    compute: torch.dtype | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """The outputs at the batch points and rows in `ranges`, in one block. With `compute` everything is computed, and
    given, in that type. An index outside of its tensor raises IndexError."""
    if compute is not None:
        name = NAME_OF[compute]
        a = replace(a, tensors=tuple(replace(t, dtype=name) if t.kind == "float" else t for t in a.tensors), dtype=name)
    named = {t.name: x for t, x in zip(a.tensors, tensors, strict=True)}
    table = dict(zip(a.sizes, sizes, strict=True))
    cut = {**whole_ranges(a, table), **ranges}
    ev = Blocks(a, named, table, cut)
    ev.checked = True
    for access, *_ in operands(a):
        if any(bool((ev(x) < 0).any()) for x in access.index):
            raise IndexError(f"a negative index of {access.tensor}")
    q, k, v = (operand(ev, a, *x).to(ev.compute) for x in operands(a))
    return one_block(a, table, cut, None, tuple(named), q, k, v, *tensors, checked=True)


def whole_ranges(a: Attention, table: Mapping[Size, int]) -> dict[Axis, tuple[int, int]]:
    """All of every axis."""
    return {x: (0, table[x.extent] if isinstance(x.extent, Size) else int(x.extent.value)) for x in a.axes}


def operands(a: Attention) -> tuple[tuple[Access, Axis, Axis], ...]:
    return (a.q, a.i, a.d), (a.k, a.j, a.d), (a.v, a.j, a.e)


def _split(a: Attention, whole: Ranges, budget: int) -> tuple[int, int]:
    """How many leading batch axes are taken one index at a time, and the rows of a block."""
    length = whole[a.j][1]
    for split in range(len(a.batch) + 1):
        per_row = length
        for axis in a.batch[split:]:
            per_row = per_row * whole[axis][1]
        if per_row * min(LEAST_ROWS, whole[a.i][1]) <= budget:
            return split, max(1, budget // max(1, per_row))
    return len(a.batch), LEAST_ROWS


def _along(
    axis: Axis, dim: int, step: int, ranges: Ranges, inner: Callable[[Ranges], list[torch.Tensor]]
) -> list[torch.Tensor]:
    """The outputs of `inner` on pieces of `ranges`, `step` indices of `axis` each, put together along `dim`."""
    start, end = ranges[axis]
    if end - start <= step:
        return inner(ranges)
    parts = [inner({**ranges, axis: (n, min(n + step, end))}) for n in range(start, end, step)]
    return [torch.cat(same, dim) for same in zip(*parts, strict=True)]


class Blocks(Evaluator):
    """The evaluator of one block: a load with affine indices is a view and no gather."""

    def __init__(
        self, a: Attention, named: Mapping[str, torch.Tensor], table: Mapping[Size, int], ranges: Ranges,
        keys: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """With `keys` the key index runs over those."""
        self.axes, self.ranges = a.axes, {x.index: r for x, r in ranges.items()}
        self.scattered = None if keys is None else a.j.index
        wide = DTYPE_OF[a.compute_dtype]
        device = named[a.q.tensor].device
        leaves: dict[Expr, torch.Tensor] = {
            s: torch.full((), n, dtype=torch.int64, device=device) for s, n in table.items()  # also a symbol of a trace
        }
        for at, axis in enumerate(a.axes):
            start, end = ranges[axis]
            listed = keys is not None and axis == a.j
            grid = keys if keys is not None and listed else torch.arange(start, end, device=device)
            leaves[axis.index] = grid.view([-1 if n == at else 1 for n in range(len(a.axes))])
        super().__init__(leaves, named, wide)
        self.device = device

    def over(self, tensors: Mapping[str, torch.Tensor]) -> Blocks:
        """The same block of other tensors; only views of them are asked for."""
        other = copy(self)
        other.tensors = tensors
        return other

    def _compute(self, node: Expr) -> torch.Tensor:
        if isinstance(node, Load):
            seen = self.view(node.tensor, node.index)
            if seen is not None:
                return _as_kind(seen, node.kind, self.compute)
        return super()._compute(node)

    def view(self, tensor: str, index: tuple[Expr, ...]) -> torch.Tensor | None:
        """The part of `tensor` that the block reads, one dimension an axis of the attention, or None where that is no
        view: where an index is not affine with steps >= 0, or an axis occurs in two of them."""
        value, found = self.tensors[tensor], list[Index]()
        for x in index:  # x is about the first dimension left; the axes found are appended behind the last
            affine = _affine(x)
            if affine is None or any(axis in found or axis is self.scattered for axis in affine[0]):
                return None
            steps, start = affine
            span = 1
            for axis, c in steps.items():
                first, end = self.ranges[axis]
                start, span = start + c * first, span + c * (end - first - 1)
            if start < 0 or span <= 0 or start + span > value.shape[0]:
                return None
            value = value if span == value.shape[0] else value.narrow(0, start, span)
            for axis, c in steps.items():
                first, end = self.ranges[axis]
                span -= c * (end - first - 1)
                value = _windows(value, end - first, c, span)
            value = value.squeeze(0)
            found += steps
        value = value.permute([found.index(x.index) for x in self.axes if x.index in found])
        for at, x in enumerate(self.axes):
            if x.index not in found:
                value = value.unsqueeze(at)
        return value


def _windows(value: torch.Tensor, count: int, step: int, span: int) -> torch.Tensor:
    """(span, ..., count) from (step * (count - 1) + span, ...): windows of `span`, each `step` after the one before.
    The first two ways are what unfold gives, with cheaper gradients."""
    if step == span == 1:
        return value.movedim(0, -1).unsqueeze(0)
    if step == span:
        return value.view(count, step, *value.shape[1:]).movedim(0, -1)  # splitting a dimension is always a view
    return value.unfold(0, span, step).movedim(0, -2).movedim(-1, 0)


def _affine(x: Expr) -> tuple[dict[Index, int], int] | None:
    """`x` as steps of indices, each >= 1, the largest first, and an offset."""
    steps: dict[Index, int] = {}
    offset = 0
    for monomial, c in poly(x).items():
        if not monomial:
            offset = c
        elif len(monomial) == 1 and isinstance(monomial[0], Index) and c >= 1:
            steps[monomial[0]] = c
        else:
            return None
    return dict(sorted(steps.items(), key=lambda item: -item[1])), offset


def _as_kind(value: torch.Tensor, kind: Kind, compute: torch.dtype) -> torch.Tensor:
    return value if kind == "bool" else value.to(compute if kind == "float" else torch.int64)


def operand(ev: Blocks, a: Attention, access: Access, row: Axis, last: Axis) -> torch.Tensor:
    """(*batch, row, last) of an operand, with extent 1 for batch axes it does not depend on."""
    value = ev.view(access.tensor, access.index)
    if value is None:
        value = ev.tensors[access.tensor][tuple(ev(x) for x in access.index)]
        value = value.reshape((1,) * (len(a.axes) - value.ndim) + value.shape)  # a constant index has no dimensions
    gone = [at for at, x in enumerate(a.axes) if x not in (*a.batch, row, last)]
    value = value.squeeze(gone)
    lengths = [end - start for start, end in (ev.ranges[row.index], ev.ranges[last.index])]
    return value.expand(*value.shape[:-2], *lengths)


def _hides_a_row(
    a: Attention, named: Mapping[str, torch.Tensor], table: Mapping[Size, int], ranges: Ranges, keys: Keys
) -> bool:
    """Whether a row of the block sees none of `keys`, which are all that it might see."""
    listed = isinstance(keys, torch.Tensor)
    ev = Blocks(a, named, table, ranges, keys) if listed else Blocks(a, named, table, {**ranges, a.j: keys})
    seen = ev(a.mask)
    return not bool(seen.any(-3).all() if seen.ndim else seen)


def one_block(
    a: Attention, table: Mapping[Size, int], ranges: Ranges, keys: torch.Tensor | None, names: Sequence[str],
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *tensors: torch.Tensor, checked: bool = False,
) -> list[torch.Tensor]:  # fmt: skip
    """The outputs of one block, each with all its axes."""
    ev = Blocks(a, dict(zip(names, tensors, strict=True)), table, ranges, keys)
    ev.checked = checked
    full = [ranges[x][1] - ranges[x][0] for x in (*a.batch, a.i)] + [k.shape[-2]]

    def over_ij(x: Expr) -> torch.Tensor:
        value = ev(x)
        return (value.squeeze((-2, -1)) if value.ndim else value).expand(full)

    ev.known[S] = (q @ k.transpose(-1, -2))[..., None, None]
    score = over_ij(a.score)
    visible = None if a.mask is TRUE else over_ij(a.mask)
    sink = None if a.sink is None else over_ij(a.sink)[..., :1]
    w, lse = _normalize(a, score, visible, sink)
    ev.known[W] = w[..., None, None]
    weights = over_ij(a.weight)
    if visible is not None and (a.normalizer != "softmax" or a.empty == "zero") and a.weight is not W:
        weights = torch.where(visible, weights, 0.0)
    dtype = DTYPE_OF[a.dtype]
    every: dict[str, Callable[[], torch.Tensor]] = {
        "out": lambda: (weights @ v).expand(*full[:-1], v.shape[-1]).to(dtype),
        "lse": lse,
        "weights": lambda: weights.to(dtype),
    }
    return [every[name]() for name in a.outputs]


POINTWISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "none": lambda x: x,
}


def _normalize(
    a: Attention, score: torch.Tensor, visible: torch.Tensor | None, sink: torch.Tensor | None
) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """Weights, zero where hidden, and how to get the log of their sum. Rows without a visible key are kept away from
    the softmax, whose gradient there would be NaN."""
    if a.normalizer != "softmax":
        w = POINTWISE[a.normalizer](score)
        zero = torch.zeros_like(score[..., 0])
        return (w if visible is None else torch.where(visible, w, 0.0)), lambda: zero
    hidden = score if visible is None else torch.where(visible, score, float("-inf"))
    if sink is not None or a.empty == "nan" or visible is None:
        logits = hidden if sink is None else torch.cat([hidden, sink], -1)
        w = torch.softmax(logits, -1)
        return (w if sink is None else w[..., :-1]), lambda: torch.logsumexp(logits, -1)
    empty = ~visible.any(-1, keepdim=True)
    safe = torch.where(empty, equal_scores(score, a.slope), hidden) if a.slope else hidden.masked_fill(empty, 0.0)
    w = torch.softmax(safe, -1)
    w = w if a.empty == "mean" else w.masked_fill(empty, 0.0)
    return w, lambda: torch.logsumexp(safe, -1).masked_fill(empty[..., 0], float("-inf"))


def is_plain(a: Attention) -> bool:
    """Whether `a` is what torch's own scaled_dot_product_attention computes: a constant scale, and no mask or j <= i
    (counted from the first row and key, as its `is_causal` does)."""
    dtypes = {a.tensor(x.tensor).dtype for x in (a.q, a.k, a.v)} | {a.dtype}
    causal = Op("le", (a.j.index, a.i.index))
    return (
        a.normalizer == "softmax" and a.sink is None and a.weight is W and a.outputs == ("out",) and len(dtypes) == 1
        and (a.mask is TRUE or a.mask is causal) and scaled(a.score)[0] is S
    )  # fmt: skip


def _library(
    a: Attention, named: Mapping[str, torch.Tensor], table: Mapping[Size, int], whole: Ranges
) -> torch.Tensor:
    """A plain attention by torch's own kernel, as (batch, heads, rows, channels), which its fast paths ask for."""
    ev = Blocks(a, named, table, whole)
    batch = [whole[x][1] for x in a.batch]
    q, k, v = (operand(ev, a, *x) for x in operands(a))
    group = batch[-1] if batch else 1
    shared = len(batch) > 1 and group > 1 and k.shape[-3] == 1 and v.shape[-3] == 1

    def four(x: torch.Tensor, heads: list[int]) -> torch.Tensor:
        x = x.expand(*heads, *x.shape[-2:])
        return x if x.ndim == 4 else x.reshape(*heads[:1], -1, *x.shape[-2:]) if heads else x[None, None]

    keys = [*batch[:-1], 1] if shared else batch
    out = scaled_dot_product_attention(
        four(q, batch), four(k, keys), four(v, keys), is_causal=a.mask is not TRUE, scale=scaled(a.score)[1],
        enable_gqa=shared,
    )  # fmt: skip
    return out.reshape(*batch, *out.shape[-2:])
