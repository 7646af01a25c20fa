"""attncc, an attention compiler for PyTorch: `torch.compile(model, backend="attncc")`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attncc.driver.backend import attncc_backend as backend
    from attncc.driver.explanation import explain, explain_program

__version__ = "0.1.0"
__all__ = ["__version__", "backend", "explain", "explain_program"]

_LAZY = {
    "backend": ("attncc.driver.backend", "attncc_backend"),
    "explain": ("attncc.driver.explanation", "explain"),
    "explain_program": ("attncc.driver.explanation", "explain_program"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'attncc' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)
