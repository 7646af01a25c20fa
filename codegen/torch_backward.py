"""The gradients of an attention in plain torch, from what its forward kept: the sums of its rows.

    p = exp(score - lse)                          the weights again, without statistics
    dv[j] += sum_i weight(p) do[i]                dp = weight'(p) * (do @ v^T)
    dscore = p * (dp - sum_j p dp + dlse)         ds = score'(s) * dscore
    dq[i] = sum_j ds k[j]                         dk[j] += sum_i ds q[i]

Blocks of rows visit the keys that their loop bounds leave, and nothing larger than a block exists beside the gradients
themselves. `attncc.codegen.torch_score` differentiates score and weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import prod

import torch

from attncc.codegen.torch_form import Blocks, Ranges, is_plain, operand, operands, whole_ranges
from attncc.codegen.torch_keys import Keys, expressions, skips, visited_keys
from attncc.codegen.torch_score import Scores, weights_of
from attncc.ir import Attention, Axis, Bounds, Expr, Size
from attncc.ir.analysis import scaled
from attncc.ir.build import TRUE
from attncc.ir.evaluate import DTYPE_OF
from attncc.ir.expr import free, loads

#: Elements of a block's scores for each thread: a megabyte in float32, twice, beside the keys that it reads.
BUDGET = 1 << 18
#: From here on the sum of a row is known too roughly to make weights of scores, which are summed in another order than
#: the forward's: a mask that adds the lowest number leaves nothing of the logarithm.
ROUGH = 1e3
#: The same where weights are divided by what they sum to, as C++ kernels do where no sink is part of the sum
#: (gradient_tile.h): from here on all weights of a row may leave the range of floats first.
FAR = 1e8
#: Rows of a block: fewer visit fewer hidden keys, more make better products.
ROWS = 64


def kept(a: Attention) -> tuple[str, ...] | None:
    """The outputs of the forward that `backward` needs, None where it does not know the attention's gradients."""
    if "weights" in a.outputs or (a.normalizer == "softmax" and a.empty == "mean" and a.mask is not TRUE):
        return None
    if a.normalizer != "softmax":
        return ()
    return ("out", "lse") if _by_library(a) else ("lse",)


def backward(
    a: Attention, grads: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], outputs: Mapping[str, torch.Tensor],
    sizes: Sequence[int], wanted: Sequence[bool], *, bounds: Bounds | None = None,
) -> list[torch.Tensor] | None:  # fmt: skip
    """The gradients of the `wanted` ones of `tensors`, given those of the outputs and what was kept of `outputs`; None
    where that is too little.

    `bounds` are loop bounds of `a`. Gradients have the shapes of their tensors, and may be of a wider dtype. Where `a`
    is over some keys of a larger attention, the sums of the rows are those over all keys, and "delta" among `outputs`
    is what `sum_j p dp - dlse` is over all of them."""
    if kept(a) is None or (a.normalizer == "softmax" and "lse" not in outputs):
        return None
    named = {t.name: x.detach() for t, x in zip(a.tensors, tensors, strict=True)}
    table = dict(zip(a.sizes, sizes, strict=True))
    whole = whole_ranges(a, table)
    names = [t.name for t, w in zip(a.tensors, wanted, strict=True) if w]
    leaves = {n: named[n].detach().requires_grad_() if n in names else x for n, x in named.items()}
    wide = DTYPE_OF[a.compute_dtype]
    batch = [whole[x][1] for x in a.batch]
    with torch.enable_grad():
        ev = Blocks(a, leaves, table, whole)
        q, k, v = (operand(ev, a, *x) for x in operands(a))
        shared = _shared(batch, k, v)
        own, group = batch[: len(batch) - shared], prod(batch[len(batch) - shared :])
        q = q.expand(*batch, *q.shape[-2:]).reshape(prod(own), group, *q.shape[-2:])
        k, v = (_flat(x, own, shared) for x in (k, v))
    made = dict(zip(a.outputs, grads, strict=True))
    seed = made["out"].expand(*batch, *made["out"].shape[-2:]).reshape(prod(own), group, *made["out"].shape[-2:])
    # torch's kernel knows the gradient of the output, not that of the sums
    plain = _by_library(a) and "out" in outputs and group == 1 and q.is_cpu and k.shape[-2] > 0
    rough, lost = _kinds(outputs["lse"]) if a.normalizer == "softmax" and "delta" not in outputs else (False, False)
    if plain and not rough and not made["lse"].any():
        found = dict(zip("qkv", _library(a, q, k, v, seed, outputs["out"], outputs["lse"], batch), strict=True))
        return _to_tensors(names, leaves, {"q": q, "k": k, "v": v}, found, {})
    run = _Run(a, named, table, whole, bounds, names, wide, own, group)
    run.operands = {"q": q.detach(), "k": k.detach().to(wide), "v": v.detach().to(wide)}
    run.wants = {"q": q.requires_grad, "k": k.requires_grad, "v": v.requires_grad}
    run.seed = seed
    if a.normalizer == "softmax":
        run.lse = outputs["lse"].reshape(prod(own), group, -1).to(wide)
        run.rough, run.lost = rough, lost and a.mask is not TRUE
        if lost:  # every weight of such a row is NaN
            run.lse = run.lse.masked_fill(run.lse == float("inf"), float("nan"))
        if a.empty == "zero" and a.mask is not TRUE:
            run.lse = run.lse.masked_fill(run.lse == float("-inf"), float("inf"))
    if "delta" in outputs:
        run.delta = outputs["delta"].reshape(prod(own), group, -1).to(wide)
    elif "lse" in made and a.normalizer == "softmax":
        run.dlse = made["lse"].reshape(prod(own), group, -1).to(wide)
    found = run.all_rows()
    return _to_tensors(names, leaves, {"q": q, "k": k, "v": v}, found, run.sums)


