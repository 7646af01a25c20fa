"""Linear attentions that a kernel may take: measured against the model's own operations, and put into the graph.

Never slower, as for attention: with gradients wanted, forward and backward together are compared with what Inductor
makes of the model's own code; else the forward is, unless it is as fast as that code's matrix products alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from attncc import torch_private
from attncc.driver.baseline import Untimeable, hint, made_up
from attncc.driver.candidate import Choice
from attncc.driver.edit import Editor
from attncc.driver.site_groups import between
from attncc.driver.training import Training
from attncc.driver.training_selection import last_line, leaves_of, whole_step
from attncc.errors import EditError
from attncc.ir import Linear, print_linear
from attncc.ir.expr import loads
from attncc.ir.linear import LinearOutput
from attncc.ir.reasons import because
from attncc.kernels.build import Built, default_store
from attncc.kernels.linear import built_linear
from attncc.kernels.linear_gradient import built_linear_gradient
from attncc.patterns.graph import noticed, order_in_memory
from attncc.patterns.graph.facts import Facts
from attncc.patterns.linear.linear import Recognised, Result
from attncc.progress import step
from attncc.runtime.measure import TIE, Decision, compare, remembered, sampler_for, situation
from attncc.runtime.recent import Recent

_BUDGET_S = 0.15
_PRODUCTS = ("matmul", "bmm", "mm", "einsum", "baddbmm", "linalg_solve_triangular")
_decided = Recent[tuple[object, ...], Choice](256)


@dataclass(frozen=True)
class LinearSite:
    """What a site would become: its node with the outputs that are read, the text of that, and the kernels; `backward`
    where gradients are wanted."""

    site: Recognised
    final: Linear
    spec: str
    made: Built
    backward: Built | None

    @property
    def trains(self) -> bool:
        return self.backward is not None


def proposed(site: Recognised, facts: Facts, training: Training) -> LinearSite | None:
    """What a linear attention would become, None where only parts of it are known."""
    if not site.results:
        return None
    every: tuple[LinearOutput, ...] = ("out", "state")
    outputs = tuple(x for x in every if any(r.output == x for r in site.results))
    final = replace(site.linear, outputs=outputs)
    spec = print_linear(final)
    device = str(facts.value(site.node).device)
    trains = any(r.node in training.nodes for r in site.results)
    backward = built_linear_gradient(spec, device) if trains else None
    return LinearSite(site, final, spec, built_linear(spec, device), backward)


def chosen(x: LinearSite, facts: Facts, training: Training, *, measure: bool) -> Choice:
    """Whether a kernel takes the site."""
    if x.made.language == "torch":
        return Choice(False, None, because("linear-no-kernel", x.made.reason))
    if not measure:
        return Choice(True, None, because("measuring-off"))
    try:
        values = [facts.value(n) for n in x.site.tensors]
        sizes = [hint(s, facts) for s in x.site.sizes]
        shapes = tuple(int(s) for v in values for s in (*v.shape, *v.stride()))
        key = x.spec, shapes, tuple(sizes), x.trains, training.recomputed, torch.get_num_threads()
        if key not in _decided:
            _decided[key] = _measured(x, facts, training, sizes)
        return _decided[key]
    except (Untimeable, TypeError) as error:  # a size that only the data determines
        return Choice(False, None, because("linear-not-measured", str(error)))


def put(x: LinearSite, editor: Editor) -> None:
    """Put the operator in the place of the site's results. Raises EditError."""
    if len({n.node for n in x.site.results}) < len(x.site.results):
        raise EditError(because("graph-place-taken"))
    editor.put_nodes([r.node for r in x.site.results], x.site.tensors, x.site.sizes, partial(_nodes, x, editor))


def _nodes(x: LinearSite, editor: Editor, tensors: list[fx.Node], sizes: list[int | fx.Node]) -> list[fx.Node]:
    graph, facts = editor.graph, editor.facts
    call = graph.call_function(torch.ops.attncc.linear.default, (tensors, sizes, x.spec))
    outputs: dict[str, fx.Node] = {
        name: graph.call_function(operator.getitem, (call, n)) for n, name in enumerate(x.final.outputs)
    }

    def apply(target: Any, *args: Any) -> fx.Node:
        return graph.call_function(target, args)

    return [_as_result(x.final, r, outputs[r.output], facts, apply) for r in x.site.results]


