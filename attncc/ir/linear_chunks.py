"""Linear attention by chunks of keys, in plain traceable torch: exact, and all products are products of matrices.

Inside a chunk, with G_r the product of its decays up to r (of each d, where decays differ there) and u as in the node's
own equations,

    u_r = rate_r (v_r - [delta] (k_r G_r) S - [delta] sum_(s < r) (k_r . k_s G_r / G_s) u_s)     a triangular system
    o_r = (q_r G_r) S + sum_(s <= r) (q_r . k_s G_r / G_s) u_s
    S'  = G_C S + sum_s (G_C / G_s k_s) u_s^T

(Yang et al., 2024, arXiv 2412.06464, section 3; per channel arXiv 2312.06635). Only quotients of a later product by an
earlier one are formed, as the exponential of a difference of logarithms: none exceeds one where decays do not, however
long the chunk. A decay of exactly zero starts a document: pairs across it do not meet. What the node's interpreter
does step by step is what this gives up to rounding; torch differentiates it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch

from attncc.ir.build import add, op
from attncc.ir.expr import ROUNDINGS, Expr, Op, free
from attncc.ir.interpret import Result, size_table
from attncc.ir.interpret_linear import divisor, initial_state, over_axes
from attncc.ir.linear import UNIT, Linear, X
from attncc.ir.signs import sign

_solved = cast(Callable[..., torch.Tensor], torch.linalg.solve_triangular)  # pyright: ignore[reportUnknownMemberType]
#: Tokens of a chunk: one decay a token, and one for each channel, whose quotients are formed for each pair and channel.
CHUNK, CHANNEL_CHUNK = 64, 16


def unchunked(a: Linear) -> str | None:
    """Why there is no form by chunks, or None."""
    if a.e.index in free(a.decay) | free(a.rate):
        return "a decay or a rate for each column of the state"
    if a.rule == "delta" and a.d.index in free(a.rate):
        return "the delta rule with a rate for each channel"
    if not sign(a.decay):
        return "a decay that may be negative"
    return None


def unfactored(a: Linear) -> str | None:
    """Why kernels that take its factors, with one rate a token, do not give `a`, or None."""
    if a.sees == "all":
        return "every query sees every key: two products of matrices"
    if a.over is not None:
        return "a quotient by the sum of the weights"
    return "a rate for each channel" if a.d.index in free(a.rate) else None


def by_chunks(
    a: Linear, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int] = (), *,
    compute: torch.dtype = torch.float32, chunk: int | None = None,
) -> Result:  # fmt: skip
    """The outputs of `a` by name, in `compute`. Raises ValueError where `unchunked(a)` has a reason."""
    reason = unchunked(a)
    if reason is not None:
        raise ValueError(reason)
    table: dict[Expr, int] = dict(size_table(a, sizes))
    x = factors(a, tensors, table, compute)
    state = x.state
    length = chunk or (CHUNK if x.log is None or x.log.shape[-1] == 1 else CHANNEL_CHUNK)
    past, delta = a.sees == "past", a.rule == "delta"
    if past or delta or x.log is not None:
        out, state = recurrence_by_chunks(x, length, delta=delta, asked=past)
    else:
        out, state = x.v, state + (x.k if x.rate is None else x.k * x.rate).mT @ x.v
    out = out if past else x.q @ state
    if a.over is not None:
        weight = (x.q * x.k.cumsum(-2)).sum(-1) if past else (x.q @ x.k.sum(-2)[..., None])[..., 0]
        out = out / divisor(a, weight, tensors, table, compute)
    every = {"out": out, "state": state}
    return {name: every[name] for name in a.outputs}


class Factors(NamedTuple):
    """What a linear attention reads, feature maps applied: q' (*batch, i, d), k' (*batch, j, d), v (*batch, j, e), the
    logarithms of the decays and the rates (*batch, j, d or 1), none where all are one, and the first state
    (*batch, d, e)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log: torch.Tensor | None
    rate: torch.Tensor | None
    state: torch.Tensor


