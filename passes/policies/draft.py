"""Patches of a picture or a film by the products of their means, ranked over the whole of a head's map.

Shen et al., 2025 (DraftAttention, arXiv 2505.14708), as its released code has it: `shawnricecake/draft-attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from attncc.ir import Attention, Axis, Const, Expr, Program
from attncc.ir.analysis import members
from attncc.ir.build import ONE, TRUE, ZERO, add, const, floordiv, le, lt, minimum, mod, mul, or_
from attncc.ir.expr import mentions, substitute
from attncc.ir.reasons import Reason, because
from attncc.passes.policies.blocks import Blocks, no_blocks
from attncc.passes.policies.hiding import Form, Hiding, hide
from attncc.passes.policies.making import Value, reduced, scored, selected
from attncc.passes.protocol import Legality


@dataclass(frozen=True)
class Draft:
    """p(I, J)    = softmax_J( score( mean of q over I . mean of k over J ) )                  I, J: patches of a grid
    keep(i, j) = (I, J) is among the share 1 - `sparsity` of all pairs of the head with the largest p; or J has the
                 largest p of I; or i or j is text

    `grid`: tokens per side, slowest first; `patch`: tokens per side of a patch, dividing the grid; `text`: tokens
    behind the grid, which see and are seen by all. For calls whose rows are the keys."""

    name: ClassVar[str] = "draft"
    legality: ClassVar[Legality] = "approximate"
    grid: tuple[int, ...] = ()
    patch: tuple[int, ...] = ()
    sparsity: float = 0.75
    text: int = 0

    def __post_init__(self) -> None:
        if not self.grid or len(self.grid) != len(self.patch):
            raise ValueError("grid and patch name as many sides each")
        if any(t < 1 or g % t for g, t in zip(self.grid, self.patch, strict=True)):
            raise ValueError(f"patches of {by(self.patch)} do not divide a grid of {by(self.grid)}")
        if not 0 <= self.sparsity < 1 or self.text < 0:
            raise ValueError("sparsity is at least 0 and below 1, text at least 0")

    def __call__(self, p: Program, /) -> Program:
        return hide(p, Form(self))

    def applies(self, a: Attention) -> Reason | None:
        tokens = Const(prod(self.grid) + self.text)
        if a.i.extent != tokens or a.j.extent != tokens:
            return because("policy-other-grid", by(self.grid))
        if any(mentions(x, a.i.index) for x in members("and", a.mask)):
            return because("policy-masked-grid")
        return no_blocks(a)

    def keep(self, site: Hiding) -> Expr:
        a, b = site.attention, Blocks(site, 1, 1)
        rows, keys = (site.axis(name, Const(prod(self.grid) // prod(self.patch))) for name in "IJ")
        q, k = (site.load(x.tensor, x.index) for x in (a.q, a.k))
        x, _ = self._mean(site, "rows_mean", rows, a.i, q, TRUE)
        y, held = self._mean(site, "keys_mean", keys, a.j, k, b.seen(a.j.index))
        seen = lt(ZERO, held(keys.index))
        d = a.d.index
        p = scored(site, "p", rows, keys, a.d, x(rows.index, d), y(keys.index, d), b.score(), seen)
        value = p(rows.index, keys.index)
        share = const(1.0 - self.sparsity)
        pair = selected(site, "pair", (rows, keys), value, "fraction", share, seen=seen)
        best = selected(site, "best", (keys,), value, "count", seen=seen, rows=(rows,))
        tokens = Const(prod(self.grid))
        at = self._patch(a.i.index), self._patch(a.j.index)
        chosen = or_(pair(*at), best(*at))
        return or_(chosen, le(tokens, a.i.index), le(tokens, a.j.index)) if self.text else chosen

    def _mean(
        self, site: Hiding, name: str, patches: Axis, axis: Axis, x: Expr, seen: Expr
    ) -> tuple[Value, Value]:
        """(.., patch, d): the mean over the tokens of each patch that are there; and how many those are."""
        r = site.axis("r", Const(prod(self.patch)))
        token: dict[Expr, Expr] = {axis.index: self._token(patches.index, r.index)}
        seen = substitute(seen, token)
        mean = reduced(site, name, (patches, site.attention.d), r, "mean", substitute(x, token), seen)
        return mean, reduced(site, f"{name}_held", (patches,), r, "sum", ONE, seen)

    def _token(self, patch: Expr, r: Expr) -> Expr:
        """The r-th token of a patch, both counted with the last side fastest."""
        result: Expr = ZERO
        of_patches, of_tokens, stride = 1, 1, 1
        for side, size in reversed([*zip(self.grid, self.patch, strict=True)]):
            x = mod(floordiv(patch, Const(of_patches)), Const(side // size))
            y = mod(floordiv(r, Const(of_tokens)), Const(size))
            result = add(result, mul(add(mul(x, Const(size)), y), Const(stride)))
            of_patches, of_tokens, stride = of_patches * (side // size), of_tokens * size, stride * side
        return result

    def _patch(self, token: Expr) -> Expr:
        """The patch of a token; the last one's for text."""
        if self.text:
            token = minimum(token, Const(prod(self.grid) - 1))
        result: Expr = ZERO
        patches, stride = 1, 1
        for side, size in reversed([*zip(self.grid, self.patch, strict=True)]):
            x = floordiv(mod(floordiv(token, Const(stride)), Const(side)), Const(size))
            result = add(result, mul(x, Const(patches)))
            patches, stride = patches * (side // size), stride * side
        return result


def by(sides: tuple[int, ...]) -> str:
    return "x".join(map(str, sides))
