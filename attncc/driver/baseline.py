"""The unfused alternative of sites: the model's own operations from the operands to the output, ready to be timed.

What does not depend on queries, keys or values (masks, buckets) is computed beforehand: a model computes it once for
all layers. Where gradients are wanted, what leads from a parameter to this site alone (a bias table of the layer) is
part of it. Operands are random, integer and boolean loads neutral, in the shapes and strides that the graph has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attncc import torch_private
from attncc.driver.site_groups import between, operands, sources
from attncc.ir.analysis import at_sizes
from attncc.ir.expr import Expr, Size, free
from attncc.patterns.graph.facts import Facts
from attncc.patterns.graph.operators import hint as example
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
    autocast: tuple[str, torch.dtype] | None = None

    @property
    def still(self) -> bool:
        """Whether the kernels take tensors that are there, so that nothing is computed on the way to them."""
        cast = any(
            self.known[n].dtype != dtype
            for site in self.sites
            for n, dtype in zip(site.tensors, site.dtypes, strict=True)
            if n in self.known
        )
        return not self.made and not cast

    def tensors(self) -> list[list[torch.Tensor]]:
        """The tensors of each kernel; what only the kernels need is computed on the way, as it will be in the model."""
        values = dict(self.known)
        for n in self.made:
            target: Any = n.target
            args, kwargs = fx.map_arg((n.args, dict(n.kwargs)), values.__getitem__)  # type: ignore[misc]
            values[n] = target(*args, **kwargs)
        return [[values[n].to(t) for n, t in zip(s.tensors, s.dtypes, strict=True)] for s in self.sites]

    def around(self) -> AbstractContextManager[object]:
        """The region of autocast that the sites are in."""
        if self.autocast is None:
            return nullcontext()
        device, dtype = self.autocast
        return torch.autocast(device, dtype)

    def run(self) -> tuple[torch.Tensor, ...]:
        """What the model's own operations give, one by one."""
        with self.around():
            return self.module(*self.inputs)


class Untimeable(Exception):
    """The site cannot be run on made-up data; the message says why."""


def trial(
    sites: Sequence[Lifted], facts: Facts, learned: Collection[fx.Node] = (), *, seed: int = 0
) -> Trial:  # fmt: skip
    """Made-up data and the unfused computation of some sites; tensors of the nodes `learned` require gradients. Raises
    Untimeable."""
    generator = torch.Generator().manual_seed(seed)
    known: dict[fx.Node, Any] = {}
    for site in sites:
        for n in sorted(sources(site.tensors, facts), key=facts.order.__getitem__):
            if n not in known:
                value = facts.value(n)
                known[n] = _data(n, facts, generator) if isinstance(value, torch.Tensor) else _number(value)
                if n in learned:
                    known[n].requires_grad_()
    regions = {autocast_at(site.node, facts) for site in sites}
    if len(regions) > 1:
        raise Untimeable("its parts are in different regions of autocast")
    made = [n for n in between([n for s in sites for n in s.tensors], set(known), facts) if n in facts.made]
    module, inputs = _unfused(sites, facts, known, learned)
    sizes = [[hint(x, facts) for x in s.sizes] for s in sites]
    return Trial(tuple(sites), known, sizes, made, module, inputs, regions.pop())


def autocast_at(n: fx.Node, facts: Facts) -> tuple[str, torch.dtype] | None:
    """The device type and dtype of the region of autocast that a node is in: one of the graph's, or one around it."""
    device = facts.value(n).device.type if isinstance(facts.value(n), torch.Tensor) else "cpu"
    if not torch.amp.is_autocast_available(device):
        return None
    regions = {None: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))}
    for x in facts.nodes:
        name = getattr(x.target, "__name__", "")
        if x is n:
            break
        if name == "_enter_autocast" and x.args[0] == device:
            regions[x] = (bool(x.args[2]), x.args[1] or torch.get_autocast_dtype(device))
        elif name == "_exit_autocast":
            regions.pop(x.args[0], None)
    enabled, dtype = list(regions.values())[-1]
    return (device, dtype) if enabled else None


