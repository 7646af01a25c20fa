"""Running a program by itself: attentions by their kernels, other nodes by their interpreters or by Inductor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch
from torch import fx

from attncc import torch_private
from attncc.driver.lowering import keys_of, lower
from attncc.ir import Attention, Expr, Program, kind_of, print_attention
from attncc.ir.evaluate import int_value
from attncc.runtime.kept import run_beside

Values = dict[str, torch.Tensor]


def run(p: Program, values: Mapping[str, torch.Tensor], sizes: Mapping[Expr, int]) -> list[torch.Tensor]:
    """The outputs of `p`, one operation after another; `values` are its inputs by name."""
    known = dict(values)
    for step in p.steps:
        given = [known[x] for x in step.arguments]
        extents = [int_value(x, sizes) for x in step.sizes]
        kind = kind_of(step.node)
        if isinstance(step.node, Attention):
            found = torch.ops.attncc.attention(given, extents, print_attention(step.node))
        else:
            by_name = dict(zip((t.name for t in step.node.tensors), given, strict=True))
            made = kind.interpret(step.node, by_name, extents)
            found = [made[t.name] for t in kind.gives(step.node)]
        known |= dict(zip(step.results, found, strict=True))
    return [known[x] for x in p.outputs]


def compiled(
    p: Program, values: Mapping[str, torch.Tensor], sizes: Mapping[Expr, int], caches: Collection[str] = ()
) -> Callable[[Mapping[str, torch.Tensor]], object]:
    """`p` as it runs in a model, for tensors like `values`: what is no attention is compiled by Inductor. `caches`:
    inputs that have boxes beside them; each call is as one that writes to their first key."""
    graph = fx.Graph()
    inputs = [graph.placeholder(t.name) for t in p.inputs]
    extents = [sizes[s] for s in p.sizes]
    first = graph.call_function(torch.zeros, (1,), {"dtype": torch.int64}) if caches else None
    kept = {name: first for name in caches if name in {keys_of(step) for step in p.steps}}
    graph.output(tuple(lower(p, graph, inputs, extents, extents, kept=kept)))
    module = fx.GraphModule(torch.nn.Module(), graph)
    made = torch_private.inductor_apart(module, [values[t.name] for t in p.inputs])

    def call(given: Mapping[str, torch.Tensor]) -> object:
        return run_beside([given[name] for name in kept], lambda: made(*(given[t.name] for t in p.inputs)))

    return call


def up_to_attention(p: Program) -> Program:
    """The part of a program that its only attention is computed by, which gives the attention's output; inputs that it
    does not read are left out. Raises ValueError where there is another number of attentions."""
    (at,) = [n for n, step in enumerate(p.steps) if isinstance(step.node, Attention)]
    needed: set[str] = {*p.steps[at].arguments}
    steps = [p.steps[at]]
    for step in reversed(p.steps[:at]):
        if needed & {*step.results}:
            steps.insert(0, step)
            needed |= {*step.arguments}
    outputs = (p.steps[at].results[_attention(p.steps[at].node).outputs.index("out")],)
    return replace(p, inputs=tuple(t for t in p.inputs if t.name in needed), steps=tuple(steps), outputs=outputs)


def _attention(node: object) -> Attention:
    assert isinstance(node, Attention)
    return node


