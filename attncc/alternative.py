"""The unfused alternative of a site: the model's own operations from the operands to the output, ready to be timed.

What does not depend on queries, keys or values (masks, buckets) is computed beforehand: a model computes it once for
all layers. Operands are random, integer and boolean loads neutral, in the shapes and strides that the graph has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attncc import torch_private
from attncc.ir.expr import Const, Expr, Op, Size
from attncc.patterns.assemble import Lifted
from attncc.patterns.contractions import contraction
from attncc.patterns.facts import Facts
from attncc.patterns.flex import FLEX, WHOLE


@dataclass(frozen=True)
class Trial:
    """One site with data: the kernel's tensors and sizes, and the unfused computation of the same thing."""

    tensors: list[torch.Tensor]
    sizes: list[int]
    module: fx.GraphModule
    inputs: list[torch.Tensor]


class Untimeable(Exception):
    """The site cannot be run on made-up data; the message says why."""


def trial(site: Lifted, facts: Facts, *, seed: int = 0) -> Trial:
    """Made-up data and the unfused computation of a site. Raises Untimeable."""
    generator = torch.Generator().manual_seed(seed)
    known: dict[fx.Node, Any] = {}
    for n, dtype in zip(site.tensors, site.dtypes, strict=True):
        if dtype != facts.dtype(n):
            raise Untimeable("autocast")
        known[n] = made_up(facts.value(n), generator)
    module, inputs = _unfused(site, facts, known)
    return Trial([known[n] for n in site.tensors], [hint(x, facts) for x in site.sizes], module, inputs)


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


def _unfused(site: Lifted, facts: Facts, known: dict[fx.Node, Any]) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """The graph of what depends on the operands, and its inputs: operands and everything computed beforehand."""
    operands = {site.tensors[at] for at, t in enumerate(site.attention.tensors) if t.name in _operand_names(site)}
    needed = _slice(site.node, set(known))
    moving: set[fx.Node] = set(operands)
    for n in needed:
        if n not in known and any(a in moving for a in n.all_input_nodes):
            moving.add(n)
    timed = [n for n in needed if n in moving and n not in operands]
    if site.node not in timed:
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
    graph.output(copies[site.node])
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


def needed_elsewhere(site: Lifted, facts: Facts) -> fx.Node | None:
    """A user, outside the site, of scores or weights that the site computes on its way: they must exist then, and a
    fused kernel would compute them once more."""
    stops = set(site.tensors)
    inside = _slice(site.node, stops)
    names = _operand_names(site)
    moving = {n for n, t in zip(site.tensors, site.attention.tensors, strict=True) if t.name in names}
    scores: set[fx.Node] = set()
    for n in inside:
        if n in stops or not any(a in moving for a in n.all_input_nodes):
            continue
        moving.add(n)
        product = contraction(facts, n)
        made = product is not None and product.lhs in moving and product.rhs in moving
        if n is site.node or not (made or any(a in scores for a in n.all_input_nodes)):
            continue
        scores.add(n)
        for user in n.users:
            if user in facts.live and (user not in inside or user in stops):
                return user
    return None


def _operand_names(site: Lifted) -> set[str]:
    a = site.attention
    return {a.q.tensor, a.k.tensor, a.v.tensor}


def _slice(node: fx.Node, stops: set[fx.Node]) -> list[fx.Node]:
    """Everything `node` is computed from, back to `stops`, in graph order."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            if n not in stops:
                stack += n.all_input_nodes
    return [n for n in node.graph.nodes if n in seen]


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
