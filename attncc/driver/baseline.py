"""The unfused alternative of sites: the model's own operations from the operands to the output, ready to be timed.

What does not depend on queries, keys or values (masks, buckets) is computed beforehand: a model computes it once for
all layers. Operands are random, integer and boolean loads neutral, in the shapes and strides that the graph has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attncc import torch_private
from attncc.driver.site_groups import between, operands, sources
from attncc.ir.expr import Const, Expr, Op, Size
from attncc.patterns.graph.facts import Facts
from attncc.patterns.site.assemble import Lifted
from attncc.patterns.softmax.flex import FLEX, WHOLE
from attncc.runtime.measure import settings


@dataclass(frozen=True)
class Trial:
    """Sites with data: the tensors and sizes of each one's kernel, and the unfused computation of the same thing."""

    sites: tuple[Lifted, ...]
    known: dict[fx.Node, Any]
    sizes: list[list[int]]
    made: list[fx.Node]
    module: fx.GraphModule
    inputs: list[torch.Tensor]

    def tensors(self) -> list[list[torch.Tensor]]:
        """The tensors of each kernel; what only the kernels need is computed on the way, as it will be in the model."""
        values = dict(self.known)
        for n in self.made:
            target: Any = n.target
            args, kwargs = fx.map_arg((n.args, dict(n.kwargs)), values.__getitem__)  # type: ignore[misc]
            values[n] = target(*args, **kwargs)
        return [[values[n] for n in site.tensors] for site in self.sites]


class Untimeable(Exception):
    """The site cannot be run on made-up data; the message says why."""


def trial(sites: Sequence[Lifted], facts: Facts, *, seed: int = 0) -> Trial:
    """Made-up data and the unfused computation of some sites. Raises Untimeable."""
    generator = torch.Generator().manual_seed(seed)
    known: dict[fx.Node, Any] = {}
    for site in sites:
        if any(dtype != facts.dtype(n) for n, dtype in zip(site.tensors, site.dtypes, strict=True)):
            raise Untimeable("autocast")
        for n in sorted(sources(site.tensors, facts), key=facts.order.__getitem__):
            if n not in known:
                value = facts.value(n)
                known[n] = made_up(value, generator) if isinstance(value, torch.Tensor) else _number(value)
    made = [n for n in between([n for s in sites for n in s.tensors], set(known), facts) if n in facts.made]
    module, inputs = _unfused(sites, facts, known)
    return Trial(tuple(sites), known, [[hint(x, facts) for x in s.sizes] for s in sites], made, module, inputs)


def looks(site: Lifted, facts: Facts) -> tuple[object, ...]:
    """What a trial of a site depends on beside the attention: the machine and its settings, how its tensors lie in
    memory, and its sizes. Raises Untimeable."""
    values = [facts.value(n) for n in site.tensors]
    layouts = [tuple(_number(s) for s in (*v.shape, *v.stride())) for v in values]
    return (*settings(values[0].device), *layouts, *(hint(x, facts) for x in site.sizes))


