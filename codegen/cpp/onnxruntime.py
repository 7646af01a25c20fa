"""Kernels as operators of onnxruntime: a library that its sessions load (`register_custom_ops_library`).

Each attention is an operator of its own in the domain `attncc`, whose inputs are its tensors and then the vector of its
sizes. What is used of onnxruntime's C API is declared here by its place in the table of functions, which only grows.
"""

from __future__ import annotations

from collections.abc import Sequence

from attncc.codegen.cpp.packed import CHOICE, MOST_DIMENSIONS, MOST_OUTPUTS, MOST_TENSORS, Packed, axes_of, extent

#: The domain of the operators, and the version of the C API: that of onnxruntime 1.16, whose operators report errors.
DOMAIN, API = "attncc", 16
#: ONNXTensorElementDataType.
_TYPES = {
    "f32": 1, "u8": 2, "i8": 3, "i16": 5, "i32": 6, "i64": 7, "bool": 9, "f16": 10, "f64": 11, "bf16": 16,
}  # fmt: skip

_BEGIN = f"""
typedef struct OrtStatus Status;
struct ApiBase {{
    const void* const* (*GetApi)(uint32_t version);
    const char* (*GetVersionString)();
}};

namespace {{
// Functions of OrtApi by their places.
struct Api {{
    const void* const* table;
    template <typename F> F at(int place) const {{ return (F)table[place]; }}
    Status* error(const char* text) const {{ return at<Status* (*)(int, const char*)>(0)(1, text); }}
    Status* domain(const char* name, void** made) const {{
        return at<Status* (*)(const char*, void**)>(26)(name, made);
    }}
    Status* add(void* domain, const void* op) const {{ return at<Status* (*)(void*, const void*)>(27)(domain, op); }}
    Status* use(void* options, void* domain) const {{ return at<Status* (*)(void*, void*)>(28)(options, domain); }}
    Status* data(void* value, void** found) const {{ return at<Status* (*)(void*, void**)>(51)(value, found); }}
    Status* rank(const void* info, size_t* n) const {{ return at<Status* (*)(const void*, size_t*)>(61)(info, n); }}
    Status* extents(const void* info, int64_t* found, size_t n) const {{
        return at<Status* (*)(const void*, int64_t*, size_t)>(62)(info, found, n);
    }}
    Status* info(const void* value, void** made) const {{
        return at<Status* (*)(const void*, void**)>(65)(value, made);
    }}
    Status* input(const void* call, size_t n, void** found) const {{
        return at<Status* (*)(const void*, size_t, void**)>(90)(call, n, found);
    }}
    Status* output(void* call, size_t n, const int64_t* extents, size_t rank, void** made) const {{
        return at<Status* (*)(void*, size_t, const int64_t*, size_t, void**)>(91)(call, n, extents, rank, made);
    }}
    void release_info(void* info) const {{ at<void (*)(void*)>(99)(info); }}
}};

struct Operator;
// OrtCustomOp.
struct Callbacks {{
    uint32_t version;
    void* (*CreateKernel)(const Operator*, const void*, const void*);
    const char* (*GetName)(const Operator*);
    const char* (*GetExecutionProviderType)(const Operator*);
    int (*GetInputType)(const Operator*, size_t);
    size_t (*GetInputTypeCount)(const Operator*);
    int (*GetOutputType)(const Operator*, size_t);
    size_t (*GetOutputTypeCount)(const Operator*);
    void (*KernelCompute)(void*, void*);
    void (*KernelDestroy)(void*);
    int (*GetInputCharacteristic)(const Operator*, size_t);
    int (*GetOutputCharacteristic)(const Operator*, size_t);
    int (*GetInputMemoryType)(const Operator*, size_t);
    int (*GetVariadicInputMinArity)(const Operator*);
    int (*GetVariadicInputHomogeneity)(const Operator*);
    int (*GetVariadicOutputMinArity)(const Operator*);
    int (*GetVariadicOutputHomogeneity)(const Operator*);
    Status* (*CreateKernelV2)(const Operator*, const void* const*, const void*, void**);
    Status* (*KernelComputeV2)(void*, void*);
    Status* (*InferOutputShapeFn)(const Operator*, void*);
    int (*GetStartVersion)(const Operator*);
    int (*GetEndVersion)(const Operator*);
}};
struct Operator {{
    Callbacks callbacks;  // first: onnxruntime knows it alone
    const char* name;
    size_t inputs, outputs;  // the sizes are the last input
    const int *input_types, *output_types;
    const size_t* ranks;
    void (*extents)(const int64_t* sizes, int64_t (*found)[{MOST_DIMENSIONS}]);
    Kernel (*kernel)();
}};
struct Session {{
    Api api;
    const Operator* op;
    Kernel kernel;
}};

void dense(size_t rank, const int64_t* extents, int64_t* strides) {{
    int64_t step = 1;
    for (size_t n = rank; n-- > 0; step *= extents[n]) strides[n] = step;
}}

Status* compute(void* kernel, void* call) {{
    const Session& s = *(const Session*)kernel;
    const Api& api = s.api;
    void *in[{MOST_TENSORS}], *out[{MOST_OUTPUTS}], *value, *info;
    int64_t dims[{MOST_DIMENSIONS}], strides[{MOST_TENSORS} + {MOST_OUTPUTS}][{MOST_DIMENSIONS}];
    int64_t made[{MOST_OUTPUTS}][{MOST_DIMENSIONS}];
    const int64_t *in_strides[{MOST_TENSORS}], *out_strides[{MOST_OUTPUTS}];
    size_t rank;
    for (size_t n = 0; n < s.op->inputs; ++n) {{
        if (Status* failed = api.input(call, n, &value)) return failed;
        if (Status* failed = api.data(value, &in[n])) return failed;
        if (Status* failed = api.info(value, &info)) return failed;
        Status* failed = api.rank(info, &rank);
        if (!failed && rank > {MOST_DIMENSIONS}) failed = api.error("attncc: a tensor has too many dimensions");
        if (!failed) failed = api.extents(info, dims, rank);
        api.release_info(info);
        if (failed) return failed;
        dense(rank, dims, strides[n]);
        in_strides[n] = strides[n];
    }}
    const int64_t* sizes = (const int64_t*)in[s.op->inputs - 1];
    s.op->extents(sizes, made);
    for (size_t n = 0; n < s.op->outputs; ++n) {{
        if (Status* failed = api.output(call, n, made[n], s.op->ranks[n], &value)) return failed;
        if (Status* failed = api.data(value, &out[n])) return failed;
        dense(s.op->ranks[n], made[n], strides[{MOST_TENSORS} + n]);
        out_strides[n] = strides[{MOST_TENSORS} + n];
    }}
    const int32_t code = s.kernel == nullptr ? -1 : s.kernel(in, in_strides, sizes, out, out_strides);
    if (code == 0) return nullptr;
    char text[200];
    snprintf(text, sizeof text, "attncc: %s: %s", s.op->name, reason(code));
    return api.error(text);
}}

Status* create(const Operator* op, const void* const* api, const void*, void** made) {{
    *made = new Session{{{{api}}, op, op->kernel()}};
    return nullptr;
}}

const Callbacks callbacks = {{
    {API},
    nullptr,
    [](const Operator* op) {{ return op->name; }},
    [](const Operator*) -> const char* {{ return nullptr; }},  // the CPU
    [](const Operator* op, size_t n) {{ return op->input_types[n]; }},
    [](const Operator* op) {{ return op->inputs; }},
    [](const Operator* op, size_t n) {{ return op->output_types[n]; }},
    [](const Operator* op) {{ return op->outputs; }},
    nullptr,
    [](void* kernel) {{ delete (Session*)kernel; }},
    [](const Operator*, size_t) {{ return 0; }},  // none is optional
    [](const Operator*, size_t) {{ return 0; }},
    [](const Operator*, size_t) {{ return 0; }},
    [](const Operator*) {{ return 0; }},
    [](const Operator*) {{ return 0; }},
    [](const Operator*) {{ return 0; }},
    [](const Operator*) {{ return 0; }},
    create,
    compute,
    nullptr,
    [](const Operator*) {{ return 1; }},
    [](const Operator*) {{ return 0x7fffffff; }},
}};
}}  // namespace
"""

