"""Kernels in libraries of several: each a translation unit under a name of its own, and chosen where it is loaded.

Such libraries are what other runtimes load, where there may be neither Python nor attncc: `attncc.codegen.cpp.aoti` has
the functions that an AOTInductor package calls, `attncc.codegen.cpp.onnxruntime` the operators of onnxruntime.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from attncc.codegen.cpp.isa import ISAS
from attncc.ir import Attention, Axis, Size

#: What each instruction set asks of the processor: words of gcc's `__builtin_cpu_supports`, and what it has none for.
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
_ASKS: dict[str, tuple[str, ...]] = {
    "amx": (*_AVX512, "avx512bf16", "avx512vbmi"),
    "avx512bf16": (*_AVX512, "avx512bf16", "avx512vbmi"),
    "avx512": _AVX512,
    "avx2": ("avx2", "fma"),
    "neon": (),
}
_MORE = {"amx": ("has_matrix_unit()",), "avx512bf16": ('!__builtin_cpu_is("intel")',)}
_KERNEL = "(const void* const*, const int64_t* const*, const int64_t*, void* const*, const int64_t* const*)"

#: What the choice of a kernel needs, and what its failures are.
CHOICE = """#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {
typedef int32_t (*Kernel)KERNEL;

#if defined(__x86_64__)
// Whether there is a matrix unit for bfloat16, and Linux lets this process use it.
bool has_matrix_unit() {
    unsigned a, b, c, d;
    const unsigned wanted = 1u << 22 | 1u << 24;  // amx-bf16, amx-tile
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & wanted) != wanted) return false;
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
}
#endif

// Whether the user asks for this instruction set, or for none.
bool wanted(const char* isa) {
    const char* asked = getenv("ATTNCC_ISA");
    return asked == nullptr || *asked == 0 || strcmp(asked, isa) == 0;
}

// Why a kernel gave a number other than zero; -1: there is no kernel.
const char* reason(int32_t code) {
    switch (code) {
        case -1: return "this processor has none of the instruction sets that it was compiled for";
        case 1: return "out of memory";
        case 2: return "a size beyond 2^24";
        case 3: return "Linux does not let this process use AMX";
        default: return "the kernel failed";
    }
}
}  // namespace
""".replace("KERNEL", _KERNEL)

#: Dimensions of a tensor, tensors and outputs that these functions have room for.
MOST_DIMENSIONS, MOST_TENSORS, MOST_OUTPUTS = 8, 32, 4


@dataclass(frozen=True)
class Packed:
    """One attention of a library: what its functions are named after, and the instruction sets of its kernels."""

    name: str
    attention: Attention
    isas: tuple[str, ...]

    @property
    def fits(self) -> bool:
        a = self.attention
        ranks = [len(t.shape) for t in a.tensors] + [len(axes_of(a, name)) for name in a.outputs]
        return max(ranks) <= MOST_DIMENSIONS and len(a.tensors) < MOST_TENSORS and len(a.outputs) <= MOST_OUTPUTS

    def kernel(self, isa: str) -> str:
        return f"attncc_{self.name}_{isa}"

    def choice(self) -> str:
        """A function that gives the kernel of the fastest instruction set that this processor has, or null."""
        known = [isa for isa in ISAS if isa in self.isas]
        lines = [f'extern "C" int32_t {self.kernel(isa)}{_KERNEL};' for isa in known]
        lines += [f"static Kernel {self.chosen}() {{"]
        for isa in known:
            asks = [f'wanted("{isa}")', *(f'__builtin_cpu_supports("{word}")' for word in _ASKS[isa])]
            lines += [f"    if ({' && '.join([*asks, *_MORE.get(isa, ())])}) return {self.kernel(isa)};"]
        return "\n".join(["", *lines, "    return nullptr;", "}", ""])

    @property
    def chosen(self) -> str:
        return f"kernel_{self.name}"


def axes_of(a: Attention, output: str) -> tuple[Axis, ...]:
    """The axes of an output, in their order."""
    return a.out_axes if output == "out" else (*a.batch, a.i)


def extent(a: Attention, axis: Axis, size: str) -> str:
    """An extent in C, where `size` names those that a call passes: `n{}`, `sizes[{}]`."""
    x = axis.extent
    return size.format(a.sizes.index(x)) if isinstance(x, Size) else str(int(x.value))


def unit(source: str, entry: str) -> str:
    """A kernel's translation unit for a library of several: under a name of its own, as its functions are."""
    includes = [m.end() for m in re.finditer(r"^#include <[^>]*>\n", source, re.MULTILINE)]
    assert includes, "a kernel includes the system's headers first"
    body = source[includes[-1] :].replace("attncc_run", entry)
    return f"{source[: includes[-1]]}namespace of_{entry} {{\n{body}}}\n"
