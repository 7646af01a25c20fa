"""Inductor's accumulating scatters on CPUs, which up to torch 2.13 write outside of their buffers: private torch API,
like `torch_private`.

Where values that are read across their rows are added up at places that depend on both loops (`F.fold` of permuted
windows), Inductor tiles the two, and the loop inside a tile advances the place twice (pytorch/pytorch#191837):

    out[.. + 256 * x0 + 256 * x0_inner] += ..      what is meant
    out[.. + 256 * x0 + 512 * x0_inner] += ..      what is generated, where more than one thread computes

Results are wrong and other memory is overwritten. What attncc has Inductor compile is generated as it is meant; for
other backends nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch

NOTE = (
    f"Inductor of torch {torch.__version__} lets some sums over places of a tensor (fold) write outside of"
    " their memory on CPUs; here they were generated right"
)

_told: ContextVar[Callable[[str], object] | None] = ContextVar("attncc_scatters", default=None)


def sound(generate: Callable[..., Any], told: Callable[[str], object]) -> Callable[..., Any]:
    """`generate`, which generates code for a graph, without the fault; `told` is given a note where it would have
    been."""
    if not _faulty():
        return generate

    def run(*args: Any, **kwargs: Any) -> Any:
        _correct()
        token = _told.set(told)
        try:
            return generate(*args, **kwargs)
        finally:
            _told.reset(token)

    return run


def _faulty() -> bool:
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) < (2, 14)


@cache
def _correct() -> None:
    """Let the generator move a place along a tile once, inside `sound`; elsewhere it does what it does."""
    from torch._inductor import config  # noqa: PLC0415 - Inductor takes a second to import
    from torch._inductor.codegen.cpp import CppTile2DKernel, CppVecKernel  # noqa: PLC0415 - as above

    kernel, settings = _any(CppTile2DKernel), _any(config)
    plain = kernel.store

    def store(self: Any, name: str, index: Any, value: Any, mode: str | None = None) -> None:
        told = _told.get()
        several = settings.cpp.dynamic_threads or self.num_threads != 1
        place = self.rename_indexing(index)
        twice = several and place.has(self.itervars[self.outer_idx]) and not self.need_vec_transpose(place)
        if told is None or mode != "atomic_add" or not twice:
            plain(self, name, index, value, mode)
            return
        told(NOTE)
        _any(CppVecKernel).store(self, name, index, value, mode)  # which itself moves the place along the tile

    kernel.store = store


def _any(x: object) -> Any:
    return x
