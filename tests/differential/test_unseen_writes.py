"""Masks that a module keeps, changed between calls in ways that leave no trace: the next call sees the new mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attncc.kernels.skip_tables

N = 256
#: More than a mask was ever left unread for, having been found the same.
CALLS = 70
EYE = torch.eye(N, dtype=torch.bool)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many small calls take the longer the more threads meet after each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def masks(floats: bool) -> list[torch.Tensor]:
    """Three that show something, so that tables are made of them, and one that does not."""
    i = torch.arange(N)
    random = torch.rand(N, N, generator=torch.Generator().manual_seed(0)) > 0.5
    found = [(i[:, None] >= i), (i[:, None] - i).abs() < 99, i[:, None] <= i, random | EYE]
    return [torch.zeros(N, N).masked_fill(~m, -torch.inf) for m in found] if floats else found


class InBuffer(nn.Module):
    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("m", mask)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.m)


class InParameter(InBuffer):
    def __init__(self, mask: torch.Tensor) -> None:
        nn.Module.__init__(self)
        self.m = nn.Parameter(mask, requires_grad=False)


class InAttribute(InBuffer):
    def __init__(self, mask: torch.Tensor) -> None:
        nn.Module.__init__(self)
        self.m = mask


class InClosure(nn.Module):
    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.forward = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        self.__dict__["m"] = mask


def _by_numpy(m: torch.Tensor, new: torch.Tensor) -> None:
    m.detach().numpy()[...] = new.numpy()


WRITES: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "data": lambda m, new: m.data.copy_(new),
    "a new data": lambda m, new: setattr(m, "data", new.clone()),
    "NumPy": _by_numpy,
    "storage": lambda m, new: m.untyped_storage().copy_(new.untyped_storage()),
    "DLPack": lambda m, new: torch.from_dlpack(m.detach()).copy_(new),
    "set_": lambda m, new: m.data.set_(new.clone()),
    "in place": lambda m, new: m.detach().copy_(new),
}


@pytest.mark.parametrize("floats", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("kind", [InBuffer, InParameter, InAttribute, InClosure])
def test_every_write_is_seen(kind: type[nn.Module], floats: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attncc.kernels.skip_tables, "WORTHWHILE", 1)
    torch.manual_seed(0)
    first, *others = masks(floats)
    model = kind(first)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="attncc", options={"measure": False, "inductor": False})
    q, k, v = torch.randn(3, 1, 4, N, 16)
    with torch.no_grad():
        for at, (name, write) in enumerate(WRITES.items()):
            for _ in range(CALLS):
                result = compiled(q, k, v)
            torch.testing.assert_close(result, model(q, k, v), rtol=1e-4, atol=1e-5, msg=f"before {name}")
            write(model.m, others[at % len(others)])
            torch.testing.assert_close(compiled(q, k, v), model(q, k, v), rtol=1e-4, atol=1e-5, msg=f"after {name}")
