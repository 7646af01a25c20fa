"""Finding the processor's instruction set and a compiler, and what a call refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attentions.dense import attention
from cpp_kernels.build import build, host_isas, run, toolchain

from attncc.runtime.cpp import NEEDS, CompileError, CppKernelError, CppToolchain, detect_isa, processor, usable_isas

pytestmark = pytest.mark.slow

ZEN4 = NEEDS["avx512bf16"] | {"avx2", "fma", "f16c"}
CPUINFO = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 fma f16c\nbugs\t\t: none\n"


def test_flags_of_a_processor() -> None:
    assert processor(CPUINFO) == ("AuthenticAMD", frozenset({"fpu", "avx2", "fma", "f16c"}))
    assert processor("") == ("", frozenset())


def test_the_best_comes_first() -> None:
    assert usable_isas("x86_64", "AuthenticAMD", ZEN4) == ["avx512bf16", "avx512", "avx2"]
    assert usable_isas("x86_64", "GenuineIntel", ZEN4) == ["avx512", "avx2"]
    assert usable_isas("x86_64", "GenuineIntel", ZEN4 | NEEDS["amx"])[0] == "amx"
    assert usable_isas("x86_64", "AuthenticAMD", frozenset({"avx2"})) == []
    assert usable_isas("aarch64", "", frozenset()) == ["neon"]


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCC_ISA", "avx2")
    assert detect_isa() == "avx2"
    monkeypatch.setenv("ATTNCC_ISA", "mmx")
    with pytest.raises(CppKernelError, match="mmx"):
        detect_isa()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("ATTNCC_CXX", raising=False)
    assert CppToolchain.find() is None


def test_a_compilers_complaint_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="nonsense"):
        toolchain().compile("nonsense", "avx2", tmp_path / "x.so")
    assert not (tmp_path / "x.so").exists()


def test_a_call_with_too_few_tensors() -> None:
    q = torch.randn(1, 1, 4, 8)
    a = attention(q, q, q)
    kernel = build(a, host_isas()[0])
    with pytest.raises(CppKernelError, match="3 tensors"):
        kernel([q, q], [], [q])


def test_shapes_may_change_from_call_to_call() -> None:
    for n in (3, 70, 3):
        q = torch.randn(2, 3, n, 8, generator=torch.Generator().manual_seed(n))
        a = attention(q, q, q)
        want = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        got = run(a, {"q": q, "k": q, "v": q}, [], host_isas()[0])["out"]
        torch.testing.assert_close(got, want)
