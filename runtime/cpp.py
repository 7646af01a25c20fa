"""The C++ toolchain: finding a compiler, compiling, loading, calling.

A kernel is one shared library with the entry `attncc_run` (see `attncc.codegen.cpp`). It is compiled against the OpenMP
runtime that torch has already loaded, so torch's thread count applies.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch

from attncc.ir import Attention
from attncc.runtime import compilers
from attncc.runtime.compilers import CompileError
from attncc.runtime.libraries import LibraryError, damage, load
from attncc.runtime.store_files import read

__all__ = ["CompileError", "CppKernel", "CppKernelError", "CppToolchain", "detect_isa"]

_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
#: The processor flags each instruction set needs, best first; `neon` goes by the machine's name.
NEEDS: dict[str, frozenset[str]] = {
    "amx": _AVX512 | {"avx512_bf16", "avx512vbmi", "amx_tile", "amx_bf16"},
    "avx512bf16": _AVX512 | {"avx512_bf16", "avx512vbmi"},
    "avx512": _AVX512,
    "avx2": frozenset({"avx2", "fma", "f16c"}),
}
_WIDE = ("-march=x86-64-v4", "-mprefer-vector-width=512")
_FLAGS: dict[str, tuple[str, ...]] = {
    "amx": (*_WIDE, "-mavx512bf16", "-mavx512vbmi", "-mamx-tile", "-mamx-bf16"),
    "avx512bf16": (*_WIDE, "-mavx512bf16", "-mavx512vbmi"),
    "avx512": _WIDE,
    "avx2": ("-march=x86-64-v3",),
    "neon": ("-march=armv8-a",),
}
#: What a kernel needs of -O3, in three quarters of the compile time: unrolling whole loops puts register tiles into
#: registers, and a question that a loop asks at every turn is asked once before it.
_OPTIMISED = ("-O2", "-fpeel-loops", "-funswitch-loops")
_COMMON = (
    "-std=c++17", *_OPTIMISED, "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-w",
)  # fmt: skip
_TOO_LARGE = 2
_ERRORS = {1: "out of memory", _TOO_LARGE: "a size beyond 2^24", 3: "Linux does not let this process use AMX"}


class CppKernelError(RuntimeError):
    """A kernel gave up; the message says why."""


def processor(cpuinfo: str) -> tuple[str, frozenset[str]]:
    """Vendor and flags of the first processor in the text of /proc/cpuinfo."""
    vendor = re.search(r"^vendor_id\s*:\s*(\S+)", cpuinfo, re.MULTILINE)
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    return vendor[1] if vendor else "", frozenset(flags[1].split()) if flags else frozenset()


def usable_isas(machine: str, vendor: str, flags: frozenset[str]) -> list[str]:
    """The instruction sets of a processor, the fastest first."""
    if machine in ("aarch64", "arm64"):
        return ["neon"]
    fits = [isa for isa, needs in NEEDS.items() if needs <= flags]
    if vendor == "GenuineIntel" and "avx512bf16" in fits:
        fits.remove("avx512bf16")  # Intel's bf16 dot is slower than its float32 multiply-add; the matrix unit is not
    return fits


def detect_isa() -> str:
    """The best instruction set that this machine, its kernel and the compiler share; `ATTNCC_ISA` overrides it.

    Raises CppKernelError where there is none, CompileError where the compiler cannot be run."""
    chosen = os.environ.get("ATTNCC_ISA")
    if chosen:
        if chosen not in _FLAGS:
            raise CppKernelError(f"ATTNCC_ISA={chosen!r} is none of {', '.join(_FLAGS)}")
        return chosen
    return _detected(CppToolchain.find())


@cache
def _detected(toolchain: CppToolchain | None) -> str:
    cpuinfo = Path("/proc/cpuinfo")
    vendor, flags = processor(cpuinfo.read_text()) if cpuinfo.exists() else ("", frozenset[str]())
    usable = [isa for isa in usable_isas(platform.machine(), vendor, flags) if isa != "amx" or _matrix_unit_allowed()]
    for isa in usable:
        if toolchain is None or toolchain.speaks(isa):
            return isa
    if usable and toolchain is not None:
        raise CppKernelError(f"{' '.join(toolchain.command)} compiles for none of {', '.join(usable)}")
    raise CppKernelError(f"no kernels for this {platform.machine()} processor; they need at least AVX2 or NEON")


def _matrix_unit_allowed() -> bool:
    """Whether Linux lets this process use AMX tiles: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)."""
    return ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0


#: Seconds that a compiler may take to say what it is.
_PROBE_S = 20.0
ENTRY = "attncc_run"


@dataclass(frozen=True)
class CppToolchain:
    """A C++ compiler that speaks gcc's command line: a program, and words that come first (`ccache g++`). `note` says
    what was asked for in vain."""

    path: str
    words: tuple[str, ...] = ()
    note: str = ""

    @staticmethod
    def find() -> CppToolchain | None:
        """The compiler that `ATTNCC_CXX` or `CXX` names, else g++ or clang++; None where there is none."""
        found = CppToolchain.find_or_reason()
        return None if isinstance(found, str) else found

    @staticmethod
    def find_or_reason() -> CppToolchain | str:
        """The same, or why there is none."""
        found = compilers.find()
        return found if isinstance(found, str) else CppToolchain(found.words[0], found.words[1:], found.note)

    @property
    def command(self) -> tuple[str, ...]:
        return (self.path, *self.words)

    @cached_property
    def version(self) -> str:
        """One line that tells compilers apart, for cache keys. Raises CompileError where it cannot be run."""
        _, said = compilers.run([*self.command, "--version"], seconds=min(_PROBE_S, compilers.timeout_s()))
        return (said.splitlines() or ["unknown"])[0]

    @property
    def identity(self) -> str:
        """What tells a program from another one in its place: paths, sizes and times."""
        found: list[str] = []
        for word in self.command:
            path = Path(word)
            if path.is_absolute() and path.exists():
                state = path.stat()
                found.append(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}")
            else:
                found.append(word)
        return "; ".join(found)

    def flags(self, isa: str) -> tuple[str, ...]:
        return (*_COMMON, *_FLAGS[isa])

    def speaks(self, isa: str) -> bool:
        """Whether the compiler knows the instruction set. Raises CompileError where it cannot be run."""
        command = [*self.command, *self.flags(isa), "-x", "c++", "-fsyntax-only", os.devnull]
        return compilers.run(command, seconds=min(_PROBE_S, compilers.timeout_s()))[0] == 0

    def compile(self, source: str, isa: str, out: Path, *, whole: bool = True) -> None:
        """Builds the shared library `out` from `source`, in the folder of `out`; an object of one where not `whole`.
        Raises CompileError with the compiler's message, or with what is wrong with the library."""
        with tempfile.TemporaryDirectory(prefix="compiling-", dir=out.parent) as folder:
            unit = Path(folder) / "kernel.cpp"
            unit.write_text(source)
            flags = [x for x in self.flags(isa) if whole or x != "-shared"]
            command = [*self.command, *flags, *([] if whole else ["-c"]), str(unit), "-o", str(out)]
            status, said = compilers.run(command, scratch=Path(folder))
        if status != 0:
            raise CompileError(f"{' '.join(command)}\n{said.strip() or f'error: exit status {status}'}")


