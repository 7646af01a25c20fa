"""Kernels as C functions of an AOTInductor package, which run where there is neither Python nor attncc.

A package calls an operator through a C function of torch's stable ABI (`custom_ops_to_c_shims`). One is written for
each attention; it makes the outputs and calls the kernel of the best instruction set that the processor has among
those that were compiled. What is used of the ABI is declared here, so no header of torch is needed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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
_DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64"}
_KERNEL = "(const void* const*, const int64_t* const*, const int64_t*, void* const*, const int64_t* const*)"

_BEGIN = """#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef struct AtenTensorOpaque* Tensor;
extern "C" {
int32_t aoti_torch_get_data_ptr(Tensor, void**);
int32_t aoti_torch_get_strides(Tensor, int64_t**);
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Tensor*);
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
}

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

int32_t failed(const char* name, int32_t code) {
    static const char* const why[] = {"", "out of memory", "a size beyond 2^24",
                                      "Linux does not let this process use AMX"};
    fprintf(stderr, "attncc: %s: %s\\n", name, code > 0 && code < 4 ? why[code] : "failed");
    return 1;
}

// An uninitialised output, dense in memory in the order of `axes`, outermost first.
int32_t allocated(int rank, const int64_t* extents, const int* axes, int32_t dtype, Tensor* made) {
    int64_t strides[8], step = 1;
    for (int n = rank - 1; n >= 0; --n) {
        strides[axes[n]] = step;
        step *= extents[axes[n]];
    }
    return aoti_torch_empty_strided(rank, extents, strides, dtype, aoti_torch_device_type_cpu(), 0, made);
}

int32_t run(const char* name, Kernel kernel, int tensors, const Tensor* given, const int64_t* sizes, int outputs,
            Tensor* const* made) {
    void *in[32], *out[8];
    int64_t *in_strides[32], *out_strides[8];
    if (kernel == nullptr) {
        fprintf(stderr, "attncc: %s: this processor has none of the instruction sets it was compiled for\\n", name);
        return 1;
    }
    for (int n = 0; n < tensors; ++n)
        if (aoti_torch_get_data_ptr(given[n], &in[n]) || aoti_torch_get_strides(given[n], &in_strides[n])) return 1;
    for (int n = 0; n < outputs; ++n)
        if (aoti_torch_get_data_ptr(*made[n], &out[n]) || aoti_torch_get_strides(*made[n], &out_strides[n])) return 1;
    const int32_t code = kernel(in, in_strides, sizes, out, out_strides);
    return code ? failed(name, code) : 0;
}
}  // namespace
""".replace("KERNEL", _KERNEL)


@dataclass(frozen=True)
class Packed:
    """One attention of a package: the name of its function, and the instruction sets that its kernel is there for."""

    name: str
    attention: Attention
    isas: tuple[str, ...]

    @property
    def parameters(self) -> str:
        a = self.attention
        given = [*(f"Tensor t{n}" for n in range(len(a.tensors))), *(f"int64_t n{n}" for n in range(len(a.sizes)))]
        return ", ".join([*given, *(f"Tensor* r{n}" for n in range(len(a.outputs)))])

    @property
    def declaration(self) -> str:
        """The function as torch's generated code declares it."""
        typed = re.sub(r"\bTensor\b", "AtenTensorHandle", self.parameters)
        return f"AOTITorchError aoti_torch_cpu_{self.name}({typed})"

    def kernel(self, isa: str) -> str:
        return f"attncc_{self.name}_{isa}"


#: Tensors that a function takes at most.
MOST_TENSORS = 32


def unit(source: str, entry: str) -> str:
    """A kernel's translation unit for a library of several: under a name of its own, as its functions are."""
    includes = [m.end() for m in re.finditer(r"^#include <[^>]*>\n", source, re.MULTILINE)]
    assert includes, "a kernel includes the system's headers first"
    body = source[includes[-1] :].replace("attncc_run", entry)
    return f"{source[: includes[-1]]}namespace of_{entry} {{\n{body}}}\n"


def functions(packed: Sequence[Packed]) -> str:
    """The translation unit of the C functions."""
    return _BEGIN + "".join(map(_function, packed))


def _function(p: Packed) -> str:
    a = p.attention
    known = [isa for isa in ISAS if isa in p.isas]  # the fastest first
    lines = [f'\nextern "C" int32_t {p.kernel(isa)}{_KERNEL};' for isa in known]
    lines += [f"static Kernel kernel_{p.name}() {{"]
    for isa in known:
        asks = [f'wanted("{isa}")', *(f'__builtin_cpu_supports("{word}")' for word in _ASKS[isa])]
        lines += [f"    if ({' && '.join([*asks, *_MORE.get(isa, ())])}) return {p.kernel(isa)};"]
    lines += ["    return nullptr;", "}"]
    lines += [f'extern "C" int32_t aoti_torch_cpu_{p.name}({p.parameters}) {{']
    lines += [f"    static const Kernel kernel = kernel_{p.name}();"]
    lines += [f"    const Tensor given[] = {{{', '.join(f't{n}' for n in range(len(a.tensors)))}}};"]
    lines += [f"    const int64_t sizes[] = {{{', '.join([*(f'n{n}' for n in range(len(a.sizes))), '0'])}}};"]
    lines += [f"    Tensor* const made[] = {{{', '.join(f'r{n}' for n in range(len(a.outputs)))}}};"]
    for n, name in enumerate(a.outputs):
        axes = (*a.out_axes,) if name == "out" else (*a.batch, a.i)
        order = [x.name for x in axes] if name != "out" or not a.layout else list(a.layout)
        places = [[x.name for x in axes].index(x) for x in order]
        dtype = _DTYPES[a.compute_dtype if name == "lse" else a.dtype]
        lines += [f"    const int64_t extents{n}[] = {{{', '.join(_extent(a, x) for x in axes)}}};"]
        lines += [f"    const int axes{n}[] = {{{', '.join(map(str, places))}}};"]
        lines += [f"    if (allocated({len(axes)}, extents{n}, axes{n}, aoti_torch_dtype_{dtype}(), r{n})) return 1;"]
    lines += [f'    return run("{p.name}", kernel, {len(a.tensors)}, given, sizes, {len(a.outputs)}, made);', "}"]
    return "\n".join(lines) + "\n"


def _extent(a: Attention, x: Axis) -> str:
    return f"n{a.sizes.index(x.extent)}" if isinstance(x.extent, Size) else str(int(x.extent.value))
