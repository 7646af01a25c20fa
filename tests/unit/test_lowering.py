"""A program put into a graph computes what its interpreter does, with static and with symbolic sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import fx
from torch.testing import assert_close

import attncc.dynamo  # noqa: F401 - kernels for the operator
from attncc.driver.lowering import lower
from attncc.ir import Attention, Program, interpret_program, parse_program, verify_program

MERGED = """program
size   N
input  q: f32[2, N, 8]
input  k: f32[2, N, 8]
input  u: f32[2, N]
step   a, la = attention(q = q, k = k, v = k; N = N)
  size   N
  batch  b = 2
  axis   i = N, j = N, d = 8, e = 8
  tensor q: f32[2, N, 8]
  tensor k: f32[2, N, 8]
  tensor v: f32[2, N, 8]
  q      q[b, i, d]
  k      k[b, j, d]
  v      v[b, j, e]
  score  s * 0.25
  mask   j <= i
  norm   softmax
  empty  zero
  weight w
  give   out, lse
  dtype  f32
step   c, lc = attention(q = q, k = k, v = k; N = N)
  size   N
  batch  b = 2
  axis   i = N, j = N, d = 8, e = 8
  tensor q: f32[2, N, 8]
  tensor k: f32[2, N, 8]
  tensor v: f32[2, N, 8]
  q      q[b, i, d]
  k      k[b, j, d]
  v      v[b, j, e]
  score  s * 0.25
  mask   i + 1 <= j
  norm   softmax
  empty  zero
  weight w
  give   out, lse
  dtype  f32
step   m, l = merge(lse0 = la, lse1 = lc, out0 = a, out1 = c; N = N)
  size   N
  batch  b = 2, i = N
  axis   e = 8
  tensor lse0: f32[2, N]
  tensor lse1: f32[2, N]
  tensor out0: f32[2, N, 8]
  tensor out1: f32[2, N, 8]
  over   2
  how    softmax
  empty  0.0, 0.0
  give   out, lse
  dtype  f32
step   g = correct(m = m, u = u; N = N)
  size   N
  axis   b = 2, i = N, e = 8
  tensor m: f32[2, N, 8]
  tensor u: f32[2, N]
  value  max(m[b, i, e] * u[b, i], -0.5) + 1.0
  dtype  f32
step   y = rearrange(x = g; N = N)
  size   N
  axis   b = 2, i = N, e = 8
  tensor x: f32[2, N, 8]
  form   b i e -> i (b e)
  memory 1, 0
give   y, l
"""

TURNED = """program
size   N
input  x: f32[2, N, 8]
step   y = layout(x = x; N = N)
  size   N
  axis   b = 2, t = N, e = 8
  tensor x: f32[2, N, 8]
  along  t
  source -1 - t + N
step   z = correct(x = y; N = N)
  size   N
  axis   b = 2, t = N, e = 8
  tensor x: f32[2, N, 8]
  value  x[b, t, e] * float(t) + float(N)
  dtype  f32
give   z
"""


def inputs_of(p: Program, sizes: Sequence[int]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    table = dict(zip(p.sizes, sizes, strict=True))
    shape = [[table[n] if n in table else int(n.value) for n in t.shape] for t in p.inputs]  # type: ignore[index, attr-defined]
    return [torch.randn(s, generator=g) for s in shape]


def module_of(p: Program, examples: Sequence[Any]) -> fx.GraphModule:
    """A graph whose inputs are those of a program and then its sizes."""
    graph = fx.Graph()
    given = [graph.placeholder(t.name) for t in p.inputs]
    sizes = [graph.placeholder(f"size_{s.name}") for s in p.sizes]
    graph.output(tuple(lower(p, graph, given, sizes, examples)))
    graph.lint()
    return fx.GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize("text", [MERGED, TURNED], ids=["direct", "traced"])
def test_a_lowered_program_computes_what_it_means(text: str) -> None:
    p = verify_program(parse_program(text))
    run = module_of(p, [11])
    for size in (11,) if text is TURNED else (11, 24):
        tensors = inputs_of(p, [size])
        wanted = interpret_program(p, {t.name: x for t, x in zip(p.inputs, tensors, strict=True)}, [size])
        for got, name in zip(run(*tensors, size), p.outputs, strict=True):
            assert_close(got, wanted[name])
            assert got.stride() == wanted[name].stride()
    calls = [n for n in run.graph.nodes if n.target is torch.ops.attncc.attention.default]
    assert len(calls) == sum(isinstance(s.node, Attention) for s in p.steps)


@pytest.mark.parametrize("text", [MERGED, TURNED], ids=["direct", "traced"])
def test_symbols_stay_symbols(text: str) -> None:
    """Inside of a compilation the sizes are symbols: one graph serves all lengths."""
    p = verify_program(parse_program(text))
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, given: Sequence[Any]) -> Any:
        (out,) = gm.graph.find_nodes(op="output")
        places = [n for n in gm.graph.nodes if n.op == "placeholder"]
        tensors = [n for n in places if isinstance(n.meta["example_value"], torch.Tensor)]
        (size,) = [n for n in places if isinstance(n.meta["example_value"], torch.SymInt)]
        with gm.graph.inserting_before(out):
            made = lower(p, gm.graph, tensors, [size], [size.meta["example_value"]])
        out.args = ((*made, *out.args[0][len(made) :]),)
        gm.recompile()
        graphs.append(gm)
        return gm.forward

    def f(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert all(x.shape[1] == tensors[0].shape[1] for x in tensors)  # one symbol
        return tuple(x + 0 for x in tensors)

    run = torch.compile(f, backend=backend)
    for size in (11, 24):
        tensors = inputs_of(p, [size])
        for x in tensors:
            torch._dynamo.mark_dynamic(x, 1)
        wanted = interpret_program(p, {t.name: x for t, x in zip(p.inputs, tensors, strict=True)}, [size])
        for got, name in zip(run(*tensors), p.outputs, strict=False):
            assert_close(got, wanted[name])
    assert len(graphs) == 1
