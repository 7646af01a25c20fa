"""Scores and weights of one block with their derivatives, in plain torch.

    score = c * s + rest      the common case: nothing is kept beside the weights, and all is done in place
    otherwise                 torch differentiates the expressions over the block's scores
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch

from attncc.codegen.torch_form import POINTWISE, Blocks, Ranges
from attncc.codegen.torch_keys import Keys
from attncc.ir import Attention, Const, Expr, Load, Op, S, Size, W
from attncc.ir.affine import poly
from attncc.ir.build import TRUE, add, mul, op, sub
from attncc.ir.expr import free, loads, walk


def weights_of(a: Attention) -> list[Expr]:
    """The expressions that gradients go through."""
    return [a.score, a.weight, *([] if a.sink is None else [a.sink])]


_NOTHING = Const(0.0)


def linear(score: Expr) -> tuple[float, Expr] | None:
    """(c, rest) of a score `c * s + rest`, with no `s` in rest; None for any other score."""
    if S not in walk(score):
        return 0.0, score
    match score:
        case _ if score is S:
            return 1.0, _NOTHING
        case Op("mul", (x, Const(c))) | Op("mul", (Const(c), x)):
            found = linear(x)
            return None if found is None else (found[0] * float(c), mul(found[1], Const(float(c))))
        case Op("add", (x, y)):
            left, right = linear(x), linear(y)
            return None if left is None or right is None else (left[0] + right[0], add(left[1], right[1]))
        case Op("sub", (x, y)):
            left, right = linear(x), linear(y)
            return None if left is None or right is None else (left[0] - right[0], sub(left[1], right[1]))
        case Op("neg", (x,)):
            found = linear(x)
            return None if found is None else (-found[0], op("neg", found[1]))
        case _:
            return None


class Scores:
    """What the blocks of some rows share. `learned` are the tensors whose gradients are wanted. With `rough` sums of
    rows, weights are made to sum to one again: a block has all keys of its rows. `lost`: some row is NaN, which the
    keys that it does not see know nothing of."""

    def __init__(
        self, a: Attention, named: Mapping[str, torch.Tensor], table: Mapping[Size, int], learned: Sequence[str],
        *, rough: bool = False, lost: bool = False,
    ) -> None:  # fmt: skip
        self.a, self.named, self.table, self.rough, self.lost = a, named, table, rough, lost
        found = linear(a.score) if a.normalizer == "softmax" and a.weight is W else None
        self.linear = found if found is not None and found[0] != 0.0 else None
        self.learned = [x for x in loads(*weights_of(a)) if x.tensor in learned]
        batch: set[Expr] = {x.index for x in a.batch}
        self.alike = not batch & free(a.mask)
        self._last: tuple[Keys, torch.Tensor] | None = None

    def block(self, part: Ranges, keys: Keys, group: int) -> Block:
        cut = {**part, self.a.j: keys} if isinstance(keys, tuple) else part
        ev = Blocks(self.a, self.named, self.table, cut, None if isinstance(keys, tuple) else keys)
        visible = None
        if self.a.mask is not TRUE:
            if self.alike and self._last is not None and self._last[0] is keys:
                visible = self._last[1]
            else:
                visible = over_ij(ev, self.a.mask)
                self._last = keys, visible
        return Block(self, ev, visible, group)


def over_ij(ev: Blocks, x: Expr) -> torch.Tensor:
    """The value of an expression over (*batch, i, j), with extent 1 where it does not depend on an index."""
    value = ev(x)
    return value.squeeze((-2, -1)) if value.ndim else value.view([1] * (len(ev.axes) - 2))


class Block:
    """The scores of a block: from `q k^T`, `scale` being in q already, to weights, and back."""

    def __init__(self, scores: Scores, ev: Blocks, visible: torch.Tensor | None, group: int) -> None:
        self.scores, self.a, self.ev, self.visible, self.group = scores, scores.a, ev, visible, group
        self.scale = 1.0 if scores.linear is None else scores.linear[0]
        self.total: torch.Tensor | None = None
        self.leaves: dict[Load, torch.Tensor] = {}
        for x in scores.learned:
            self.leaves[x] = ev(x).detach().requires_grad_()
        for x, leaf in self.leaves.items():
            ev.known[x] = leaf
        self.found: dict[Load, torch.Tensor] = {}
        ranges = [ev.ranges[x.index] for x in (*self.a.batch, self.a.i)]
        self.shape = [end - start for start, end in ranges]

    def weights(self, s: torch.Tensor, lse: torch.Tensor | None) -> torch.Tensor:
        """The weights of the values. `s` is (points, rows of the group, keys), and written to."""
        self.lse = lse
        view = s.view(*self.shape, s.shape[-1])
        if self.scores.linear is None:
            return self._kept(self._any(view, lse).reshape(s.shape))
        self.rest = None
        if self.scores.linear[1] is not _NOTHING:
            with torch.enable_grad():
                self.rest = over_ij(self.ev, self.scores.linear[1])
            view.add_(self.rest.detach())
        self._hide(view)
        assert lse is not None
        if self.scores.rough:
            lse = self.lse = self._highest(s, lse)
        self.p = s.sub_(lse).exp_()
        if self.scores.rough:
            self.total = self._total(self.p, lse)
            self.p.div_(self.total)
        return self._kept(self.p)

    def _kept(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, zero where hidden, NaN or not."""
        if self.visible is None or not self.scores.lost:
            return x
        seen = self.visible.expand(*self.shape, x.shape[-1]).reshape(x.shape)
        return x.masked_fill(~seen, 0.0)

    def _highest(self, s: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """The highest score of each row, in the place of the log of its sum; that where the row sees nothing or is NaN.
        """
        top = s.amax(-1, keepdim=True)
        if self.a.sink is not None:
            with torch.enable_grad():
                value = over_ij(self.ev, self.a.sink)
            top = torch.maximum(top, value.detach().expand(*self.shape, 1).reshape(top.shape))
        return torch.where(lse.isnan() | (top == float("-inf")), lse, top)

    def _total(self, p: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """What the weights of each row sum to, with the weight of the sink; one where there are none."""
        total = p.sum(-1, keepdim=True)
        if self.a.sink is not None:
            with torch.enable_grad():  # it is kept, to be differentiated
                value = over_ij(self.ev, self.a.sink)
            sink = (value.detach() - lse.view(*self.shape, 1)).exp()
            total = total + sink.expand(*self.shape, 1).reshape(total.shape)
        return total.masked_fill(total == 0, 1.0)

    def _hide(self, s: torch.Tensor) -> None:
        """Write -inf where the mask hides, which is mostly a few of the keys of a block."""
        if self.visible is None:
            return
        seen = self.visible.expand(*self.visible.shape[:-1], s.shape[-1])
        if not s.is_cpu:
            s.masked_fill_(~seen, float("-inf"))
            return
        some = (~seen.flatten(0, -2).all(0)).nonzero()
        if len(some):
            first, last = int(some[0]), int(some[-1]) + 1
            seen, part = seen[..., first:last], s[..., first:last]
            if bool(part.sum().isfinite()):  # a hidden NaN would stay one; masked_fill_ takes ten times as long
                torch.minimum(part, torch.where(seen, float("inf"), float("-inf")).to(s.dtype), out=part)
            else:
                part.masked_fill_(~seen, float("-inf"))

    def _any(self, s: torch.Tensor, lse: torch.Tensor | None) -> torch.Tensor:
        """Weights of any score and any weight, with what torch needs to differentiate them."""
        a, ev, visible = self.a, self.ev, self.visible
        with torch.enable_grad():
            self.s = s.detach().clone().requires_grad_()
            ev.known[S] = self.s[..., None, None]
            self.score = over_ij(ev, a.score).expand(s.shape)
            if a.normalizer == "softmax":
                assert lse is not None
                score = self.score.detach()
                hidden = score if visible is None else score.masked_fill(~visible, float("-inf"))
                if self.scores.rough:
                    lse = self.lse = self._highest(hidden.reshape(*lse.shape[:-1], -1), lse)
                p = (hidden - lse.view(*self.shape, 1)).exp()
                if self.scores.rough:
                    self.total = self._total(p, lse)
                    p = p / self.total
                self.p = w = p.detach().requires_grad_()
            else:
                w = POINTWISE[a.normalizer](self.score)
                w = w if visible is None else torch.where(visible, w, 0.0)
            ev.known[W] = w[..., None, None]
            made = over_ij(ev, a.weight).expand(s.shape)
            if visible is not None and (a.normalizer != "softmax" or a.empty == "zero") and a.weight is not W:
                made = torch.where(visible, made, 0.0)
            self.made = made
        return made.detach()

    def backward(
        self, dw: torch.Tensor, dlse: torch.Tensor | None, delta: torch.Tensor | None = None
    ) -> torch.Tensor:  # fmt: skip
        """The gradient of `s` from that of the weights, which is written to; those of loads are kept. `delta`: what the
        weights' gradients sum to, where the block has not all keys of its rows."""
        a, p = self.a, getattr(self, "p", None)
        ds: torch.Tensor | None = None
        dp = dw
        if self.scores.linear is None:
            inputs = [self.s] if a.normalizer != "softmax" else [self.s, self.p]
            found = self._differentiate(self.made, inputs, dw.view(self.made.shape))
            ds = found[0]
            if a.normalizer != "softmax":
                return _full(ds, dw)
            dp, p = _full(found[1], dw), self.p.detach().reshape(dw.shape)
        assert p is not None
        t = dp.mul_(p)
        total = t.sum(-1, keepdim=True) if delta is None else delta
        if delta is None and self.leaves and a.sink is None:
            # of what is added to whole rows the gradients cancel, down to how far the weights are from adding up to one
            total = total / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
        if dlse is not None:
            total = total - dlse
        t.addcmul_(p, total, value=-1.0)
        if a.sink is not None:
            self._sink(total)
        if self.scores.linear is None:
            (more,) = self._differentiate(self.score, [self.s], t.view(self.score.shape))
            whole = more if ds is None else ds if more is None else ds + more
            return self._kept(_full(whole, dw))
        t = self._kept(t)
        if self.rest is not None:
            self._differentiate(self.rest, [], t.view(*self.shape, t.shape[-1]).sum_to_size(self.rest.shape))
        return t

    def _sink(self, total: torch.Tensor) -> None:
        assert self.a.sink is not None and self.lse is not None
        with torch.enable_grad():
            value = over_ij(self.ev, self.a.sink)
        if value.requires_grad:
            total, lse = total.view(*self.shape, 1), self.lse.view(*self.shape, 1)
            weight = (value.detach() - lse).exp()
            weight = weight if self.total is None else weight / self.total.view(*self.shape, 1)
            self._differentiate(value, [], (-weight * total).sum_to_size(value.shape))

    def _differentiate(
        self, made: torch.Tensor, inputs: Sequence[torch.Tensor], grad: torch.Tensor
    ) -> list[torch.Tensor | None]:
        """Gradients of `inputs`; those of loads are added to what was found of them."""
        if not made.requires_grad:
            return [None] * len(inputs)
        given = [*inputs, *self.leaves.values()]
        every = torch.autograd.grad(made, given, grad, allow_unused=True, retain_graph=True)
        found = cast(Sequence[torch.Tensor | None], every)
        for x, g in zip(self.leaves, found[len(inputs) :], strict=True):
            if g is not None:
                self.found[x] = self.found[x] + g if x in self.found else g
        return list(found[: len(inputs)])

    def add_loads(self, sums: Mapping[str, torch.Tensor]) -> None:
        """Add the gradients of loads to those of their tensors."""
        if not self.found:
            return
        into = self.ev.over(sums)
        for x, g in self.found.items():
            place = into.view(x.tensor, x.index) if _apart(x.index) else None
            if place is not None:
                place.add_(g)
            else:
                sums[x.tensor].index_put_(tuple(self.ev(c) for c in x.index), g, accumulate=True)


def _full(x: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if x is None else x.reshape(like.shape)


def _apart(index: Iterable[Expr]) -> bool:
    """Whether no two indices meet in one dimension, so that each element is read once."""
    return all(len({m for m in poly(x) if m}) <= 1 for x in index)
