"""Linear attentions of every kind, of given sizes, and data for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from attncc.ir import Access, Axis, Const, Expr, Index, Linear, Load, Size, Tensor
from attncc.ir.build import add, const, eq, floordiv, maximum, mul, op, where
from attncc.ir.linear import X, Z

b, h, i, j, d, e = (Index(n) for n in "bhijde")


def plain(batch: int, heads: int, n: int | Size, dk: int, dv: int, dtype: str = "f32") -> Linear:
    """Unnormalised, over the past."""
    rows = n if isinstance(n, Size) else Const(n)

    def tensor(name: str, last: int) -> Tensor:
        return Tensor(name, dtype, (Const(batch), Const(heads), rows, Const(last)))

    return Linear(
        sizes=(n,) if isinstance(n, Size) else (), batch=(Axis("b", Const(batch)), Axis("h", Const(heads))),
        i=Axis("i", rows), j=Axis("j", rows), d=Axis("d", Const(dk)), e=Axis("e", Const(dv)),
        tensors=(tensor("q", dk), tensor("k", dk), tensor("v", dv)), q=Access("q", (b, h, i, d)),
        k=Access("k", (b, h, j, d)), v=Access("v", (b, h, j, e)), sees="past", dtype=dtype,
    )  # fmt: skip


def _more(a: Linear, *names: str) -> Linear:
    batch, heads, n, dk = a.tensor("q").shape
    shapes: dict[str, tuple[Expr, ...]] = {
        "g": (batch, heads, n), "r": (batch, heads, n), "gk": (batch, heads, n, dk), "doc": (batch, n),
        "s0": (batch, heads, dk, a.e.extent), "slope": (heads,),
    }  # fmt: skip
    kind = "f64" if a.dtype == "f64" else "f32"
    held = (Tensor(x, "i64" if x == "doc" else kind, shapes[x]) for x in names)
    return replace(a, tensors=(*a.tensors, *held))


def _load(name: str, *index: Expr) -> Expr:
    return Load(name, index, "int" if name == "doc" else "float")


DECAY = op("exp", op("neg", _load("g", b, h, j)))
CHANNELS = op("exp", op("neg", _load("gk", b, h, j, d)))


def bare(a: Linear) -> Linear:
    return a


def retention(a: Linear) -> Linear:
    return replace(_more(a, "slope"), decay=op("exp", op("neg", _load("slope", h))))


def gated(a: Linear) -> Linear:
    """A decay a token, from a state to a state: Mamba-2."""
    return replace(
        _more(a, "g", "s0"), decay=DECAY, state=Access("s0", (b, h, d, e)), outputs=("out", "state")
    )  # fmt: skip


def by_channel(a: Linear) -> Linear:
    """Gated linear attention."""
    return replace(_more(a, "gk"), decay=CHANNELS, outputs=("out", "state"))


def delta(a: Linear) -> Linear:
    return replace(_more(a, "r"), rate=_load("r", b, h, j), rule="delta")


def gated_delta(a: Linear) -> Linear:
    return replace(gated(delta(a)), tensors=_more(delta(a), "g", "s0").tensors)


def delta_by_channel(a: Linear) -> Linear:
    return replace(delta(a), tensors=_more(delta(a), "gk").tensors, decay=CHANNELS, outputs=("out", "state"))


def packed(a: Linear) -> Linear:
    """Documents: the state begins anew where their number changes."""
    a = gated_delta(a)
    before = maximum(add(j, const(-1)), const(0))
    same = eq(_load("doc", b, j), _load("doc", b, before))
    return replace(a, tensors=_more(a, "doc").tensors, decay=where(same, a.decay, const(0.0)))


def features(a: Linear) -> Linear:
    """elu(x) + 1 on both sides, divided by the sum of the weights."""
    phi = where(op("lt", const(0.0), X), add(X, const(1.0)), op("exp", X))
    return replace(a, phi_q=phi, phi_k=phi, over=add(Z, const(1e-6)))



def for_all(a: Linear) -> Linear:
    """Every query sees every key: relu features, divided."""
    phi = maximum(X, const(0.0))
    return replace(a, phi_q=phi, phi_k=phi, over=maximum(Z, const(1e-3)), sees="all")


def grouped(a: Linear) -> Linear:
    """Two heads of values to one of queries and keys, which lie by token."""
    batch, heads, n, dk = a.tensor("q").shape
    assert isinstance(heads, Const)
    few = Const(int(heads.value) // 2)
    held = tuple(replace(t, shape=(batch, n, few, dk)) if t.name in "qk" else t for t in a.tensors)
    group = floordiv(h, const(2))
    return replace(
        gated_delta(replace(a, tensors=held)), tensors=(*held, *gated_delta(a).tensors[3:]),
        q=Access("q", (b, i, group, d)), k=Access("k", (b, j, group, d)), phi_q=mul(X, const(0.125)),
    )  # fmt: skip


def selective_scan(a: Linear) -> Linear:
    """A decay for each channel and column, of a step for each column and a matrix: Mamba; from a state."""
    batch, heads, n, dk = a.tensor("q").shape
    kind = "f64" if a.dtype == "f64" else "f32"
    step, matrix = Tensor("dt", kind, (batch, n, heads, a.e.extent)), Tensor("am", kind, (a.e.extent, dk))
    dt, am = Load("dt", (b, j, h, e), "float"), Load("am", (e, d), "float")
    state = Tensor("s0", kind, (batch, heads, a.e.extent, dk))
    return replace(
        a, tensors=(*a.tensors, step, matrix, state), decay=op("exp", op("neg", mul(dt, am))), rate=dt,
        state=Access("s0", (b, h, e, d)), outputs=("out", "state"),
    )  # fmt: skip


def discretised(a: Linear) -> Linear:
    """The same of decays that are a tensor, and a rate for each channel and column."""
    batch, heads, n, dk = a.tensor("q").shape
    kind = "f64" if a.dtype == "f64" else "f32"
    held = Tensor("gde", kind, (batch, heads, a.e.extent, n, dk))
    x = Load("gde", (b, h, e, j, d), "float")
    return replace(a, tensors=(*a.tensors, held), decay=x, rate=mul(x, x), outputs=("out", "state"))


SCANS: dict[str, Callable[[Linear], Linear]] = {f.__name__: f for f in (selective_scan, discretised)}
FORMS: dict[str, Callable[[Linear], Linear]] = {
    f.__name__: f
    for f in (bare, retention, gated, by_channel, delta, gated_delta, delta_by_channel, packed, features, for_all,
              grouped)
}  # fmt: skip


def data(a: Linear, n: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors for `a`, `n` for its size if it has one: keys of length one, decays between 0.2 and 1."""
    generator = torch.Generator().manual_seed(seed)
    kinds = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
    made: dict[str, torch.Tensor] = {}
    for t in a.tensors:
        shape = [n if isinstance(x, Size) else int(x.value) for x in t.shape]  # type: ignore[attr-defined]
        if t.name == "doc":
            made[t.name] = torch.arange(shape[-1]).expand(shape) // 5
            continue
        uniform = t.name in ("g", "gk", "r", "slope", "dt", "am", "gde")
        x = (torch.rand if uniform else torch.randn)(shape, generator=generator, dtype=torch.float64)
        x = x * 1.5 if t.name in ("g", "gk") else x
        made[t.name] = (torch.nn.functional.normalize(x, dim=-1) if t.name == "k" else x).to(kinds[t.dtype])
    return made
