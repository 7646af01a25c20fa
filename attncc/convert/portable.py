"""Calls of attncc's operator as operators of torch itself: a program then runs where attncc is not installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from attncc.codegen.torch_portable import portable
from attncc.convert.tracing import traced_into
from attncc.ir import parse_attention


def portable_form(graph: fx.Graph, call: fx.Node) -> Sequence[fx.Node]:
    """The nodes of the outputs of a call of the operator, made by operators of torch."""
    tensors, sizes, spec = call.args
    a = parse_attention(str(spec))
    count = len(a.tensors)

    def run(*values: Any) -> list[torch.Tensor]:
        return portable(a, values[:count], values[count:])

    return traced_into(graph, run, [*tensors, *sizes])  # type: ignore[misc]
