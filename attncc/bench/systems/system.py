"""What a row of the systems is: a model that uses the mechanism, what attncc must make of it, what its authors say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

#: exact: found in a model and compiled as it is. policy: an approximation that a plan asks for. trained: compiled where
#: the model has the weights. pattern: attention without a softmax over keys. none: nothing to compile.
Kind = Literal["exact", "policy", "trained", "pattern", "none"]
Made = tuple[nn.Module, tuple[Tensor, ...]]


@dataclass(frozen=True)
class System:
    """One spelling of a row of the table. `make(full)` gives a model and its inputs, of few tokens or of the sizes that
    are measured. Its graph has `attentions` and `linear` attentions, and places that are left alone, for reasons with
    the codes `left`. `trains`: gradients are part of what the system does. `form` is the policy that a plan asks for,
    of every head. `flex` computes the same with FlexAttention. `claim` is what the authors measured, on their machines,
    `gap` what is not the same here."""

    number: int
    name: str
    spelling: str
    kind: Kind
    make: Callable[[bool], Made]
    attentions: int = 0
    linear: int = 0
    left: tuple[str, ...] = ()
    trains: bool = False
    form: str = ""
    flex: Callable[[nn.Module], Callable[..., Tensor]] | None = None
    claim: str = ""
    gap: str = ""

    @property
    def title(self) -> str:
        return f"{self.number} {self.name} ({self.spelling})"


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    """Tensors of normal numbers, the same in every call."""
    by = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=by) for shape in shapes)


def settled(model: nn.Module, *inputs: Tensor) -> Made:
    """A model whose weights are the same in every call, none of them zero, ready to infer."""
    by = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            if not x.is_floating_point():
                continue
            if name.endswith("running_var"):
                x.copy_(torch.rand(x.shape, generator=by) + 0.5)
            elif x.dim() > 1:
                x.copy_(torch.randn(x.shape, generator=by) * (x[0].numel() ** -0.5))
            else:
                x.copy_(torch.randn(x.shape, generator=by) * 0.2 + (1.0 if "norm" in name else 0.1))
    return model.eval(), inputs


def heads_of(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, heads * d)"""
    return x.transpose(1, 2).flatten(2)
