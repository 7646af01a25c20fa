"""Rewriting expressions: rebuild bottom-up, folding on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from attncc.ir.build import op
from attncc.ir.terms import Expr, Load, Op, walk


def rewrite(root: Expr, rule: Callable[[Expr], Expr | None]) -> Expr:
    """Rebuild bottom-up: `rule` sees each node with its children rewritten and returns its replacement, or None."""
    done: dict[Expr, Expr] = {}
    for node in walk(root):
        new: Expr = node
        if isinstance(node, Load):
            new = Load(node.tensor, tuple(done[c] for c in node.index), node.kind)
        elif isinstance(node, Op):
            args = tuple(done[a] for a in node.args)
            new = node if args == node.args else op(node.name, *args)
        replaced = rule(new)
        done[node] = new if replaced is None else replaced
    return done[root]


def substitute(root: Expr, table: Mapping[Expr, Expr]) -> Expr:
    """Replace leaves or whole subexpressions of `root` by the table's values."""
    return rewrite(root, table.get)
