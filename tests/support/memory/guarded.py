"""Tensors of which only some rows can be read: any other touch ends the process with a signal."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable

import torch

_libc = ctypes.CDLL(None, use_errno=True)
_NOTHING = 0  # PROT_NONE


def guarded(x: torch.Tensor, readable: Iterable[int]) -> torch.Tensor:
    """A copy of `x` (.., rows, width) of which the pages are closed that hold no row of `readable`. The rows of one
    point of the leading dimensions must fill whole pages."""
    rows, stride = x.shape[-2], x.shape[-1] * x.element_size()
    if rows * stride % mmap.PAGESIZE:
        raise ValueError(f"{rows} rows of {stride} bytes do not fill pages of {mmap.PAGESIZE}")
    memory = mmap.mmap(-1, x.nbytes)
    copy = torch.frombuffer(memory, dtype=x.dtype).view(x.shape)
    copy.copy_(x)
    kept = {at // mmap.PAGESIZE for n in readable for at in (n * stride, (n + 1) * stride - 1)}
    pages = rows * stride // mmap.PAGESIZE
    for point in range(x.nbytes // (rows * stride)):
        for page in set(range(pages)) - kept:
            at = ctypes.c_void_p(copy.data_ptr() + (point * pages + page) * mmap.PAGESIZE)
            if _libc.mprotect(at, ctypes.c_size_t(mmap.PAGESIZE), _NOTHING):
                raise OSError(ctypes.get_errno(), "mprotect")
    return copy
