"""The C functions that an AOTInductor package calls (`custom_ops_to_c_shims`), one for each attention.

Each makes the outputs and calls the kernel. What is used of torch's stable ABI is declared here: no header is needed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from attncc.codegen.cpp.packed import CHOICE, MOST_DIMENSIONS, MOST_OUTPUTS, MOST_TENSORS, Packed, axes_of, extent
from attncc.ir import Attention

_DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64"}

_BEGIN = f"""
typedef struct AtenTensorOpaque* Tensor;
extern "C" {{
int32_t aoti_torch_get_data_ptr(Tensor, void**);
int32_t aoti_torch_get_strides(Tensor, int64_t**);
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Tensor*);
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
}}

namespace {{
// An uninitialised output, dense in memory in the order of `axes`, outermost first.
int32_t allocated(int rank, const int64_t* extents, const int* axes, int32_t dtype, Tensor* made) {{
    int64_t strides[{MOST_DIMENSIONS}], step = 1;
    for (int n = rank - 1; n >= 0; --n) {{
        strides[axes[n]] = step;
        step *= extents[axes[n]];
    }}
    return aoti_torch_empty_strided(rank, extents, strides, dtype, aoti_torch_device_type_cpu(), 0, made);
}}

int32_t run(const char* name, Kernel kernel, int tensors, const Tensor* given, const int64_t* sizes, int outputs,
            Tensor* const* made) {{
    void *in[{MOST_TENSORS}], *out[{MOST_OUTPUTS}];
    int64_t *in_strides[{MOST_TENSORS}], *out_strides[{MOST_OUTPUTS}];
    int32_t code = -1;
    if (kernel == nullptr) tensors = outputs = 0;
    for (int n = 0; n < tensors; ++n)
        if (aoti_torch_get_data_ptr(given[n], &in[n]) || aoti_torch_get_strides(given[n], &in_strides[n])) return 1;
    for (int n = 0; n < outputs; ++n)
        if (aoti_torch_get_data_ptr(*made[n], &out[n]) || aoti_torch_get_strides(*made[n], &out_strides[n])) return 1;
    if (kernel != nullptr) code = kernel(in, in_strides, sizes, out, out_strides);
    if (code) fprintf(stderr, "attncc: %s: %s\\n", name, reason(code));
    return code != 0;
}}
}}  // namespace
"""


def functions(packed: Sequence[Packed]) -> str:
    """The translation unit of the functions."""
    return CHOICE + _BEGIN + "".join(p.choice() + _function(p) for p in packed)


def declaration(p: Packed) -> str:
    """A function as torch's generated code declares it."""
    typed = re.sub(r"\bTensor\b", "AtenTensorHandle", _parameters(p.attention))
    return f"AOTITorchError aoti_torch_cpu_{p.name}({typed})"


def _parameters(a: Attention) -> str:
    given = [*(f"Tensor t{n}" for n in range(len(a.tensors))), *(f"int64_t n{n}" for n in range(len(a.sizes)))]
    return ", ".join([*given, *(f"Tensor* r{n}" for n in range(len(a.outputs)))])


def _function(p: Packed) -> str:
    a = p.attention
    lines = [f'extern "C" int32_t aoti_torch_cpu_{p.name}({_parameters(a)}) {{']
    lines += [f"    static const Kernel kernel = {p.chosen}();"]
    lines += [f"    const Tensor given[] = {{{', '.join(f't{n}' for n in range(len(a.tensors)))}}};"]
    lines += [f"    const int64_t sizes[] = {{{', '.join([*(f'n{n}' for n in range(len(a.sizes))), '0'])}}};"]
    lines += [f"    Tensor* const made[] = {{{', '.join(f'r{n}' for n in range(len(a.outputs)))}}};"]
    for n, name in enumerate(a.outputs):
        axes = axes_of(a, name)
        names = [x.name for x in axes]
        order = a.layout if name == "out" and a.layout else names
        dtype = _DTYPES[a.compute_dtype if name == "lse" else a.dtype]
        lines += [f"    const int64_t extents{n}[] = {{{', '.join(extent(a, x, 'n{}') for x in axes)}}};"]
        lines += [f"    const int axes{n}[] = {{{', '.join(str(names.index(x)) for x in order)}}};"]
        lines += [f"    if (allocated({len(axes)}, extents{n}, axes{n}, aoti_torch_dtype_{dtype}(), r{n})) return 1;"]
    lines += [f'    return run("{p.name}", kernel, {len(a.tensors)}, given, sizes, {len(a.outputs)}, made);', "}"]
    return "\n".join(lines) + "\n"