def whole(path: Path) -> None:
    """See that a compiler wrote a library with the entry. Raises CompileError where it did not."""
    try:
        why = damage(read(path, 1 << 30), ENTRY)
    except OSError as error:
        why = f"cannot be read: {error}" if os.path.lexists(path) else "is not there"
    if why is not None:
        raise CompileError(f"error: what the compiler should have written {why}")


def loaded(binary: bytes) -> ctypes.CDLL:
    """The library that a compiler made. Raises CompileError where it is none, or is not whole."""
    try:
        return load(binary, "what the compiler wrote", ENTRY)
    except LibraryError as error:
        raise CompileError(f"error: {error}") from error


_Words = ctypes.c_int64
_Pointers = ctypes.c_void_p


@dataclass(frozen=True)
class Ranks:
    """What a kernel takes: the dimensions of each tensor and of each output, and how many sizes."""

    tensors: tuple[int, ...]
    sizes: int
    outputs: tuple[int, ...]

    @staticmethod
    def of(a: Attention) -> Ranks:
        outputs = tuple(len(a.batch) + (2 if o == "out" else 1) for o in a.outputs)
        return Ranks(tuple(len(t.shape) for t in a.tensors), len(a.sizes), outputs)


class CppKernel:
    """A loaded kernel. Call it with the attention's tensors, sizes and preallocated outputs, in declaration order.

    Outputs have their logical shapes, (*batch, i, e) and (*batch, i), in any strides. The arrays that carry strides are
    kept by the strides' values, so a call in a loop only writes its pointers."""

    def __init__(self, path: Path, a: Attention | Ranks, binary: bytes | None = None) -> None:
        """`binary` is what `path` held when it was checked. Raises CompileError where that is no library."""
        self.path, self.ranks = path, Ranks.of(a) if isinstance(a, Attention) else a
        #: The kernel for calls with sizes that this one refuses, made when the first of them comes.
        self.larger: Callable[[], Callable[..., None]] | None = None
        self._library = loaded(path.read_bytes() if binary is None else binary)
        self._run = self._library[ENTRY]
        self._run.restype = ctypes.c_int32
        self._run.argtypes = [_Pointers] * 5
        self._layouts: dict[tuple[object, ...], tuple[object, ...]] = {}

    def __call__(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> None:
        strides = (*[t.stride() for t in tensors], *sizes, *[t.stride() for t in outputs])
        layout = self._layouts.get(strides)
        if layout is None:
            layout = self._layout(tensors, sizes, outputs)
            if len(self._layouts) >= 256:  # shapes that never come back must not pile up
                self._layouts.clear()
            self._layouts[strides] = layout
        in_type, in_strides, size_array, out_type, out_strides, _ = layout
        failed = self._run(
            in_type(*[t.data_ptr() for t in tensors]), in_strides, size_array,  # type: ignore[operator]
            out_type(*[t.data_ptr() for t in outputs]), out_strides,  # type: ignore[operator]
        )  # fmt: skip
        if failed == _TOO_LARGE and self.larger is not None:
            self.larger()(tensors, sizes, outputs)
        elif failed:
            raise CppKernelError(f"{self.path.name}: {_ERRORS.get(failed, failed)}")

    def _layout(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> tuple[object, ...]:
        r = self.ranks
        given = len(tensors), len(sizes), len(outputs)
        if given != (len(r.tensors), r.sizes, len(r.outputs)):
            raise CppKernelError(
                f"the kernel takes {len(r.tensors)} tensors, {r.sizes} sizes and {len(r.outputs)} outputs, got "
                f"{given[0]}, {given[1]} and {given[2]}"
            )
        if (r.tensors, r.outputs) != (tuple(t.ndim for t in tensors), tuple(t.ndim for t in outputs)):
            takes = f"{list(r.tensors)} and {list(r.outputs)}"
            raise CppKernelError(f"the kernel takes tensors and outputs of {takes} dimensions")
        held: list[object] = []
        pointers: list[ctypes.Array[ctypes.c_void_p]] = []
        for group in (tensors, outputs):
            arrays = [(_Words * max(t.ndim, 1))(*t.stride()) for t in group]
            held.append(arrays)
            pointers.append((_Pointers * len(group))(*[ctypes.addressof(x) for x in arrays]))
        size_array = (_Words * max(len(sizes), 1))(*sizes)
        return (_Pointers * len(tensors), pointers[0], size_array, _Pointers * len(outputs), pointers[1], held)