def _data(n: fx.Node, facts: Facts, generator: torch.Generator) -> torch.Tensor:
    """A made-up tensor of a node, of the dtype that it has in the model."""
    return made_up(facts.value(n), generator, facts.dtype(n))


def looks(site: Lifted, facts: Facts) -> tuple[object, ...]:
    """What a trial of a site depends on beside the attention: the machine and its settings, how its tensors lie in
    memory, and its sizes. Raises Untimeable."""
    values = [facts.value(n) for n in site.tensors]
    layouts = [tuple(_number(s) for s in (*v.shape, *v.stride())) for v in values]
    return (*settings(values[0].device), *layouts, *(hint(x, facts) for x in site.sizes))


def made_up(fake: torch.Tensor, generator: torch.Generator, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor like a fake one, of its dtype or another: random floats, zeros for integers, true for booleans."""
    shape, stride = (tuple(_number(s) for s in xs) for xs in (fake.shape, fake.stride()))
    real = torch.empty_strided(shape, stride, dtype=dtype or fake.dtype, device=fake.device)
    if real.dtype.is_floating_point:
        return real.copy_(torch.randn(shape, generator=generator).to(real.dtype))
    return real.fill_(real.dtype == torch.bool)


def _number(x: Any) -> Any:
    if isinstance(x, torch.SymFloat):
        held: Any = x.node
        found = held.hint if held.has_hint() else None
    else:
        found = example(x)
    if found is None:
        raise Untimeable("a size that only the data determines")
    return found


def hint(x: Expr, facts: Facts) -> int:
    """The value that a size had when the graph was captured. Raises Untimeable where it had none."""
    known: dict[Size, int] = {}
    for size in (s for s in free(x) if isinstance(s, Size)):
        found = facts.hint(size)
        if found is None:
            raise Untimeable(f"no example value for {size!r}")
        known[size] = found
    return at_sizes(x, known)


def _unfused(
    sites: Sequence[Lifted], facts: Facts, known: dict[fx.Node, Any], learned: Collection[fx.Node]
) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """The graph of what depends on the operands, and its inputs: operands and everything computed beforehand."""
    given = {n for site in sites for n in sources(operands(site), facts)}
    results = list(dict.fromkeys(n for site in sites for n in (site.node, *(x.node for x in site.columns))))
    needed = between(results, set(known), facts)
    moving: set[fx.Node] = set(given)
    for n in needed:
        if n not in known and any(a in moving for a in n.all_input_nodes):
            moving.add(n)
    own = set(moving)
    for n in reversed(needed):  # what leads from a parameter to these sites alone is computed, and learned, for each
        if n in learned and n not in known and all(u in own for u in n.users if u in facts.live):
            own.add(n)
    moving = own
    timed = [n for n in needed if n in moving and n not in given]
    if not set(results) <= set(timed):
        raise Untimeable("its output does not depend on its operands")

    def value(n: fx.Node) -> Any:
        """What an argument is outside the timed graph."""
        if n not in known:
            with torch.no_grad():
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
            if n in learned and not held.requires_grad:
                held = known[n] = held.detach().requires_grad_()
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
            raise Untimeable("a number that only the data determines")
        return fake.node.hint
    if n.op == "placeholder":
        if not isinstance(fake, torch.Tensor):
            raise Untimeable(f"an input {n.name} that is not a tensor")
        return _data(n, facts, torch.Generator().manual_seed(0))
    if n.op == "get_attr":
        return getattr(facts.graph.owning_module, str(n.target))
    target: Any = n.target
    args, kwargs = fx.map_arg((n.args, dict(n.kwargs)), value)  # type: ignore[misc]
    return target(*args, **kwargs)
