"""From an attention to one C++ translation unit: the hooks that the skeleton in `lib/` calls, and the skeleton itself.

    q, k, v         -> query_at, key_at, value_at: pointer + sum of stride * index
    score, mask     -> logit (without its constant factor, for softmax), masked keys -inf
    sink            -> first_logit, the maximum a row starts with
    drop            -> spare_share, the share of a row's weights that it may leave out
    weight          -> linear_weight where linear in w, else weight after a first pass for the sums
    bounds          -> find_spans, the keys a tile visits and those of them that it must mask
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

from attncc.codegen.cpp import prepared
from attncc.codegen.cpp.expressions import INDEX_BOUND, WIDE_BOUND, Printer, fits_32_bits, literal
from attncc.codegen.cpp.fold import folded
from attncc.codegen.cpp.isa import TABLE, machine
from attncc.codegen.cpp.operands import NotAffine, Operand, operand
from attncc.codegen.cpp.prepared import function
from attncc.codegen.cpp.visits import is_band, most_few
from attncc.ir import Attention, Axis, Bounds, Const, Expr, Interval, Op, S, W, print_attention
from attncc.ir.analysis import folded_axes, keeps_nan, linear_factor, scaled, zero_at_zero
from attncc.ir.bounds import Bits
from attncc.ir.build import TRUE
from attncc.ir.expr import free, loads, walk

ELEMENT = {
    "f64": "double", "f32": "float", "bf16": "bf16", "f16": "f16", "i64": "int64_t", "i32": "int32_t",
    "i16": "int16_t", "i8": "int8_t", "u8": "uint8_t", "bool": "bool",
}  # fmt: skip
_INDENT = "    "
_LOG2E = math.log2(math.e)


def unsupported(a: Attention) -> str | None:
    """Why no C++ kernel gives `a`, or None."""
    if "weights" in a.outputs:
        return "the weights are asked for; the C++ kernel never forms them"
    if a.dtype not in ELEMENT or a.dtype not in ("f64", "f32", "bf16", "f16"):
        return f"out as {a.dtype}"
    if a.empty != "zero" and a.normalizer == "softmax" and not zero_at_zero(a.weight, W):
        return f"a weight that is not 0 where w is 0, with empty rows as {a.empty}"
    if a.empty == "nan" and a.normalizer == "softmax" and not keeps_nan(a.weight, W):
        return "a weight that may replace the NaN of an empty row"
    try:
        operands_of(a)
    except NotAffine as error:
        return str(error)
    return None


def instructions(a: Attention, isa: str) -> str:
    """The instruction set that the kernel of `a` for `isa` makes use of: what AMX and AVX-512-BF16 have beyond AVX-512
    multiplies bfloat16 alone."""
    return isa if _in_bf16(a) or not TABLE[isa].pairs else "avx512"


def _in_bf16(a: Attention) -> bool:
    return {a.tensor(x.tensor).dtype for x in (a.q, a.k, a.v)} == {"bf16"}


def emit(a: Attention, bounds: Bounds, isa: str, *, wide: bool = False) -> str:
    """The C++ source of `a` for `isa`; `wide` where a call may have sizes beyond 2^24.

    Raises ValueError where `unsupported(a)` has a reason."""
    reason = unsupported(a)
    if reason is not None:
        raise ValueError(f"no C++ kernel: {reason}")
    if isa not in TABLE:
        raise ValueError(f"no such instruction set {isa!r}; it is one of {', '.join(TABLE)}")
    return Emitter(a, bounds, isa, wide=wide).source()


def operands_of(a: Attention) -> tuple[Operand, Operand, Operand]:
    return operand(a.q, a.i, a.d), operand(a.k, a.j, a.d), operand(a.v, a.j, a.e)


@cache
def library(name: str) -> str:
    return (Path(__file__).parent / "lib" / f"{name}.h").read_text()


class Emitter:
    def __init__(self, a: Attention, bounds: Bounds, isa: str, *, wide: bool) -> None:
        self.wide = wide
        a = replace(a, score=folded(a.score), weight=folded(a.weight))
        self.hidden = (Interval(Const(0), a.j.extent),) if bounds.hidden is None else bounds.hidden
        bounds = replace(bounds, full=(), full_parts=(), residue=None, hidden=self.hidden)  # what find_spans works out
        self.a, self.bounds, self.name, self.isa = a, bounds, isa, TABLE[isa]
        self.folded = folded_axes(a, bounds.expressions)
        self.held = tuple(x for x in a.batch if x not in self.folded)
        self.p = Printer(a, [x.index for x in self.folded])
        self.q, self.k, self.v = operands_of(a)
        factor = linear_factor(a.weight, W) if a.normalizer == "softmax" else None
        self.factor = None if factor is None or S in free(factor) else factor
        self.early = a.normalizer == "softmax" and self.factor is None
        # bfloat16 operands alone gain from bfloat16 products; everything else runs in the compute type.
        self.pairs = _in_bf16(a) and self.isa.pairs
        self.tiles = self.pairs and self.isa.tiles
        # What rounds to bfloat16 in the end, weights or the output, needs no more of exp and tanh.
        self.coarse = self.pairs or (_in_bf16(a) and a.dtype == "bf16" and "lse" not in a.outputs)
        self.near = self.coarse and any(isinstance(x, Op) and x.name == "tanh" for x in walk(a.score))
        # raw * scale is the logit to base 2 where there is a softmax: the kernel takes the maximum of raw.
        self.raw, factor = scaled(a.score) if a.normalizer == "softmax" else (a.score, 1.0)
        self.scale = factor * _LOG2E if a.normalizer == "softmax" else 1.0

    def source(self) -> str:
        hooks = [self._bounds(), self._logit(), self._weights(), self._sink()]
        hooks.append(prepared.slanted(self.p))  # they fill the slots printed below
        parts = [self._header(), self._config(), *map(library, ("vector", "integers", "convert", "layout"))]
        parts += [library("matrix_unit" if self.tiles else "product")]
        parts += ["// ---- this attention " + "-" * 96 + "\n", self._call(), self._points(), prepared.slots(self.p)]
        parts += [*map(library, ("spans", "tile", "peak")), prepared.fills(self.p), *hooks]
        parts += [prepared.staged(self.p), self._rows()]
        parts += [library("dropped"), library("pairs" if self.pairs else "plain"), library("few")]
        parts += [*([library("few_tiles")] if self.tiles else []), library("few_attend")]
        return "\n".join([*parts, *map(library, ("begin", "slanted", "attend", "run")), self._entry()])

    # ---- text ------------------------------------------------------------------------------------------------------
    def _header(self) -> str:
        lines = ["attncc: a C++ kernel for " + self.name, "", *_equation(self.a), ""]
        lines += print_attention(self.a).splitlines()
        lines += ["", *(f"visit  {interval_text(x)}" for x in self.bounds.visit)]
        lines += [f"hidden {interval_text(x)}" for x in self.hidden]
        return "\n".join(f"// {line}".rstrip() for line in lines) + "\n"

    def _config(self) -> str:
        a, double = self.a, self.p.double
        roots = (a.score, a.mask, a.weight, *(x for x in (a.sink, a.spare) if x is not None))
        narrow = not double and not self.wide and fits_32_bits(a, *roots)
        spans = [n for x in self.bounds.intervals for n in x.expressions]
        defines = machine(self.isa, self.name, double=double, pairs=self.pairs, tiles=self.tiles,
                          coarse=self.coarse, band=is_band(a, self.bounds), skips=a.spare is not None) | {
            "WIDE_INTS": int(not narrow), "STAGED": len(self.p.staged), "SLANTED": len(self.p.diagonals.tables),
            "STAGED_BY_SCORE": int(not self.p.staged.keys().isdisjoint(loads(a.score, a.weight))),
            "MAX_SPANS": max(len(self.bounds.visit), 1), "MAX_HIDDEN": max(len(self.hidden), 1),
            "MAX_STRIPES": max((len(x.stripes) for x in (*self.bounds.visit, *self.hidden)), default=0),
            "MAX_BITS": max((len(x.bits) for x in (*self.bounds.visit, *self.hidden)), default=0),
            "ROW_AXES": 1 + len(self.folded),
            "HAS_OUT": int("out" in a.outputs), "HAS_LSE": int("lse" in a.outputs), "HAS_SINK": int(a.sink is not None),
            "IS_SOFTMAX": int(a.normalizer == "softmax"), "NORMALIZED_EARLY": int(self.early),
            "EMPTY_ZERO": 0, "EMPTY_MEAN": 1, "EMPTY_NAN": 2, "EMPTY": f"EMPTY_{a.empty.upper()}",
            "SCALE": self._real(self.scale), "LOG2E": self._real(_LOG2E),
            "HAS_NEAR": int(self.near), "MAY_DROP": int(a.spare is not None),
            "MOST_FEW": most_few(a, self.folded),
            "FEW_ALONE": int(a.normalizer == "softmax" and self.raw is S and self.factor == Const(1.0)),
            "SUMS_ROUNDED": int(self.factor == Const(1.0) and "lse" not in a.outputs),
            "CAN_SPLIT": int(a.normalizer == "softmax" and not self.early and a.empty != "mean"),
            "EVEN_AREA": int(not (free(*spans) - {*a.sizes} or loads(*spans))),
            "OUT_OF_MEMORY": 1, "TOO_LARGE": 2, "NO_MATRIX_UNIT": 3,
        }  # fmt: skip
        headers = ["math.h", "omp.h", "stddef.h", "stdint.h", "stdlib.h", "string.h"]
        lines = [f"#include <{h}>" for h in [*headers, *(["sys/syscall.h", "unistd.h"] if self.tiles else [])]]
        lines += [f"#define {name} {value}" for name, value in defines.items()]
        lines += [f"typedef {'double' if double else 'float'} real;  // the compute type"]
        lines += [f"typedef {'int64_t' if double else 'int32_t'} mask_int;"]
        lines += [f"typedef {'int32_t' if narrow else 'int64_t'} lane_int;  // what every integer of a lane fits"]
        return "\n".join(lines) + "\n"

    def _real(self, x: float) -> str:
        return literal(Const(float(x)), double=self.p.double)

    def _call(self) -> str:
        a = self.a
        lines = ["// What a call passes: pointers, strides in elements, sizes."]
        lines.append("struct Call {")
        lines += self._fields()
        lines.append("    int64_t q_d, q_i, k_j, k_d, v_j, v_e, out_e;")
        rank = len(a.batch)
        if "out" in a.outputs:
            lines.append(f"    {ELEMENT[a.dtype]}* out;\n    int64_t s_out[{rank + 2}];")
        if "lse" in a.outputs:
            lines.append(f"    real* lse;\n    int64_t s_lse[{rank + 1}];")
        lines.append("};")
        for role, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            dtype = ELEMENT[a.tensor(x.tensor).dtype]
            lines.append(f"typedef {dtype} {role}_element;")
        lines.append(f"typedef {ELEMENT[a.dtype]} out_element;")
        return "\n".join(lines) + "\n"

    def _extent(self, x: Axis) -> str:
        return self.p.scalar(x.extent)

    def _points(self) -> str:
        """The batch axes: those that hold keys, and those folded into rows."""
        out = list[str]()
        for struct, single, axes in (("Batch", "batch", self.held), ("Group", "group", self.folded)):
            fields = " ".join(f"int64_t x_{x.name};" for x in axes)
            out.append(f"struct {struct} {{ {fields} }};\n")
            count = " * ".join(self._extent(x) for x in axes) or "1"
            out.append(f"static int64_t {single}_count(const Call& c) {{ (void)c; return {count}; }}\n")
            lines = [f"{struct} at;", "(void)c; (void)n;"]
            for x in reversed(axes):
                if x is axes[0]:
                    lines.append(f"at.x_{x.name} = n;")
                else:
                    lines += [f"at.x_{x.name} = n % {self._extent(x)};", f"n /= {self._extent(x)};"]
            lines.append("return at;")
            out.append(function(f"static {struct} {single}_at(const Call& c, int64_t n)", lines))
        return "".join(out)

    def _place(self, operand: Operand) -> str:
        names: dict[Expr, str] = {x.index: f"g.x_{x.name}" for x in self.folded}
        t = operand.tensor
        terms = [
            f"{self.p.scalar(x, names)} * c.s_{t}[{n}]" for n, x in enumerate(operand.offset) if x != Const(0)
        ]  # fmt: skip
        return " + ".join([f"c.t_{t}", *terms])

    def _rows(self) -> str:
        a = self.a
        batch = [f"{'g' if x in self.folded else 'b'}.x_{x.name}" for x in a.batch]
        out = [
            "INLINE const q_element* query_at(const Call& c, const Batch& b, const Group& g, int64_t i) {\n"
            f"    (void)b; (void)g;\n    return {self._place(self.q)} + i * c.q_i;\n}}\n",
            "INLINE const k_element* key_at(const Call& c, const Batch& b) {\n"
            f"    (void)b;\n    return {self._place(self.k)};\n}}\n",
            "INLINE const v_element* value_at(const Call& c, const Batch& b) {\n"
            f"    (void)b;\n    return {self._place(self.v)};\n}}\n",
        ]
        for name, ctype in (("out", "out_element"), ("lse", "real")):
            terms = [f"{x} * c.s_{name}[{n}]" for n, x in enumerate([*batch, "i"])]
            body = f"c.{name} + {' + '.join(terms)}" if name in a.outputs else "nullptr"
            out.append(
                f"INLINE {ctype}* {name}_at(const Call& c, const Batch& b, const Group& g, int64_t i) {{\n"
                f"    (void)c; (void)b; (void)g; (void)i;\n    return {body};\n}}\n"
            )
        lines = ["(void)g;", "t.lane[0][lane] = (lane_int)i;"]
        lines += [f"t.lane[{n}][lane] = (lane_int)g.x_{x.name};" for n, x in enumerate(self.folded, 1)]
        out.append(function("INLINE void set_lane(Tile& t, int64_t lane, const Group& g, int64_t i)", lines))
        return "\n".join(out)

    # ---- hooks -----------------------------------------------------------------------------------------------------
    def _bounds(self) -> str:
        lines = ["(void)c; (void)b;"]
        names: dict[Expr, str] = {self.a.i.index: "i"}
        for x in self.bounds.rows:
            compare = "<" if x.op == "min" else ">"
            lines += [
                f"int64_t {x.name} = INT64_{'MAX' if x.op == 'min' else 'MIN'};",
                "for (int64_t i = t.i0; i < t.i1; ++i) {",
                f"    const int64_t x = {self.p.scalar(x.expr, names)};",
                f"    {x.name} = x {compare} {x.name} ? x : {x.name};",
                "}",
            ]
            names[x.index] = x.name
        for call, intervals, tail in (("visit", self.bounds.visit, ", from, to"), ("hide", self.hidden, ", c.M")):
            for x in intervals:
                ends = f"{self.p.scalar(x.lo, names)}, {self.p.scalar(x.hi, names)}{tail}"
                stripes = (", ".join(self.p.scalar(n, names) for n in (s.step, s.offset, s.width)) for s in x.stripes)
                parts = [ends, *(f"Stripe{{{s}}}" for s in stripes), *(self._bits(n, names) for n in x.bits)]
                lines.append(f"{call}(t, {', '.join(parts)});")
        head = "static void find_spans(const Call& c, const Batch& b, Tile& t, int64_t from, int64_t to)"
        return function(head, lines)

    def _bits(self, x: Bits, names: dict[Expr, str]) -> str:
        place = [f"{self.p.scalar(n, names)} * c.s_{x.tensor}[{dim}]" for dim, n in enumerate(x.index)]
        return f"Bits{{{' + '.join([f'c.t_{x.tensor}', *place])}, {x.block}, {'false' if x.outside else 'true'}}}"

    def _logit(self) -> str:
        a = self.a
        unmasked = self.p.statements({"x": self.raw}, near=self.near)
        masked = self.p.statements({"seen": a.mask})
        lines = [_UNUSED, "(void)s; (void)visible; (void)reach;"]
        if a.mask is not TRUE:
            lines += ["if (MASKED) {", *(f"{_INDENT}{line}" for line in masked), f"{_INDENT}visible = seen;", "}"]
        lines += unmasked
        pointwise = {"softmax": "x", "none": "x", "sigmoid": "sigmoid_of(x)", "relu": "x < 0 ? vreal{} : x"}
        lines.append(f"return {pointwise[a.normalizer]};")
        head = (
            "template <bool MASKED, bool NEAR>\n"
            f"INLINE vreal logit({_PLACE}, vreal s, vmask& visible, vreal& reach)"
        )  # fmt: skip
        return function(head, lines)

    def _weights(self) -> str:
        factor = Const(1.0) if self.factor is None else self.factor
        linear = ["return w;"] if factor == Const(1.0) else [*self.p.statements({"f": factor}), "return w * f;"]
        every = [*self.p.statements({"x": self.a.weight}), "return x;"]
        if self.early:
            alone = ["const vreal w = splat(1 / (real)c.M);", *every]
        else:
            alone = [*self.p.statements({"x": factor}), "return x;"]
        return (
            function(f"INLINE vreal linear_weight({_PLACE}, vreal w)", [_UNUSED, *linear])
            + function(f"INLINE vreal weight({_PLACE}, vreal s, vreal w)", [_UNUSED, "(void)s; (void)w;", *every])
            + function(f"INLINE vreal empty_weight({_PLACE}, vreal s)", [_UNUSED, "(void)s;", *alone])
        )

    def _sink(self) -> str:
        body = "splat(-INFINITY)"
        if self.a.sink is not None:
            body = self.p.row_code(self.a.sink)
        head = "static vreal first_logit(const Call& c, const Batch& b, const Uniform& u, const Tile& t, int64_t at)"
        sink = function(head, ["(void)c; (void)b; (void)u; (void)t; (void)at;", f"return {body};"])
        if self.a.spare is None:
            return sink
        head = "static vreal spare_share(const Call& c, const Batch& b, const Uniform& u, const Tile& t, int64_t at)"
        body = self.p.row_code(self.a.spare)
        return sink + function(head, ["(void)c; (void)b; (void)u; (void)t; (void)at;", f"return {body};"])

    def _entry(self) -> str:
        a = self.a
        lines = self._given()
        for role, x, row, col in (("q", self.q, "i", "d"), ("k", self.k, "j", "d"), ("v", self.v, "j", "e")):
            lines.append(f"c.{role}_{row} = {self._stride(x, x.row_terms)};")
            lines.append(f"c.{role}_{col} = {self._stride(x, x.col_terms)};")
        lines.append("c.out_e = 1;")
        for n, name in enumerate(x for x in a.outputs):
            rank = len(a.batch) + (2 if name == "out" else 1)
            ctype = ELEMENT[a.dtype] if name == "out" else "real"
            lines.append(f"c.{name} = ({ctype}*)outputs[{n}];")
            lines += [f"c.s_{name}[{d}] = out_strides[{n}][{d}];" for d in range(rank)]
            if name == "out":
                lines.append(f"c.out_e = c.s_out[{rank - 1}];")
        return self._run(lines)

    def _fields(self) -> list[str]:
        """Of the call: its tensors, sizes and extents."""
        a = self.a
        lines: list[str] = []
        for t in a.tensors:
            element = ELEMENT[t.dtype]
            lines.append(f"    const {element}* t_{t.name};  // {t.dtype}[{', '.join(map(repr, t.shape))}]")
            lines.append(f"    int64_t s_{t.name}[{max(len(t.shape), 1)}];")
        lines += [f"    int64_t z_{s.name};" for s in a.sizes]
        for name, axis in (("N", a.i), ("M", a.j), ("D", a.d), ("E", a.e)):
            if isinstance(axis.extent, Const):
                lines.append(f"    static constexpr int64_t {name} = {axis.extent.value};")
            else:
                lines.append(f"    int64_t {name};")
        return lines

    def _given(self) -> list[str]:
        """The call made of what the entry is passed, but for the outputs."""
        a = self.a
        lines = ["(void)sizes; (void)outputs; (void)out_strides;", "Call c;"]
        for n, s in enumerate(a.sizes):
            most = WIDE_BOUND if self.wide else INDEX_BOUND
            lines += [f"if (sizes[{n}] > {most}) return TOO_LARGE;", f"c.z_{s.name} = sizes[{n}];"]
        for n, t in enumerate(a.tensors):
            lines.append(f"c.t_{t.name} = (const {ELEMENT[t.dtype]}*)tensors[{n}];")
            lines += [f"c.s_{t.name}[{d}] = strides[{n}][{d}];" for d in range(len(t.shape))]
        for name, axis in (("N", a.i), ("M", a.j), ("D", a.d), ("E", a.e)):
            if not isinstance(axis.extent, Const):
                lines.append(f"c.{name} = {self._extent(axis)};")
        return lines

    def _run(self, lines: list[str]) -> str:
        """The entry, where `lines` make the call."""
        head = (
            'extern "C" __attribute__((visibility("default"))) int32_t attncc_run(\n'
            "    const void* const* tensors, const int64_t* const* strides, const int64_t* sizes,\n"
            "    void* const* outputs, const int64_t* const* out_strides)"
        )
        return "// ---- entry: 0, OUT_OF_MEMORY or TOO_LARGE\n" + function(head, [*lines, "return run(c);"])

    def _stride(self, x: Operand, terms: tuple[tuple[Expr, int], ...]) -> str:
        return " + ".join(f"{self.p.scalar(k)} * c.s_{x.tensor}[{dim}]" for k, dim in terms) or "0"


_PLACE = "const Call& c, const Uniform& u, const RowValues& r, int64_t j"
_UNUSED = "(void)c; (void)u; (void)r; (void)j;"


def interval_text(x: Interval, key: str = "j") -> str:
    """An interval as a kernel's head says it."""
    stripes = "".join(f", ({key} - ({s.offset!r})) % {s.step!r} < {s.width!r}" for s in x.stripes)
    verbs = ("lacks" if b.outside else "holds" for b in x.bits)
    bits = "".join(
        f", {b.tensor}[{', '.join(map(repr, b.index))}] {verb} {key} // {b.block}"
        for b, verb in zip(x.bits, verbs, strict=True)
    )
    return f"{x.lo!r} <= {key} < {x.hi!r}{stripes}{bits}"


def _equation(a: Attention) -> list[str]:
    i, j, d, e = (x.name for x in (a.i, a.j, a.d, a.e))
    norm = {"softmax": f"softmax_{j}", "none": ""}.get(a.normalizer, a.normalizer)
    return [
        f"out[{i}, {e}] = sum_{j} weight({norm}(score(s)) where mask) * v[{j}, {e}],  "
        f"s = sum_{d} q[{i}, {d}] * k[{j}, {d}]"
    ]