_END = f"""
extern "C" __attribute__((visibility("default"))) Status* RegisterCustomOps(void* options, const ApiBase* base) {{
    const Api api = {{base->GetApi({API})}};
    if (api.table == nullptr) {{
        fprintf(stderr, "attncc: onnxruntime %s is older than 1.{API}\\n", base->GetVersionString());
        return nullptr;  // no error can be given without its functions; the model then lacks the operators
    }}
    void* domain;  // lives as long as the process: sessions refer to it
    if (Status* failed = api.domain("{DOMAIN}", &domain)) return failed;
    for (const Operator& op : operators)
        if (Status* failed = api.add(domain, &op)) return failed;
    return api.use(options, domain);
}}
"""


def library(packed: Sequence[Packed]) -> str:
    """The translation unit of the operators."""
    listed = ",\n    ".join(f"operator_{p.name}" for p in packed)
    table = f"\nstatic const Operator operators[] = {{\n    {listed},\n}};\n"
    return CHOICE + _BEGIN + "".join(p.choice() + _operator(p) for p in packed) + table + _END


def _operator(p: Packed) -> str:
    a = p.attention
    inputs = [*(_TYPES[t.dtype] for t in a.tensors), _TYPES["i64"]]
    outputs = [_TYPES[a.compute_dtype if name == "lse" else a.dtype] for name in a.outputs]
    axes = [axes_of(a, name) for name in a.outputs]
    lines = [f"static const int inputs_{p.name}[] = {{{', '.join(map(str, inputs))}}};"]
    lines += [f"static const int outputs_{p.name}[] = {{{', '.join(map(str, outputs))}}};"]
    lines += [f"static const size_t ranks_{p.name}[] = {{{', '.join(str(len(x)) for x in axes)}}};"]
    lines += [f"static void extents_{p.name}(const int64_t* sizes, int64_t (*found)[{MOST_DIMENSIONS}]) {{"]
    for n, own in enumerate(axes):
        lines += [f"    found[{n}][{d}] = {extent(a, x, 'sizes[{}]')};" for d, x in enumerate(own)]
    lines += ["}", f"static const Operator operator_{p.name} = {{"]
    lines += [f'    callbacks, "{p.name}", {len(inputs)}, {len(outputs)}, inputs_{p.name}, outputs_{p.name},']
    lines += [f"    ranks_{p.name}, extents_{p.name}, {p.chosen},", "};"]
    return "\n".join(lines) + "\n"
