"""The IR: nodes and programs as values. Knows nothing of what is above it."""

from attncc.ir.attention import Access, Attention, Axis, S, Tensor, W
from attncc.ir.attention_text import parse_attention, print_attention
from attncc.ir.bounds import Bounds, Interval
from attncc.ir.boxes import Boxes
from attncc.ir.correct import Correct
from attncc.ir.expr import Const, Expr, Index, Kind, KindError, Load, Op, Size, Var
from attncc.ir.interpret import interpret
from attncc.ir.interpret_linear import interpret_linear
from attncc.ir.layout import Layout
from attncc.ir.linear import Linear, parse_linear, print_linear
from attncc.ir.merge import Merge
from attncc.ir.node import Node, kind_of
from attncc.ir.program import Program, Step, interpret_program, verify_program
from attncc.ir.program_text import parse_program, print_program
from attncc.ir.rearrange import Rearrange
from attncc.ir.reduce import Reduce
from attncc.ir.scores import Scores
from attncc.ir.select import Select
from attncc.ir.table import Table
from attncc.ir.text import ParseError, parse_expr, print_expr
from attncc.ir.verify import VerifyError, verify
from attncc.ir.verify_linear import verify_linear

__all__ = [
    "Access", "Attention", "Axis", "Bounds", "Boxes", "Const", "Correct", "Expr", "Index", "Interval", "Kind",
    "KindError", "Layout", "Linear", "Load", "Merge", "Node", "Op", "ParseError", "Program", "Rearrange", "Reduce", "S",
    "Scores", "Select", "Size", "Step", "Table", "Tensor", "Var", "VerifyError", "W", "interpret", "interpret_linear",
    "interpret_program", "kind_of", "parse_attention", "parse_expr", "parse_linear", "parse_program", "print_attention",
    "print_expr", "print_linear", "print_program", "verify", "verify_linear", "verify_program",
]  # fmt: skip
