"""What a report's times hold for: the machine, its settings, and the versions."""

from __future__ import annotations

import platform
from typing import Any

import torch

from attncc.kernels.build import target_of
from attncc.runtime.measure import settings
from attncc.version import __version__


def machine() -> dict[str, Any]:
    """Processor, threads, instruction set and precision of float32 products; the GPU and its capability where there is
    one."""
    cpu = torch.device("cpu")
    processor, threads, precision = settings(cpu)
    found: dict[str, Any] = {
        "processor": processor, "threads": threads, "instruction_set": target_of(cpu).arch,
        "float32_precision": precision,
    }  # fmt: skip
    if torch.cuda.is_available():
        gpu = torch.device("cuda")
        name, _, precision = settings(gpu)
        found |= {"gpu": name, "gpu_capability": target_of(gpu).arch, "gpu_float32_precision": precision}
    return found


def versions() -> dict[str, str]:
    return {"attncc": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
