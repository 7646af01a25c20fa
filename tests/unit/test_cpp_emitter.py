"""What the C++ emitter refuses, what it keeps out of the key loop, and that the file is as it was read."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from attncc.codegen import cpp as codegen_cpp
from attncc.codegen.cpp import ISAS, emit, unsupported
from attncc.codegen.cpp.expressions import fits_32_bits
from attncc.ir import Access, Attention, Const, Expr, S, Size, W, parse_attention, parse_expr
from attncc.ir.build import floordiv, mul
from attncc.passes.bounds.bounds import loop_bounds
from attncc.runtime.cpp import CppToolchain

LIBRARY = sorted((Path(codegen_cpp.__file__).parent / "lib").glob("*.h"))

CAUSAL = """attention
size   B, N
batch  b = B, hk = 2, g = 4
axis   i = N, j = N, d = 64, e = 64
tensor q: {dtype}[B, N, 8, 64]
tensor k: {dtype}[B, N, 2, 64]
tensor v: {dtype}[B, N, 2, 64]
tensor slope: f32[8]
tensor doc: {index}[B, N]
q      q[b, i, hk * 4 + g, d]
k      k[b, j, hk, d]
v      v[b, j, hk, e]
score  s * 0.125 - slope[hk * 4 + g] * float(i - j)
mask   j <= i and doc[b, i] == doc[b, j]
norm   softmax
empty  zero
weight w
give   out, lse
dtype  {dtype}
layout b, i, hk, g, e
"""


def causal(dtype: str = "f32", index: str = "i32") -> Attention:
    return parse_attention(CAUSAL.format(dtype=dtype, index=index))


def expression(text: str) -> Expr:
    return parse_expr(text, {"s": S, "w": W, "x": Const(2.0), "n": Size("n")}, {})


@pytest.mark.parametrize(("name", "dtype", "isa"), [("cpp_causal_amx.cpp", "bf16", "amx"),
                                                    ("cpp_causal_avx2.cpp", "f32", "avx2")])  # fmt: skip
def test_what_is_generated(name: str, dtype: str, isa: str, golden: Callable[[str, str], None]) -> None:
    """The parts of the skeleton are named where they stand, each as it lies in `lib/`."""
    a = causal(dtype)
    text = emit(a, loop_bounds(a), isa)
    for part in LIBRARY:
        text = text.replace(part.read_text(), f"/* lib/{part.name} */\n")
    assert text.count("/* lib/") > 10
    golden(name, text)


def test_the_skeleton_is_as_it_was_read(golden: Callable[[str, str], None]) -> None:
    """One digest of all of it: `git diff` shows what changed, so the golden files need not hold it."""
    digest = sha256()
    for part in LIBRARY:
        digest.update(f"{part.name}\n{part.read_text()}".encode())
    golden("cpp_lib.sha256", f"{digest.hexdigest()}  codegen/cpp/lib\n")


def test_weights_are_refused() -> None:
    reason = unsupported(replace(causal(), outputs=("out", "weights")))
    assert reason is not None and "weights" in reason
    with pytest.raises(ValueError, match="weights"):
        emit(replace(causal(), outputs=("weights",)), loop_bounds(causal()), "avx2")


def test_rows_under_a_floor_are_refused() -> None:
    a = causal()
    odd = Access("k", (*a.k.index[:1], floordiv(a.j.index, Const(2)), *a.k.index[2:]))
    reason = unsupported(replace(a, k=odd))
    assert reason is not None and "affine" in reason


def test_weights_of_empty_rows_must_vanish() -> None:
    a = replace(causal(), empty="mean", weight=expression("w + 1.0"))
    assert unsupported(a) is not None
    assert unsupported(replace(a, weight=expression("w * 3.0"))) is None


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="avx2"):
        emit(causal(), loop_bounds(causal()), "mmx")


def test_integers_take_64_bits_only_where_32_could_overflow() -> None:
    assert fits_32_bits(causal(index="i32"), causal(index="i32").mask)
    assert not fits_32_bits(causal(index="i64"), causal(index="i64").mask)
    a = causal()
    assert not fits_32_bits(a, mul(a.i.index, a.j.index))


@pytest.mark.slow
def test_every_instruction_set_compiles_where_a_compiler_for_it_is_found(tmp_path: Path) -> None:
    """NEON by a cross compiler, if there is one; the others by the host's."""
    host = CppToolchain.find()
    tried = 0
    for isa in ISAS:
        cross = shutil.which("aarch64-linux-gnu-g++")
        toolchain = CppToolchain(cross) if isa == "neon" and cross else host if isa != "neon" else None
        if toolchain is None or not toolchain.speaks(isa):
            continue
        for dtype in ("f32", "bf16"):
            a = causal(dtype)
            toolchain.compile(emit(a, loop_bounds(a), isa), isa, tmp_path / f"{isa}-{dtype}.so")
            tried += 1
    if not tried:
        pytest.skip("no compiler")


def test_no_headers_but_the_systems() -> None:
    """The unit is freestanding, and compiles fast because it leaves the intrinsics' headers out."""
    for isa in ISAS:
        lines = emit(causal("bf16"), loop_bounds(causal("bf16")), isa).splitlines()
        headers = {x for x in lines if x.startswith("#include")}
        assert not [x for x in headers if "torch" in x or "immintrin" in x or '"' in x]


def test_the_file_preprocesses_without_warnings_of_its_own(tmp_path: Path) -> None:
    host = CppToolchain.find()
    if host is None:
        pytest.skip("no compiler")
    a = causal()
    unit = tmp_path / "unit.cpp"
    unit.write_text(emit(a, loop_bounds(a), "avx2"))
    flags = [f for f in host.flags("avx2") if f not in ("-w", "-shared")]
    done = subprocess.run([host.path, *flags, "-Wall", "-Wextra", "-Wno-unused", "-Wno-psabi", "-Wno-unknown-pragmas",
                           "-fsyntax-only", str(unit)], capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr[:2000]
