"""What `test_scatters.py` runs in a process of its own, as the fault that it looks for may take the process with it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

import attncc  # noqa: F401 - the backend of that name
from attncc import torch_private

Form = Callable[..., Tensor]


def outlook(x: Tensor, w: Tensor) -> Tensor:
    """Outlook attention: windows of values, weighed, and added up where they came from."""
    b, c, n, _ = x.shape
    windows = F.unfold(x, 3, padding=1, stride=2).reshape(b, 2, c // 2, 9, -1).permute(0, 1, 4, 3, 2)
    out = (w.softmax(-1) @ windows).permute(0, 1, 4, 3, 2).reshape(b, c * 9, -1)
    return F.fold(out, (n, n), 3, padding=1, stride=2)


def permuted(x: Tensor) -> Tensor:
    """Windows whose channels lie together."""
    b, rows, _, c = x.shape
    windows = (x * 2).permute(0, 3, 2, 1).reshape(b, 9 * c, rows)
    return F.fold(windows, (28, 28), 3, padding=1, stride=2)


def columns(x: Tensor, at: Tensor) -> Tensor:
    """The place depends on data along one loop, and the fault does not show."""
    return torch.zeros(x.shape[1], x.shape[0]).index_add(1, at, (x * 2).mT)


def given(name: str) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return {
        "outlook": lambda: (torch.randn(1, 64, 14, 14), torch.randn(1, 2, 49, 9, 9)),
        "permuted": lambda: (torch.randn(2, 196, 9, 32),),
        "columns": lambda: (torch.randn(64, 48), torch.randint(0, 64, (64,))),
    }[name]()


def inductor(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Inductor as attncc runs it."""
    return torch_private.inductor(gm, inputs, {}, warnings.warn)


def main(backend: Any, name: str) -> None:
    torch.set_num_threads(2)
    form, tensors = globals()[name], given(name)
    learned = [x.requires_grad_() for x in tensors if x.is_floating_point()]
    compiled = torch.compile(form, backend=backend)

    def both(run: Form) -> list[Tensor]:
        out = run(*tensors)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), learned)]

    for _ in range(3):
        torch.testing.assert_close(both(compiled), both(form), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(*tensors), form(*tensors), rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        main({"ours": inductor}.get(sys.argv[1], sys.argv[1]), sys.argv[2])
    print("notes", sum("outside of their memory" in str(w.message) for w in said))
