"""From a linear attention to one C++ translation unit: the hooks that `lib/linear.h` calls, and that.

    q, k, v, state -> query_at, key_at, value_at, state_at: pointer + sum of stride * index
    phi            -> map_query, map_key, in place on a row of channels
    decay, rate    -> decay_of (a number a token, or a row of channels, and the same less one), rate_of
    over           -> over_of, what the output is divided by
"""

from __future__ import annotations

from attncc.codegen.cpp.emitter import ELEMENT, library
from attncc.codegen.cpp.expressions import INDEX_BOUND
from attncc.codegen.cpp.isa import TABLE, machine
from attncc.codegen.cpp.linear_expressions import LinearPrinter, along
from attncc.codegen.cpp.linear_scan import is_scan, scan_room, scan_rows, unsupported_scan
from attncc.codegen.cpp.operands import NotAffine, Operand, operand
from attncc.codegen.cpp.prepared import function
from attncc.ir import Axis, Const, Expr, Linear, Load, print_linear
from attncc.ir.expr import free
from attncc.ir.linear import X

#: Where what `lib/linear_scan.h` works with is declared, and what reads it comes.
_ROOM_END = "// ---- the hooks of this attention come here\n"
#: Tokens of a block, and vectors of a row of the state that stay in registers with the sums of as many tokens.
_TOKENS, _VECTORS = 4, {"avx2": 1}


def unsupported_linear(a: Linear) -> str | None:
    """Why no C++ kernel gives `a`, or None."""
    floats = ("f64", "f32", "bf16", "f16")
    if a.dtype not in floats or any(a.tensor(x.tensor).dtype not in floats for _, x in a.accesses()):
        return "operands that are no floats"
    d = a.d.index
    if d in free(a.phi_q) | free(a.phi_k):
        return "a feature map that changes with the channel"
    if is_scan(a) and (reason := unsupported_scan(a)) is not None:
        return reason
    try:
        _operands(a)
    except NotAffine as error:
        return str(error)
    return None


def emit_linear(a: Linear, isa: str) -> str:
    """The C++ source of `a` for `isa`. Raises ValueError where `unsupported_linear(a)` has a reason."""
    reason = unsupported_linear(a)
    if reason is not None:
        raise ValueError(f"no C++ kernel: {reason}")
    return _LinearEmitter(a, isa).source()


def is_step(a: Linear) -> bool:
    """Whether `a` is one token that goes from a state to the next: `lib/linear_step.h` instead of `lib/linear.h`."""
    return a.j.extent == Const(1) and a.sees == "past" and a.state is not None and {*a.outputs} == {"out", "state"}


def _operands(a: Linear) -> dict[str, Operand]:
    axes = {"q": (a.i, a.d), "k": (a.j, a.d), "v": (a.j, a.e), "state": (a.d, a.e)}
    return {name: operand(x, *axes[name]) for name, x in a.accesses()}


