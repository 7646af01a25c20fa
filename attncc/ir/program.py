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

from itertools import count

from attncc.ir.attention import DTYPES, EMPTIES, NORMALIZERS, OUTPUTS, Access, Attention, S, W
from attncc.ir.expr import Expr
from attncc.ir.lines import Lines, declared_lines, shared, split, tensor_lines
from attncc.ir.text import print_expr


def print_attention(a: Attention) -> str:
    """The canonical text of `a`: what caches are keyed by and what `attncc inspect --ir` shows."""
    taken = {x.name for x in (*a.axes, *a.sizes, *a.tensors)}
    fresh = (name for n in count() if (name := f"t{n}") not in taken)
    names: dict[Expr, str] = {}
    let_lines: list[str] = []
    for x, name in zip(shared(tuple(a.expressions())), fresh, strict=False):
        let_lines.append(f"let    {name} = {print_expr(x, names)}")
        names[x] = name

    def show(x: Expr) -> str:
        return print_expr(x, names)

    def access(x: Access) -> str:
        return f"{x.tensor}[{', '.join(map(show, x.index))}]"

    lines = ["attention", *declared_lines(a.sizes, a.batch, (a.i, a.j, a.d, a.e)), *tensor_lines(a.tensors)]
    lines += [f"{n}      {access(x)}" for n, x in (("q", a.q), ("k", a.k), ("v", a.v))]
    lines += let_lines
    lines += [f"score  {show(a.score)}", f"mask   {show(a.mask)}", f"norm   {a.normalizer}", f"empty  {a.empty}"]
    if a.sink is not None:
        lines.append(f"sink   {show(a.sink)}")
    lines += [f"weight {show(a.weight)}", f"give   {', '.join(a.outputs)}", f"dtype  {a.dtype}"]
    if a.layout:
        lines.append(f"layout {', '.join(a.layout)}")
    return "\n".join(lines) + "\n"


def parse_attention(text: str) -> Attention:
    """The attention that `text` describes. Raises ParseError on anything that is not canonical."""
    lines = Lines(text, "attention", (S, W))
    i, j, d, e = lines.axes["axis"]
    result = Attention(
        sizes=lines.sizes, batch=lines.axes["batch"], i=i, j=j, d=d, e=e, tensors=tuple(lines.tensors),
        q=lines.access("q"), k=lines.access("k"), v=lines.access("v"),
        score=lines.expr(lines.take("score")), mask=lines.expr(lines.take("mask")),
        normalizer=lines.one_of("norm", NORMALIZERS), empty=lines.one_of("empty", EMPTIES),
        sink=lines.maybe("sink"), weight=lines.expr(lines.take("weight")),
        outputs=tuple(lines.each_of("give", OUTPUTS)), dtype=lines.one_of("dtype", tuple(DTYPES)),
        layout=tuple(split(lines.field.pop("layout", ""))),
    )  # fmt: skip
    lines.finish()
    return result
