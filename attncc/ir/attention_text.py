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

from attncc.ir.attention import DTYPES, EMPTIES, NORMALIZERS, OUTPUTS, Attention, S, W
from attncc.ir.lines import Lines, Writer, declared_lines, tensor_lines
from attncc.ir.text import ParseError


def print_attention(a: Attention) -> str:
    """The canonical text of `a`: what caches are keyed by and what `attncc inspect --ir` shows."""
    writer = Writer((x.name for x in (*a.axes, *a.sizes, *a.tensors)), a.expressions())
    show = writer.show
    lines = ["attention", *declared_lines(a.sizes, a.batch, (a.i, a.j, a.d, a.e)), *tensor_lines(a.tensors)]
    lines += [f"{n}      {writer.access(x)}" for n, x in (("q", a.q), ("k", a.k), ("v", a.v))]
    lines += writer.lets
    lines += [f"score  {show(a.score)}", f"mask   {show(a.mask)}", f"norm   {a.normalizer}", f"empty  {a.empty}"]
    if a.slope:
        lines.append(f"slope  {a.slope}")
    if a.sink is not None:
        lines.append(f"sink   {show(a.sink)}")
    if a.drop is not None:
        lines.append(f"drop   {show(a.drop)}")
    lines += [f"weight {show(a.weight)}", f"give   {', '.join(a.outputs)}", f"dtype  {a.dtype}"]
    if a.layout:
        lines.append(f"layout {', '.join(a.layout)}")
    return "\n".join(lines) + "\n"


def parse_attention(text: str) -> Attention:
    """The attention that `text` describes. Raises ParseError on anything that is not canonical."""
    lines = Lines(text, "attention", (S, W), axes="ijde")
    i, j, d, e = lines.axes["axis"]
    result = Attention(
        sizes=lines.sizes, batch=lines.axes["batch"], i=i, j=j, d=d, e=e, tensors=tuple(lines.tensors),
        q=lines.access("q"), k=lines.access("k"), v=lines.access("v"),
        score=lines.expr(lines.take("score")), mask=lines.expr(lines.take("mask")),
        normalizer=lines.one_of("norm", NORMALIZERS), empty=lines.one_of("empty", EMPTIES),
        sink=lines.maybe("sink"), drop=lines.maybe("drop"), weight=lines.expr(lines.take("weight")),
        outputs=tuple(lines.each_of("give", OUTPUTS)), dtype=lines.one_of("dtype", tuple(DTYPES)),
        layout=lines.words("layout"), slope=_number(lines.field.pop("slope", "0.0")),
    )  # fmt: skip
    lines.finish()
    return result


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ParseError(f"not a number: {text!r}") from error
