# ruff: noqa: E501, UP031 - spellings are listed a line each, however long
"""Random attention programs: modules in torch's own words, each spelled as some model might spell it.

A program is Python source, so that a failing one reads as what it is. Scores are tracked by the order of their axes
(`layout`), and everything that joins them (masks, biases) is made as (batch, head, query, key) and put in that order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")
Make = Callable[["Sizes", torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Batch, query heads, key heads, queries, keys, width of keys and of values."""

    b: int
    h: int
    hk: int
    n: int
    m: int
    d: int
    e: int


@dataclass
class Program:
    """`source` defines `forward(self, *inputs)`. `sites` is how many softmax-like sites it holds, `plain` whether they
    are attention and nothing stands in the way of fusing them."""

    sizes: Sizes
    inputs: dict[str, Make] = field(default_factory=dict)
    buffers: dict[str, Make] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    sites: int = 1
    plain: bool = True
    dynamic: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def source(self) -> str:
        head = f"def forward(self, {', '.join(self.inputs)}):"
        return "\n    ".join([head, *self.lines]) + "\n"

    def module(self, seed: int) -> nn.Module:
        random = torch.Generator().manual_seed(seed)
        scope: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "math": __import__("math")}
        exec(compile(self.source, "<program>", "exec"), scope)
        module = type("Model", (nn.Module,), {"forward": scope["forward"]})()
        for name, make in self.buffers.items():
            value = make(self.sizes, random)
            if name.startswith("p_"):
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
            else:
                module.register_buffer(name, value)
        return module.to(self.dtype)

    def data(self, sizes: Sizes, seed: int) -> list[torch.Tensor]:
        random = torch.Generator().manual_seed(seed + 1)
        made = [make(sizes, random) for make in self.inputs.values()]
        return [x.to(self.dtype) if x.is_floating_point() else x for x in made]


def normal(*dims: Callable[[Sizes], int] | int) -> Make:
    def make(s: Sizes, random: torch.Generator) -> torch.Tensor:
        return torch.randn([d if isinstance(d, int) else d(s) for d in dims], generator=random)

    return make


def integers(high: Callable[[Sizes], int], *dims: Callable[[Sizes], int] | int, low: int = 0) -> Make:
    def make(s: Sizes, random: torch.Generator) -> torch.Tensor:
        shape = [d if isinstance(d, int) else d(s) for d in dims]
        return torch.randint(low, max(high(s), low + 1), shape, generator=random)

    return make


def _b(s: Sizes) -> int: return s.b
def _n(s: Sizes) -> int: return s.n
def _m(s: Sizes) -> int: return s.m


