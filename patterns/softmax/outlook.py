"""Outlook attention (Yuan et al., 2021, arXiv 2106.13112): logits from a layer, values from windows of a token map.

There are no queries and keys; the score is a load. The same shapes appear where a layer weighs experts or branches, so
the values must be windows: read through an `unfold`, where the key says which neighbour of the token it is.
"""

from __future__ import annotations

import torch
from torch import fx

from attncc.ir.build import ONE, ZERO
from attncc.ir.expr import Expr, Index, loads, substitute
from attncc.patterns.site import DOT, ELEMENTS, VIEW_OPS, Facts, Frame, Product
from attncc.patterns.softmax.anchors import Term

aten = torch.ops.aten
_WINDOWS = (aten.unfold.default, aten.im2col.default)
_STEPS = 16


def windowed_product(frame: Frame, term: Term, score: Expr) -> Product | None:
    """A product of one number each, which the score does not mention: what an attention has in place of q and k."""
    f, n = frame.facts, term.anchor.scores
    if not _is_window(f, frame.values) or any(x.tensor.startswith(DOT) for x in loads(score)):
        return None
    rows = sorted((x for x in frame.rows if isinstance(x, Index)), key=lambda x: x.name)
    row = rows[-1] if rows else None
    q_at = tuple(substitute(x, {frame.c: ZERO}) for x in term.at)
    k_at = term.at if row is None else tuple(substitute(x, {row: ZERO}) for x in term.at)
    held = next(iter(loads(score)), None)
    return None if held is None else Product(held, n, n, q_at, n, k_at, row, (Index("d"), ONE), held)


def _is_window(f: Facts, n: fx.Node) -> bool:
    """Whether a tensor is windows of another one, moved or changed element by element."""
    for _ in range(_STEPS):
        if n.target in _WINDOWS:
            return True
        if n.op != "call_function" or not (n.target in VIEW_OPS or n.target in ELEMENTS):
            return False
        inputs = [a for a in n.all_input_nodes if f.is_tensor(a)]
        if len(inputs) != 1:
            return False
        n = inputs[0]
    return False
