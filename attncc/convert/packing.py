"""Kernels of several attentions in one library, for runtimes that know nothing of attncc."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from attncc.codegen import cpp
from attncc.codegen.cpp.packed import Packed, unit
from attncc.frontends.targets import TargetError, one_line
from attncc.ir import Bounds
from attncc.kernels.build import find_toolchain
from attncc.kernels.compiled import first_error
from attncc.progress import step
from attncc.runtime.cpp import CompileError, CppKernelError, CppToolchain, detect_isa


@dataclass(frozen=True)
class Compiling:
    """With what kernels are compiled, and for which instruction sets."""

    toolchain: CppToolchain
    isas: tuple[str, ...]

    @staticmethod
    def of(isas: Sequence[str] = ()) -> Compiling:
        """For the named instruction sets, or for this machine's best. Raises TargetError where that is impossible."""
        unknown = [x for x in isas if x not in cpp.ISAS]
        if unknown:
            raise TargetError(f"--isa {','.join(unknown)}: known are {', '.join(cpp.ISAS)}")
        toolchain = find_toolchain()
        if toolchain is None:
            raise TargetError("kernels inside a file need a C++ compiler, and none was found")
        try:
            missing = [x for x in isas if not toolchain.speaks(x)]
            best = isas or (detect_isa(),)
        except (CompileError, CppKernelError) as error:
            raise TargetError(f"kernels inside a file need a C++ compiler: {one_line(error)}") from error
        if missing:
            raise TargetError(f"--isa {','.join(missing)}: {toolchain.path} does not compile for it")
        return Compiling(toolchain, tuple(best))

    def objects(self, folder: Path, functions: str, kernels: Mapping[Packed, Bounds]) -> list[Path]:
        """The object files of the functions and of every kernel. Raises TargetError."""
        least = "neon" if "neon" in self.isas else "avx2"
        texts = {"functions": (functions, least)}
        for p, bounds in kernels.items():
            for isa in p.isas:
                texts[p.kernel(isa)] = unit(cpp.emit(p.attention, bounds, isa), p.kernel(isa)), isa
        step(f"compiling {len(texts) - 1} kernels")

        def compiled(name: str) -> Path:
            out = folder / f"{name}.o"
            self.toolchain.compile(*texts[name], out, whole=False)
            return out

        try:
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                return list(pool.map(compiled, texts))
        except CompileError as error:
            raise TargetError(f"the kernels do not compile: {first_error(str(error))}") from error

    def archive(self, objects: Sequence[Path], out: Path) -> None:
        """A static library. Raises TargetError."""
        asked = _run([*self.toolchain.command, "-print-prog-name=ar"])
        self._linked([asked.stdout.strip() or "ar", "rcs", str(out), *map(str, objects)])

    def shared(self, objects: Sequence[Path], out: Path) -> None:
        """A shared library. Raises TargetError."""
        self._linked([*self.toolchain.command, "-shared", "-fopenmp", "-o", str(out), *map(str, objects)])

    def _linked(self, command: Sequence[str]) -> None:
        done = _run(command)
        if done.returncode:
            raise TargetError(f"the kernels cannot be put together: {command[0]}: {done.stderr.strip()}")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise TargetError(f"{command[0]} cannot be run ({one_line(error)})") from error