def factors(
    a: Linear, tensors: Mapping[str, torch.Tensor], table: Mapping[Expr, int], compute: torch.dtype
) -> Factors:
    """The factors of `a` in `compute`. No decay or rate may depend on the column."""
    rows, keys, columns = (*a.batch, a.i, a.d), (*a.batch, a.j, a.d), (*a.batch, a.j, a.e)

    def each(x: Expr) -> torch.Tensor:
        if a.d.index in free(x):
            return over_axes(keys, x, tensors, table, compute).to(compute)
        return over_axes(keys[:-1], x, tensors, table, compute).to(compute)[..., None]

    return Factors(
        over_axes(rows, a.phi_q, tensors, table, compute, a.q).to(compute),
        over_axes(keys, a.phi_k, tensors, table, compute, a.k).to(compute),
        over_axes(columns, X, tensors, table, compute, a.v).to(compute),
        None if a.decay is UNIT else each(logarithm(a.decay)), None if a.rate is UNIT else each(a.rate),
        initial_state(a, tensors, table, compute).to(compute),
    )  # fmt: skip


@dataclass(frozen=True)
class _Decays:
    """The decays of some tokens, of shape (*batch, tokens, d or 1): the sum of their logarithms up to each (those of
    zeros left out), and how many zeros there are up to each; with neither, all decays are one."""

    logs: torch.Tensor | None = None
    zeros: torch.Tensor | None = None

    def between(self) -> torch.Tensor | None:
        """(*batch, late, early, d or 1): the product of the decays behind each early token up to each late one, zero
        where the late one is before; nothing if all are one."""
        if self.logs is None or self.zeros is None:
            return None
        grown = self.logs[..., :, None, :] - self.logs[..., None, :, :]
        met = self.zeros[..., :, None, :] == self.zeros[..., None, :, :]
        at = torch.arange(grown.shape[-2], device=grown.device)
        return grown.masked_fill(~(met & (at[:, None] >= at)[..., None]), -torch.inf).exp()

    def since_start(self) -> torch.Tensor | None:
        """(*batch, tokens, d or 1): the product of the decays up to each token, its own included."""
        if self.logs is None or self.zeros is None:
            return None
        return self.logs.masked_fill(self.zeros > 0, -torch.inf).exp()

    def to_end(self) -> torch.Tensor | None:
        """(*batch, tokens, d or 1): the product of the decays behind each token."""
        if self.logs is None or self.zeros is None:
            return None
        grown = self.logs[..., -1:, :] - self.logs
        return grown.masked_fill(self.zeros != self.zeros[..., -1:, :], -torch.inf).exp()


def _decays(log: torch.Tensor | None) -> _Decays:
    if log is None:
        return _Decays()
    zero = log.isneginf()
    return _Decays(log.masked_fill(zero, 0.0).cumsum(-2), zero.cumsum(-2))


def recurrence_by_chunks(
    x: Factors, chunk: int, *, delta: bool, asked: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs, none unless they are `asked` for, and the last state."""
    outs: list[torch.Tensor] = []
    state = x.state
    n = x.k.shape[-2]
    for start in range(0, n, chunk):
        part = slice(start, min(start + chunk, n))
        decays = _decays(None if x.log is None else x.log[..., part, :])
        rate = None if x.rate is None else x.rate[..., part, :]
        k, u = x.k[..., part, :], x.v[..., part, :]
        between, begun, rest = decays.between(), decays.since_start(), decays.to_end()
        written = k
        if delta:
            system = _products(k, k, between).tril(-1)
            u = u - (k if begun is None else k * begun) @ state
            if rate is not None:
                system, u = system * rate, u * rate
            u = _solved(system, u, upper=False, unitriangular=True)
        elif rate is not None:
            written = k * rate
        if asked:
            q = x.q[..., part, :]
            read = (q if begun is None else q * begun) @ state
            outs.append(read + _products(q, written, between).tril() @ u)
        held = state if begun is None else begun[..., -1, :, None] * state
        state = held + (written if rest is None else written * rest).mT @ u
    return torch.cat(outs, -2) if outs else x.v[..., :0, :], state


def _products(rows: torch.Tensor, keys: torch.Tensor, between: torch.Tensor | None) -> torch.Tensor:
    """(*batch, rows, keys): the products, each with the decays between the two."""
    if between is None:
        return rows @ keys.mT
    if between.shape[-1] == 1:
        return rows @ keys.mT * between[..., 0]
    return torch.einsum("...rd,...sd,...rsd->...rs", rows, keys, between)


def logarithm(x: Expr) -> Expr:
    """log(x) for an x that is not below zero, taken apart where exponentials, products and selections allow."""
    match x:
        case Op("exp", (a,)):
            return a
        case Op("mul", (a, b)) if sign(a) and sign(b):
            return add(logarithm(a), logarithm(b))
        case Op("where", (c, a, b)):
            return op("where", c, logarithm(a), logarithm(b))
        case Op(name, (a,)) if name in ROUNDINGS:
            return logarithm(a)
        case _:
            return op("log", x)
