"""Calling Triton kernels: several sources of one attention, and which of them is the fastest for a shape.

    ATTNCC_TUNE=off    never measure; the first source is used
"""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
from collections.abc import Callable, MutableMapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any, cast

import torch

from attncc.runtime.forks import Guard
from attncc.runtime.measure import on_cuda
from attncc.runtime.recent import Recent
from attncc.runtime.triton_module import load_module

Tensors = Sequence[torch.Tensor]
#: (call) -> seconds. Raises what the call raises.
Timer = Callable[[Callable[[], object]], float]
#: (tensors, sizes, outputs) -> what is wrong with the outputs, None if they are right, empty where nothing can be told.
Check = Callable[[Tensors, Sequence[int], Tensors], str | None]
Run = Callable[[Tensors, Sequence[int], Tensors], None]

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
    to `remember` under a key that names sources, bucket and device. Modules are loaded at first use.

    With `check`, what a source gives is looked at in its first call on a device, and what was found is remembered. A
    source that is wrong is not used again and `report`ed; where none is left, what `otherwise` makes runs."""

    def __init__(
        self, sources: Sequence[str], *, remember: MutableMapping[str, str] | None = None, check: Check | None = None,
        report: Callable[[str], object] = str, otherwise: Callable[[], Run] | None = None,
    ) -> None:  # fmt: skip
        if not sources:
            raise ValueError("a kernel needs at least one source")
        self._sources = tuple(sources)
        self._names = tuple(hashlib.sha256(s.encode()).hexdigest()[:16] for s in self._sources)
        self._remember = remember
        self._check, self._report = check, report
        self._other = None if otherwise is None else cache(otherwise)
        self._found: dict[tuple[torch.device, int], str] = {}
        self._chosen = Recent[str, int](MOST_SHAPES)
        self._tuning = Guard()
        self._device_names: dict[torch.device, str] = {}
        self.timer: Timer = median_on_cuda

    def __call__(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> None:
        """Tensors, sizes and outputs in the order of the attention; outputs have its logical dimensions."""
        device = outputs[0].device
        while True:
            at = self._choice(tensors, sizes, outputs, device) if len(self._sources) > 1 else 0
            if self._barred(at, device):
                if self._other is None:
                    raise RuntimeError(f"no kernel of this attention is right: {self._found[device, at]}")
                self._other()(tensors, sizes, outputs)
                return
            self._launch(at, tensors, sizes, outputs, device)
            if self._right(at, tensors, sizes, outputs, device):
                return
            self._chosen.clear()

    def _right(self, at: int, tensors: Tensors, sizes: Sequence[int], outputs: Tensors, device: torch.device) -> bool:
        """Whether a call may be believed: it was checked, now or before, or nothing can be told yet."""
        if self._check is None or (device, at) in self._found:
            return True
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return True  # whoever captures ran it before
        why = self._check(tensors, sizes, outputs)
        if why == "":
            return True
        self._keep(at, device, "right" if why is None else why)
        if why is not None:
            self._report(f"Triton made a kernel that is wrong on {self._device_name(device)}, which is not used: {why}")
        return why is None

    def _barred(self, at: int, device: torch.device) -> bool:
        """Whether a source is known to be wrong."""
        if self._check is None:
            return False
        if (device, at) not in self._found and self._remember is not None:
            known = self._remember.get(self._checked(at, device))
            if known is not None:
                self._found[device, at] = known
        return self._found.get((device, at), "right") != "right"

    def _keep(self, at: int, device: torch.device, found: str) -> None:
        self._found[device, at] = found
        if self._remember is not None:
            self._remember[self._checked(at, device)] = found

    def _checked(self, at: int, device: torch.device) -> str:
        """The key of what a check found."""
        triton = sys.modules.get("triton")
        return f"triton checked/{self._names[at]}/{self._device_name(device)}/{getattr(triton, '__version__', '')}"

    def module(self, at: int = 0) -> ModuleType:
        """The loaded module of a source, to be looked at."""
        return load_module(self._sources[at])

    def _launch(
        self,
        at: int,
        tensors: Tensors,
        sizes: Sequence[int],
        outputs: Tensors,
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
        tensors: Tensors,
        sizes: Sequence[int],
        outputs: Tensors,
        device: torch.device,
    ) -> int:
        usable = [at for at in range(len(self._sources)) if not self._barred(at, device)] or [0]
        where = f"{self._device_name(device)}/{','.join(str(_bucket(n)) for n in sizes)}"
        if where in self._chosen:
            return self._chosen[where]
        key = f"triton/{self._digest}/{where}"
        known = self._remember.get(key) if self._remember is not None else None
        if known in self._names and self._names.index(known) in usable:
            self._chosen[where] = self._names.index(known)
            return self._chosen[where]
        if not tuning_allowed(device):
            return usable[0]  # not kept: a later call may measure
        with self._tuning():
            if where not in self._chosen:
                self._chosen[where] = self._fastest(usable, tensors, sizes, outputs, device)
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
        usable: Sequence[int],
        tensors: Tensors,
        sizes: Sequence[int],
        outputs: Tensors,
        device: torch.device,
    ) -> int:
        """The index of the fastest of the `usable` sources that runs. Raises what the first one raised if none does."""
        seconds: dict[int, float] = {}
        first: Exception | None = None
        for at in usable:
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
