"""Linear attention by chunks of keys: the parallel form that kernels use, against which the recurrence is checked.

Inside a chunk, with G_r the product of the decays up to r and u as in the node's own equations,

    u_r = v_r - [delta] (G_r k_r^T S + sum_(s < r) G_r / G_s (k_r . k_s) rate_s u_s)      a triangular system
    o_r = G_r q_r^T S + sum_(s <= r) G_r / G_s (q_r . k_s) rate_s u_s
    S'  = G_C S + sum_s G_C / G_s rate_s k_s u_s^T

(Yang et al., 2024, arXiv 2412.06464, section 3). Decay and rate may depend on the batch and the key alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from attncc.ir import Expr, Linear
from attncc.ir.interpret_linear import initial_state, operands


def by_chunks(
    a: Linear, tensors: Mapping[str, torch.Tensor], chunk: int, compute: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """`out` and `state` of a linear attention of constant sizes that sees the past and divides by nothing."""
    assert a.sees == "past"
    assert a.over is None
    assert not a.sizes
    table: dict[Expr, int] = {}
    q, k, v, decay, rate = operands(a, tensors, table, compute)
    decay, rate = decay[..., 0, 0], rate[..., 0, 0]
    state = initial_state(a, tensors, table, compute)
    outs: list[torch.Tensor] = []
    for start in range(0, k.shape[-2], chunk):
        part = slice(start, start + chunk)
        queries, keys, values, r = q[..., part, :], k[..., part, :], v[..., part, :], rate[..., part]
        grown = decay[..., part].log().cumsum(-1)
        between = (grown[..., :, None] - grown[..., None, :]).exp().tril() * r[..., None, :]
        grown = grown.exp()[..., None]
        if a.rule == "delta":
            system = (keys @ keys.mT * between).tril(-1) + torch.eye(keys.shape[-2], dtype=compute)
            values = torch.linalg.solve_triangular(system, values - grown * (keys @ state), upper=False)
        outs.append(grown * (queries @ state) + (queries @ keys.mT * between) @ values)
        state = grown[..., -1:, :] * state + (keys * between[..., -1, :, None]).mT @ values
    return {"out": torch.cat(outs, -2), "state": state}
