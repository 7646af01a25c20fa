"""Floats that are known at the call alone, as loads from tensors of one element: another value needs no other kernel.

    def attend(q, k, v, temperature: float): ...         temperature.item() -> a symbol zf
    q @ k.mT * temperature / (1 - temperature)           (1 - temperature) is computed once, in float64, and loaded

Dynamo wraps such a number in a tensor and unwraps it where it is used; what the model computes from numbers is then a
number too. Inductor takes it for what it is, and guards on no value, where an operation of two tensors has it as one.
"""

from __future__ import annotations

import torch
from torch import fx

from attncc.ir.expr import Load
from attncc.patterns.reader.rules import Facts

aten = torch.ops.aten


def call_number(f: Facts, n: fx.Node, reader: fx.Node) -> Load:
    """The number that `n` holds, as the operation `reader` takes it."""
    dtype = torch.float64 if f.dtype(reader) == torch.float64 else torch.float32
    device: torch.device = f.value(reader).device
    at = f.order[n] + 1

    def one() -> fx.Node:
        return f.make(aten.ones.default, ([],), 0, dtype=dtype, device=device)

    unit = f.make_once(("one", dtype, device), one)
    held = f.make_once(("number", n, dtype, device), lambda: f.make(aten.mul.Tensor, (unit, n), at))
    return Load(held.name, (), "float")