class _LinearEmitter:
    def __init__(self, a: Linear, isa: str) -> None:
        self.a, self.name, self.isa = a, isa, TABLE[isa]
        self.p = LinearPrinter(a)
        self.operands = _operands(a)
        self.row = None if is_scan(a) else along(a, a.decay)

    def source(self) -> str:
        parts = [self._header(), self._config(), *map(library, ("vector", "integers", "convert", "linear_rows"))]
        parts += ["// ---- this attention " + "-" * 96 + "\n", self._call(), self._points(), self._rows(), self._maps()]
        if is_scan(self.a):  # its hooks come between what they work with and the loop that calls them
            room, loop = library("linear_scan").split(_ROOM_END)
            parts += [scan_room(self.a), room + _ROOM_END, scan_rows(self.a, self.p), loop]
            return "\n".join([*parts, self._entry()])
        return "\n".join([*parts, library("linear_step" if is_step(self.a) else "linear"), self._entry()])

    def _header(self) -> str:
        lines = [f"attncc: a C++ kernel for {self.name}", "", *print_linear(self.a).splitlines()]
        return "\n".join(f"// {line}".rstrip() for line in lines) + "\n"

    def _config(self) -> str:
        a, double = self.a, self.p.double
        defines = machine(self.isa, self.name, double=double, pairs=False, tiles=False, coarse=False) | {
            "WIDE_INTS": 1, "TOKENS": 1 if a.j.extent == Const(1) else _TOKENS, "VECTORS": _VECTORS.get(self.name, 2),
            "PAST": int(a.sees == "past" and "out" in a.outputs), "DELTA": int(a.rule == "delta"),
            "CHANNELS": int(self.row is not None), "WEIGHED": int(a.over is not None and "out" in a.outputs),
            "HAS_STATE": int(a.state is not None), "HAS_OUT": int("out" in a.outputs),
            "GIVES_STATE": int("state" in a.outputs), "STATE_RANK": len(a.batch), "OUT_OF_MEMORY": 1, "TOO_LARGE": 2,
        }  # fmt: skip
        headers = ("math.h", "omp.h", "stddef.h", "stdint.h", "stdlib.h", "string.h")
        lines = [f"#include <{h}>" for h in headers]
        lines += [f"#define {name} {value}" for name, value in defines.items()]
        lines += [f"typedef {'double' if double else 'float'} real;  // the compute type"]
        lines += [f"typedef {'int64_t' if double else 'int32_t'} mask_int;", "typedef int64_t lane_int;"]
        return "\n".join(lines) + "\n"

    def _call(self) -> str:
        a = self.a
        lines = ["// What a call passes: pointers, strides in elements, sizes.", "struct Call {"]
        for t in a.tensors:
            lines.append(f"    const {ELEMENT[t.dtype]}* t_{t.name};  // {t.dtype}[{', '.join(map(repr, t.shape))}]")
            lines.append(f"    int64_t s_{t.name}[{max(len(t.shape), 1)}];")
        lines += [f"    int64_t z_{s.name};" for s in a.sizes]
        for name, axis in self._extents():
            held = f"static constexpr int64_t {name} = {axis.extent.value}" if isinstance(axis.extent, Const) else ""
            lines.append(f"    {held or f'int64_t {name}'};")
        lines.append("    int64_t q_i, q_d, k_j, k_d, v_j, v_e, s_d, s_e, out_e, new_e;")
        rank = len(a.batch)
        lines.append(f"    {ELEMENT[a.dtype]}* out;\n    int64_t s_out[{rank + 2}];")
        lines.append(f"    real* state;\n    int64_t s_state[{rank + 2}];\n}};")
        for role in ("q", "k", "v", "state"):
            of = self.operands.get(role)
            lines.append(f"typedef {'real' if of is None else ELEMENT[a.tensor(of.tensor).dtype]} {role}_element;")
        lines.append(f"typedef {ELEMENT[a.dtype]} out_element;")
        return "\n".join(lines) + "\n"

    def _extents(self) -> tuple[tuple[str, Axis], ...]:
        return ("N", self.a.i), ("M", self.a.j), ("D", self.a.d), ("E", self.a.e)

    def _points(self) -> str:
        fields = " ".join(f"int64_t x_{x.name};" for x in self.a.batch)
        count = " * ".join(self.p.integer(x.extent) for x in self.a.batch) or "1"
        lines = ["Batch at;", "(void)c; (void)n;"]
        for x in reversed(self.a.batch):
            lines += [f"at.x_{x.name} = n % {self.p.integer(x.extent)};", f"n /= {self.p.integer(x.extent)};"]
        lines.append("return at;")
        return (
            f"struct Batch {{ {fields} }};\nstatic int64_t batch_count(const Call& c) {{ (void)c; return {count}; }}\n"
            + function("static Batch batch_at(const Call& c, int64_t n)", lines)
        )

    def _rows(self) -> str:
        out: list[str] = []
        roles = (("q", "query_at", "i", "q_i"), ("k", "key_at", "j", "k_j"), ("v", "value_at", "j", "v_j"),
                 ("state", "state_at", "d", "s_d"))  # fmt: skip
        for role, name, row, step in roles:
            of = self.operands.get(role)
            body = "nullptr"
            if of is not None:
                terms = [f"({self.p.integer(x)}) * c.s_{of.tensor}[{n}]" for n, x in enumerate(of.offset)
                         if x != Const(0)]  # fmt: skip
                body = " + ".join([f"c.t_{of.tensor}", *terms, f"{row} * c.{step}"])
            head = f"INLINE const {role}_element* {name}(const Call& c, const Batch& b, int64_t {row})"
            out.append(function(head, [f"(void)c; (void)b; (void){row};", f"return {body};"]))
        rank = len(self.a.batch)
        for name, field, row, ctype in (("out_at", "out", "i", "out_element"), ("new_state_at", "state", "d", "real")):
            terms = [f"b.x_{x.name} * c.s_{field}[{n}]" for n, x in enumerate(self.a.batch)]
            body = " + ".join([f"c.{field}", *terms, f"{row} * c.s_{field}[{rank}]"])
            head = f"INLINE {ctype}* {name}(const Call& c, const Batch& b, int64_t {row})"
            out.append(function(head, [f"(void)b; return {body};"]))
        return "\n".join(out)

    def _maps(self) -> str:
        a = self.a
        out: list[str] = []
        for name, phi, row in (("map_query", a.phi_q, "i"), ("map_key", a.phi_k, "j")):
            lines = [f"(void)c; (void)b; (void){row}; (void)p; (void)rows;"]
            if phi is not X:
                lines += ["for (int64_t at = 0; at < rows; at += LANES) {", "    const vreal x = load(p + at);",
                          f"    store(p + at, {self.p.vector(phi)});", "}",
                          "for (int64_t at = c.D; at < rows; ++at) p[at] = 0;"]  # fmt: skip
            head = f"INLINE void {name}(const Call& c, const Batch& b, int64_t {row}, real* p, int64_t rows)"
            out.append(function(head, lines))
        if is_scan(a):
            return "\n".join(out)
        lines = ["(void)c; (void)b; (void)j; (void)rows;"]
        if isinstance(self.row, Load):
            at = tuple(Const(0) if x is a.d.index else x for x in self.row.index)
            step = f"c.s_{self.row.tensor}[{self.row.index.index(a.d.index)}]"
            place = self.p.place(self.row.tensor, at)
            lines += [f"take(c.t_{self.row.tensor} + {place}, {step}, c.D, rows, g);"]
            lines += ["for (int64_t at = 0; at < rows; at += LANES) {", "    const vreal x = load(g + at);",
                      f"    store(g + at, {self.p.vector(a.decay, self.row)});",
                      f"    store(less + at, {self.p.less_one(a.decay, self.row)});", "}",
                      "for (int64_t at = c.D; at < rows; ++at) g[at] = 1, less[at] = 0;"]  # fmt: skip
        else:
            lines += [f"g[0] = {self._number(a.decay)};", f"less[0] = ({self.p.less_one(a.decay)})[0];"]
        head = "INLINE void decay_of(const Call& c, const Batch& b, int64_t j, real* g, real* less, int64_t rows)"
        out.append(function(head, lines))
        lines = ["(void)c; (void)b; (void)j;", f"return {self._number(a.rate)};"]
        out.append(function("INLINE real rate_of(const Call& c, const Batch& b, int64_t j)", lines))
        over: Expr = Const(1.0) if a.over is None else a.over
        lines = ["(void)c; (void)b;", "const vreal x = splat(z);", "(void)x;", f"return {self._number(over)};"]
        out.append(function("INLINE real over_of(const Call& c, const Batch& b, real z)", lines))
        return "\n".join(out)

    def _number(self, x: Expr) -> str:
        return f"({self.p.vector(x)})[0]"

    def _entry(self) -> str:
        a = self.a
        lines = ["(void)sizes; (void)outputs; (void)out_strides;", "Call c;"]
        for n, s in enumerate(a.sizes):
            lines += [f"if (sizes[{n}] > {INDEX_BOUND}) return TOO_LARGE;", f"c.z_{s.name} = sizes[{n}];"]
        for n, t in enumerate(a.tensors):
            lines.append(f"c.t_{t.name} = (const {ELEMENT[t.dtype]}*)tensors[{n}];")
            lines += [f"c.s_{t.name}[{d}] = strides[{n}][{d}];" for d in range(len(t.shape))]
        lines += [
            f"c.{name} = {self.p.integer(x.extent)};" for name, x in self._extents() if not isinstance(x.extent, Const)
        ]
        steps = {"q": ("q_i", "q_d"), "k": ("k_j", "k_d"), "v": ("v_j", "v_e"), "state": ("s_d", "s_e")}
        for role, names in steps.items():
            of = self.operands.get(role)
            for name, terms in zip(names, ((), ()) if of is None else (of.row_terms, of.col_terms), strict=True):
                tensor = "" if of is None else of.tensor
                code = " + ".join(f"({self.p.integer(k)}) * c.s_{tensor}[{dim}]" for k, dim in terms) or "0"
                lines.append(f"c.{name} = {code};")
        rank = len(a.batch) + 2
        for n, name in enumerate(a.outputs):
            lines.append(f"c.{name} = ({ELEMENT[a.dtype] if name == 'out' else 'real'}*)outputs[{n}];")
            lines += [f"c.s_{name}[{d}] = out_strides[{n}][{d}];" for d in range(rank)]
            lines.append(f"c.{'out_e' if name == 'out' else 'new_e'} = c.s_{name}[{rank - 1}];")
        head = (
            'extern "C" __attribute__((visibility("default"))) int32_t attncc_run(\n'
            "    const void* const* tensors, const int64_t* const* strides, const int64_t* sizes,\n"
            "    void* const* outputs, const int64_t* const* out_strides)"
        )
        return "// ---- entry: 0, OUT_OF_MEMORY or TOO_LARGE\n" + function(head, [*lines, "return run(c);"])
