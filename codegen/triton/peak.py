"""What the weights of a row are taken against: the largest score so far, and sums that follow it as it grows."""

from __future__ import annotations

import math

from attncc.codegen.triton.expressions import LARGEST
from attncc.codegen.triton.frame import Frame
from attncc.ir import Const

LOG2E = math.log2(math.e)


def _rounded(product: str) -> str:
    """A product that nothing is fused with, minus infinity as the lowest number."""
    return f"tl.maximum({product}, -{LARGEST!r})"


def number(x: float) -> str:
    return repr(x)


class Peak:
    """The lines that keep `m`, the largest score of each row, and `l`, the sum of its weights. The scale of the scores
    is left to `c2`, which leads from the numbers that are compared to powers of two."""

    def __init__(self, frame: Frame) -> None:
        self.f, self.p = frame, frame.p
        self.c2 = self.p.scale * LOG2E

    def start(self, rows: str) -> list[str]:
        """The largest score of each row, and the sum of weights over it, before there are any."""
        return [
            *self._lift(),
            f'm = tl.full([{rows}], float("-inf"), tl.float32)', f"l = tl.zeros([{rows}], tl.float32)",
        ]  # fmt: skip

    def _lift(self) -> list[str]:
        """By how many powers of two all weights are made smaller, so that no sum of weighted values passes the largest
        number: as many as there are keys, and one. Sums of float16 are far from it in float32."""
        if not self.lifted:
            return []
        keys = self.p.a.j.extent
        if isinstance(keys, Const):
            return [f"lift = {number(float(max(int(keys.value), 1).bit_length() + 1))}"]
        return [f"lift = tl.ceil(tl.log2(tl.maximum({self.f.scope.text(keys)}, 1) * 1.0)) + 1.0"]

    @property
    def lifted(self) -> bool:
        return self.p.softmax and not self.p.two_pass and self.p.value_type != "f16"

    def of(self, m: str) -> str:
        """What the largest weight is taken against: the rounded m * rate, and more where that leaves the others room.
        """
        return f"{_rounded(f'{m} * rate')} + lifted" if self.lifted else _rounded(f"{m} * rate")

    def raised(self, largest: str) -> list[str]:
        """Lines that raise `m` to what `largest` is, `shrink` being what earlier sums are worth then."""
        new = [f"m_new = tl.maximum(m, {largest})", *self.against("m_new")]
        return [*new, f"shrink = tl.exp2({self.of('m')} - base)", "m = m_new"]

    def against(self, m: str) -> list[str]:
        """What weights are taken against: a weight is 2^(x * rate - base), one fused multiply-add, and `base` the
        rounded m * rate, so that the largest is off by that rounding. Where it would be large the rate is a power of
        two, which rounds nothing; neighbours of the largest score lie too far below it there to weigh anything."""
        far = number(2.0 ** math.ceil(math.log2(self.c2)))
        if self.c2 > 1.0:  # lest it pass the largest number
            far = f"tl.where(tl.abs({m}) < {2.0**64!r}, {far}, {2.0**-16!r})"
        rate = f"rate = tl.where(tl.abs({m}) < {number(self.far)}, {number(self.c2)}, {far})"
        lifted = f"lifted = tl.where(tl.abs({m}) < {number(self.far)}, lift, 0.0)"
        return [rate, *([lifted] if self.lifted else []), f"base = {self.of(m)}"]

    @property
    def far(self) -> float:
        """The score from which on the largest weight would be off by too much: 2^32, or what float16 holds."""
        return 2.0 ** (26 if self.p.value_type == "f16" else 30) / self.c2
