"""Random well-formed attentions with tensors to run them on, for property tests of passes and emitters.

    @given(programs(simple=True))
    def test_something(program): ...
        want = interpret(program.attention, program.tensors, program.sizes, compute=torch.float64)

Every program verifies, every load is in range, and no score is infinite or NaN at a visible key, so outputs are finite
except where `empty` says NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from attncc.ir import Access, Attention, Axis, Const, Expr, Index, S, Size, W
from attncc.ir.attention import NORMALIZERS, Output
from attncc.ir.build import add, and_, const, floordiv, mul, or_, sub
from random_ir.masks import mask_terms
from random_ir.scores import SCORES, WEIGHTS, filled, sinks
from random_ir.shop import Dim, Shop, const_dim, minus, plus, times

FLOATS = ("f32", "bf16", "f16", "f64")


class Program(NamedTuple):
    attention: Attention
    tensors: dict[str, torch.Tensor]
    sizes: list[int]


def programs(
    *,
    simple: bool = False,
    dtypes: Sequence[str] = FLOATS,
    normalizers: Sequence[str] = NORMALIZERS,
    outputs: Sequence[Output] = ("out", "lse", "weights"),
    longest: int = 40,
    largest_head: int = 24,
) -> st.SearchStrategy[Program]:
    """Random programs. `simple` keeps operand indices affine with constant coefficients, which is what emitters are
    promised; otherwise they also floor-divide. Outputs beyond "out" are drawn from `outputs`."""
    return _programs(simple, tuple(dtypes), tuple(normalizers), tuple(outputs), longest, largest_head)


#: Names of the batch axes, with the largest extent of each. hk and g split grouped heads; t counts windows.
_BATCHES = ((), (("h", 3),), (("b", 3), ("h", 4)), (("b", 2), ("hk", 3), ("g", 3)), (("b", 2), ("t", 3), ("h", 2)))


@st.composite
def _programs(
    draw: st.DrawFn,
    simple: bool,
    dtypes: tuple[str, ...],
    normalizers: tuple[str, ...],
    outputs: tuple[Output, ...],
    longest: int,
    largest_head: int,
) -> Program:
    shop = Shop(draw)
    extents: dict[str, Dim] = {}
    for name, largest in shop.pick(*_BATCHES):
        extents[name] = const_dim(shop.integer(1, largest))
    batch = tuple(extents)
    extents["i"] = shop.length("N", longest)
    extents["j"] = extents["i"] if shop.pick(True, False) else shop.length("M", longest)
    extents["d"] = const_dim(shop.integer(1, largest_head))
    extents["e"] = extents["d"] if shop.pick(True, False) else const_dim(shop.integer(1, largest_head))
    shop.extents = extents

    operand_dtype = shop.pick(*dtypes)
    q = _operand(shop, "q", operand_dtype, batch, "i", "d", simple)
    k = _operand(shop, "k", operand_dtype, batch, "j", "d", simple)
    v = _operand(shop, "v", operand_dtype, batch, "j", "e", simple)

    score: Expr = mul(S, const(shop.pick(1.0, 0.125, extents["d"].value**-0.5)))
    for term in shop.some(SCORES, 3):
        score = term(shop, score)
    mask = _mask(shop)
    score = filled(shop, score)
    softmax = "softmax" in normalizers and shop.pick(True, True, False)
    normalizer = "softmax" if softmax else shop.pick(*normalizers)
    sink = sinks(shop) if normalizer == "softmax" else None
    weight: Expr = W
    for term in shop.some(WEIGHTS, 2):
        weight = term(shop, weight)
    empty = "zero"
    if normalizer == "softmax":
        empty = shop.pick("zero", "mean", "nan") if sink is None else shop.pick("zero", "nan")
    wanted = [o for o in outputs if o == "out" or shop.pick(False, True)]
    if normalizer != "softmax":
        wanted = [o for o in wanted if o != "lse"]
    layout = shop.order((*batch, "i", "e")) if shop.pick(False, True) else ()

    def axis(name: str) -> Axis:
        x = extents[name].expr
        assert isinstance(x, Const | Size)
        return Axis(name, x)

    attention = Attention(
        sizes=tuple(shop.sizes), batch=tuple(axis(n) for n in batch), i=axis("i"), j=axis("j"), d=axis("d"),
        e=axis("e"), tensors=tuple(shop.declared), q=q, k=k, v=v, score=score, mask=mask, normalizer=normalizer,
        empty=empty, sink=sink, weight=weight, outputs=tuple(wanted) or ("out",),
        dtype=shop.pick(operand_dtype, *dtypes), layout=layout,
    )  # fmt: skip
    return Program(attention, shop.tensors, list(shop.sizes.values()))


def _mask(shop: Shop) -> Expr:
    """Nothing, one term, or two joined by `and` or `or`."""
    terms = mask_terms(shop)
    if not terms:
        return const(True)
    return and_(*terms) if shop.pick(True, False) else or_(*terms)


def _operand(shop: Shop, name: str, dtype: str, batch: tuple[str, ...], row: str, col: str, simple: bool) -> Access:
    """A tensor for q, k or v and how it is indexed: which batch axes it has, how they are merged, in which order."""
    dims: list[tuple[Expr, Dim]] = []  # index and extent of each dimension of the tensor
    for axis in batch:
        if name != "q" and axis == "g":
            continue  # keys are shared by the heads of a group
        if axis in ("b", "h") and shop.pick(False, False, False, True):
            continue  # and some operands by everyone
        dims.append((Index(axis), shop.extents[axis]))
    rows, cols = (Index(row), shop.extents[row]), (Index(col), shop.extents[col])
    dims = _grouped(shop, name, dims, simple)
    dims, rows = _windowed(shop, dims, rows)
    if shop.pick(False, False, False, True):  # backwards, as torch.flip leaves it
        rows = (sub(minus(rows[1], const_dim(1)).expr, rows[0]), rows[1])
    if dims and shop.pick(False, True):  # heads and channels in one dimension, as a linear layer leaves them
        (head, heads), dims = dims[-1], dims[:-1]
        cols = (add(mul(head, cols[1].expr), cols[0]), times(heads, cols[1]))
    if shop.pick(False, True):  # a slice of something longer
        cols = (add(cols[0], const(3)), plus(cols[1], const_dim(5)))
    every = shop.order((*dims, rows, cols))
    shop.floats(name, dtype, [extent for _, extent in every])
    return Access(name, tuple(index for index, _ in every))


def _grouped(shop: Shop, name: str, dims: list[tuple[Expr, Dim]], simple: bool) -> list[tuple[Expr, Dim]]:
    """Heads of q as one dimension hk * G + g; heads of k and v as h // c."""
    indices = [index for index, _ in dims]
    hk, g, h = Index("hk"), Index("g"), Index("h")
    if name == "q" and hk in indices and g in indices and shop.pick(True, False):
        groups = shop.extents["g"]
        merged = (add(mul(hk, groups.expr), g), times(shop.extents["hk"], groups))
        return [merged if index is hk else (index, extent) for index, extent in dims if index is not g]
    if name != "q" and not simple and h in indices and shop.pick(False, True):
        heads = shop.extents["h"].value
        shared = (floordiv(h, const(2)), const_dim((heads + 1) // 2))
        return [shared if index is h else (index, extent) for index, extent in dims]
    return dims


def _windowed(
    shop: Shop, dims: list[tuple[Expr, Dim]], rows: tuple[Expr, Dim]
) -> tuple[list[tuple[Expr, Dim]], tuple[Expr, Dim]]:
    """Windows cut out of one sequence: row t * step + i, overlapping or not."""
    t = Index("t")
    if t not in [index for index, _ in dims] or not isinstance(rows[1].expr, Const) or shop.pick(False, True):
        return dims, rows
    step, windows = shop.pick(rows[1].value, 1, 2), shop.extents["t"].value
    row = (add(mul(t, const(step)), rows[0]), const_dim((windows - 1) * step + rows[1].value))
    return [x for x in dims if x[0] is not t], row
