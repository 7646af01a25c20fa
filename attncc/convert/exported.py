"""Exported programs with their attentions rewritten: a copy is edited, the program that was given stays as it is.

The graph of a program is what the driver reads and edits elsewhere, once its nodes say what Dynamo's would: an example
value each, parameters among the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch.export import ExportedProgram

from attncc.convert.tracing import traced_into
from attncc.driver.collected import Collected, collecting
from attncc.driver.graph_edits import copied
from attncc.driver.planning import PlannedSite, Planner
from attncc.driver.rewriting import rewrite
from attncc.frontends.targets import TargetError
from attncc.ir import Program
from attncc.ir.reasons import Reason
from attncc.report.site import HeadForm

#: What a call of the operator becomes: the nodes of its outputs, made at the insertion point of a graph.
Form = Callable[[fx.Graph, fx.Node], Sequence[fx.Node]]


@dataclass(frozen=True)
class Rewritten:
    """A program with its attentions rewritten, and what was found."""

    program: ExportedProgram
    found: Collected


def rewritten(
    program: ExportedProgram, *, kernels: bool = True, measure: bool = True, planner: Planner | None = None,
    form: Form | None = None,
) -> Rewritten:  # fmt: skip
    """The program with its attentions fused, as the backend does it. Without `kernels` all of them are, and nothing is
    built or measured. `form` gives each call of the operator another form.

    Raises PlanError where the plan is for another model, TargetError where an open dimension would be so no more."""
    gm = _copy(program.graph_module)
    inputs = _as_dynamo(gm, program)
    found = Collected()
    token = collecting.set(found)
    mode = detect_fake_mode([x for x in inputs if isinstance(x, torch.Tensor)])
    sizes = None if mode is None else mode.shape_env
    closed = set[Any]() if sizes is None else set(sizes.replacements)
    own = Collected()
    try:
        with tracing(TracingContext(mode)), torch.no_grad():
            rewrite(
                gm, inputs, own, measure=measure, planner=None if planner is None else _Given(planner, program),
                kernels=kernels,
            )  # fmt: skip
            _evaluate(gm, mode)
            _as_operators(gm)
            if form is not None:
                _reform(gm, form)
            _evaluate(gm, mode)
    finally:
        collecting.reset(token)
    if sizes is not None and (fixed := set(sizes.replacements) - closed):
        named = ", ".join(f"{x} = {sizes.replacements[x]}" for x in sorted(fixed, key=str))
        raise TargetError(f"the rewritten program would hold for the sizes of the example inputs alone: {named}")
    found.add(own)
    for inner in _modules(gm):
        inner.graph.lint()
        inner.recompile()
    return Rewritten(_program(gm, program), found)


class _Given:
    """A planner that sees a program's own parameters: those that it is read with hold no data."""

    def __init__(self, planner: Planner, program: ExportedProgram) -> None:
        self.planner, self.program = planner, program
        self.notes = planner.notes

    def begin(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        names = self.program.graph_signature.parameters
        self.planner.begin([torch.nn.Parameter(self.program.state_dict[n], requires_grad=False) for n in names])

    def take(self, site: PlannedSite, p: Program) -> Program | Reason | None:
        return self.planner.take(site, p)

    def timed(self, site: PlannedSite) -> bool:
        return self.planner.timed(site)

    def says(self, site: PlannedSite) -> str:
        return self.planner.says(site)

    def forms(self, site: PlannedSite) -> tuple[HeadForm, ...]:
        return self.planner.forms(site)

    def made(self, site: PlannedSite, taken: Program, final: Program, call: fx.Node) -> None:
        self.planner.made(site, taken, final, call)


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph module and of those in it, whose tensors are the same."""
    made = fx.GraphModule(gm, copied(gm.graph)[0])
    made.meta = dict(gm.meta)
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(made, name, _copy(child))
    for n in made.graph.nodes:
        n.meta = dict(n.meta)
    return made


def _as_dynamo(gm: fx.GraphModule, program: ExportedProgram) -> list[Any]:
    """Let the nodes say what Dynamo's would; the example values of the inputs."""
    for inner in gm.modules():
        for n in inner.graph.nodes if isinstance(inner, fx.GraphModule) else ():
            if "val" in n.meta:
                n.meta["example_value"] = n.meta["val"]
    parameters = program.graph_signature.inputs_to_parameters
    inputs: list[Any] = []
    for n in gm.graph.find_nodes(op="placeholder"):
        value = n.meta.get("val")
        if n.name in parameters and isinstance(value, torch.Tensor):
            with detect_fake_mode([value]) or torch.no_grad():
                value = torch.nn.Parameter(value, requires_grad=False)
            n.meta["example_value"] = value
        inputs.append(value)
    return inputs


def _modules(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """A graph module and those that its operators run."""
    return [x for x in gm.modules() if isinstance(x, fx.GraphModule)]


def _reform(gm: fx.GraphModule, form: Form) -> None:
    for inner in _modules(gm):
        for call in inner.graph.find_nodes(op="call_function", target=torch.ops.attncc.attention.default):
            with inner.graph.inserting_before(call):
                made = form(inner.graph, call)
            for user in list(call.users):
                user.replace_all_uses_with(made[user.args[1]])
                inner.graph.erase_node(user)
            inner.graph.erase_node(call)


def _as_operators(gm: fx.GraphModule) -> None:
    """What the driver put into a graph as methods and functions of torch becomes the operators that those call: an
    exported program holds nothing else."""
    for inner in _modules(gm):
        for n in list(inner.graph.nodes):
            if n.op != "call_method" and not (n.op == "call_function" and n.target is torch.tensor):
                continue
            with inner.graph.inserting_before(n):
                (made,) = traced_into(inner.graph, _call_of(n), n.all_input_nodes)
            made.meta.setdefault("val", n.meta["val"])
            n.replace_all_uses_with(made)
            inner.graph.erase_node(n)


def _call_of(n: fx.Node) -> Callable[..., Any]:
    def run(*values: Any) -> tuple[Any, ...]:
        known = dict(zip(n.all_input_nodes, values, strict=True))
        args, kwargs = fx.map_arg((n.args, dict(n.kwargs)), known.__getitem__)  # type: ignore[misc]
        call: Any = getattr(args[0], n.target) if isinstance(n.target, str) else n.target
        return (call(*(args[1:] if isinstance(n.target, str) else args), **kwargs),)

    return run


def _evaluate(gm: fx.GraphModule, mode: Any) -> None:
    """Every node says what it gives, as those of an exported program do."""
    for inner in _modules(gm):
        inner.graph.eliminate_dead_code()
        for n in inner.graph.nodes:
            example = n.meta.pop("example_value", None)
            if n.op in ("placeholder", "output", "get_attr") or "val" in n.meta:
                continue
            if example is None:
                args, kwargs = fx.map_arg((n.args, dict(n.kwargs)), lambda x: x.meta["val"])  # type: ignore[misc]
                with mode or nullcontext(), torch.no_grad():
                    call: Any = getattr(args[0], n.target) if isinstance(n.target, str) else n.target
                    example = call(*(args[1:] if isinstance(n.target, str) else args), **kwargs)
            n.meta["val"] = example


def _program(gm: fx.GraphModule, program: ExportedProgram) -> ExportedProgram:
    """The program around an edited graph, whose outputs may have other names."""
    before, after = (list(fx.map_arg(x.graph.output_node().args[0], lambda n: n)) for x in (program.graph_module, gm))  # type: ignore[call-overload]
    names = {
        old.name: new.name
        for old, new in zip(before, after, strict=True)
        if isinstance(old, fx.Node) and isinstance(new, fx.Node)
    }
    signature = program.graph_signature
    outputs = [replace(x, arg=_renamed(x.arg, names)) for x in signature.output_specs]
    entries = list(program.module_call_graph)
    whole = entries[0].signature
    if whole is not None:
        whole = replace(whole, outputs=[_renamed(x, names) for x in whole.outputs])
        entries[0] = replace(entries[0], signature=whole)
    return ExportedProgram(
        root=gm, graph=gm.graph, graph_signature=replace(signature, output_specs=outputs),
        state_dict=program.state_dict, range_constraints=program.range_constraints, module_call_graph=entries,
        example_inputs=program.example_inputs, constants=program.constants, verifiers=[program.verifier],
    )  # fmt: skip


def _renamed(x: Any, names: dict[str, str]) -> Any:
    name = getattr(x, "name", None)
    return replace(x, name=names[name]) if name in names else x
