"""Compiling a kernel module ahead of time, for devices this machine need not have."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from attncc.runtime.triton_module import load_module


class Options(Protocol):
    """What of a configuration is told to Triton rather than written in the source."""

    @property
    def warps(self) -> int: ...
    @property
    def stages(self) -> int: ...


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target. `text` is PTX or amdgcn assembly, `binary` a cubin or hsaco, `machine_code` the text
    of the instructions that run (SASS; the assembly itself on AMD). `spills` is bytes of local memory a thread."""

    kernel: str
    target: str
    text: str
    binary: bytes
    machine_code: str
    shared_bytes: int
    registers: int
    spills: int


TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def compile_for(source: str, config: Options, target: str, kernel: str = "attention", **constants: Any) -> Compiled:
    """Compile `kernel` of a module that the Triton emitter wrote, as a call with aligned, contiguous tensors would.

    `constants` are values of constexpr parameters. Raises what Triton raises, and ValueError for an unknown target."""
    triton: Any = import_module("triton")  # here, because it is heavy and absent on some platforms
    compiler: Any = import_module("triton.compiler")
    new_target: Any = import_module("triton.backends.compiler").GPUTarget
    module = load_module(source)
    signature, values, attributes = _specialised(module, kernel, constants)
    if target.startswith("sm_"):
        gpu = new_target("cuda", int(target.removeprefix("sm_")), 32)
    elif target.startswith("gfx"):
        gpu = new_target("hip", target, 64)
    else:
        raise ValueError(f"target {target!r}: give sm_NN or gfxNNN")
    built = triton.compile(
        compiler.ASTSource(getattr(module, kernel), signature, values, attributes),
        target=gpu,
        options={"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True},
    )
    shared = int(built.metadata.shared)
    if gpu.backend == "hip":
        text = str(built.asm["amdgcn"])
        return Compiled(kernel, target, text, built.asm["hsaco"], text, shared, *_amd_resources(text))
    binary: bytes = built.asm["cubin"]
    code, registers, spills = _nvidia_resources(binary)
    return Compiled(kernel, target, str(built.asm["ptx"]), binary, code, shared, registers, spills)


def _specialised(module: ModuleType, kernel: str, constants: dict[str, Any]) -> tuple[dict[str, str], Any, Any]:
    """Types, constants and alignments of the arguments, as Triton finds them at a call: strides of one are constants,
    and pointers and other strides of contiguous tensors are multiples of 16."""
    signature: dict[str, str] = dict(module.SIGNATURES[kernel])
    values: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for at, (name, kind) in enumerate(signature.items()):
        step = module.CONTIGUOUS.get(name, 0)
        if name in constants:
            signature[name], values[(at,)] = "constexpr", constants[name]
        elif step == 1:
            signature[name], values[(at,)] = "constexpr", 1
        elif kind == "constexpr":
            raise ValueError(f"{kernel} needs a value of {name}")
        elif step == 16 or kind.startswith("*"):
            attributes[(at,)] = [["tt.divisibility", 16]]
    return signature, values, attributes


def _tool(name: str) -> Path:
    """A program of the CUDA toolkit that Triton's wheel ships. Raises FileNotFoundError."""
    path = Path(str(import_module("triton").__file__)).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise FileNotFoundError(f"{name} is not in this Triton ({path.parent})")
    return path


def _nvidia_resources(binary: bytes) -> tuple[str, int, int]:
    """SASS, registers a thread, bytes of stack a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = _run(_tool("cuobjdump"), "-res-usage", file.name)
        code = _run(_tool("nvdisasm"), "-c", file.name)
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return code, found["REG"], found["STACK"] + found["LOCAL"]


def _run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd_resources(text: str) -> tuple[int, int]:
    """Registers a thread, bytes of scratch a thread."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)
    assert registers is not None and scratch is not None
    return int(registers[1]), int(scratch[1])