class Writer:
    """Writes one program. `pick` chooses among its arguments."""

    def __init__(self, pick: Callable[..., Any]) -> None:
        self.pick = pick
        self.p: Program
        self.names = 0
        self.after = "{}"

    def maybe(self, one_in: int = 2) -> bool:
        return self.pick(*[False] * (one_in - 1), True)

    def line(self, text: str) -> None:
        self.p.lines.append(text)

    def label(self, text: str, *, plain: bool = True) -> None:
        self.p.labels.append(text)
        self.p.plain = self.p.plain and plain

    def fresh(self, text: str, name: str = "t") -> str:
        self.names += 1
        var = f"{name}{self.names}"
        self.line(f"{var} = {text}")
        return var

    def input(self, name: str, make: Make) -> str:
        self.p.inputs[name] = make
        return name

    def buffer(self, name: str, make: Make) -> str:
        self.p.buffers[name] = make
        return f"self.{name}"

    def write(self) -> Program:
        pick = self.pick
        hk = pick(1, 2)
        n = pick(1, 2, 5, 6, 7)
        self.square = pick(True, True, False)
        d = pick(1, 4, 8)
        sizes = Sizes(pick(1, 2, 3), hk * pick(1, 1, 2, 3), hk, n, n if self.square else pick(1, 3, 6, 8), d, pick(d, d, 4, 1))
        self.p = Program(sizes, dynamic=self.maybe(4))
        self.packed = self.square and sizes.hk == sizes.h and sizes.e == sizes.d and self.maybe(3)
        from random_models.forms import joint_heads, library, twin  # noqa: PLC0415

        self.p.dtype = pick(*[torch.float32] * 6, torch.bfloat16, torch.float16)
        kind = pick(*["scores"] * 8, "library", "joint")
        self._operands(grouped=kind != "library")
        if kind == "library":
            library(self)
        elif kind == "joint":
            joint_heads(self)
        else:
            self._before_scores()
            self._scores()
            self._changes_to_scores()
            if self.maybe(12):
                twin(self)
            weights = self._normalise()
            weights = self._changes_to_weights(weights)
            if self.p.dtype != torch.float32:
                weights = self.fresh(f"{weights}.to(v.dtype)", "w")
            self._product(weights)
        self._after()
        return self.p

    # operands: q, k, v as (batch, head, token, width)

    def _operands(self, *, grouped: bool) -> None:
        pick, s = self.pick, self.p.sizes
        if self.packed:
            self.input("x", normal(_b, _n, 3 * s.h * s.d))
            self.line("B, N = x.shape[0], x.shape[1]; M = N")
            self.label("packed")
            how = pick("chunk", "split", "unbind", "select", "slice")
            if how in ("chunk", "split", "slice"):
                w = s.h * s.d
                cut = {"chunk": "x.chunk(3, dim=-1)", "split": f"x.split({w}, dim=2)",
                       "slice": f"(x[..., :{w}], x[..., {w}:{2 * w}], x[..., {-w}:])"}[how]
                self.line(f"q, k, v = {cut}")
                for t in "qkv":
                    self.line(f"{t} = {self._heads(t, s.h, s.d, 'N')}")
            elif how == "unbind":
                self.line(f"q, k, v = x.view(B, N, 3, {s.h}, {s.d}).permute(2, 0, 3, 1, 4).unbind(0)")
            else:
                self.line(f"x = x.reshape(B, N, 3, {s.h}, {s.d}).transpose(1, 3)")
                self.line("q, k, v = x[:, :, 0], x[:, :, 1], x[:, :, 2]")
        else:
            self.input("x", normal(_b, _n, s.h * s.d))
            self.input("y", normal(_b, _m, s.hk * s.d))
            self.input("z", normal(_b, _m, s.hk * s.e))
            self.line("B, N, M = x.shape[0], x.shape[1], y.shape[1]")
            self.line(f"q = {self._heads('x', s.h, s.d, 'N')}")
            self.line(f"k = {self._heads('y', s.hk, s.d, 'M')}")
            self.line(f"v = {self._heads('z', s.hk, s.e, 'M')}")
        if self.maybe(6):
            which = pick("q", "k", "v", "q, k")
            for t in which.split(", "):
                self.line(f"{t} = {pick(f'{t}.contiguous()', f'{t}.clone()', f'{t} * 1.0', f'F.normalize({t}, dim=-1)')}")
        if self.maybe(8):
            self.label("rope")
            self.line("q, k = (torch.cat([-t[..., 1:], t[..., :1]], dim=-1) + t for t in (q, k))")
        if grouped:
            self._grouped()

    def _heads(self, t: str, h: int, d: int, length: str) -> str:
        return self.pick(
            f"{t}.view(B, {length}, {h}, {d}).transpose(1, 2)", f"{t}.reshape(B, -1, {h}, {d}).permute(0, 2, 1, 3)",
            f"torch.einsum('bnhd->bhnd', {t}.reshape(B, {length}, {h}, {d}))",
            f"{t}.unflatten(-1, ({h}, {d})).movedim(2, 1)",
            f"torch.stack({t}.split({d}, dim=-1), dim=1)",
        )  # fmt: skip

    def _grouped(self) -> None:
        s = self.p.sizes
        g = s.h // s.hk
        if g == 1:
            return
        self.label("grouped")
        how = self.pick("expand", "repeat_interleave", "index", "tile")
        for t in "kv":
            d = s.d if t == "k" else s.e
            self.line(f"{t} = " + {
                "expand": f"{t}[:, :, None].expand(B, {s.hk}, {g}, M, {d}).reshape(B, {s.h}, M, {d})",
                "repeat_interleave": f"{t}.repeat_interleave({g}, dim=1)",
                "index": f"{t}[:, torch.arange({s.h}) // {g}]",
                "tile": f"{t}.repeat(1, {g}, 1, 1)",
            }[how])  # fmt: skip

    def _before_scores(self) -> None:
        s = self.p.sizes
        if self.maybe(12):
            self.label("cache")
            self.buffer("cache", lambda s, r: torch.randn([s.b, s.h, 2 * s.m, s.d], generator=r))
            self.p.dynamic = False
            how = self.pick("slice", "index_copy", "copy")
            self.line({
                "slice": "self.cache[:, :, 1:1 + M] = k",
                "index_copy": "self.cache.index_copy_(2, torch.arange(M) + 1, k)",
                "copy": "self.cache.narrow(2, 1, M).copy_(k)",
            }[how])  # fmt: skip
            self.line("k = self.cache[:, :, 1:1 + M]")
            if self.maybe(3):
                self.line("k = k.clone(); self.cache.zero_()")
        if self.maybe(12):
            self.label("counter")
            self.buffer("length", lambda s, r: torch.tensor([1]))
            self.line(self.pick("self.length += 2", "self.length.add_(1)", "self.length.fill_(2)"))
            self.line("q = q * self.length")
            if self.maybe():
                self.line("self.length.mul_(3)")
        if s.d and self.maybe(14):
            self.label("in-place q")
            self.line(self.pick("q = q.clone(); q *= 0.5", "q = q.contiguous().clone().mul_(0.5)", "q = q + 0; q[..., 0] = 0"))

    # scores

    def _scores(self) -> None:
        s, pick = self.p.sizes, self.pick
        scale = pick("", "before", "after", "div", "rsqrt", "both", "numpy")
        c = s.d ** -0.5
        if scale == "before":
            self.line(pick(f"q = q * {c!r}", f"q = q / {s.d ** 0.5!r}"))
        if scale == "both":
            self.line(f"q = q * {c ** 0.5!r}; k = k * {c ** 0.5!r}")
        self.layout = pick("bhij", "bhij", "fij", "bhji", "bijh", "bihj")
        eq = pick("matmul", "matmul", "einsum", "einsum", "written")
        if eq == "written" and self.layout in ("bhij", "bihj") and s.d > 1:  # of one component it sums nothing
            self.line(self._written())
            return
        eq = "einsum" if eq == "written" else eq
        if self.layout == "bhij":
            self.line({"matmul": pick("s = q @ k.transpose(-1, -2)", "s = torch.matmul(q, k.mT)", "s = torch.matmul(q, k.permute(0, 1, 3, 2))", "s = (k @ q.transpose(2, 3)).transpose(-1, -2)"),
                       "einsum": "s = torch.einsum('bhid,bhjd->bhij', q, k)"}[eq])
        elif self.layout == "bhji":
            self.line(pick("s = k @ q.transpose(-1, -2)", "s = torch.einsum('bhid,bhjd->bhji', q, k)"))
        elif self.layout == "bijh":
            self.line("s = torch.einsum('bhid,bhjd->bijh', q, k)")
        elif self.layout == "bihj":
            self.line("s = torch.einsum('bihd,bhjd->bihj', q.transpose(1, 2), k)")
        else:
            for t, length, d in (("q", "N", s.d), ("k", "M", s.d), ("v", "M", s.e)):
                self.line(f"{t} = {t}.reshape({pick(f'B * {s.h}', '-1')}, {length}, {d})")
            how = pick("bmm", "baddbmm", "matmul")
            if how == "baddbmm":
                bias, beta = pick(("torch.empty(B * %d, N, M)" % s.h, 0), ("self.flat_bias", 1), ("self.flat_bias", 0.5))
                if beta:
                    self.buffer("p_flat", normal(1, 1, 1))
                    bias = f"self.p_flat.expand(B * {s.h}, N, M)"
                else:
                    bias = f"torch.zeros(B * {s.h}, N, M, dtype=q.dtype)"
                self.line(f"s = torch.baddbmm({bias}, q, k.transpose(1, 2), beta={beta}, alpha={pick(1.0, 0.3)})")
            else:
                self.line({"bmm": "s = torch.bmm(q, k.transpose(1, 2))", "matmul": "s = q @ k.mT"}[how])
        self.label(self.layout)
        text = {"after": f"s * {c!r}", "div": f"s / {s.d ** 0.5!r}", "rsqrt": f"s * torch.rsqrt(torch.tensor({float(s.d)}))",
                "numpy": f"s / math.sqrt({s.d})"}.get(scale)
        if text:
            inplace = self.maybe(5)
            self.line(f"s = {text}" if not inplace else pick(f"s *= {c!r}", f"s = s.mul_({c!r})", f"s.div_({1 / c!r})"))

    def fit(self, t: str) -> str:
        """A (b|1, h|1, i|1, j|1) tensor as something that broadcasts to the scores."""
        h = self.p.sizes.h
        return {
            "bhij": t, "bhji": f"{t}.transpose(-1, -2)", "bijh": f"{t}.permute(0, 2, 3, 1)", "bihj": f"{t}.transpose(1, 2)",
            "fij": f"{t}.expand(B, {h}, N, M).{self.pick('reshape', 'reshape', 'flatten')}({'0, 1' if False else ''}"
        }[self.layout] if self.layout != "fij" else self.pick(
            f"{t}.expand(B, {h}, N, M).reshape(B * {h}, N, M)", f"{t}.expand(B, {h}, N, M).flatten(0, 1)")

    def _written(self) -> str:
        """The scores element by element: a product, or a distance."""
        self.label("written out")
        q, k = ("q[:, :, :, None]", "k[:, :, None]") if self.layout == "bhij" else (
            "q.transpose(1, 2).unsqueeze(3)", "k.unsqueeze(1)")  # fmt: skip
        return self.pick(
            f"s = ({q} * {k}).sum(-1)", f"s = torch.mul({k}, {q}).sum(dim=-1)", f"s = ({q} * {k} * 0.7).mean(-1)",
            f"s = ({q} * {k} / 2).sum(-1, keepdim=True).squeeze(-1)", f"s = -({q} - {k}).square().sum(-1) * 0.2",
            f"s = ({k} - {q}).pow(2).mean(-1) / -2.0",
        )  # fmt: skip

    def _changes_to_scores(self) -> None:
        from random_models.spellings import CHANGES  # noqa: PLC0415

        for _ in range(self.pick(0, 1, 1, 2, 2, 3)):
            self.pick(*CHANGES)(self)

    @property
    def dim(self) -> int:
        return self.layout.index("j") - len(self.layout)

    def _normalise(self) -> str:
        from random_models.spellings import softmax  # noqa: PLC0415

        return softmax(self)

    def _changes_to_weights(self, w: str) -> str:
        from random_models.spellings import WEIGHTS  # noqa: PLC0415

        return self.pick(*WEIGHTS)(self, w) if self.maybe(3) else w

    def _product(self, w: str) -> None:
        s, pick = self.p.sizes, self.pick
        if self.maybe(16):
            self.label("v changed late")
            self.line(pick("v = v.clone(); v.add_(1.0)", "v = v * 2", "v = v.clone(); v[..., 0] = 1.0"))
        if self.maybe(20):
            self.label("k, q overwritten", plain=False)
            self.line(pick("k.zero_()", "q.add_(1.0)", "v = v.mul_(2.0)", "s.zero_()", "x.zero_()"))
        L = self.layout
        if L == "fij":
            self.line(f"o = {pick(f'torch.bmm({w}, v)', f'{w} @ v', f'(v.transpose(1, 2) @ {w}.transpose(1, 2)).transpose(1, 2)')}")
            self.line(f"o = {self.after.format('o')}")
            self.line(f"o = o.view(B, {s.h}, N, {s.e})")
        elif L == "bhij":
            self.line("o = " + pick(f"{w} @ v", f"torch.matmul({w}, v)", f"torch.einsum('bhij,bhje->bhie', {w}, v)",
                                    f"(v.transpose(-1, -2) @ {w}.transpose(-1, -2)).transpose(-1, -2)",
                                    f"({w}.unsqueeze(-1) * v.unsqueeze(2)).sum(3)"))
            self.line(f"o = {self.after.format('o')}")
        elif L == "bhji":
            self.line("o = " + pick(f"{w}.transpose(-1, -2) @ v", f"torch.einsum('bhji,bhje->bhie', {w}, v)",
                                    f"(v.mT @ {w}).mT"))
        else:
            self.line("o = " + pick(f"torch.einsum('{L},bhje->bhie', {w}, v)",
                                    f"{w}.permute({', '.join(str(L.index(c)) for c in 'bhij')}) @ v"))

    def _after(self) -> None:
        s, pick = self.p.sizes, self.pick
        if self.maybe(10):
            self.label("gate")
            self.line("o = o * torch.sigmoid(q.reshape(B, -1, N, q.shape[-1])[..., :1])")
        self.line(f"o = {pick(f'o.transpose(1, 2).reshape(B, N, {s.h * s.e})', 'o.permute(0, 2, 1, 3).flatten(2)', 'o')}")
        if self.maybe(12):
            self.label("late write")
            self.line(pick("x.zero_()", "k.mul_(0)", "v.fill_(3.0)", "o += 1", "o.mul_(2.0)"))
        self.line("return o" if not self.extra else f"return o, {', '.join(self.extra)}")

    @property
    def extra(self) -> list[str]:
        return self.__dict__.setdefault("_extra", [])
