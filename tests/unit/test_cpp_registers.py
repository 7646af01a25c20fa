"""The sums of a product stay in registers: a kernel whose compiler spills them is half as fast, and still right."""

import re
from pathlib import Path

import pytest
from cpp_kernels.build import toolchain

from attncc.codegen.cpp import emit
from attncc.ir import parse_attention
from attncc.passes.bounds.bounds import loop_bounds
from attncc.runtime import compilers

TEXT = """attention
size   N, M
batch  b = 1, h = 8
axis   i = N, j = M, d = 64, e = 64
tensor q: DTYPE[1, 8, N, 64]
tensor k: DTYPE[1, 8, M, 64]
tensor v: DTYPE[1, 8, M, 64]
q      q[b, h, i, d]
k      k[b, h, j, d]
v      v[b, h, j, e]
score  s * 0.125
mask   True
norm   softmax
empty  zero
weight w
give   out
dtype  DTYPE
"""


def loops(assembly: str, function: str) -> list[list[str]]:
    """The instructions of every innermost loop of `function`: from a label to a jump back to it, nothing between."""
    found: list[list[str]] = []
    label, body, inside = "", list[str](), False
    for line in assembly.splitlines():
        if re.match(r"_[\w.]+:", line):
            inside = function in line
        if not inside:
            continue
        if start := re.match(r"(\.L\w+):", line):
            label, body = start[1], []
        elif re.match(r"\s+[a-z]", line):
            body.append(line.strip())
            jump = re.match(r"\s+j\w+\s+(\.L\w+)", line)
            if jump and jump[1] == label:
                found.append(body)
            if jump:
                label, body = "", []
    return found


@pytest.mark.parametrize(
    ("isa", "dtype", "multiply"),
    [("avx512bf16", "bf16", "vdpbf16ps"), ("avx512", "f32", "vfmadd"), ("avx2", "f32", "vfmadd")],
)
def test_the_sums_of_a_product_stay_in_registers(isa: str, dtype: str, multiply: str, tmp_path: Path) -> None:
    tools = toolchain()
    if not tools.speaks(isa):
        pytest.skip(f"the compiler does not speak {isa}")
    a = parse_attention(TEXT.replace("DTYPE", dtype))
    unit, out = tmp_path / "kernel.cpp", tmp_path / "kernel.s"
    unit.write_text(emit(a, loop_bounds(a), isa))
    status, said = compilers.run([*tools.command, *tools.flags(isa), "-S", str(unit), "-o", str(out)])
    assert status == 0, said
    register = "%ymm" if isa == "avx2" else "%zmm"
    products = [x for x in loops(out.read_text(), "product") if sum(line.startswith(multiply) for line in x) >= 8]
    assert max(sum(line.startswith(multiply) for line in x) for x in products) >= (12 if isa == "avx2" else 24)
    for body in products:
        spilled = [x for x in body if register in x and re.search(r"\(%r[sb]p", x)]
        assert not spilled, "\n".join(body)
