"""Canonical text of an attention, and its parser: `parse(print_attention(a)) == a`.

    attention
    size   B, N
    batch  b = B, h = 8
    axis   i = N, j = N, d = 64, e = 64
    tensor q: bf16[B, 8, N, 64]
    tensor k: bf16[B, 2, N, 64]
    tensor v: bf16[B, 2, N, 64]
    q      q[b, h, i, d]
    k      k[b, h // 4, j, d]
    v      v[b, h // 4, j, e]
    score  s * 0.125
    mask   j <= i
    norm   softmax
    empty  zero
    weight w
    give   out
    dtype  bf16
    layout b, i, h, e
"""

from __future__ import annotations

import re
from itertools import count
from typing import cast

from attncc.ir.attention import (
    DTYPES,
    EMPTIES,
    NORMALIZERS,
    OUTPUTS,
    Access,
    Attention,
    Axis,
    Empty,
    Normalizer,
    Output,
    S,
    Tensor,
    W,
)  # fmt: skip
from attncc.ir.expr import Const, Expr, Index, Kind, Load, Op, Size, walk
from attncc.ir.text import ParseError, parse_expr, print_expr

_SHARED_SIZE = 6  # a subexpression used twice gets a name from this many nodes on


def print_attention(a: Attention) -> str:
    """The canonical text of `a`: what caches are keyed by and what `attncc inspect --ir` shows."""
    taken = {x.name for x in (*a.axes, *a.sizes, *a.tensors)}
    fresh = (name for n in count() if (name := f"t{n}") not in taken)
    names: dict[Expr, str] = {}
    let_lines: list[str] = []
    for x, name in zip(_shared(a), fresh, strict=False):
        let_lines.append(f"let    {name} = {print_expr(x, names)}")
        names[x] = name

    def show(x: Expr) -> str:
        return print_expr(x, names)

    def access(x: Access) -> str:
        return f"{x.tensor}[{', '.join(map(show, x.index))}]"

    def axes(xs: tuple[Axis, ...]) -> str:
        return ", ".join(f"{x.name} = {print_expr(x.extent)}" for x in xs)

    lines = ["attention"]
    if a.sizes:
        lines.append(f"size   {', '.join(s.name for s in a.sizes)}")
    if a.batch:
        lines.append(f"batch  {axes(a.batch)}")
    lines.append(f"axis   {axes((a.i, a.j, a.d, a.e))}")
    lines += [f"tensor {t.name}: {t.dtype}[{', '.join(map(print_expr, t.shape))}]" for t in a.tensors]
    lines += [f"{n}      {access(x)}" for n, x in (("q", a.q), ("k", a.k), ("v", a.v))]
    lines += let_lines
    lines += [f"score  {show(a.score)}", f"mask   {show(a.mask)}", f"norm   {a.normalizer}", f"empty  {a.empty}"]
    if a.sink is not None:
        lines.append(f"sink   {show(a.sink)}")
    lines += [f"weight {show(a.weight)}", f"give   {', '.join(a.outputs)}", f"dtype  {a.dtype}"]
    if a.layout:
        lines.append(f"layout {', '.join(a.layout)}")
    return "\n".join(lines) + "\n"


def _shared(a: Attention) -> list[Expr]:
    """Operations that would be printed more than once and are worth a name, children first."""
    roots = tuple(a.expressions())
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


_TENSOR = re.compile(r"(\w+): (\w+)\[(.*)\]$")
_ACCESS = re.compile(r"(\w+)\[(.*)\]$")


def parse_attention(text: str) -> Attention:
    """The attention that `text` describes. Raises ParseError on anything that is not canonical."""
    return _Reader(text).read()


