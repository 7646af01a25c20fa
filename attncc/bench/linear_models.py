"""Linear attentions by chunks as models write them in torch: what `attncc bench --suite linear` compiles.

Shapes: q, k (batch, tokens, heads, d), v (batch, tokens, heads, e), logarithms of decays and rates (batch, tokens,
heads). Each returns its output, (batch, tokens, heads, e), and its last state, (batch, heads, d, e).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

T = torch.Tensor
CHUNK = 64


def _chunks(x: T, chunk: int) -> T:
    """(batch, heads, chunks, chunk, ...) of a tensor by token, zeros behind its end."""
    x = x.transpose(1, 2)
    pad = -x.shape[2] % chunk
    x = F.pad(x, (0, 0, 0, pad) if x.ndim == 4 else (0, pad))
    return x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:])


def _tokens(x: T, count: int) -> T:
    return x.flatten(2, 3)[:, :, :count].transpose(1, 2)


def gated_delta(q: T, k: T, v: T, g: T, beta: T, chunk: int = CHUNK) -> tuple[T, T]:
    """The gated delta rule in its WY form (Yang et al., 2024, arXiv 2412.06464)."""
    count = q.shape[1]
    q, k = q * q.shape[-1] ** -0.5, F.normalize(k, dim=-1)
    q, k, v, kb, vb, g = (_chunks(x, chunk) for x in (q, k, v, k * beta[..., None], v * beta[..., None], g))
    g = g.cumsum(-1)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    between = (g[..., :, None] - g[..., None, :]).masked_fill(later, -torch.inf).exp()
    system = kb @ k.mT * between
    u = torch.linalg.solve_triangular(system, vb, upper=False, unitriangular=True)
    w = torch.linalg.solve_triangular(system, kb * g.exp()[..., None], upper=False, unitriangular=True)
    weights = q @ k.mT * between
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    out = torch.zeros_like(v)
    for i in range(q.shape[2]):
        new = u[:, :, i] - w[:, :, i] @ state
        out[:, :, i] = (q[:, :, i] * g[:, :, i, :, None].exp()) @ state + weights[:, :, i] @ new
        rest = (g[:, :, i, -1:] - g[:, :, i]).exp()[..., None]
        state = state * g[:, :, i, -1, None, None].exp() + (k[:, :, i] * rest).mT @ new
    return _tokens(out, count), state


def delta_by_inverse(q: T, k: T, v: T, g: T, beta: T, chunk: int = CHUNK) -> tuple[T, T]:
    """The same, the triangular system inverted row by row, as code from before triangular solves has it."""
    count = q.shape[1]
    k = F.normalize(k, dim=-1)
    q, k, v, beta, g = (_chunks(x, chunk) for x in (q, k, v, beta, g))
    kb, vb, g = k * beta[..., None], v * beta[..., None], g.cumsum(-1)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(0)
    between = (g[..., :, None] - g[..., None, :]).tril().exp().tril()
    inverse = -(kb @ k.mT * between).masked_fill(later, 0)
    for i in range(1, chunk):
        row, above = inverse[..., i, :i].clone(), inverse[..., :i, :i].clone()
        inverse[..., i, :i] = row + (row[..., None] * above).sum(-2)
    inverse = inverse + torch.eye(chunk, dtype=q.dtype, device=q.device)
    u, w = inverse @ vb, inverse @ (kb * g.exp()[..., None])
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    outs: list[T] = []
    for i in range(q.shape[2]):
        new = u[:, :, i] - w[:, :, i] @ state
        read = (q[:, :, i] * g[:, :, i, :, None].exp()) @ state
        outs.append(read + (q[:, :, i] @ k[:, :, i].mT * between[:, :, i]) @ new)
        rest = (g[:, :, i, -1:] - g[:, :, i]).exp()[..., None]
        state = state * g[:, :, i, -1, None, None].exp() + (k[:, :, i] * rest).mT @ new
    return _tokens(torch.stack(outs, 2), count), state


def _sums(x: T) -> T:
    """(..., i, j): the sum of x behind j up to i, -inf where j is later."""
    n = x.shape[-1]
    ones = torch.ones(n, n, dtype=torch.bool, device=x.device)
    x = x[..., None].expand(*x.shape, n).masked_fill(~ones.tril(-1), 0)
    return x.cumsum(-2).masked_fill(~ones.tril(), -torch.inf)


def ssd(q: T, k: T, v: T, g: T, dt: T, chunk: int = 4 * CHUNK) -> tuple[T, T]:
    """Mamba-2's state-space duality (Dao and Gu, 2024, arXiv 2405.21060): states of all chunks at once."""
    count = q.shape[1]
    q, k, v, g = (_chunks(x, chunk) for x in (q, k, v * dt[..., None], g))
    total = g.cumsum(-1)
    inside = (q @ k.mT * _sums(g).exp()) @ v
    states = (k * (total[..., -1:] - total).exp()[..., None]).mT @ v
    states = torch.cat([torch.zeros_like(states[:, :, :1]), states], 2)
    carried = _sums(F.pad(total[..., -1], (1, 0))).exp()
    states = torch.einsum("bhzc,bhcde->bhzde", carried, states)
    out = inside + (q * total.exp()[..., None]) @ states[:, :, :-1]
    return _tokens(out, count), states[:, :, -1]


def gated_by_channel(q: T, k: T, v: T, g: T, chunk: int = CHUNK // 4) -> tuple[T, T]:
    """Gated linear attention (Yang et al., 2023, arXiv 2312.06635): `g` is (batch, tokens, heads, d)."""
    count = q.shape[1]
    q, k, v, g = (_chunks(x, chunk) for x in (q, k, v, g))
    total = g.cumsum(-2)
    earlier = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    between = (total[..., :, None, :] - total[..., None, :, :]).masked_fill(~earlier[..., None], -torch.inf).exp()
    weights = torch.einsum("bhcid,bhcjd,bhcijd->bhcij", q, k, between)
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    outs: list[T] = []
    for i in range(q.shape[2]):
        outs.append((q[:, :, i] * total[:, :, i].exp()) @ state + weights[:, :, i] @ v[:, :, i])
        rest = (total[:, :, i, -1:] - total[:, :, i]).exp()
        state = state * total[:, :, i, -1, :, None].exp() + (k[:, :, i] * rest).mT @ v[:, :, i]
    return _tokens(torch.stack(outs, 2), count), state
