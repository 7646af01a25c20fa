"""The peak of memory of a call, all that it allocates included: torch's tensors, scratch of kernels and libraries.

On a CPU it is the high-water mark of the process's resident memory, which Linux keeps and lets the process reset; on a
CUDA device it is what torch's allocator counts. Elsewhere it is not known.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
#: What Linux takes for: set the high-water mark to what is resident now.
_RESET_MARK = "5"


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `call` holds at its peak beyond what is held before it, None where that cannot be known.

    Call it once before: what it allocates for good is not meant. Other threads of the process count too."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    try:
        _give_back()
        _CLEAR.write_text(_RESET_MARK)
        before = _resident("VmRSS")
        call()
        after = _resident("VmHWM")
    except OSError:
        return None
    return None if before is None or after is None else max(0, after - before)


def _give_back() -> None:
    """Have the C library give free memory back, so that taking it again counts."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(name: str) -> int | None:
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