def is_rough(lse: torch.Tensor, *, most: float = ROUGH) -> bool:
    """Whether weights cannot be made of scores and the sums of rows `lse` alone, as those of what is beyond `most`
    (see `ROUGH`); or some row is NaN."""
    return any(_kinds(lse, most))


def _kinds(lse: torch.Tensor, far: float = ROUGH) -> tuple[bool, bool]:
    """Whether sums of rows are rough, and whether some row is NaN. Another device than the CPU would be waited for."""
    if not lse.is_cpu or not lse.numel():
        return not lse.is_cpu, False
    least, most = (float(x) for x in torch.aminmax(lse))
    if least >= -far and most <= far:
        return False, False
    rough = bool((lse.abs() > far).logical_and(lse.isfinite()).any())
    return rough, bool((lse.isnan() | (lse == float("inf"))).any())


def _shared(batch: Sequence[int], k: torch.Tensor, v: torch.Tensor) -> int:
    """How many of the last batch axes keys and values do not depend on: their rows are taken together."""
    count = 0
    while count < len(batch) and k.shape[len(batch) - 1 - count] == v.shape[len(batch) - 1 - count] == 1:
        count += 1
    return count


def _flat(x: torch.Tensor, own: Sequence[int], shared: int) -> torch.Tensor:
    """(points of the batch, keys, channels) of keys or values."""
    x = x.squeeze(list(range(len(own), len(own) + shared))) if shared else x
    return x.expand(*own, *x.shape[-2:]).reshape(prod(own), *x.shape[-2:])


def _to_tensors(
    names: Sequence[str], leaves: Mapping[str, torch.Tensor], made: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor], sums: Mapping[str, torch.Tensor],
) -> list[torch.Tensor]:  # fmt: skip
    """The gradients of operands and loads as those of the tensors that they are read from."""
    pairs = [(x, found[n].reshape(x.shape).to(x.dtype)) for n, x in made.items() if x.requires_grad and n in found]
    sources = [leaves[n] for n in names]
    back: Sequence[torch.Tensor | None] = [None] * len(sources)
    if pairs and sources:
        back = torch.autograd.grad([x for x, _ in pairs], sources, [g for _, g in pairs], allow_unused=True)
    result: list[torch.Tensor] = []
    for name, x, own in zip(names, sources, back, strict=True):
        added = sums.get(name)
        parts = [p for p in (own, added) if p is not None]
        result.append(sum(parts[1:], parts[0]) if parts else torch.zeros_like(x))
    return result


