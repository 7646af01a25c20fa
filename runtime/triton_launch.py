"""Calling Triton kernels: several sources of one attention, and which of them is the fastest for a shape.

    ATTNCC_TUNE=off    never measure; the first source is used
"""

from __future__ import annotations

import hashlib
import os
import statistics
from collections.abc import Callable, MutableMapping, Sequence
from types import ModuleType
from typing import Any, cast

import torch

from attncc.runtime.forks import Guard
from attncc.runtime.measure import on_cuda
from attncc.runtime.recent import Recent
from attncc.runtime.triton_module import load_module

#: (call) -> seconds. Raises what the call raises.
Timer = Callable[[Callable[[], object]], float]

_ROUNDS = 5
#: Buckets of shapes whose choice is at hand; `remember` has them all.
MOST_SHAPES = 1024


def median_on_cuda(call: Callable[[], object]) -> float:
    """Median of a few samples after one call to compile and one to warm up."""
    call()
    once = on_cuda(call, 1)
    repeats = max(1, min(100, round(1e-3 / max(once, 1e-7))))
    return statistics.median(on_cuda(call, repeats) for _ in range(_ROUNDS))


def tuning_allowed(device: torch.device) -> bool:
    """Measuring needs a GPU, and never happens while a CUDA graph is being captured: it would be captured too."""
    if os.environ.get("ATTNCC_TUNE", "").lower() in ("off", "0", "no"):
        return False
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


class TritonKernel:
    """One attention on GPUs. `sources` are modules of the Triton emitter, the best guess first, for the same attention.

    Which of them runs is decided once for each bucket of shapes (sizes to the next power of two) and device, and handed
    to `remember` under a key that names sources, bucket and device. Modules are loaded at first use."""

    def __init__(self, sources: Sequence[str], *, remember: MutableMapping[str, str] | None = None) -> None:
        if not sources:
            raise ValueError("a kernel needs at least one source")
        self._sources = tuple(sources)
        self._names = tuple(hashlib.sha256(s.encode()).hexdigest()[:16] for s in self._sources)
        self._remember = remember
        self._chosen = Recent[str, int](MOST_SHAPES)
        self._tuning = Guard()
        self._device_names: dict[torch.device, str] = {}
        self.timer: Timer = median_on_cuda

    def __call__(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> None:
        """Tensors, sizes and outputs in the order of the attention; outputs have its logical dimensions."""
        device = outputs[0].device
        at = self._choice(tensors, sizes, outputs, device) if len(self._sources) > 1 else 0
        self._launch(at, tensors, sizes, outputs, device)

    def module(self, at: int = 0) -> ModuleType:
        """The loaded module of a source, to be looked at."""
        return load_module(self._sources[at])

    def _launch(
        self,
        at: int,
        tensors: Sequence[torch.Tensor],
        sizes: Sequence[int],
        outputs: Sequence[torch.Tensor],
        device: torch.device,
    ) -> None:
        launch = self.module(at).launch
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                launch(tensors, sizes, outputs)
        else:
            launch(tensors, sizes, outputs)

    def _choice(
        self,
        tensors: Sequence[torch.Tensor],
        sizes: Sequence[int],
        outputs: Sequence[torch.Tensor],
        device: torch.device,
    ) -> int:
        where = f"{self._device_name(device)}/{','.join(str(_bucket(n)) for n in sizes)}"
        if where in self._chosen:
            return self._chosen[where]
        key = f"triton/{self._digest}/{where}"
        known = self._remember.get(key) if self._remember is not None else None
        if known in self._names:
            self._chosen[where] = self._names.index(known)
            return self._chosen[where]
        if not tuning_allowed(device):
            return 0  # not kept: a later call may measure
        with self._tuning():
            if where not in self._chosen:
                self._chosen[where] = self._fastest(tensors, sizes, outputs, device)
                if self._remember is not None:
                    self._remember[key] = self._names[self._chosen[where]]
        return self._chosen[where]

    @property
    def _digest(self) -> str:
        return hashlib.sha256("".join(self._names).encode()).hexdigest()[:16]

    def _device_name(self, device: torch.device) -> str:
        if device not in self._device_names:
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            self._device_names[device] = name.replace("/", "-")
        return self._device_names[device]

    def _fastest(
        self,
        tensors: Sequence[torch.Tensor],
        sizes: Sequence[int],
        outputs: Sequence[torch.Tensor],
        device: torch.device,
    ) -> int:
        """The index of the fastest source that runs. Raises what the first one raised if none does."""
        seconds: dict[int, float] = {}
        first: Exception | None = None
        for at in range(len(self._sources)):
            try:
                seconds[at] = self.timer(lambda at=at: self._launch(at, tensors, sizes, outputs, device))
            except Exception as error:  # too much shared memory, or a compiler's failure: the next one may do
                first = first or error
        if not seconds:
            assert first is not None
            raise first
        return min(seconds, key=lambda at: seconds[at])


def _bucket(n: int) -> int:
    """The next power of two, 0 for 0."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def capability_of(device: torch.device) -> str:
    """"sm_90" or "gfx942", as configurations are asked for."""
    properties: Any = cast(Any, torch.cuda).get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
