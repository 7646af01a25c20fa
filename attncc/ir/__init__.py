"""The IR: attention as a value. Knows nothing of what is above it."""

from attncc.ir.attention import Access, Attention, Axis, S, Tensor, W
from attncc.ir.bounds import Bounds, Interval
from attncc.ir.expr import Const, Expr, Index, Kind, KindError, Load, Op, Size, Var
from attncc.ir.interpret import interpret
from attncc.ir.interpret_linear import interpret_linear
from attncc.ir.linear import Linear, parse_linear, print_linear
from attncc.ir.program import parse_attention, print_attention
from attncc.ir.text import ParseError, parse_expr, print_expr
from attncc.ir.verify import VerifyError, verify
from attncc.ir.verify_linear import verify_linear

__all__ = [
    "Access", "Attention", "Axis", "Bounds", "Const", "Expr", "Index", "Interval", "Kind", "KindError", "Linear",
    "Load", "Op", "ParseError", "S", "Size", "Tensor", "Var", "VerifyError", "W", "interpret", "interpret_linear",
    "parse_attention", "parse_expr", "parse_linear", "print_attention", "print_expr", "print_linear", "verify",
    "verify_linear",
]  # fmt: skip