def _by_library(a: Attention) -> bool:
    """Whether the gradients are those of torch's own kernel."""
    return a.outputs == ("out", "lse") and is_plain(replace(a, outputs=("out",))) and a.d.extent == a.e.extent


def _library(
    a: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seed: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, batch: Sequence[int],
) -> Sequence[torch.Tensor]:  # fmt: skip
    """A plain attention by the backward of torch's own kernel, which begins with the same."""
    heads = batch[-1] if len(batch) > 1 else prod(batch)

    def four(x: torch.Tensor) -> torch.Tensor:
        """(batch, heads, rows, channels); the kernel takes the channels of a row to lie side by side."""
        x = x.detach().reshape(-1, heads, *x.shape[-2:])
        return x if x.stride(-1) == 1 else x.contiguous()

    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        four(seed).to(q.dtype), four(q[:, 0]), four(k), four(v), four(out), lse.reshape(-1, heads, lse.shape[-1]), 0.0,
        a.mask is not TRUE, attn_mask=None, scale=scaled(a.score)[1],
    )  # fmt: skip
    return found


@dataclass
class _Run:
    """One backward: what it reads, and the gradients as they grow."""

    a: Attention
    named: Mapping[str, torch.Tensor]
    table: Mapping[Size, int]
    whole: Ranges
    bounds: Bounds | None
    names: Sequence[str]
    wide: torch.dtype
    own: Sequence[int]
    group: int

    def __post_init__(self) -> None:
        self.operands: dict[str, torch.Tensor] = {}
        self.wants: dict[str, bool] = {}
        self.seed = torch.empty(0)
        self.lse: torch.Tensor | None = None
        self.rough = self.lost = False
        self.dlse: torch.Tensor | None = None
        self.delta: torch.Tensor | None = None
        self.sums: dict[str, torch.Tensor] = {}
        self.held: dict[int, torch.Tensor] = {}
        a = self.a
        read = {x.tensor for x in loads(*weights_of(a))}
        self.learned = [n for n in self.names if n in read]
        for n in self.learned:
            self.sums[n] = torch.zeros_like(self.named[n], dtype=self.wide, memory_format=torch.contiguous_format)

    def all_rows(self) -> dict[str, torch.Tensor]:
        a, (_, rows) = self.a, self.whole[self.a.i]
        q, k = self.operands["q"], self.operands["k"]
        found = {
            n: torch.zeros_like(
                x, dtype=None if n == "q" else self.wide, memory_format=torch.contiguous_format
            )  # rows are written once, keys added to
            for n, x in self.operands.items()
            if self.wants[n]
        }
        if not rows or not k.shape[-2] or not q.shape[0]:
            return found
        step = max(1, ROWS // self.group)
        skipping = skips(a, self.bounds, q.device.type)
        for first in range(0, rows, step):
            cut = {**self.whole, a.i: (first, min(first + step, rows))}
            keys: Keys = self.whole[a.j]
            by_box = skipping and self.bounds is not None and _depends(a, self.bounds)
            if skipping and not by_box:
                keys = self._keys(cut)
            widest = keys[1] - keys[0] if isinstance(keys, tuple) else len(keys)
            scores = Scores(a, self.named, self.table, self.learned, rough=self.rough, lost=self.lost)
            for part, points in self._boxes(cut, widest):
                if by_box:
                    keys = self._keys(part)
                self._block(scores, part, points, keys, found)
        return found

    def _keys(self, cut: Ranges) -> Keys:
        assert self.bounds is not None
        if any(loads(*expressions(self.bounds))):
            return visited_keys(self.a, self.bounds, self.named, self.table, cut)
        return _fixed_keys(self.a, self.bounds, tuple(self.table.items()), tuple(cut.items()))

    def _boxes(self, cut: Ranges, keys: int) -> Iterator[tuple[Ranges, slice]]:
        """The batch in pieces whose blocks fit the budget, each with its place among the points of the batch."""
        budget = BUDGET * (torch.get_num_threads() if self.operands["q"].is_cpu else 64)
        start, end = cut[self.a.i]
        block = self.group * (end - start) * max(1, keys)
        at, inner = 0, prod(self.own)
        while at < len(self.own) and inner // self.own[at] * block > budget:
            inner //= self.own[at]
            at += 1
        singles = self.a.batch[:at]
        for number, index in enumerate(product(*(range(n) for n in self.own[:at]))):
            part = {**cut, **{x: (n, n + 1) for x, n in zip(singles, index, strict=True)}}
            if at == len(self.own):
                yield part, slice(number, number + 1)
                continue
            each = inner // self.own[at]
            step = max(1, budget // (each * block))
            for n in range(0, self.own[at], step):
                last = min(n + step, self.own[at])
                place = slice(number * inner + n * each, number * inner + last * each)
                yield {**part, self.a.batch[at]: (n, last)}, place

    def _block(
        self, scores: Scores, part: Ranges, points: slice, keys: Keys, found: dict[str, torch.Tensor]
    ) -> None:  # fmt: skip
        """Add what the rows and keys of one block give."""
        rows = slice(*part[self.a.i])
        listed = isinstance(keys, torch.Tensor)
        k, v = (self.operands[n][points] for n in "kv")
        if listed:
            keys = keys.to(k.device)
            k, v = k.index_select(-2, keys), v.index_select(-2, keys)
        else:
            k, v = k[:, slice(*keys)], v[:, slice(*keys)]
        q, seed = (x[points, :, rows].to(self.wide).flatten(1, 2) for x in (self.operands["q"], self.seed))
        lse, dlse, delta = (
            None if x is None else x[points, :, rows].flatten(1, 2)[..., None]
            for x in (self.lse, self.dlse, self.delta)
        )  # fmt: skip
        block = scores.block(part, keys, self.group)
        if block.scale != 1.0:
            q = q * block.scale
        s = torch.bmm(q, k.mT, out=self._scratch(q, k, 0))
        weights = block.weights(s, lse)
        if self.wants["v"]:
            _add(found["v"], points, keys, weights.mT, seed)
        if not (self.wants["q"] or self.wants["k"] or self.learned):
            return
        ds = block.backward(torch.bmm(seed, v.mT, out=self._scratch(seed, v, 1)), dlse, delta)
        if self.wants["q"]:
            dq = torch.bmm(ds, k).view(ds.shape[0], self.group, -1, k.shape[-1])
            found["q"][points, :, rows] = dq if block.scale == 1.0 else dq.mul_(block.scale)
        if self.wants["k"]:
            _add(found["k"], points, keys, ds.mT, q)
        block.add_loads(self.sums)


    def _scratch(self, left: torch.Tensor, right: torch.Tensor, number: int) -> torch.Tensor:
        """Memory for the product of `left` and `right` transposed: new memory would cost as much as writing it."""
        shape = (left.shape[0], left.shape[1], right.shape[1])
        held = self.held.get(number)
        if held is None or held.numel() < prod(shape):
            held = self.held[number] = left.new_empty(prod(shape))
        return held[: prod(shape)].view(shape)


def _add(total: torch.Tensor, points: slice, keys: Keys, left: torch.Tensor, right: torch.Tensor) -> None:
    if isinstance(keys, tuple):
        total[points, slice(*keys)].baddbmm_(left, right)
    else:
        total[points] = total[points].index_add(-2, keys, torch.bmm(left, right))


def _depends(a: Attention, bounds: Bounds) -> bool:
    """Whether the keys that are visited differ over the batch."""
    batch: set[Expr] = {x.index for x in a.batch}
    return any(batch & free(x) for x in expressions(bounds))


@lru_cache(maxsize=1024)
def _fixed_keys(
    a: Attention, bounds: Bounds, table: tuple[tuple[Size, int], ...], cut: tuple[tuple[Axis, tuple[int, int]], ...]
) -> Keys:  # fmt: skip
    """Those of bounds that read no data."""
    return visited_keys(a, bounds, {}, dict(table), dict(cut))
