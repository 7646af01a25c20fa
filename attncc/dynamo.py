"""The backend under the name by which `torch.compile` and other programs reach it; it lives in `attncc.driver`.

Asking for it is when what Dynamo does for it begins: importing this changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attncc.driver import backend
from attncc.driver.backend import Collected, collecting
from attncc.torch_private.compiling import trace_through_breaks

if TYPE_CHECKING:
    from attncc.driver.backend import attncc_backend

__all__ = ["Collected", "attncc_backend", "collecting"]


def __getattr__(name: str) -> Any:
    if name != "attncc_backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    trace_through_breaks(backend.attncc_backend)
    return backend.attncc_backend
