"""Blend: the output of a row becomes partly its own value. An effect, not an approximation.

HeadHunter with SoftPAG, 2025 (perturbed attention guidance by heads): A' = (1 - u) A + u I for chosen heads of a second
forward, the one that guidance moves away from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attncc.ir import Attention, Expr, Load, Program
from attncc.ir.affine import poly
from attncc.ir.build import TRUE, add, const, mul
from attncc.ir.expr import substitute
from attncc.ir.reasons import Reason, because
from attncc.passes.policies.hiding import Form, Hiding, hide
from attncc.passes.policies.parts import Parts, no_joining
from attncc.passes.policies.places import places
from attncc.passes.protocol import Legality


@dataclass(frozen=True)
class Blend:
    """out[i]  ->  (1 - u) out[i] + u v[i]                                    v[i]: the value of the key that is row i

    No key is hidden. `u`: 0 leaves the output as it is, 1 makes it the values. A budget says nothing of it: profiling
    does not choose it."""

    name: ClassVar[str] = "blend"
    legality: ClassVar[Legality] = "approximate"
    intent: ClassVar[str] = "change"
    u: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.u <= 1:
            raise ValueError(f"u is from 0 to 1, not {self.u}")

    def __call__(self, p: Program, /) -> Program:
        return hide(p, Form(self))

    def applies(self, a: Attention) -> Reason | None:
        return no_joining(a) or _not_aligned(a)

    def keep(self, site: Hiding) -> Expr:
        return TRUE

    def parts(self, site: Hiding) -> Parts:
        a = site.attention
        own = substitute(Load(a.v.tensor, a.v.index, "float"), {a.j.index: a.i.index})
        return Parts(TRUE, after=lambda out: add(mul(const(1.0 - self.u), out), mul(const(self.u), own)))


def _not_aligned(a: Attention) -> Reason | None:
    """Why rows and keys are not the same tokens one by one, or None."""
    at = places(a)
    same = at is not None and poly(a.i.extent) == poly(a.j.extent) and poly(at.row) == poly(a.i.index)
    return None if same else because("policy-not-aligned")
