"""The gradient of an attention from its expressions: score and weight differentiated, each load with what its gradient
is summed along."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from attncc.ir import Attention, Const, Expr, Load, S, W
from attncc.ir.analysis import linear_factor
from attncc.ir.attention_grad import AttentionGrad, LoadGrad, Over
from attncc.ir.build import ONE, const
from attncc.ir.distance import ByDistance
from attncc.ir.expr import free, loads, mentions
from attncc.ir.gradients import followed, plain
from attncc.passes.gradient.derivative import NotDifferentiable, derivative

#: Pairs of a row and a key of a batch point that are few: as many numbers as 128 rows of 128 channels.
MOST_PAIRS = 1 << 14


def gradient_of(a: Attention, wanted: Collection[str]) -> AttentionGrad | str:
    """The gradient of `a` for the `wanted` ones of its tensors, or why it is not known in this form.

    Gradients of what a sink reads are no part of it: they are those of one number a row."""
    if a.normalizer != "softmax":
        return f"the gradient of weights by {a.normalizer}"
    if "weights" in a.outputs:
        return "the gradient of the weights themselves"
    factor = linear_factor(a.weight, W)
    if factor is None or S in free(factor):
        return f"the gradient of the weight {a.weight!r}, which is not linear in w"
    learned = [x for x in loads(a.weight) if x.tensor in wanted and x in followed(a.weight)]
    if learned:
        return f"the gradient of {learned[0].tensor}, which the weight reads"
    operands = tuple(n for n, x in (("q", a.q), ("k", a.k), ("v", a.v)) if x.tensor in wanted)
    try:
        by_score = derivative(a.score, S)
        found: list[LoadGrad] = []
        for x in loads(a.score):
            slope = derivative(a.score, x) if x.tensor in wanted else None
            if slope is None:
                continue
            over = _over(a, x)
            if over is None:
                return f"the gradient of {x!r}, which rows and keys share in no simple way"
            found.append(LoadGrad(x, plain(slope), over))
    except NotDifferentiable as error:
        return str(error)
    zero: Expr = const(0.0)
    values = replace(a, score=plain(a.score), mask=plain(a.mask), weight=plain(a.weight))
    return AttentionGrad(values, operands, zero if by_score is None else plain(by_score), plain(factor), tuple(found))


def _over(a: Attention, x: Load) -> Over | None:
    """What the gradient of a load is kept apart by."""
    row, key = (any(mentions(n, axis.index) for n in x.index) for axis in (a.i, a.j))
    if not row and not key:
        return ""
    if not (row and key):
        return "i" if row else "j"
    by_distance = ByDistance(a.i.index, a.j.index)
    if all(by_distance(n) for n in x.index):
        return "j - i"
    return "i, j" if _by_pair(a, x) else None


def _by_pair(a: Attention, x: Load) -> bool:
    """Whether a number for each pair of row and key is no more than what is there anyway: the tensor has all pairs of
    every batch point itself, or the pairs are few, as in windows."""
    i, j = a.i.extent, a.j.extent
    if isinstance(i, Const) and isinstance(j, Const) and int(i.value) * int(j.value) <= MOST_PAIRS:
        return True
    own = [axis.index for axis in (*a.batch, a.i, a.j) if axis.extent is not ONE]
    return all(n in x.index for n in own)
