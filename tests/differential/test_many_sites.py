"""Many different sites in one model: what is shared between equal ones is not shared with others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncc.dynamo import Collected, collecting

FAST = {"inductor": False, "measure": False}


class Layers(nn.Module):
    """Layers that take turns: windowed or not, 2 or 4 heads, with a graph break in the middle."""

    def __init__(self, layers: int, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        half = len(self.qkv) // 2
        x = self.part(x, range(half))
        torch._dynamo.graph_break()
        return self.part(x, range(half, 2 * half))

    def part(self, x: Tensor, which: range) -> Tensor:
        n = x.shape[1]
        distance = torch.arange(n)[:, None] - torch.arange(n)[None, :]
        for at in which:
            window, heads = (5, n)[at % 2], (2, 4)[at // 2 % 2]
            q, k, v = self.qkv[at](x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            scores = (q @ k.mT) * q.shape[-1] ** -0.5
            hidden = (distance < 0) | (distance >= window)
            x = x + (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return x


@torch.no_grad()
def test_layers_in_turn_and_two_dtypes() -> None:
    """16 layers of 4 kinds over a graph break, compiled for one dtype and then for another in one process."""
    model, x = Layers(16).eval(), torch.randn(2, 24, 32)
    torch._dynamo.reset()
    texts: dict[torch.dtype, list[str]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        found = Collected()
        token = collecting.set(found)
        try:
            model, given = model.to(dtype), x.to(dtype)
            got = torch.compile(model, backend="attncc", options=FAST)(given)
        finally:
            collecting.reset(token)
        exact = model.double()(given.double())
        own = model.to(dtype)(given)
        error, rounding = (own - exact).abs().max(), torch.finfo(dtype).eps * exact.abs().max()
        assert (got - exact).abs().max() <= 2 * error + 2 * rounding
        assert [s.status for s in found.sites] == ["fused"] * 16
        texts[dtype] = [s.ir or "" for s in found.sites]
        for at, text in enumerate(texts[dtype]):
            assert ("b1 = 2" if at // 2 % 2 == 0 else "b1 = 4") in text
            assert ("i - 4" in text or "i < j + 5" in text or "j + 4" in text) == (at % 2 == 0), text
            assert text == texts[dtype][at % 4]
    assert set(texts[torch.float32]).isdisjoint(texts[torch.bfloat16])
