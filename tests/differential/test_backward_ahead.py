"""Before a graph that trains runs, its backward kernels are built beside those of the forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attncc.driver import backend
from attncc.kernels import gradients


def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first = (q @ k.mT * 0.3).softmax(-1) @ v
    return (first @ k.mT * 0.3).softmax(-1) @ v  # the same attention once more


def compiled(*, learns: bool) -> None:
    torch._dynamo.reset()
    given = [torch.randn(2, 2, 40, 16).requires_grad_(learns) for _ in range(3)]
    options = {"inductor": False, "measure": False}
    torch.compile(model, backend=backend.attncc_backend, options=options)(*given)


def test_each_backward_is_built_once_with_the_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[tuple[str, ...]] = []
    own = gradients.built_backward
    monkeypatch.setattr(gradients, "built_backward", lambda a, names, d: built.append(names) or own(a, names, d))
    monkeypatch.setattr("attncc.driver.site_record.described", lambda *_: ("", None))  # asks for it to be shown
    compiled(learns=False)
    assert built == []
    compiled(learns=True)
    assert len(built) == 1 and len(built[0]) == 3
