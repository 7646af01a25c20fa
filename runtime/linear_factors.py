"""Kernels of a linear attention that take what its node is made of, and torch for what lies before that.

Feature maps, decays, heads that share keys and casts are elementwise: torch runs and differentiates them. The kernel
takes what they give (`attncc.ir.linear_chunks.factors`), as four-dimensional tensors, and gives outputs, or gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attncc.ir import Linear
from attncc.ir.evaluate import DTYPE_OF
from attncc.ir.expr import Expr
from attncc.ir.linear_chunks import Factors, factors
from attncc.runtime.derivatives import differentiated
from attncc.runtime.op import Kernel


class FactorKernel:
    """A linear attention by a kernel of its factors, as `attncc.codegen.triton.linear` writes them."""

    def __init__(self, a: Linear, kernel: Kernel) -> None:
        self.linear, self.kernel = a, kernel

    def __call__(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> None:
        a = self.linear
        table: dict[Expr, int] = dict(zip(a.sizes, sizes, strict=True))
        with torch.no_grad():
            x = factors(a, {t.name: y for t, y in zip(a.tensors, tensors, strict=True)}, table, torch.float32)
        to = dict(zip(a.outputs, outputs, strict=True))
        out = to["out"] if "out" in to else torch.empty_like(x.v)
        state = to["state"] if "state" in to else torch.empty(x.state.shape, device=x.state.device)
        self.kernel(_taken(x), (), [_four(out), _four(state)])


def gradients(
    a: Linear, kernel: Kernel, grads: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], sizes: Sequence[int],
    wanted: Sequence[bool],
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of the `wanted` ones of `tensors`, given those of the outputs of `a`."""
    compute = DTYPE_OF[a.compute_dtype]
    table: dict[Expr, int] = dict(zip(a.sizes, sizes, strict=True))
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        x = factors(a, {t.name: y for t, y in zip(a.tensors, leaves, strict=True)}, table, compute)
    given = dict(zip(a.outputs, grads, strict=True))
    found = factor_gradients(kernel, x, given.get("out"), given.get("state"))
    made = [(y, g) for y, g in zip(x, found, strict=True) if y is not None and y.requires_grad]
    sources = [y for y, w in zip(leaves, wanted, strict=True) if w]
    return differentiated([y for y, _ in made], sources, [g for _, g in made], create_graph=False)


def factor_gradients(
    kernel: Kernel, x: Factors, out: torch.Tensor | None, state: torch.Tensor | None
) -> list[torch.Tensor]:
    """Gradients of each factor, of its shape, given those of the output (*batch, i, e) and of the last state, zero
    where there are none. What `kernel` takes and gives is said in `attncc.codegen.cpp.linear_gradient`."""
    batch, (n, d), e = x.q.shape[:-2], x.q.shape[-2:], x.v.shape[-1]
    out = x.q.new_zeros(()).expand(*batch, n, e) if out is None else out.to(x.q.dtype)
    state = x.q.new_zeros(()).expand(*batch, d, e) if state is None else state.to(x.q.dtype)
    given = [*_taken(x), _four(out), _four(state)]
    made = [torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in given[:6]]
    kernel(given, [*given[0].shape[:2], n, d, e], made)
    made[4] = made[4][..., None]
    return [y.reshape(*batch, *y.shape[2:]) for y in made]


def _taken(x: Factors) -> list[torch.Tensor]:
    """q, k, v, logarithms, rates and the first state, as kernels take them: zeros and ones where there are none."""
    shape = (*x.q.shape[:-1], 1)
    log = x.q.new_zeros(()).expand(shape) if x.log is None else x.log
    rate = x.q.new_ones(()).expand(shape) if x.rate is None else x.rate
    q, k, v, log, rate, state = (_four(y.detach()) for y in (x.q, x.k, x.v, log, rate, x.state))
    return [q, k, v, log, rate[..., 0], state]


def _four(x: torch.Tensor) -> torch.Tensor:
    """Two dimensions of batch in place of none, one or many."""
    while x.ndim < 4:
        x = x[None]
    return x.flatten(0, x.ndim - 4)
