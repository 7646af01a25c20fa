"""What the texts of all nodes share: lines of a word and a value, declared sizes, axes and tensors, expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import count
from typing import Any

from attncc.ir.attention import DTYPES, Access, Axis, Tensor
from attncc.ir.expr import Const, Expr, Index, Kind, Load, Op, Size, Var, walk
from attncc.ir.text import ParseError, parse_expr, print_expr

_SHARED_SIZE = 6  # a subexpression used twice gets a name from this many nodes on


def axes_text(axes: Iterable[Axis]) -> str:
    return ", ".join(f"{x.name} = {print_expr(x.extent)}" for x in axes)


def declared_lines(sizes: tuple[Size, ...], batch: tuple[Axis, ...], axes: tuple[Axis, ...]) -> list[str]:
    """The lines of sizes and axes, those that are empty left out."""
    lines = [f"size   {', '.join(s.name for s in sizes)}"] if sizes else []
    lines += [f"batch  {axes_text(batch)}"] if batch else []
    return [*lines, f"axis   {axes_text(axes)}"] if axes else lines


def tensor_text(t: Tensor) -> str:
    return f"{t.name}: {t.dtype}[{', '.join(map(print_expr, t.shape))}]"


def tensor_lines(tensors: Iterable[Tensor]) -> list[str]:
    return [f"tensor {tensor_text(t)}" for t in tensors]


def shared(roots: tuple[Expr, ...]) -> list[Expr]:
    """Operations that would be printed more than once and are worth a name, children first."""
    uses: dict[Expr, int] = {}
    weight: dict[Expr, int] = {}
    nodes = list(walk(*roots))
    for root in roots:
        uses[root] = uses.get(root, 0) + 1
    for node in nodes:
        weight[node] = 1 + sum(weight[c] for c in node.children)
        for child in node.children:
            uses[child] = uses.get(child, 0) + 1
    return [n for n in nodes if isinstance(n, Op | Load) and uses[n] > 1 and weight[n] >= _SHARED_SIZE]


class Writer:
    """Writes the expressions of one node, those that recur by a name. `taken` are the names that the node declares."""

    def __init__(self, taken: Iterable[str], expressions: Iterable[Expr]) -> None:
        used = set(taken)
        fresh = (name for n in count() if (name := f"t{n}") not in used)
        self.lets: list[str] = []
        self._names: dict[Expr, str] = {}
        for x, name in zip(shared(tuple(expressions)), fresh, strict=False):
            self.lets.append(f"let    {name} = {self.show(x)}")
            self._names[x] = name

    def show(self, x: Expr) -> str:
        return print_expr(x, self._names)

    def access(self, x: Access) -> str:
        return f"{x.tensor}[{', '.join(map(self.show, x.index))}]"


_TENSOR = re.compile(r"(\w+): (\w+)\[(.*)\]$")
_ACCESS = re.compile(r"(\w+)\[(.*)\]$")


class Lines:
    """The text of one node, taken apart. `title` is its first line, `variables` what its expressions may name, `axes`
    the letters that its line of axes has a name for each of, where that is fixed.

    Raises ParseError on anything that is not canonical."""

    def __init__(self, text: str, title: str, variables: tuple[Var, ...] = (), axes: str = "") -> None:
        head, *lines = [line for line in text.splitlines() if line.strip()] or [""]
        if head.strip() != title:
            raise ParseError(f"the text starts with the line {title!r}, not {head!r}")
        self.names: dict[str, Expr] = {x.name: x for x in variables}
        self.kinds: dict[str, Kind] = {}
        self.tensors: list[Tensor] = []
        self.sizes: tuple[Size, ...] = ()
        self.axes: dict[str, tuple[Axis, ...]] = {"batch": ()}
        self.field: dict[str, str] = {}
        lets = self._declare(lines)
        for name, value in lets:
            self.names[name] = self.expr(value)
        if axes and len(self.axes.get("axis", ())) != len(axes):
            raise ParseError(f"the line 'axis' names {', '.join(axes[:-1])} and {axes[-1]}")

    def _declare(self, lines: list[str]) -> list[tuple[str, str]]:
        lets: list[tuple[str, str]] = []
        seen: set[str] = set()
        for line in lines:
            word, _, rest = line.partition(" ")
            rest = rest.strip()
            if word in seen:
                raise ParseError(f"the line {word!r} appears twice")
            if word not in ("tensor", "let"):
                seen.add(word)
            if word == "size":
                self.sizes = tuple(Size(n) for n in split(rest))
                self.names |= {s.name: s for s in self.sizes}
            elif word in ("batch", "axis"):
                self.axes[word] = tuple(self._axis(part) for part in split(rest))
                self.names |= {x.name: x.index for x in self.axes[word]}
            elif word == "tensor":
                self._tensor(rest)
            elif word == "let":
                name, _, value = rest.partition(" = ")
                lets.append((name, value))
            else:
                self.field[word] = rest
        return lets

    def expr(self, text: str) -> Expr:
        return parse_expr(text, self.names, self.kinds)

    def take(self, word: str) -> str:
        if word not in self.field:
            raise ParseError(f"no line {word!r}")
        return self.field.pop(word)

    def maybe(self, word: str) -> Expr | None:
        return self.expr(self.field.pop(word)) if word in self.field else None

    def each_of(self, word: str, allowed: tuple[str, ...]) -> list[Any]:
        values = split(self.take(word))
        for value in values:
            if value not in allowed:
                raise ParseError(f"{word} is one of {', '.join(allowed)}, not {value!r}")
        return values

    def one_of(self, word: str, allowed: tuple[str, ...]) -> Any:
        values = self.each_of(word, allowed)
        if len(values) != 1:
            raise ParseError(f"the line {word!r} has one word")
        return values[0]

    def access(self, word: str) -> Access:
        text = self.take(word)
        found = _ACCESS.match(text)
        if not found or found[1] not in self.kinds:
            raise ParseError(f"{word} is `tensor[index]`, not {text!r}")
        return Access(found[1], tuple(self.expr(p) for p in split(found[2])))

    def words(self, word: str) -> tuple[str, ...]:
        """The comma-separated words of a line that may be missing."""
        return tuple(split(self.field.pop(word, "")))

    def finish(self) -> None:
        if self.field:
            raise ParseError(f"unknown line {next(iter(self.field))!r}")

    def _axis(self, part: str) -> Axis:
        name, _, extent = part.partition(" = ")
        value = self.expr(extent)
        if not isinstance(value, Const | Size) or not name.isidentifier():
            raise ParseError(f"an axis is `name = extent`, not {part!r}")
        self.names[name] = Index(name)
        return Axis(name, value)

    def _tensor(self, text: str) -> None:
        tensor = parse_tensor(text, self.names)
        self.tensors.append(tensor)
        self.kinds[tensor.name] = tensor.kind


def parse_tensor(text: str, names: dict[str, Expr]) -> Tensor:
    """Inverse of a line of `tensor_lines`, without its first word. `names` are the sizes its shape may mention."""
    found = _TENSOR.match(text)
    if not found or found[2] not in DTYPES:
        raise ParseError(f"a tensor is `name: dtype[shape]`, not {text!r}")
    return Tensor(found[1], found[2], tuple(parse_expr(p, names, {}) for p in split(found[3])))


def split(text: str) -> list[str]:
    """Split at the commas that are outside all brackets."""
    parts, depth, start = list[str](), 0, 0
    for at, char in enumerate(text):
        depth += char in "([" or -(char in ")]")
        if char == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    tail = text[start:].strip()
    return [*parts, tail] if tail else parts
