"""The one node: an attention, from its operands to its outputs, as a frozen value.

    out[b.., i, e] = sum_j weight(w[b.., i, j]) * v[b.., j, e]
    w[b.., i, .]   = normalize_j( score(s; b.., i, j) where mask(b.., i, j) )
    s              = sum_d q[b.., i, d] * k[b.., j, d]

Operands are a source tensor and an access map, so grouped heads, broadcasts and layouts cost no copy and no node.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from attncc.ir.build import TRUE
from attncc.ir.expr import Const, Expr, Index, Kind, Size, Var, substitute

Normalizer = Literal["softmax", "sigmoid", "relu", "none"]
#: What a row without any visible key gives: zeros (boolean masks), the mean of V (finite additive masks, where eager
#: finds all scores equal), or NaN (masks of -inf under a plain softmax).
Empty = Literal["zero", "mean", "nan"]
Output = Literal["out", "lse", "weights"]

NORMALIZERS: tuple[str, ...] = get_args(Normalizer)
EMPTIES: tuple[str, ...] = get_args(Empty)
OUTPUTS: tuple[str, ...] = get_args(Output)

#: dtype name -> (kind of a load, bytes an element)
DTYPES: dict[str, tuple[Kind, int]] = {
    "f64": ("float", 8), "f32": ("float", 4), "bf16": ("float", 2), "f16": ("float", 2), "i64": ("int", 8),
    "i32": ("int", 4), "i16": ("int", 2), "i8": ("int", 1), "u8": ("int", 1), "bool": ("bool", 1),
}  # fmt: skip

S, W = Var("s"), Var("w")


@dataclass(frozen=True)
class Axis:
    """A loop: its index name and its extent, an integer constant or a size known at the call."""

    name: str
    extent: Const | Size

    @property
    def index(self) -> Index:
        return Index(self.name)


@dataclass(frozen=True)
class Tensor:
    """A source the kernel reads. Strides are known only at the call; extents may be expressions over sizes."""

    name: str
    dtype: str
    shape: tuple[Expr, ...]

    @property
    def kind(self) -> Kind:
        return DTYPES[self.dtype][0]


@dataclass(frozen=True)
class Access:
    """`tensor[index]`, one integer expression a dimension."""

    tensor: str
    index: tuple[Expr, ...]


@dataclass(frozen=True)
class Attention:
    """Shapes: `out` is laid out as (*batch, i, e), `lse` as (*batch, i), `weights` as (*batch, i, j).

    `layout` is the order in which `out` lies in memory, outermost first (a permutation of its axis names), so that the
    transpose most models do next costs nothing. `sink` is a logit per row that takes part in the sum and has no value.
    `sizes` are the integers a call passes, in order. `slope` says of rows that give the mean how far their weights, all
    alike, follow a change of the scores: 1 where a finite number was added to them, 0 where it took their place.

    `drop` is the share of each row's weights (0 to 1) that a kernel may leave out: the output is then that of any set
    of keys which holds the rest, made to sum to one. The interpreter leaves out none.
    """

    sizes: tuple[Size, ...]
    batch: tuple[Axis, ...]
    i: Axis
    j: Axis
    d: Axis
    e: Axis
    tensors: tuple[Tensor, ...]
    q: Access
    k: Access
    v: Access
    score: Expr = S
    mask: Expr = TRUE
    normalizer: Normalizer = "softmax"
    empty: Empty = "zero"
    sink: Expr | None = None
    weight: Expr = W
    outputs: tuple[Output, ...] = ("out",)
    dtype: str = "f32"
    layout: tuple[str, ...] = field(default=())
    slope: float = 0.0
    drop: Expr | None = None

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (*self.batch, self.i, self.j, self.d, self.e)

    @property
    def out_axes(self) -> tuple[Axis, ...]:
        return (*self.batch, self.i, self.e)

    @property
    def spare(self) -> Expr | None:
        """`drop` where a kernel makes use of it: not where weights or their sums are asked for, or weights changed."""
        return self.drop if self.weight is W and self.outputs == ("out",) else None

    def tensor(self, name: str) -> Tensor:
        for t in self.tensors:
            if t.name == name:
                return t
        raise KeyError(name)

    @property
    def compute_dtype(self) -> str:
        """float64 if any operand is, else float32."""
        wide = any(self.tensor(a.tensor).dtype == "f64" for a in (self.q, self.k, self.v))
        return "f64" if wide else "f32"

    def expressions(self) -> Iterator[Expr]:
        """Every expression the node holds, operand indices included."""
        for access in (self.q, self.k, self.v):
            yield from access.index
        yield self.score
        yield self.mask
        if self.sink is not None:
            yield self.sink
        yield self.weight
        if self.drop is not None:
            yield self.drop

    def substitute(self, table: dict[Expr, Expr]) -> Attention:
        """The node with every expression rewritten by `table`; declarations are left alone."""

        def on(x: Expr) -> Expr:
            return substitute(x, table)

        def access(a: Access) -> Access:
            return Access(a.tensor, tuple(on(x) for x in a.index))

        return replace(
            self,
            q=access(self.q), k=access(self.k), v=access(self.v), score=on(self.score), mask=on(self.mask),
            sink=None if self.sink is None else on(self.sink), weight=on(self.weight),
            drop=None if self.drop is None else on(self.drop),
        )  # fmt: skip


def fresh_name(name: str, taken: Collection[str]) -> str:
    """`name`, with as many underscores behind it as make it none of `taken`."""
    while name in taken:
        name += "_"
    return name
