"""Certified skip: keys whose weights are next to nothing are left out inside the kernel, with no estimate of which.

After skip-softmax (BLASST), as NVIDIA's Model-Optimizer has it, which compares the largest score of a tile with the
running one and calibrates the threshold. Here the sum of what is left out is kept, row by row: its bound needs no
calibration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attncc.ir import Attention, Expr, Program, W
from attncc.ir.build import TRUE, const
from attncc.ir.reasons import Reason, because
from attncc.passes.policies.hiding import Form, Hiding, hide
from attncc.passes.protocol import Legality


@dataclass(frozen=True)
class CertifiedSkip:
    """sum of w[i, j] over the keys j that are left out  <=  eps          w: the exact weights, for each row i

    Hence |O'[i] - O[i]| <= 2 eps max_j |v[j]|, the output O' being made of the other weights over their sum.

    A block of keys J is left out of row i where D + sum_J w < eps L n / N: L and D are the sums of what was kept and
    left out so far, n of the row's N keys were met so far. It saves the product with the values, and reading those at
    decode; scores are all computed. Kernels that leave out nothing satisfy it too: the torch form, and those that give
    the sums.
    """

    name: ClassVar[str] = "certified-skip"
    legality: ClassVar[Legality] = "approximate"
    eps: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1:
            raise ValueError(f"eps is between 0 and 1, not {self.eps}")

    def __call__(self, p: Program, /) -> Program:
        return hide(p, Form(self))

    def applies(self, a: Attention) -> Reason | None:
        if a.normalizer != "softmax" or a.weight is not W:
            return because("policy-no-softmax")
        return because("policy-sums-asked") if a.outputs != ("out",) else None

    def keep(self, site: Hiding) -> Expr:
        return TRUE

    def drop(self, site: Hiding) -> Expr:
        """The share of the weights that a row may leave out."""
        return const(self.eps)
