"""Canonical text of a program, and its parser: `parse_program(print_program(p)) == p`."""

from __future__ import annotations

import re

from attncc.ir.attention import Tensor
from attncc.ir.expr import Expr, Size
from attncc.ir.lines import parse_tensor, split, tensor_text
from attncc.ir.node import kind_called, kind_of
from attncc.ir.program import Program, Step
from attncc.ir.text import ParseError, parse_expr, print_expr

_STEP = re.compile(r"(?P<results>[\w, ]+) = (?P<title>\w+)\((?P<tensors>[^;()]*)(; (?P<sizes>.*))?\)$")
_INDENT = "  "


def print_program(p: Program) -> str:
    """The canonical text of `p`: what `attncc inspect --ir` shows and `attncc opt` reads."""
    lines = ["program"]
    lines += [f"size   {', '.join(s.name for s in p.sizes)}"] if p.sizes else []
    lines += [f"input  {tensor_text(t)}" for t in p.inputs]
    for step in p.steps:
        kind = kind_of(step.node)
        call = ", ".join(f"{t.name} = {x}" for t, x in zip(step.node.tensors, step.arguments, strict=True))
        sizes = ", ".join(f"{s.name} = {print_expr(x)}" for s, x in zip(step.node.sizes, step.sizes, strict=True))
        lines.append(f"step   {', '.join(step.results)} = {kind.title}({call}{f'; {sizes}' if sizes else ''})")
        lines += [f"{_INDENT}{line}" for line in kind.print(step.node).splitlines()[1:]]
    return "\n".join([*lines, f"give   {', '.join(p.outputs)}"]) + "\n"


def parse_program(text: str) -> Program:
    """The program that `text` describes. Raises ParseError, naming the line, on anything that is not canonical."""
    lines = [(at, line) for at, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines or lines[0][1].strip() != "program":
        raise ParseError(f"the text starts with the line 'program', not {lines[0][1] if lines else ''!r}")
    sizes: tuple[Size, ...] = ()
    inputs, steps, outputs = list[Tensor](), list[Step](), tuple[str, ...]()
    at = 1
    while at < len(lines):
        number, line = lines[at]
        body: list[str] = []
        at += 1
        while at < len(lines) and lines[at][1].startswith(_INDENT):
            body.append(lines[at][1].removeprefix(_INDENT))
            at += 1
        word, _, rest = line.partition(" ")
        names: dict[str, Expr] = {s.name: s for s in sizes}
        try:
            if word == "step":
                steps.append(_step(rest.strip(), body, names))
            elif body:
                raise ParseError(f"only a step has lines of its own, not {word!r}")
            elif word == "size":
                sizes = tuple(Size(n) for n in split(rest))
            elif word == "input":
                inputs.append(parse_tensor(rest.strip(), names))
            elif word == "give" and not outputs:
                outputs = tuple(split(rest))
            else:
                raise ParseError(f"unknown line {word!r}")
        except ParseError as error:
            raise ParseError(f"line {number}: {error}") from error
    return Program(sizes, tuple(inputs), tuple(steps), outputs)


def _step(text: str, body: list[str], names: dict[str, Expr]) -> Step:
    found = _STEP.match(text)
    kind = kind_called(found["title"]) if found else None
    if found is None or kind is None:
        raise ParseError(f"a step is `results = kind(tensor = value; size = expression)`, not {text!r}")
    node = kind.parse("\n".join([kind.title, *body]) + "\n")
    tensors = _pairs(found["tensors"], [t.name for t in node.tensors], "tensor")
    sizes = _pairs(found["sizes"] or "", [s.name for s in node.sizes], "size")
    return Step(
        tuple(split(found["results"])), node, tuple(tensors), tuple(parse_expr(x, names, {}) for x in sizes)
    )  # fmt: skip


def _pairs(text: str, wanted: list[str], what: str) -> list[str]:
    """The right sides of `name = value, ...`, whose left sides are the names wanted, in order."""
    pairs = [part.partition(" = ") for part in split(text)]
    if [name for name, _, _ in pairs] != wanted:
        raise ParseError(f"the step's node declares the {what}s {', '.join(wanted) or 'none'}, the call has {text!r}")
    return [value for _, _, value in pairs]
