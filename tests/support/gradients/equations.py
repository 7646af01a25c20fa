"""The equations of a gradient in the place of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from attncc.ir.attention_grad import AttentionGrad, interpret_grad


class Equations:
    """What a backward kernel of `g` gives, in plain torch, changed by `spoil`."""

    def __init__(self, g: AttentionGrad, spoil: Callable[[list[torch.Tensor]], object] = lambda x: None) -> None:
        self.g, self.spoil = g, spoil

    def __call__(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> None:
        count = len(self.g.attention.tensors)
        named = {t.name: x for t, x in zip(self.g.attention.tensors, tensors[:count], strict=True)}
        for out, value in zip(outputs, interpret_grad(self.g, named, tensors[count:], sizes), strict=True):
            out.copy_(value)
        self.spoil(list(outputs))
