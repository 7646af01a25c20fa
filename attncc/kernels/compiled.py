"""Compiled C++ kernels: found in the store or made, and checked before their first use on a machine.

What a check found is kept with the measurements, under the library, the processor and the compiler: it costs once. A
kernel that was wrong is put aside and not made again until the compiler is another one.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from attncc.kernels.first_use import Check, CheckedAtFirst, Untried
from attncc.progress import step
from attncc.runtime.compilers import timeout_s
from attncc.runtime.cpp import CompileError, CppKernel, CppKernelError, CppToolchain, Ranks, processor, whole
from attncc.runtime.measure import device_name
from attncc.runtime.notices import notice
from attncc.runtime.op import Kernel
from attncc.runtime.store import Store, StoreError, key

#: `off` leaves out the check at first use.
CHECK = "ATTNCC_CHECK"
_LIBRARY = "kernel.so"
#: Seconds that a builder may take beside its compiler, before others go ahead without it.
_MORE_S = 30.0
#: What the check compares may change; what it found before is then not taken for what it would find.
_VERSION = 1
#: What making a kernel may fail with.
NOT_MADE = (CompileError, CppKernelError, StoreError, OSError)
_log = logging.getLogger(__name__)


def why_not_made(error: Exception) -> str:
    """One line of what making a kernel failed with."""
    compiling = isinstance(error, CompileError)
    return f"the C++ compiler failed: {first_error(str(error))}" if compiling else str(error)


def first_error(message: str) -> str:
    """The line of a compiler's message that says most."""
    lines = message.strip().splitlines() or ["no word"]
    return next((line.removeprefix("error: ") for line in lines if "error" in line), lines[-1])


def compiled(
    takes: Ranks, source: str, isa: str, toolchain: CppToolchain, name: str, store: Store,
    check: Check, otherwise: Callable[[], Kernel], larger: Callable[[], Kernel] | None,
) -> Kernel:  # fmt: skip
    """The kernel that `source` gives, held by `check` against what it should give at its first use; `otherwise` runs in
    its place where a later check finds it wrong, `larger` for sizes that it refuses.

    Raises CompileError where the compiler fails or made a kernel that is wrong, StoreError and OSError."""
    made = _Made(takes, source, isa, toolchain, name, store)
    known = store.recall(made.failed)
    if known is not None:
        raise CompileError(f"error: {known.get('why')}")
    kernel = made.kernel()
    kernel.larger = larger
    if not checks() or store.recall(made.checked) is not None:
        return kernel
    step(f"checking {name}")
    try:
        why = check.wrong(kernel)
    except Untried as reason:
        _log.debug("%s is checked at its first call: %s", name, reason)
        return CheckedAtFirst(kernel, check.differs, lambda found: made.settled(found, kernel, otherwise))
    if why is not None:
        raise CompileError(f"error: {made.refused(why)}")
    made.passed()
    return kernel


def checks() -> bool:
    """Whether kernels are checked at their first use."""
    return os.environ.get(CHECK, "").lower() not in ("off", "0", "no")


class _Made:
    """A kernel in the store, and where the store keeps what checks of it found."""

    def __init__(
        self, takes: Ranks, source: str, isa: str, toolchain: CppToolchain, name: str, store: Store
    ) -> None:  # fmt: skip
        self.takes, self.source, self.isa, self.toolchain = takes, source, isa, toolchain
        self.name, self.store = name, store
        flags = " ".join(toolchain.flags(isa))
        self.key = key({"source": source, "isa": isa, "compiler": toolchain.version, "flags": flags})
        self.failed = key({"kind": "wrong kernel", "entry": self.key, "compiler": toolchain.identity, **_here()})
        self.checked = ""
        self.folder: Path | None = None

    def kernel(self) -> CppKernel:
        """The kernel, loaded from bytes that are what its build wrote."""
        try:
            return self._kernel()
        except StoreError as error:  # changed since it was found, and put aside: made again, once
            notice(f"{error}; it is built again")
            return self._kernel()

    def _kernel(self) -> CppKernel:
        wait = timeout_s() + _MORE_S
        self.folder = self.store.get_or_build(self.key, self.name, self._make, patience_s=wait)
        binary = self.store.read(self.folder, _LIBRARY)
        self.checked = key({"kind": "first use", "library": hashlib.sha256(binary).hexdigest(),
                            "compiler": self.toolchain.version, "version": _VERSION, **_here()})  # fmt: skip
        try:
            return CppKernel(self.folder / _LIBRARY, self.takes, binary)
        except CompileError:
            self.store.discard(self.folder)
            raise

    def _make(self, folder: Path) -> None:
        step(f"compiling {self.name} for {self.isa}")
        (folder / "kernel.cpp").write_text(self.source)
        library = folder / _LIBRARY
        self.toolchain.compile(self.source, self.isa, library)
        whole(library)

    def passed(self) -> None:
        self.store.remember(self.checked, {"entry": self.key, "right": True})

    def refused(self, why: str) -> str:
        """Put the kernel aside for good; the reason to report."""
        reason = f"{' '.join(self.toolchain.command)} made a kernel that is wrong, which is not used: {why}"
        notice(reason)
        self.store.remember(self.failed, {"entry": self.key, "why": reason})
        if self.folder is not None:
            self.store.discard(self.folder)
        return reason

    def settled(self, why: str | None, kernel: Kernel, otherwise: Callable[[], Kernel]) -> Kernel:
        """What runs after a check at the first call."""
        if why is None:
            self.passed()
            return kernel
        self.refused(why)
        return otherwise()


@cache
def _here() -> dict[str, str]:
    """What the same library may give other results on."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = processor(cpuinfo.read_text(errors="replace"))[1] if cpuinfo.exists() else frozenset[str]()
    features = hashlib.sha256(" ".join(sorted(flags)).encode()).hexdigest()
    return {"processor": device_name(torch.device("cpu")), "features": features}
