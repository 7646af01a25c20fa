"""One attention of a benchmark: as IR text, as tensors, and in the spelling of its rivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from attncc.ir.evaluate import DTYPE_OF
from attncc.ir.streams import limit_of

Mod = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One attention. Tensors are q (B, HK * G, N, D), k and v (B, HK, M, D) and `extra` by name.

    `mask_mod` and `score_mod` are FlexAttention's spelling, given the extra tensors; the plain spelling uses them. In
    the text of the IR, SCALE, HEAD and DTYPE stand for what they are in this row. `by_head` says that each head has a
    mask of its own. `dropped` is the share of weights that training leaves out, by the `words` of each row."""

    name: str
    batch: int
    heads: int
    group: int
    rows: int
    keys: int
    d: int
    mask: str = "True"
    score: str = ""
    declared: tuple[str, ...] = ()
    extra: Callable[[torch.device], dict[str, torch.Tensor]] = lambda device: {}
    mask_mod: Callable[[dict[str, torch.Tensor]], Mod] | None = None
    score_mod: Callable[[dict[str, torch.Tensor]], Mod] | None = None
    causal: bool = False
    by_head: bool = False
    dtype: str = "bf16"
    dropped: float = 0.0

    @property
    def text(self) -> str:
        hq, scale, head = self.heads * self.group, repr(self.d**-0.5), f"hk * {self.group} + g"
        lines = [
            "attention",
            f"batch  b = {self.batch}, hk = {self.heads}, g = {self.group}",
            f"axis   i = {self.rows}, j = {self.keys}, d = {self.d}, e = {self.d}",
            f"tensor q: {self.dtype}[{self.batch}, {hq}, {self.rows}, {self.d}]",
            f"tensor k: {self.dtype}[{self.batch}, {self.heads}, {self.keys}, {self.d}]",
            f"tensor v: {self.dtype}[{self.batch}, {self.heads}, {self.keys}, {self.d}]",
            *(f"tensor {t.replace('DTYPE', self.dtype)}" for t in self.declared),
            *([f"tensor words: i32[{self.batch}, {hq}, {self.rows}, 2]"] if self.dropped else []),
            f"q      q[b, hk * {self.group} + g, i, d]",
            "k      k[b, hk, j, d]",
            "v      v[b, hk, j, e]",
            f"score  {(self.score or 's * SCALE').replace('HEAD', head).replace('SCALE', scale)}",
            f"mask   {self.mask.replace('HEAD', head)}",
            "norm   softmax",
            "empty  zero",
            f"weight {self._weight.replace('HEAD', head)}",
            "give   out",
            f"dtype  {self.dtype}",
        ]  # fmt: skip
        return "\n".join(lines)

    @property
    def _weight(self) -> str:
        if not self.dropped:
            return "w"
        word = "mix(words[b, HEAD, i, 0], words[b, HEAD, i, 1], j)"
        return f"w * where({word} < {limit_of(self.dropped)}, {1 / (1 - self.dropped)!r}, 0.0)"

    def words(self) -> torch.Tensor:
        """New ones, from torch's generator, as a model's step draws them."""
        return torch.randint(-(2**31), 2**31, (self.batch, self.heads * self.group, self.rows, 2), dtype=torch.int32)

    def tensors(self, device: torch.device) -> dict[str, torch.Tensor]:
        random = torch.Generator(device).manual_seed(0)
        dtype = DTYPE_OF[self.dtype]

        def normal(heads: int, length: int) -> torch.Tensor:
            shape = (self.batch, heads, length, self.d)
            return torch.randn(shape, generator=random, device=device).to(dtype)

        q = normal(self.heads * self.group, self.rows)
        types = {name: kind.partition("[")[0].strip() for name, _, kind in (t.partition(":") for t in self.declared)}
        drawn = {"words": self.words().to(device)} if self.dropped else {}
        extra = {n: t.to(DTYPE_OF[types[n].replace("DTYPE", self.dtype)]) for n, t in self.extra(device).items()}
        return {"q": q, "k": normal(self.heads, self.keys), "v": normal(self.heads, self.keys), **extra, **drawn}


def grid(row: Row, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """b, h, i, j in shapes that broadcast to (B, H, N, M)."""
    sizes = (row.batch, row.heads * row.group, row.rows, row.keys)
    b, h, i, j = (torch.arange(n, device=device) for n in sizes)
    return b.view(-1, 1, 1, 1), h.view(1, -1, 1, 1), i.view(1, 1, -1, 1), j.view(1, 1, 1, -1)


def mask_of(row: Row, t: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """The mask as a tensor that broadcasts to (B, H, N, M)."""
    if row.mask_mod is None:
        return None
    b, h, i, j = grid(row, t["q"].device)
    return row.mask_mod(t)(b, h if row.by_head else h[:, :1], i, j)


def visible_pairs(row: Row, t: dict[str, torch.Tensor]) -> int:
    """Pairs of a row and a key that see each other, over batch and heads; counted a slice of rows at a time."""
    if row.mask_mod is None:
        return row.batch * row.heads * row.group * row.rows * row.keys
    device, seen, step = t["q"].device, 0, max(1, (1 << 26) // row.keys)
    mod, heads = row.mask_mod(t), row.heads * row.group
    points = [(b, h) for b in range(row.batch if "length" in t else 1) for h in range(heads if row.by_head else 1)]
    j = torch.arange(row.keys, device=device).view(1, -1)
    for b, h in points:
        at = torch.tensor(b, device=device), torch.tensor(h, device=device)
        for start in range(0, row.rows, step):
            i = torch.arange(start, min(start + step, row.rows), device=device).view(-1, 1)
            seen += int(mod(*at, i, j).expand(len(i), row.keys).sum())
    return seen * (row.batch * heads // len(points))
