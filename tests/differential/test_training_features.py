"""What training loops do around a model: tied parameters, accumulated gradients, autocast and scaled losses.

Gradients of a compiled model are within twice eager's own error against float64, and a rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attncc.driver import backend

WORDS, WIDTH, HEADS, LENGTH = 50, 64, 4, 70


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.v = self.k  # one projection for keys and values
        self.bias = nn.Embedding(16, HEADS)  # by distance, in buckets
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        at = torch.arange(x.shape[1])
        bias = self.bias((at[:, None] - at).clamp(0, 15)).permute(2, 0, 1)
        scores = q @ k.mT * self.temperature * 0.25 + bias
        scores = scores.masked_fill(at > at[:, None], float("-inf"))
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return x @ self.embedding.weight.T  # tied to the embedding


def gradients(
    dtype: torch.dtype, compiled: bool, around: Callable[[], AbstractContextManager[object]], scaled: bool
) -> dict[str, Tensor]:
    """The gradients of two batches that are added up."""
    torch.manual_seed(0)
    model = Model().to(dtype)
    call: Callable[[Tensor], Tensor] = model
    if compiled:
        torch._dynamo.reset()
        options = {"inductor": False, "measure": False}
        call = torch.compile(model, backend=backend.attncc_backend, options=options)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for n in range(2):
        tokens = torch.randint(0, WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(n))
        with around():
            loss = F.cross_entropy(call(tokens).flatten(0, 1).to(torch.promote_types(dtype, torch.float32)),
                                   tokens.roll(-1, 1).flatten()) / 2  # fmt: skip
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def autocast() -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(("around", "scaled"), [(nullcontext, False), (autocast, True)], ids=["plain", "scaled"])
def test_gradients_are_as_good_as_eagers(around: Callable[[], AbstractContextManager[object]], scaled: bool) -> None:
    found = backend.Collected()
    token = backend.collecting.set(found)
    try:
        got = gradients(torch.float32, True, around, scaled)
    finally:
        backend.collecting.reset(token)
    assert [s.status for s in found.sites] == ["fused", "fused"], found.sites
    assert all("kernel" in s.backward for s in found.sites) or found.sites[0].language == "torch"
    eager = gradients(torch.float32, False, around, scaled)
    exact = gradients(torch.float64, False, nullcontext, False)
    assert set(got) == set(exact) and "blocks.0.bias.weight" in got and "blocks.1.temperature" in got
    unit = 2.0**-8 if scaled else 2.0**-22
    for name, want in exact.items():
        size = float(want.square().mean().sqrt())
        own, error = (float((x[name] - want).square().mean().sqrt()) for x in (eager, got))
        assert error <= 2 * own + unit * size, f"{name}: {error / size}, eager {own / size}"
