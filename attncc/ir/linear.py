"""Linear attention: a state of d x e numbers in place of N x M weights, from its operands to its outputs.

    k'[j, d] = phi_k(k[b.., j, d])                                q'[i, d] = phi_q(q[b.., i, d])
    S_j[d, e] = decay * S_(j-1)[d, e] + k'[j, d] * rate * u_j[e]          S_(-1) = state, or zero
    u_j[e]    = v[b.., j, e], less sum_d k'[j, d] * decay * S_(j-1)[d, e] under the delta rule
    out[b.., i, e] = sum_d q'[i, d] * S_l[d, e] / over(sum_(j <= l) q'[i, .] . k'[j, .])

where l is i if a query sees the past (its own key included), and the last key if it sees all. Without decay and delta
rule this is q' (k'^T v) of Katharopoulos et al., 2020 (arXiv 2006.16236); with a decay that is constant it is
retention and lightning attention; with the delta rule, Yang et al., 2024 (arXiv 2412.06464); with a decay for each d
and e, the selective scan of state-space models. A decay of zero starts anew: packed documents have one at their first
tokens. Sums, and the state, are in float32, or float64 where an operand is. The work is O(N d e).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from attncc.ir.attention import DTYPES, Access, Axis, Tensor
from attncc.ir.expr import Const, Expr, Size, Var
from attncc.ir.lines import Lines, Writer, declared_lines, tensor_lines

Sees = Literal["all", "past"]
Rule = Literal["add", "delta"]
LinearOutput = Literal["out", "state"]
SEES: tuple[str, ...] = get_args(Sees)
RULES: tuple[str, ...] = get_args(Rule)
LINEAR_OUTPUTS: tuple[str, ...] = get_args(LinearOutput)

#: The element of an operand, in its feature map; the sum of weights, in what the output is divided by.
X, Z = Var("x"), Var("z")
UNIT = Const(1.0)


@dataclass(frozen=True)
class Linear:
    """Shapes: `out` is (*batch, i, e), `state` (the last one) is (*batch, d, e). `decay` and `rate` may mention the
    batch, j, d and e; feature maps the batch, the row and d. A query that sees the past needs as many rows as keys."""

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
    phi_q: Expr = X
    phi_k: Expr = X
    decay: Expr = UNIT
    rate: Expr = UNIT
    rule: Rule = "add"
    sees: Sees = "all"
    over: Expr | None = None
    state: Access | None = None
    outputs: tuple[LinearOutput, ...] = ("out",)
    dtype: str = "f32"

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (*self.batch, self.i, self.j, self.d, self.e)

    @property
    def compute_dtype(self) -> str:
        """f64 where an operand is, else f32: of everything that is computed, the states too."""
        held = {t.name: t.dtype for t in self.tensors}
        return "f64" if "f64" in (held.get(x.tensor) for _, x in self.accesses()) else "f32"

    def tensor(self, name: str) -> Tensor:
        """The declaration of a tensor. Raises KeyError for a name that is not declared."""
        return {t.name: t for t in self.tensors}[name]

    def accesses(self) -> Iterator[tuple[str, Access]]:
        yield from (("q", self.q), ("k", self.k), ("v", self.v))
        if self.state is not None:
            yield "state", self.state

    def expressions(self) -> Iterator[Expr]:
        """Every expression the node holds, operand indices included."""
        for _, access in self.accesses():
            yield from access.index
        yield from (self.phi_q, self.phi_k, self.decay, self.rate)
        if self.over is not None:
            yield self.over


def print_linear(a: Linear) -> str:
    """The canonical text of `a`: `parse_linear(print_linear(a)) == a`."""
    writer = Writer((x.name for x in (*a.axes, *a.sizes, *a.tensors)), a.expressions())
    show = writer.show
    lines = ["linear", *declared_lines(a.sizes, a.batch, (a.i, a.j, a.d, a.e)), *tensor_lines(a.tensors), *writer.lets]
    lines += [f"{name:<6} {writer.access(x)}" for name, x in a.accesses()]
    lines += [f"phi_q  {show(a.phi_q)}", f"phi_k  {show(a.phi_k)}", f"decay  {show(a.decay)}", f"rate   {show(a.rate)}"]
    lines += [f"rule   {a.rule}", f"sees   {a.sees}"]
    if a.over is not None:
        lines.append(f"over   {show(a.over)}")
    return "\n".join([*lines, f"give   {', '.join(a.outputs)}", f"dtype  {a.dtype}"]) + "\n"


def parse_linear(text: str) -> Linear:
    """The linear attention that `text` describes. Raises ParseError on anything that is not canonical."""
    lines = Lines(text, "linear", (X, Z), axes="ijde")
    i, j, d, e = lines.axes["axis"]
    result = Linear(
        sizes=lines.sizes, batch=lines.axes["batch"], i=i, j=j, d=d, e=e, tensors=tuple(lines.tensors),
        q=lines.access("q"), k=lines.access("k"), v=lines.access("v"),
        phi_q=lines.expr(lines.take("phi_q")), phi_k=lines.expr(lines.take("phi_k")),
        decay=lines.expr(lines.take("decay")), rate=lines.expr(lines.take("rate")),
        rule=lines.one_of("rule", RULES), sees=lines.one_of("sees", SEES), over=lines.maybe("over"),
        state=lines.access("state") if "state" in lines.field else None,
        outputs=tuple(lines.each_of("give", LINEAR_OUTPUTS)), dtype=lines.one_of("dtype", tuple(DTYPES)),
    )  # fmt: skip
    lines.finish()
    return result
