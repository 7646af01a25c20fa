"""Attentions that policies are tried on: masks, groups, lengths and padding, with what each row may see."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attncc.ir import Attention, Program, interpret_program, parse_attention, print_attention, verify_program
from attncc.ir.evaluate import Evaluator, int_value
from attncc.ir.interpret import index_grid, size_table
from attncc.ir.program import program_of_node
from attncc.kernels.build import built
from attncc.passes.pipeline import Pipeline, standard
from attncc.passes.policies.hiding import Policy
from attncc.runtime.outputs import signature_of

B, D = 2, 8

#: The parts of a mask, what they read, and the same in torch: (data, b, i, n, m) -> what row i of sequence b sees.
MASKS: dict[str, str] = {
    "all": "",
    "causal": "j <= i + (m - n)",
    "padded": "j <= i + (m - n) and seen[b, j]",
    "documents": "j <= i + (m - n) and doc[b, i + (m - n)] == doc[b, j]",
    "placed": "j <= place[b, i]",
    "padded both ways": "seen[b, j]",
}


@dataclass(frozen=True)
class Situation:
    """Heads on groups of them, n rows and m keys, and a mask of `MASKS`; `padding` are the hidden keys in front."""

    mask: str
    heads: int = 4
    group: int = 1
    n: int = 37
    m: int = 37
    padding: tuple[int, ...] = (0, 9)
    dynamic: bool = True

    @property
    def lengths(self) -> tuple[str, str]:
        """Of rows and of keys, as the text of the attention has them: rows that are keys have one length."""
        if not self.dynamic:
            return str(self.n), str(self.m)
        return ("n", "m") if self.causal else ("n", "n")

    @property
    def sizes(self) -> list[int]:
        return [{"n": self.n, "m": self.m}[x] for x in dict.fromkeys(self.lengths)] if self.dynamic else []

    def attention(self) -> Attention:
        k = f"h // {self.group}" if self.group > 1 else "h"
        n, m = self.lengths
        mask = MASKS[self.mask] or "True"
        mask = mask if self.dynamic else mask.replace("(m - n)", str(self.m - self.n))
        read = {"seen": f"bool[{B}, {m}]", "doc": f"i64[{B}, {m}]", "place": f"i64[{B}, {n}]"}
        lines = [
            "attention", *([f"size   {', '.join(dict.fromkeys((n, m)))}"] if self.dynamic else []),
            f"batch  b = {B}, h = {self.heads}", f"axis   i = {n}, j = {m}, d = {D}, e = {D}",
            f"tensor q: f32[{B}, {self.heads}, {n}, {D}]",
            *(f"tensor {x}: f32[{B}, {self.heads // self.group}, {m}, {D}]" for x in "kv"),
            *(f"tensor {x}: {declared}" for x, declared in read.items() if f"{x}[" in MASKS[self.mask]),
            "q      q[b, h, i, d]", f"k      k[b, {k}, j, d]", f"v      v[b, {k}, j, e]",
            "score  s * 0.25", f"mask   {mask}", "norm   softmax", "empty  zero", "weight w",
            "give   out", "dtype  f32",
        ]  # fmt: skip
        return parse_attention("\n".join(lines) + "\n")

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        kv = self.heads // self.group
        shapes = {"q": (B, self.heads, self.n, D), "k": (B, kv, self.m, D), "v": (B, kv, self.m, D)}
        given = {x: torch.randn(s, generator=g) for x, s in shapes.items()}
        keys, front = torch.arange(self.m), torch.tensor(self.padding)[:, None]
        given["seen"] = (keys >= front).contiguous()
        given["doc"] = torch.stack([keys // 13, keys // 20])
        given["place"] = torch.arange(self.n) + (self.m - self.n) - torch.tensor([[0], [2]])
        names = [t.name for t in self.attention().tensors]
        return {x: given[x] for x in names}

    def visible(self, data: dict[str, Tensor], b: int, i: int) -> tuple[list[int], int, int]:
        """(keys that the model's mask leaves row i, its position, the start of its sequence)."""
        row = i + self.m - self.n
        if self.mask == "placed":
            row = int(data["place"][b, i])
        keys = [j for j in range(self.m) if "j <=" not in MASKS[self.mask] or j <= row]
        start = 0
        if "seen" in data:
            start = self.padding[b]
            keys = [j for j in keys if j >= start]
        if "doc" in data:
            own = [j for j in range(self.m) if data["doc"][b, j] == data["doc"][b, row]]
            start, keys = own[0], [j for j in keys if j in own]
        if not self.causal:  # a row that is padding stands where the sequence begins
            row = max(row, start)
        return keys, row - start, start

    @property
    def causal(self) -> bool:
        return "j <=" in MASKS[self.mask] or self.n == 1


SITUATIONS = [
    Situation("causal"), Situation("causal", group=2), Situation("causal", heads=8, group=8, n=21, m=45),
    Situation("causal", heads=1, n=1, m=50), Situation("padded"), Situation("padded", group=4, n=11, m=40),
    Situation("documents", group=2), Situation("documents", n=16, m=33), Situation("placed", n=5, m=64),
    Situation("all", heads=1, n=1, m=50, dynamic=False), Situation("padded both ways", n=1, m=40, dynamic=False),
    Situation("all"), Situation("padded both ways", group=2),
]  # fmt: skip


def applied(policy: Policy, a: Attention) -> Program:
    assert policy.applies(a) is None
    return Pipeline((policy,)).run(program_of_node(a))  # type: ignore[arg-type] - closed forms are passes


def kept(p: Program, data: dict[str, Tensor], s: Situation) -> Tensor:
    """bool[b, h, i, j]: what the attention of a program lets through."""
    start = {}
    *before, last = p.steps
    if before:
        ends = tuple(x.results[0] for x in before)
        found = interpret_program(replace(p, steps=tuple(before), outputs=ends), data, s.sizes)
        start = {t.name: found[t.name] for t in last.node.tensors if t.name in found}
    a = last.node
    assert isinstance(a, Attention)
    grid = index_grid((*a.batch, a.i, a.j), size_table(a, s.sizes), torch.device("cpu"))
    shape = [B, s.heads, s.n, s.m]
    return Evaluator(grid, {**data, **start}, torch.float32, checked=True)(a.mask).expand(shape)


def masked(data: dict[str, Tensor], s: Situation, mask: Tensor) -> Tensor:
    q, k, v = (data[x].double() for x in "qkv")
    k, v = (x.repeat_interleave(s.group, 1) for x in (k, v))
    scores = (q @ k.mT * 0.25).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


def run_kernels(made_by: Program, data: dict[str, Tensor], s: Situation) -> Tensor:
    """The output of a program after the passes, its attentions by their kernels and the rest by its interpreters."""
    p = verify_program(standard().run(made_by))
    values = dict(data)
    for step in p.steps:
        given = [values[x] for x in step.arguments]
        if isinstance(step.node, Attention):
            made = built(print_attention(step.node), "cpu")
            assert made.language == "cpp", made.reason
            table = dict(zip(p.sizes, s.sizes, strict=True))
            sizes = [int_value(x, {**table}) for x in step.sizes]
            outs = signature_of(print_attention(step.node)).allocate(given, sizes)
            made.kernel(given, sizes, outs)
            values |= dict(zip(step.results, outs, strict=True))
        else:
            one = replace(step, arguments=tuple(t.name for t in step.node.tensors))
            named_as_read = {t.name: x for t, x in zip(step.node.tensors, given, strict=True)}
            alone = replace(p, steps=(one,), inputs=step.node.tensors, outputs=step.results)
            values |= interpret_program(alone, named_as_read, s.sizes)
    return values[p.outputs[0]].reshape(B, s.heads, s.n, D)