def _as_result(a: Linear, r: Result, value: Any, facts: Facts, apply: Callable[..., Any]) -> Any:
    """An output as the model has it: its axes in the model's order, its dtype, its rows; its place in memory, where
    somebody could tell."""
    aten, like, dtype = torch.ops.aten, facts.value(r.node), facts.dtype(r.node)
    rows, columns = (a.i.name, a.e.name) if r.output == "out" else (a.d.name, a.e.name)
    names = [*(x.name for x in a.batch), rows, columns]
    if r.row is not None:
        value = apply(aten.select.int, value, len(names) - 2, r.row)
        names.remove(rows)
    order = [names.index(n) for n in r.axes if n]
    if order != sorted(order):
        value = apply(aten.permute.default, value, order)
    for at, n in enumerate(r.axes):
        if not n:
            value = apply(aten.unsqueeze.default, value, at)
    extent = {x.name: x.extent for x in a.axes}
    at = r.axes.index(rows) if r.output == "out" and rows in r.axes else None
    if at is not None and isinstance(like.shape[at], int):
        more = int(like.shape[at]) - int(getattr(extent[rows], "value", like.shape[at]))
        if more > 0:
            value = apply(aten.constant_pad_nd.default, value, [0, 0] * (len(r.axes) - 1 - at) + [0, more])
    if like.dtype != torch.float32 or dtype != like.dtype or a.dtype != "f32":
        value = apply(aten.to.dtype, value, dtype)
    if noticed(facts, r.node):
        lies = order_in_memory(like)
        value = apply(aten.contiguous.default, apply(aten.permute.default, value, lies))
        value = apply(aten.permute.default, value, [lies.index(d) for d in range(len(lies))])
    return value


def _measured(x: LinearSite, facts: Facts, training: Training, sizes: list[int]) -> Choice:
    device = facts.value(x.site.node).device
    tensors = _data(x, facts)
    module, inputs = _own(x, facts, tensors)
    flat = [int(s) for t in tensors for s in t.shape]
    kind = ("linear in training" if training.recomputed else "linear with gradients") if x.trains else "linear"
    sources = [x.made.source, *([] if x.backward is None else [x.backward.source])]
    where = situation(x.spec, [*flat, *sizes], device, (*sources, kind))

    def apply(target: Any, *args: Any) -> Any:
        return target(*args)

    def ours() -> list[torch.Tensor]:
        found = torch.ops.attncc.linear(tensors, sizes, x.spec)
        outputs: dict[str, Any] = dict(zip(x.final.outputs, found, strict=True))
        return [_as_result(x.final, r, outputs[r.output], facts, apply) for r in x.site.results]

    def found() -> Decision:
        if x.trains:
            return _with_gradients(ours, module, inputs, tensors, device, recomputed=training.recomputed)
        return _forward(ours, module, inputs, device)

    step(f"measuring {x.made.name}")
    decision = remembered(default_store(), where, ("attncc", "unfused"), found)
    return _choice(decision, trains=x.trains)


def _choice(decision: Decision, *, trains: bool) -> Choice:
    won = decision.winner == "attncc"
    own, other = decision.us.get("attncc"), decision.us.get("unfused")
    ratio = other / own if own and other else None
    if won and "products" in decision.us:
        return Choice(True, None, because("linear-products"), decision.us)
    if won:
        return Choice(True, ratio, because("linear-fused", decision.reason), decision.us)
    slower = because("linear-training", decision.reason) if trains else because("linear-slower", decision.reason)
    return Choice(False, ratio, slower, decision.us)


def _forward(
    ours: Callable[[], object], module: fx.GraphModule, inputs: list[torch.Tensor], device: torch.device
) -> Decision:
    sample = sampler_for(device)
    with torch.no_grad():
        floor = _products(module, inputs)
        if floor is not None:
            timed = compare({"attncc": ours, "products": floor}, _BUDGET_S / 3, sample)
            if not timed.failed and timed.us["attncc"] <= timed.us["products"] * (1 + TIE):
                return Decision("attncc", "beside its products alone", timed.us)
        step("compiling the unfused form for comparison")
        try:
            compiled = torch_private.inductor_apart(module, inputs)
        except Exception as error:  # whatever it is, the model's own operations would meet it too
            return Decision("attncc", f"not measured: Inductor fails on the model's own form ({last_line(error)})", {})
        timed = compare({"attncc": ours, "unfused": lambda: compiled(*inputs)}, _BUDGET_S, sample)
    return _settled(timed.us, timed.failed, TIE)


