"""Attentions over pieces of one softmax, put back together where the graph has their products.

Each product becomes `exp(lse_k - lse) * out_k`, with `lse = log sum_k exp(lse_k)` over all pieces. What the model does
with the products stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from attncc.driver.edit import EditError, Editor
from attncc.ir import Attention
from attncc.patterns.site.assemble import Lifted, Piece

aten = torch.ops.aten
Parts = Sequence[tuple[Lifted, Attention]]


def merge(editor: Editor, parts: Parts) -> None:
    """Replace the products of a softmax that is summed in pieces. Raises EditError."""
    targets = [editor.place(site.node) for site, _ in parts]
    last = max(targets, key=editor.position)
    _move_behind(editor, targets, last)
    call = editor.graph.call_function
    with editor.graph.inserting_before(last):
        outputs = [editor.call(site, a, last) for site, a in parts]
        sums = [_rows(editor, site, a, made, last) for (site, a), made in zip(parts, outputs, strict=True)]
        every = call(aten.stack.default, (sums,))
        whole = call(aten.logsumexp.default, (every, [0]))
        made = [
            editor.laid_out(editor.output(out, site, a, last, _factor(editor, site, rows, whole, last)), site.node)
            for (site, a), out, rows in zip(parts, outputs, sums, strict=True)
        ]
    for old, new in zip(targets, made, strict=True):
        editor.replace(old, new)


def _rows(editor: Editor, site: Lifted, a: Attention, outputs: fx.Node, before: fx.Node) -> fx.Node:
    """The sums of the rows of a piece in the layout of the softmax's rows, as one dimension."""
    assert site.piece is not None
    x = editor.graph.call_function(operator.getitem, (outputs, a.outputs.index("lse")))
    return editor.graph.call_function(aten.reshape.default, (editor.in_rows(x, site.piece.rows, before), [-1]))


def _factor(editor: Editor, site: Lifted, rows: fx.Node, whole: fx.Node, before: fx.Node) -> fx.Node:
    """What a piece's output counts for, over (*batch, i, 1)."""
    piece: Piece | None = site.piece
    assert piece is not None
    call = editor.graph.call_function
    x = call(aten.exp.default, (call(aten.sub.Tensor, (rows, whole)),))
    if piece.share is not None:
        empty = call(aten.eq.Scalar, (whole, float("-inf")))
        x = call(aten.where.ScalarOther, (call(aten.logical_not.default, (empty,)), x, piece.share))
    x = editor.out_of_rows(x, piece.rows, site, before)
    return call(aten.unsqueeze.default, (x, -1))


def _move_behind(editor: Editor, targets: Sequence[fx.Node], last: fx.Node) -> None:
    """Move what is computed from the products before the last of them behind it. Nothing may write in between, but to
    what moves itself: every view of that moves with it."""
    nodes = list(editor.graph.nodes)
    between = nodes[nodes.index(min(targets, key=editor.position)) : nodes.index(last)]
    moved: dict[fx.Node, None] = dict.fromkeys(n for n in targets if n is not last)
    for n in between:
        if n in editor.effects and not (n in editor.writes and n.args[0] in moved):
            raise EditError("the model writes to memory between the products of one softmax")
        if n not in moved and any(a in moved for a in n.all_input_nodes):
            moved[n] = None
    if any(a in moved for a in last.all_input_nodes):
        raise EditError("one product of a softmax is computed from another")
    at = last
    for n in moved:
        if n not in targets:
            at.append(n)
            at = n
