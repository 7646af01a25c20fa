"""Canonical text of expressions, and its parser. Python's own expression syntax, so it reads as it means."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping

from attncc.ir.build import op
from attncc.ir.expr import OPS, Const, Expr, Index, Kind, Load, Op, Size, Var

_PRECEDENCE = {"or": 1, "and": 2, "lt": 4, "le": 4, "eq": 4, "ne": 4, "add": 5, "sub": 5}
_PRECEDENCE |= {"mul": 6, "div": 6, "floordiv": 6, "mod": 6}
_NOT, _NEG, _ATOM = 3, 7, 9


class ParseError(ValueError):
    """The text is not canonical IR; the message quotes the part that is not."""


def print_expr(root: Expr) -> str:
    """The canonical text of `root`, parenthesised only where precedence needs it."""
    return _print(root)[0]


def _constant(value: bool | int | float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return repr(value)


def _print(x: Expr) -> tuple[str, int]:
    match x:
        case Const(value):
            text = _constant(value)
            return text, _NEG if text.startswith("-") else _ATOM
        case Load(tensor, index):
            return f"{tensor}[{', '.join(_print(c)[0] for c in index) or '()'}]", _ATOM
        case Op("not", (a,)):
            return f"not {_wrap(a, _NOT)}", _NOT
        case Op("neg", (a,)):
            return f"-{_wrap(a, _ATOM)}", _NEG
        case Op(name, (a, b)) if name in _PRECEDENCE:
            level = _PRECEDENCE[name]
            loose = level if name not in ("lt", "le", "eq", "ne") else level + 1
            return f"{_wrap(a, loose)} {OPS[name].infix} {_wrap(b, level + 1)}", level
        case Op(name, args):
            return f"{name}({', '.join(_print(a)[0] for a in args)})", _ATOM
        case Index(name) | Size(name) | Var(name):
            return name, _ATOM
    raise TypeError(f"no text for {type(x).__name__}")


def _wrap(x: Expr, level: int) -> str:
    text, own = _print(x)
    return text if own >= level else f"({text})"


_BINARY: dict[type[ast.AST], str] = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.FloorDiv: "floordiv", ast.Mod: "mod",
    ast.Lt: "lt", ast.LtE: "le", ast.Eq: "eq", ast.NotEq: "ne", ast.And: "and", ast.Or: "or",
}  # fmt: skip

Names = Mapping[str, Expr]


def parse_expr(text: str, names: Names, tensors: Mapping[str, Kind]) -> Expr:
    """Inverse of `print_expr`. `names` gives the leaf each bare name stands for, `tensors` the kind of each load.

    Raises ParseError on anything that `print_expr` cannot have written."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ParseError(f"not an expression: {text!r}") from error
    return _Parser(names, tensors, text).parse(tree)


class _Parser:
    def __init__(self, names: Names, tensors: Mapping[str, Kind], text: str) -> None:
        self.names, self.tensors, self.text = names, tensors, text

    def parse(self, node: ast.AST) -> Expr:
        rule = self._RULES.get(type(node))
        if rule is None:
            raise ParseError(f"unexpected {type(node).__name__} in {self.text!r}")
        return rule(self, node)

    def _name(self, node: ast.Name) -> Expr:
        if node.id in ("inf", "nan"):
            return Const(float(node.id))
        if node.id not in self.names:
            raise ParseError(f"undeclared name {node.id!r} in {self.text!r}")
        return self.names[node.id]

    def _constant(self, node: ast.Constant) -> Expr:
        if not isinstance(node.value, bool | int | float):
            raise ParseError(f"constant {node.value!r} in {self.text!r}")
        return Const(node.value)

    def _unary(self, node: ast.UnaryOp) -> Expr:
        operand = self.parse(node.operand)
        if isinstance(node.op, ast.USub):
            return Const(-operand.value) if isinstance(operand, Const) else op("neg", operand)
        if isinstance(node.op, ast.Not):
            return op("not", operand)
        raise ParseError(f"unary operator in {self.text!r}")

    def _binary(self, node: ast.BinOp) -> Expr:
        return op(_BINARY[type(node.op)], self.parse(node.left), self.parse(node.right))

    def _compare(self, node: ast.Compare) -> Expr:
        if len(node.ops) != 1:
            raise ParseError(f"chained comparison in {self.text!r}")
        return op(_BINARY[type(node.ops[0])], self.parse(node.left), self.parse(node.comparators[0]))

    def _bool(self, node: ast.BoolOp) -> Expr:
        first, *rest = (self.parse(v) for v in node.values)
        for value in rest:
            first = op(_BINARY[type(node.op)], first, value)
        return first

    def _call(self, node: ast.Call) -> Expr:
        if not isinstance(node.func, ast.Name) or node.func.id not in OPS:
            raise ParseError(f"unknown function in {self.text!r}")
        return op(node.func.id, *(self.parse(a) for a in node.args))

    def _load(self, node: ast.Subscript) -> Expr:
        if not isinstance(node.value, ast.Name) or node.value.id not in self.tensors:
            raise ParseError(f"load from an undeclared tensor in {self.text!r}")
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return Load(node.value.id, tuple(self.parse(p) for p in parts), self.tensors[node.value.id])

    _RULES: dict[type[ast.AST], Callable[..., Expr]] = {
        ast.Name: _name, ast.Constant: _constant, ast.UnaryOp: _unary, ast.BinOp: _binary, ast.Compare: _compare,
        ast.BoolOp: _bool, ast.Call: _call, ast.Subscript: _load,
    }  # fmt: skip
