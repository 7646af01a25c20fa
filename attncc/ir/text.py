"""Text of expressions and its parser. Python's own expression syntax, so it reads as it means."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import ClassVar

from attncc.ir.build import op
from attncc.ir.terms import OPS, Const, Expr, Kind, KindError, Load


class ParseError(ValueError):
    """The text is not canonical IR; the message quotes the part that is not."""


def print_expr(root: Expr, names: Mapping[Expr, str] | None = None) -> str:
    """The canonical text of `root`, parenthesised only where precedence needs it. A subexpression that is in `names` is
    written as its name."""
    return root.text(names or {})[0]


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
    except (SyntaxError, ValueError) as error:  # ValueError: a null character
        raise ParseError(f"not an expression: {text!r}") from error
    try:
        return _Parser(names, tensors, text).parse(tree)
    except KindError as error:
        raise ParseError(f"{error} in {text!r}") from error


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
            return op("neg", operand)
        if isinstance(node.op, ast.Not):
            return op("not", operand)
        raise ParseError(f"unary operator in {self.text!r}")

    def _binary(self, node: ast.BinOp) -> Expr:
        return op(self._operator(node.op), self.parse(node.left), self.parse(node.right))

    def _operator(self, node: ast.AST) -> str:
        if type(node) not in _BINARY:
            raise ParseError(f"operator {type(node).__name__} in {self.text!r}")
        return _BINARY[type(node)]

    def _compare(self, node: ast.Compare) -> Expr:
        if len(node.ops) != 1:
            raise ParseError(f"chained comparison in {self.text!r}")
        return op(self._operator(node.ops[0]), self.parse(node.left), self.parse(node.comparators[0]))

    def _bool(self, node: ast.BoolOp) -> Expr:
        first, *rest = (self.parse(v) for v in node.values)
        for value in rest:
            first = op(self._operator(node.op), first, value)
        return first

    def _call(self, node: ast.Call) -> Expr:
        if not isinstance(node.func, ast.Name) or node.func.id not in OPS or node.keywords:
            raise ParseError(f"unknown function in {self.text!r}")
        return op(node.func.id, *(self.parse(a) for a in node.args))

    def _load(self, node: ast.Subscript) -> Expr:
        if not isinstance(node.value, ast.Name) or node.value.id not in self.tensors:
            raise ParseError(f"load from an undeclared tensor in {self.text!r}")
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return Load(node.value.id, tuple(self.parse(p) for p in parts), self.tensors[node.value.id])

    _RULES: ClassVar[dict[type[ast.AST], Callable[..., Expr]]] = {
        ast.Name: _name, ast.Constant: _constant, ast.UnaryOp: _unary, ast.BinOp: _binary, ast.Compare: _compare,
        ast.BoolOp: _bool, ast.Call: _call, ast.Subscript: _load,
    }  # fmt: skip
