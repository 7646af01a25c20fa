"""The C functions of a package: outputs that they make, kernels that they choose, and names that do not meet."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpp_kernels.build import compare, host_isas, toolchain
from cpp_kernels.cases import case, tensors_of

from attncc.codegen.cpp import emit
from attncc.codegen.cpp.aoti import declaration, functions
from attncc.codegen.cpp.packed import Packed, unit
from attncc.ir import Attention
from attncc.ir.evaluate import DTYPE_OF
from attncc.passes.bounds.bounds import loop_bounds
from attncc.runtime.outputs import shapes_of

pytestmark = pytest.mark.slow

TENSORS = Path(__file__).parents[1] / "support" / "cpp_kernels" / "tensors.cpp"
ISAS = tuple(host_isas())


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("rank", ctypes.c_int64), ("dtype", ctypes.c_int32),
    ]  # fmt: skip


def given(x: torch.Tensor) -> Tensor:
    strides = (ctypes.c_int64 * max(x.ndim, 1))(*x.stride())
    return Tensor(x.data_ptr(), strides, strides, x.ndim, x.element_size())


def held(t: Tensor, dtype: torch.dtype) -> torch.Tensor:
    sizes, strides = t.sizes[: t.rank], t.strides[: t.rank]
    count = 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    assert t.dtype == dtype.itemsize
    raw = (ctypes.c_char * (count * t.dtype)).from_address(t.data)
    return torch.frombuffer(raw, dtype=dtype, count=count).as_strided(sizes, strides)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[ctypes.CDLL, dict[str, Packed]]:
    """Two attentions in one library, for every instruction set here."""
    folder, units = tmp_path_factory.mktemp("packed"), {}
    attentions = {"causal": case("causal", lse=True), "halves": case("alibi", "bf16", d=24, e=40)}
    made = {name: Packed(f"attention_of_{name}", a, ISAS) for name, a in attentions.items()}
    exported = "#pragma GCC visibility push(default)\n"  # in a package its own code alone calls them
    units["functions.o"] = exported + functions(list(made.values())), "neon" if "neon" in ISAS else "avx2"
    for p in made.values():
        for isa in ISAS:
            units[f"{p.kernel(isa)}.o"] = unit(emit(p.attention, loop_bounds(p.attention), isa), p.kernel(isa)), isa
    for file, (source, isa) in units.items():
        toolchain().compile(source, isa, folder / file, whole=False)
    command = [*toolchain().command, "-shared", "-fPIC", str(TENSORS), *(str(folder / x) for x in units), "-fopenmp"]
    subprocess.run([*command, "-o", str(folder / "packed.so")], check=True)
    return ctypes.CDLL(str(folder / "packed.so")), made


def called(library: ctypes.CDLL, p: Packed, tensors: dict[str, torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
    a: Attention = p.attention
    made = [ctypes.POINTER(Tensor)() for _ in a.outputs]
    operands = [given(tensors[t.name]) for t in a.tensors]
    function = library[f"aoti_torch_cpu_{p.name}"]
    failed = function(*map(ctypes.byref, operands), *map(ctypes.c_int64, sizes), *map(ctypes.byref, made))
    assert failed == 0
    kinds = [DTYPE_OF[a.compute_dtype if name == "lse" else a.dtype] for name in a.outputs]
    return [held(t.contents, dtype) for t, dtype in zip(made, kinds, strict=True)]


@pytest.mark.parametrize("name", ["causal", "halves"])
def test_what_they_compute_and_where_it_lies(packed: tuple[ctypes.CDLL, dict[str, Packed]], name: str) -> None:
    library, made = packed
    p = made[name]
    tensors = tensors_of(p.attention, 33, 70)
    found = called(library, p, tensors, [33, 70])
    compare(p.attention, tensors, [33, 70], dict(zip(p.attention.outputs, found, strict=True)))
    for x, shape in zip(found, shapes_of(p.attention), strict=True):
        like = shape.allocate([33, 70], torch.device("cpu"))
        assert (x.shape, x.stride(), x.dtype) == (like.shape, like.stride(), like.dtype)


def test_a_processor_without_any_of_the_instruction_sets_is_told(
    packed: tuple[ctypes.CDLL, dict[str, Packed]]
) -> None:
    """The choice is made at the first call of a process, so another one makes it."""
    library, _ = packed
    code = f"""
import ctypes
library = ctypes.CDLL({library._name!r})
print(library.aoti_torch_cpu_attention_of_causal(*[None] * 3, *[0] * 2, *[ctypes.byref(ctypes.c_void_p())] * 2))
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "ATTNCC_ISA": "none"},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.stdout.strip() == "1" and "none of the instruction sets" in done.stderr, done


def test_a_declaration_is_that_of_the_function() -> None:
    p = Packed("some", case("causal", lse=True), ("avx2",))
    given = "AtenTensorHandle t0, AtenTensorHandle t1, AtenTensorHandle t2, int64_t n0, int64_t n1"
    assert declaration(p) == f"AOTITorchError aoti_torch_cpu_some({given}, AtenTensorHandle* r0, AtenTensorHandle* r1)"
    declared = f"int32_t{declaration(p).removeprefix('AOTITorchError')} {{"
    assert declared.replace("AtenTensorHandle", "Tensor") in functions([p])
