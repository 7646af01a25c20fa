"""The C++ kernel of kept boxes (`attncc.runtime.kept`): one for each type of keys, for all shapes."""

from __future__ import annotations

from pathlib import Path

#: C's type of an element, and its value as a float.
_ELEMENTS = {
    "f32": ("float", "return x;"),
    "bf16": ("uint16_t", "uint32_t u = (uint32_t)x << 16; float f; memcpy(&f, &u, 4); return f;"),
    "f16": ("_Float16", "return (float)x;"),
}  # fmt: skip
#: In the order of the call.
TENSORS = "q", "k", "seen", "shift", "written"
OUTPUTS = "least", "largest", "was", "at", "dirty", "out"
SIZES = "B", "H", "G", "M", "D", "P", "SIZE", "W", "whole"
#: The dimensions of each.
RANKS = (4, 4, 3, 2, 1), (4, 4, 3, 2, 3, 4)
_STRIDES = ("sq", "sk", "ss", "sh", "sw"), ("sl", "sm", "so", "sa", "sd", "st")


def unsupported_boxes(dtype: str) -> str | None:
    """Why there is no kernel for keys of a type, or None."""
    return None if dtype in _ELEMENTS else f"no kernel of boxes for keys of {dtype}"


def emit_boxes(dtype: str) -> str:
    """The source for keys of a type."""
    element, value = _ELEMENTS[dtype]
    lines = [f"// boxes of {dtype} keys", *(f"#include <{h}>" for h in ("omp.h", "stddef.h", "stdint.h", "string.h"))]
    lines += [f"typedef {element} element;", f"static inline float value(element x) {{ {value} }}"]
    lines.append((Path(__file__).parent / "lib" / "boxes.h").read_text())
    lines.append('extern "C" __attribute__((visibility("default"))) int32_t attncc_run(')
    lines.append("    void** in, int64_t** in_strides, int64_t* sizes, void** outs, int64_t** out_strides) {")
    lines.append("    Call c;")
    for at, (names, strides, array) in enumerate(zip((TENSORS, OUTPUTS), _STRIDES, ("in", "outs"), strict=True)):
        table = ("in_strides", "out_strides")[at]
        for n, (name, stride) in enumerate(zip(names, strides, strict=True)):
            lines.append(f"    c.{name} = (decltype(c.{name})){array}[{n}]; c.{stride} = {table}[{n}];")
    lines += [f"    c.{name} = sizes[{n}];" for n, name in enumerate(SIZES)]
    return "\n".join([*lines, "    run(c);", "    return 0;", "}", ""])
