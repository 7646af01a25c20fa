"""Expressions: the terms, and how to walk and rewrite them."""

from attncc.ir.rewrite import rewrite, substitute
from attncc.ir.terms import (
    OPS,
    ROUNDINGS,
    Const,
    Expr,
    Index,
    Kind,
    KindError,
    Load,
    Op,
    OpRule,
    Scalar,
    Size,
    Var,
    free,
    loads,
    mentions,
    walk,
)

__all__ = [
    "OPS", "ROUNDINGS", "Const", "Expr", "Index", "Kind", "KindError", "Load", "Op", "OpRule", "Scalar", "Size", "Var",
    "free", "loads", "mentions", "rewrite", "substitute", "walk",
]  # fmt: skip
