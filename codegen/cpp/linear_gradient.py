"""From a linear attention to the C++ translation unit of its gradient, by chunks: `lib/linear_gradient.h`.

It takes what the node is made of, feature maps applied, and gives the gradients of that; what lies before is
elementwise, and torch's to differentiate.

    tensors   q, k (B, H, N, D), v (B, H, N, E), the logarithms of the decays (B, H, N, D or 1), rate (B, H, N),
              state (B, H, D, E), gradients of out (B, H, N, E) and of the last state (B, H, D, E)
    sizes     B, H, N, D, E
    outputs   gradients of q, k, v, logarithms, rate and state
"""

from __future__ import annotations

from attncc.codegen.cpp.emitter import library
from attncc.codegen.cpp.isa import TABLE, machine
from attncc.codegen.cpp.prepared import function
from attncc.ir import Linear
from attncc.ir.expr import free
from attncc.ir.linear_chunks import unchunked, unfactored

#: (in C, dimensions) of what the kernel takes and of what it gives.
TAKES = (("q", 4), ("k", 4), ("v", 4), ("log", 4), ("rate", 3), ("state", 4), ("o", 4), ("dstate", 4))
GIVES = (("dq", 4), ("dk", 4), ("dv", 4), ("dlog", 4), ("drate", 3), ("dstart", 4))
SIZES = ("B", "H", "N", "D", "E")
#: Tokens of a chunk with one decay a token, and with one for each channel, where each pair of tokens costs a channel.
_CHUNK, _CHANNEL_CHUNK = 32, 16


def unsupported_linear_gradient(a: Linear) -> str | None:
    """Why no C++ kernel gives the gradient of `a`, or None."""
    return unfactored(a) or unchunked(a)


def emit_linear_gradient(a: Linear, isa: str) -> str:
    """The C++ source of the gradient of `a` for `isa`: that of every node with its rule, its kind of decays and its
    compute type. Raises ValueError where `unsupported_linear_gradient(a)` has a reason."""
    reason = unsupported_linear_gradient(a)
    if reason is not None:
        raise ValueError(f"no C++ kernel: {reason}")
    double, channels = a.compute_dtype == "f64", a.d.index in free(a.decay)
    delta = a.rule == "delta"
    rule = "delta rule" if delta else "sums"
    first = f"// attncc: a C++ kernel for {isa}\n//\n// gradients of linear attention: {rule}, "
    first += f"{'a decay for each channel' if channels else 'one decay a token'}, {a.compute_dtype}\n"
    parts = [first, _config(isa, double=double, channels=channels, delta=delta), *map(library, (
        "vector", "integers", "convert", "linear_rows", "linear_products",
    )), _call(), library("linear_gradient"), _entry()]  # fmt: skip
    return "\n".join(parts)


def _config(isa: str, *, double: bool, channels: bool, delta: bool) -> str:
    of = TABLE[isa]
    defines = machine(of, isa, double=double, pairs=False, tiles=False, coarse=False) | {
        "WIDE_INTS": 1, "DELTA": int(delta), "CHANNELS": int(channels),
        "CHUNK": _CHANNEL_CHUNK if channels else _CHUNK, "OUT_OF_MEMORY": 1, "TOO_LARGE": 2,
    }  # fmt: skip
    lines = [f"#include <{h}>" for h in ("math.h", "omp.h", "stddef.h", "stdint.h", "stdlib.h", "string.h")]
    lines += [f"#define {name} {value}" for name, value in defines.items()]
    lines += [f"typedef {'double' if double else 'float'} real;  // the compute type"]
    lines += [f"typedef {'int64_t' if double else 'int32_t'} mask_int;", "typedef int64_t lane_int;"]
    return "\n".join(lines) + "\n"


def _call() -> str:
    lines = ["// What a call passes: pointers, strides in elements, sizes.", "struct Call {"]
    lines += [f"    const real* t_{name};\n    const int64_t* s_{name};" for name, _ in TAKES]
    lines += [f"    real* {name};\n    const int64_t* s_{name};" for name, _ in GIVES]
    lines += [f"    int64_t {', '.join(SIZES)};", "};", "struct Point { int64_t x, y; };"]
    return "\n".join(lines) + "\n"


def _entry() -> str:
    lines = ["Call c;"]
    for n, (name, _) in enumerate(TAKES):
        lines.append(f"c.t_{name} = (const real*)tensors[{n}], c.s_{name} = strides[{n}];")
    for n, (name, _) in enumerate(GIVES):
        lines.append(f"c.{name} = (real*)outputs[{n}], c.s_{name} = out_strides[{n}];")
    lines += [f"c.{name} = sizes[{n}];" for n, name in enumerate(SIZES)]
    head = (
        'extern "C" __attribute__((visibility("default"))) int32_t attncc_run(\n'
        "    const void* const* tensors, const int64_t* const* strides, const int64_t* sizes,\n"
        "    void* const* outputs, const int64_t* const* out_strides)"
    )
    return "// ---- entry: 0 or OUT_OF_MEMORY\n" + function(head, [*lines, "return run(c);"])