def made_up(fake: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A tensor like a fake one: random floats, zeros for integers, true for booleans."""
    shape, stride = (tuple(_number(s) for s in xs) for xs in (fake.shape, fake.stride()))
    real = torch.empty_strided(shape, stride, dtype=fake.dtype, device=fake.device)
    if fake.dtype.is_floating_point:
        return real.copy_(torch.randn(shape, generator=generator).to(fake.dtype))
    return real.fill_(fake.dtype == torch.bool)


def _number(x: Any) -> int:
    if isinstance(x, torch.SymInt):
        if not x.node.has_hint():
            raise Untimeable("a size that only the data decides")
        return int(x.node.hint)
    return int(x)


def hint(x: Expr, facts: Facts) -> int:
    """The value that a size had when the graph was captured."""
    if isinstance(x, Const):
        return int(x.value)
    if isinstance(x, Op):
        a, *rest = (hint(y, facts) for y in x.args)
        table: dict[str, Callable[..., int]] = {
            "add": int.__add__, "sub": int.__sub__, "mul": int.__mul__, "floordiv": int.__floordiv__,
            "mod": int.__mod__, "neg": int.__neg__, "min": min, "max": max,
        }  # fmt: skip
        return table[x.name](a, *rest)
    assert isinstance(x, Size)
    for n in facts.graph.nodes:
        value = facts.value(n)
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        for s in sizes:
            if isinstance(s, torch.SymInt) and s.node.has_hint() and facts.size(s) is x:
                return int(s.node.hint)
    raise Untimeable(f"no example value for {x!r}")


def _unfused(
    sites: Sequence[Lifted], facts: Facts, known: dict[fx.Node, Any]
) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """The graph of what depends on the operands, and its inputs: operands and everything computed beforehand."""
    given = {n for site in sites for n in sources(operands(site), facts)}
    results = list(dict.fromkeys(site.node for site in sites))
    needed = between(results, set(known), facts)
    moving: set[fx.Node] = set(given)
    for n in needed:
        if n not in known and any(a in moving for a in n.all_input_nodes):
            moving.add(n)
    timed = [n for n in needed if n in moving and n not in given]
    if not set(results) <= set(timed):
        raise Untimeable("its output does not depend on its operands")

    def value(n: fx.Node) -> Any:
        """What an argument is outside the timed graph."""
        if n not in known:
            known[n] = _evaluate(n, facts, value)
        return known[n]

    graph, root = fx.Graph(), torch.nn.Module()
    copies: dict[fx.Node, Any] = {}
    inputs: list[torch.Tensor] = []
    for n in timed:
        if n.target is FLEX:
            known.update(_block_tables(n, facts, value))
    for n in dict.fromkeys(a for t in timed for a in t.all_input_nodes if a not in timed):
        held = copies[n] = value(n)
        if isinstance(held, torch.Tensor):
            copies[n] = graph.placeholder(n.name)
            inputs.append(held)
        elif isinstance(held, fx.GraphModule):
            setattr(root, n.name, held)
    for n, held in copies.items():
        if isinstance(held, fx.GraphModule):
            copies[n] = graph.get_attr(n.name)
    for n in timed:
        args, kwargs = fx.map_arg((n.args, dict(n.kwargs)), copies.__getitem__)  # type: ignore[misc]
        target: Any = n.target
        copies[n] = graph.call_function(target, args, kwargs)
    graph.output(tuple(copies[n] for n in results))
    return fx.GraphModule(root, graph), inputs


def _block_tables(n: fx.Node, facts: Facts, value: Callable[[fx.Node], Any]) -> dict[fx.Node, torch.Tensor]:
    """The tables of a flex_attention's block mask, made from its function as the model makes them: data made up for
    them would hide every block."""
    arguments: Any = n.args
    q, k, _, _, blocks, _, _, _, extra = arguments
    *_, rows, columns, function = blocks
    if rows >= WHOLE and columns >= WHOLE:
        return {}
    batch, heads, *_ = facts.value(blocks[2]).shape
    captured = [value(x) if isinstance(x, fx.Node) else x for x in extra]
    body = value(function)
    sizes = [_number(s) for s in (batch, heads, facts.value(q).shape[-2], facts.value(k).shape[-2])]

    def mask(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return body(b, h, i, j, *captured)

    made = torch_private.block_tables(mask, sizes, (rows, columns), facts.value(q).device)
    return {x: table for x, table in zip(blocks[2:-3], made, strict=True) if isinstance(x, fx.Node)}


def _evaluate(n: fx.Node, facts: Facts, value: Callable[[fx.Node], Any]) -> Any:
    fake = facts.value(n)
    if isinstance(fake, torch.SymInt | torch.SymFloat | torch.SymBool):
        if not fake.node.has_hint():
            raise Untimeable("a number that only the data decides")
        return fake.node.hint
    if n.op == "placeholder":
        if not isinstance(fake, torch.Tensor):
            raise Untimeable(f"an input {n.name} that is no tensor")
        return made_up(fake, torch.Generator().manual_seed(0))
    if n.op == "get_attr":
        return getattr(facts.graph.owning_module, str(n.target))
    target: Any = n.target
    args, kwargs = fx.map_arg((n.args, dict(n.kwargs)), value)  # type: ignore[misc]
    return target(*args, **kwargs)
