"""Program: named values, each made once by a node from values before it (single static assignment).

    size   n0
    input  x0: f32[2, n0, 64]
    ...
    step   a, a_lse = attention(q = x0, k = x1, v = x2; n0 = n0)
    step   y = rearrange(x = a; n0 = n0)
    give   y

Nodes know nothing of each other: each declares tensors and sizes of its own names, and a step says which values of the
program these are. So a node's text, by which its kernel is built and kept, is the same wherever the node stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from attncc.ir.affine import poly
from attncc.ir.attention import DTYPES, Tensor
from attncc.ir.evaluate import int_value
from attncc.ir.expr import Expr, Size, free, substitute
from attncc.ir.interpret import Result, size_table
from attncc.ir.node import Node, kind_of
from attncc.ir.verify import VerifyError, require


@dataclass(frozen=True)
class Step:
    """`results` are the names of the node's outputs, `arguments` the values that its tensors are, `sizes` what its
    sizes are, over those of the program; each in the order in which the node declares them."""

    results: tuple[str, ...]
    node: Node
    arguments: tuple[str, ...]
    sizes: tuple[Expr, ...] = ()

    def given(self) -> tuple[Tensor, ...]:
        """What the node gives, under the names and sizes of the program."""
        table: dict[Expr, Expr] = dict(zip(self.node.sizes, self.sizes, strict=True))
        every = kind_of(self.node).gives(self.node)
        return tuple(
            Tensor(name, t.dtype, tuple(substitute(n, table) for n in t.shape))
            for name, t in zip(self.results, every, strict=True)
        )


@dataclass(frozen=True)
class Program:
    """`inputs` declare the tensors that a call passes, in order, `sizes` the integers; `outputs` name the values given
    back."""

    sizes: tuple[Size, ...]
    inputs: tuple[Tensor, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]

    def values(self) -> dict[str, Tensor]:
        """Every value by its name, in order: the inputs, then what each step gives."""
        found = {t.name: t for t in self.inputs}
        for step in self.steps:
            found |= {t.name: t for t in step.given()}
        return found

    def with_nodes(self, nodes: Sequence[Node]) -> Program:
        """The program with another node in each step. They must read and give what those before did."""
        return replace(self, steps=tuple(replace(s, node=n) for s, n in zip(self.steps, nodes, strict=True)))


def verify_program(p: Program) -> Program:
    """`p` itself if it is well formed. Raises VerifyError, naming the step, otherwise."""
    values: dict[str, Tensor] = {}

    def define(t: Tensor, where: str) -> None:
        require(t.name.isidentifier(), f"{where}: {t.name!r} cannot be a name")
        require(t.name not in values, f"{where}: the value {t.name} is made twice")
        values[t.name] = t

    require(len({*p.sizes}) == len(p.sizes), "a size is declared twice")
    for t in p.inputs:
        require(t.dtype in DTYPES, f"the input {t.name} has the unknown dtype {t.dtype}")
        known = all(n.kind == "int" and free(n) <= {*p.sizes} for n in t.shape)
        require(known, f"the shape of the input {t.name} is integers over sizes")
        define(t, "inputs")
    for at, step in enumerate(p.steps):
        kind = kind_of(step.node)
        where = f"step {at} ({kind.title})"
        try:
            kind.verify(step.node)
        except VerifyError as error:
            raise VerifyError(f"{where}: {error}") from error
        _check_call(step, values, {*p.sizes}, where)
        for t in step.given():
            define(t, where)
    require(len(p.outputs) > 0, "a program gives something")
    for name in p.outputs:
        require(name in values, f"the output {name} is made by no step")
    return p


def _check_call(step: Step, values: Mapping[str, Tensor], sizes: set[Size], where: str) -> None:
    node = step.node
    require(len(step.sizes) == len(node.sizes), f"{where}: {len(step.sizes)} sizes for {len(node.sizes)}")
    require(len(step.arguments) == len(node.tensors), f"{where}: {len(step.arguments)} tensors for {len(node.tensors)}")
    require(len(step.results) == len(kind_of(node).gives(node)), f"{where}: it gives another number of values")
    for x in step.sizes:
        require(x.kind == "int" and free(x) <= sizes, f"{where}: {x!r} is not an integer over the program's sizes")
    table: dict[Expr, Expr] = dict(zip(node.sizes, step.sizes, strict=True))
    for name, t in zip(step.arguments, node.tensors, strict=True):
        value = values.get(name)
        if value is None:
            raise VerifyError(f"{where}: {t.name} is {name}, which no earlier step makes")
        require(value.dtype == t.dtype, f"{where}: {t.name} is {t.dtype}, {name} is {value.dtype}")
        shape = tuple(substitute(n, table) for n in t.shape)
        same = len(shape) == len(value.shape) and all(
            poly(x) == poly(y) for x, y in zip(shape, value.shape, strict=True)
        )
        require(same, f"{where}: {t.name} has the shape {list(shape)}, {name} has {list(value.shape)}")


def interpret_program(
    p: Program, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int] = (), *, compute: torch.dtype | None = None
) -> Result:
    """The outputs of `p` by name, each node by its interpreter. `compute=torch.float64` gives a reference.

    Raises ValueError if a tensor is missing or the number of sizes is wrong."""
    table = size_table(p, sizes)
    missing = [t.name for t in p.inputs if t.name not in tensors]
    if missing:
        raise ValueError(f"the program reads {', '.join(missing)}, which the call does not pass")
    values = {t.name: tensors[t.name] for t in p.inputs}
    for step in p.steps:
        node = step.node
        given = {t.name: values[name] for t, name in zip(node.tensors, step.arguments, strict=True)}
        kind = kind_of(node)
        found = kind.interpret(node, given, [int_value(x, table) for x in step.sizes], compute=compute)
        values |= {name: found[t.name] for name, t in zip(step.results, kind.gives(node), strict=True)}
    return {name: values[name] for name in p.outputs}


def program_of_node(node: Node) -> Program:
    """A program of one step, whose inputs, sizes and outputs are those of the node."""
    results = tuple(f"{t.name}_0" for t in kind_of(node).gives(node))
    inputs = tuple(t.name for t in node.tensors)
    return Program(node.sizes, node.tensors, (Step(results, node, inputs, node.sizes),), results)