def _with_gradients(
    ours: Callable[[], Sequence[torch.Tensor]], module: fx.GraphModule, inputs: list[torch.Tensor],
    tensors: list[torch.Tensor], device: torch.device, *, recomputed: bool,
) -> Decision:  # fmt: skip
    sample = sampler_for(device)
    for t in tensors:
        if t.is_floating_point():
            t.requires_grad_()
    mine = whole_step(ours, leaves_of(tensors), nullcontext, recomputed)
    step("compiling the unfused form with its backward for comparison")
    try:
        compiled = torch_private.inductor_apart_with_backward(module, inputs)
    except Exception as error:  # as above
        return Decision("unfused", f"not measured: Inductor fails on the model's own form ({last_line(error)})", {})
    own = whole_step(lambda: compiled(*inputs), leaves_of(inputs), nullcontext, recomputed)
    timed = compare({"attncc": mine, "unfused": own}, _BUDGET_S, sample)
    return _settled(timed.us, timed.failed, -TIE)


def _settled(us: Any, failed: Any, slack: float) -> Decision:
    """A tie is enough in inference; in training a tie gains nothing."""
    own, their = us.get("attncc"), us.get("unfused")
    if own is None:
        return Decision("unfused", f"no kernel ran ({failed.get('attncc')})", us)
    if their is None:
        return Decision("attncc", f"not measured: its own form fails ({failed.get('unfused')})", us)
    shown = f"attncc {own:.1f} us, unfused {their:.1f} us"
    if own <= their * (1 + slack):
        return Decision("attncc", f"{their / own:.2f} times as fast: {shown}", us)
    return Decision("unfused", f"the kernel is {own / their:.2f} times slower: {shown}", us)


def _data(x: LinearSite, facts: Facts) -> list[torch.Tensor]:
    """Made-up tensors of the site's shapes and strides, on which nothing overflows."""
    generator = torch.Generator().manual_seed(0)
    decays = {y.tensor for y in loads(x.final.decay)}
    found: list[torch.Tensor] = []
    for n, t in zip(x.site.tensors, x.final.tensors, strict=True):
        made = made_up(facts.value(n), generator, facts.dtype(n))
        if made.is_floating_point():
            made = made.abs_().mul_(-0.1) if t.name in decays else made.mul_(0.1)
        found.append(made)
    return found


def _own(x: LinearSite, facts: Facts, tensors: list[torch.Tensor]) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """The model's own operations from the tensors to the results. Raises Untimeable."""
    known = dict(zip(x.site.tensors, tensors, strict=True))
    graph, root = fx.Graph(), torch.nn.Module()
    copies: dict[fx.Node, Any] = {}
    inputs: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(1)
    for n in between([r.node for r in x.site.results], {*known}, facts):
        value = facts.value(n)
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            held: Any = value.node
            if not held.has_hint():
                raise Untimeable("a number that only the data determines")
            copies[n] = held.hint
        elif n in known or n.op == "placeholder":
            copies[n] = graph.placeholder(n.name)
            inputs.append(known[n] if n in known else made_up(value, generator, facts.dtype(n)))
        elif n.op == "get_attr":
            setattr(root, n.name, getattr(facts.graph.owning_module, str(n.target)))
            copies[n] = graph.get_attr(n.name)
        else:
            target: Any = n.target
            args, kwargs = fx.map_arg((n.args, dict(n.kwargs)), copies.__getitem__)  # type: ignore[misc]
            copies[n] = graph.call_function(target, args, kwargs)
    graph.output(tuple(copies[r.node] for r in x.site.results))
    return fx.GraphModule(root, graph), inputs


def _products(module: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[[], object] | None:
    """The matrix products of the model's own code alone, on the tensors that they have there; None if there are
    none."""
    calls: list[Callable[[], object]] = []

    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            name = str(getattr(n.target, "_opname", ""))
            if n.op == "call_function" and name in _PRODUCTS:
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                calls.append(partial(n.target, *args, **kwargs))  # type: ignore[arg-type]
            return super().run_node(n)

    Noting(module).run(*inputs)

    def run() -> None:
        for call in calls:
            call()

    return run if calls else None