class _Reader:
    def __init__(self, text: str) -> None:
        head, *self.lines = [line for line in text.splitlines() if line.strip()] or [""]
        if head.strip() != "attention":
            raise ParseError(f"an attention starts with the line 'attention', not {head!r}")
        self.names: dict[str, Expr] = {"s": S, "w": W}
        self.kinds: dict[str, Kind] = {}
        self.tensors: list[Tensor] = []
        self.field: dict[str, str] = {}

    def read(self) -> Attention:
        sizes: tuple[Size, ...] = ()
        axes: dict[str, tuple[Axis, ...]] = {"batch": ()}
        lets: list[tuple[str, str]] = []
        seen: set[str] = set()
        for line in self.lines:
            word, _, rest = line.partition(" ")
            rest = rest.strip()
            if word in seen:
                raise ParseError(f"two lines say {word!r}")
            if word not in ("tensor", "let"):
                seen.add(word)
            if word == "size":
                sizes = tuple(Size(n) for n in _split(rest))
                self.names |= {s.name: s for s in sizes}
            elif word in ("batch", "axis"):
                axes[word] = tuple(self._axis(part) for part in _split(rest))
                self.names |= {x.name: x.index for x in axes[word]}
            elif word == "tensor":
                self._tensor(rest)
            elif word == "let":
                name, _, value = rest.partition(" = ")
                lets.append((name, value))
            else:
                self.field[word] = rest
        for name, value in lets:
            self.names[name] = self.expr(value)
        if len(axes.get("axis", ())) != 4:
            raise ParseError("the line 'axis' names i, j, d and e")
        i, j, d, e = axes["axis"]
        sink = self.field.pop("sink", None)
        result = Attention(
            sizes=sizes, batch=axes["batch"], i=i, j=j, d=d, e=e, tensors=tuple(self.tensors),
            q=self._access("q"), k=self._access("k"), v=self._access("v"),
            score=self.expr(self._take("score")), mask=self.expr(self._take("mask")),
            normalizer=cast(Normalizer, self._one_of("norm", NORMALIZERS)),
            empty=cast(Empty, self._one_of("empty", EMPTIES)),
            sink=None if sink is None else self.expr(sink), weight=self.expr(self._take("weight")),
            outputs=tuple(cast(Output, o) for o in self._each_of("give", OUTPUTS)),
            dtype=self._one_of("dtype", tuple(DTYPES)), layout=tuple(_split(self.field.pop("layout", ""))),
        )  # fmt: skip
        if self.field:
            raise ParseError(f"unknown line {next(iter(self.field))!r}")
        return result

    def expr(self, text: str) -> Expr:
        return parse_expr(text, self.names, self.kinds)

    def _take(self, word: str) -> str:
        if word not in self.field:
            raise ParseError(f"no line {word!r}")
        return self.field.pop(word)

    def _each_of(self, word: str, allowed: tuple[str, ...]) -> list[str]:
        values = _split(self._take(word))
        for value in values:
            if value not in allowed:
                raise ParseError(f"{word} is one of {', '.join(allowed)}, not {value!r}")
        return values

    def _one_of(self, word: str, allowed: tuple[str, ...]) -> str:
        values = self._each_of(word, allowed)
        if len(values) != 1:
            raise ParseError(f"the line {word!r} has one word")
        return values[0]

    def _axis(self, part: str) -> Axis:
        name, _, extent = part.partition(" = ")
        value = self.expr(extent)
        if not isinstance(value, Const | Size) or not name.isidentifier():
            raise ParseError(f"an axis is `name = extent`, not {part!r}")
        self.names[name] = Index(name)
        return Axis(name, value)

    def _tensor(self, text: str) -> None:
        found = _TENSOR.match(text)
        if not found or found[2] not in DTYPES:
            raise ParseError(f"a tensor is `name: dtype[shape]`, not {text!r}")
        tensor = Tensor(found[1], found[2], tuple(self.expr(p) for p in _split(found[3])))
        self.tensors.append(tensor)
        self.kinds[tensor.name] = tensor.kind

    def _access(self, word: str) -> Access:
        text = self._take(word)
        found = _ACCESS.match(text)
        if not found or found[1] not in self.kinds:
            raise ParseError(f"{word} is `tensor[index]`, not {text!r}")
        return Access(found[1], tuple(self.expr(p) for p in _split(found[2])))


def _split(text: str) -> list[str]:
    """Split at the commas that are outside all brackets."""
    parts, depth, start = list[str](), 0, 0
    for at, char in enumerate(text):
        depth += char in "([" or -(char in ")]")
        if char == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    tail = text[start:].strip()
    return [*parts, tail] if tail else parts


