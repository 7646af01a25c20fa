"""From the gradient of an attention to one C++ translation unit: the hooks that `lib/gradient_*.h` calls.

The attention is seen from its keys: lanes are keys, the loop goes over query rows, and the bounds are those of the
transposed mask.

    q, k, v, grad     -> query_at, lane_k_at, lane_v_at, grad_at: pointer + sum of stride * index
    score, mask       -> local: the logit, its derivative by s and by each load, whether it is visible
    bounds            -> find_spans, the query rows that a tile of keys visits and those of them that it must mask
"""

from __future__ import annotations

import math
from dataclasses import replace

from attncc.codegen.cpp import prepared
from attncc.codegen.cpp.emitter import ELEMENT, Emitter, interval_text, library, operands_of
from attncc.codegen.cpp.expressions import Printer, fits_32_bits
from attncc.codegen.cpp.fold import folded
from attncc.codegen.cpp.isa import TABLE, machine
from attncc.codegen.cpp.operands import NotAffine, operand
from attncc.codegen.cpp.prepared import function
from attncc.ir import Access, Axis, Bounds, Const, Expr, Interval, Tensor, print_attention
from attncc.ir.analysis import scaled
from attncc.ir.attention_grad import GIVEN, AttentionGrad, print_grad
from attncc.ir.build import TRUE

#: Query rows of a block: their scores and gradients stay in the nearest cache beside a tile of keys.
_PLAIN = {"KEYS": 48, "SCORE_ROW": "QUERIES", "SCORE_NEXT": "LANES", "BLOCK_STEP": 1}
#: The same in the matrix unit, whose tiles of sums take a vector of keys, and 32 rows along.
_TILES = {"KEYS": 64, "SCORE_ROW": "LANES", "SCORE_NEXT": "(KEYS * LANES)", "BLOCK_STEP": 32}
_OVER = {"": "ALL", "i": "QUERY", "j": "KEY", "j - i": "DISTANCE", "i, j": "PAIR"}
_APART = {"": 0, "i": 1, "j": 1, "j - i": 1, "i, j": 2}  # dimensions of sums behind the batch
_LOG2E = math.log2(math.e)


def unsupported_gradient(g: AttentionGrad) -> str | None:
    """Why no C++ kernel gives the gradient `g`, or None."""
    a = g.attention
    if a.dtype not in ("f64", "f32", "bf16", "f16"):
        return f"out as {a.dtype}"
    if a.empty == "mean" and a.mask is not TRUE:
        return "rows that see nothing take the mean of all values"
    try:
        operands_of(a)
    except NotAffine as error:
        return str(error)
    return None


def gradient_instructions(g: AttentionGrad, isa: str) -> str:
    """The instruction set that the kernel of `g` for `isa` makes use of: outside of the matrix unit products run in
    float32."""
    return "avx512" if TABLE[isa].pairs and not _in_matrix_unit(g, isa) else isa


def _in_matrix_unit(g: AttentionGrad, isa: str) -> bool:
    a = g.attention
    return TABLE[isa].tiles and {a.tensor(x.tensor).dtype for x in (a.q, a.k, a.v)} | {a.dtype} == {"bf16"}


def emit_gradient(
    g: AttentionGrad, bounds: Bounds, isa: str, *, wide: bool = False, tables: tuple[Tensor, ...] = ()
) -> str:  # fmt: skip
    """The C++ source of `g` for `isa`; `bounds` are loop bounds of `g.by_key`, which may read `tables` that come after
    its tensors; `wide` is for calls with sizes beyond 2^24. Raises ValueError where `unsupported_gradient(g)` has a
    reason."""
    reason = unsupported_gradient(g)
    if reason is not None:
        raise ValueError(f"no C++ kernel: {reason}")
    return _GradientEmitter(g, bounds, isa, tables, wide=wide).source()


class _GradientEmitter(Emitter):
    def __init__(
        self, g: AttentionGrad, bounds: Bounds, isa: str, tables: tuple[Tensor, ...], *, wide: bool
    ) -> None:  # fmt: skip
        self.g, self.wide = g, wide
        a = replace(g.by_key, tensors=(*g.by_key.tensors, *tables))
        #: The names of what a backward is given beside the tensors of its attention.
        self.given_names = [t.name for t in g.by_key.tensors[-len(GIVEN) :]]
        self.hidden = (Interval(Const(0), a.j.extent),) if bounds.hidden is None else bounds.hidden
        self.bounds = replace(bounds, full=(), full_parts=(), residue=None, hidden=self.hidden)
        self.raw, factor = scaled(folded(a.score))
        self.a, self.name, self.isa = replace(a, score=self.raw), isa, TABLE[isa]
        self.folded, self.held = (), a.batch
        self.tiles = _in_matrix_unit(g, isa)
        self.p = Printer(self.a, ())
        self.scale = factor * _LOG2E
        self.lane_k, self.lane_v = operand(a.q, a.i, a.d), operand(g.attention.v, a.i, a.e)
        self.query = operand(a.k, a.j, a.d)
        self.outputs = [*(f"d{n}" for n in g.operands), *(f"sum{n}" for n in range(len(g.loads)))]

    def source(self) -> str:
        hooks = [self._bounds(), self._local()]
        hooks.append(prepared.slanted(self.p))  # they fill the slots printed below
        parts = [self._header(), self._config(), *map(library, ("vector", "integers", "convert", "layout"))]
        parts += [library("matrix_unit" if self.tiles else "gradient_product")]
        parts += ["// ---- this attention " + "-" * 96 + "\n", self._call(), self._points(), self._groups()]
        parts += [prepared.slots(self.p), *map(library, ("spans", "tile")), prepared.fills(self.p), *hooks]
        parts += [prepared.staged(self.p), self._rows()]
        parts += [library("slanted")]
        own = "gradient_tiles" if self.tiles else "gradient_plain"
        return "\n".join([*parts, *map(library, ("gradient_tile", own, "gradient_run")), self._entry()])

    def _header(self) -> str:
        lines = [f"attncc: a C++ kernel for {self.name}, the gradient of", ""]
        lines += [*print_attention(self.g.attention).splitlines(), "", *print_grad(self.g), ""]
        lines += [f"keys of a tile visit rows {interval_text(x, self.a.j.name)}" for x in self.bounds.visit]
        lines += [f"hidden from some of them  {interval_text(x, self.a.j.name)}" for x in self.hidden]
        return "\n".join(f"// {line}".rstrip() for line in lines) + "\n"

    def _config(self) -> str:
        a, g, double = self.a, self.g, self.p.double
        roots = (a.score, a.mask, g.by_score, g.by_weight, *(x.slope for x in g.loads))
        narrow = not double and not self.wide and fits_32_bits(a, *roots)
        both = (*self.bounds.visit, *self.hidden)
        over = ", ".join([*(_OVER[x.over] for x in g.loads), "ALL"])
        defines = machine(self.isa, self.name, double=double, pairs=self.tiles, tiles=self.tiles, coarse=self.tiles) | {
            **(_TILES if self.tiles else _PLAIN), "WIDE_INTS": int(not narrow), "STAGED": len(self.p.staged),
            "SLANTED": len(self.p.diagonals.tables), "ROW_AXES": 1, "MOST_FEW": 0,
            "MAX_SPANS": max(len(self.bounds.visit), 1), "MAX_HIDDEN": max(len(self.hidden), 1),
            "MAX_STRIPES": max((len(x.stripes) for x in both), default=0),
            "MAX_BITS": max((len(x.bits) for x in both), default=0),
            "SCALE": self._real(self.scale), "LOG2E": self._real(_LOG2E),
            "WANTS_Q": int("q" in g.operands), "WANTS_K": int("k" in g.operands), "WANTS_V": int("v" in g.operands),
            "NEEDS_SLOPES": int(g.operands != ("v",) or bool(g.loads)), "TERMS": len(g.loads),
            "BY_DISTANCE": int(any(x.over == "j - i" for x in g.loads)),
            "HAS_SINK": int(g.attention.sink is not None), "OUT_OF_MEMORY": 1, "TOO_LARGE": 2, "NO_MATRIX_UNIT": 3,
        }  # fmt: skip
        headers = ["math.h", "omp.h", "stddef.h", "stdint.h", "stdlib.h", "string.h"]
        headers += ["sys/syscall.h", "unistd.h"] if self.tiles else []
        lines = [f"#include <{h}>" for h in headers]
        lines += [f"#define {name} {value}" for name, value in defines.items()]
        lines += [f"typedef {'double' if double else 'float'} real;  // the compute type"]
        lines += [f"typedef {'int64_t' if double else 'int32_t'} mask_int;"]
        lines += [f"typedef {'int32_t' if narrow else 'int64_t'} lane_int;  // what every integer of a lane fits"]
        lines += ["// What the gradients of loads are kept apart by."]
        lines += ["enum Over { ALL, QUERY, KEY, DISTANCE, PAIR };", f"constexpr Over OVER[TERMS + 1] = {{{over}}};"]
        return "\n".join(lines) + "\n"

    # ---- the call --------------------------------------------------------------------------------------------------
    def _ranks(self) -> dict[str, int]:
        """The dimensions of each output."""
        held = len(self.g.held)
        ranks = {"dq": len(self.a.batch) + 2, "dk": held + 2, "dv": held + 2}
        sums = {f"sum{n}": len(self.a.batch) + _APART[x.over] for n, x in enumerate(self.g.loads)}
        return {n: (ranks | sums)[n] for n in self.outputs}

    def _call(self) -> str:
        a = self.a
        lines = ["// What a call passes: pointers, strides in elements, sizes. Rows (N) are keys, keys (M) queries."]
        lines.append("struct Call {")
        lines += self._fields()
        lines.append(f"    int64_t {', '.join(self._strides())};")
        lines += [f"    real* {n};\n    int64_t s_{n}[{max(rank, 1)}];" for n, rank in self._ranks().items()]
        lines.append("};")
        element = {"lane_k": a.q.tensor, "lane_v": self.lane_v.tensor, "query_element": a.k.tensor}
        lines += [f"typedef {ELEMENT[a.tensor(t).dtype]} {n};" for n, t in element.items()]
        lines.append(f"typedef {ELEMENT[self.g.attention.dtype]} grad_element;")
        return "\n".join(lines) + "\n"

    def _strides(self) -> dict[str, str]:
        """What steps along rows and channels are worth, by name."""
        rank = len(self.a.batch)
        grad, out, lse, grad_lse = self.given_names
        operands = (("q_i", "q_d", self.lane_k), ("v_i", "v_e", self.lane_v), ("k_j", "k_d", self.query))
        found = {row: self._stride(x, x.row_terms) for row, _, x in operands}
        found |= {column: self._stride(x, x.col_terms) for _, column, x in operands}
        found |= {
            "k_grad_j": f"c.s_{grad}[{rank}]", "grad_e": f"c.s_{grad}[{rank + 1}]",
            "out_j": f"c.s_{out}[{rank}]", "out_e": f"c.s_{out}[{rank + 1}]",
            "lse_j": f"c.s_{lse}[{rank}]", "grad_lse_j": f"c.s_{grad_lse}[{rank}]",
        }  # fmt: skip
        held = len(self.g.held)
        for n, own in (("q", rank), ("k", held), ("v", held)):
            names = f"d{n}_{'j' if n == 'q' else 'i'}", f"d{n}_{'e' if n == 'v' else 'd'}"
            wanted = n in self.g.operands
            found |= {x: f"c.s_d{n}[{own + at}]" if wanted else "0" for at, x in enumerate(names)}
        return found

    def _groups(self) -> str:
        """The batch as points that hold keys, each with a group that shares them."""
        held = self.g.held
        shared = tuple(x for x in self.a.batch if x not in held)
        out = list[str]()
        for name, axes in (("held", held), ("shared", shared)):
            count = " * ".join(self._extent(x) for x in axes) or "1"
            out.append(f"static int64_t {name}_count(const Call& c) {{ (void)c; return {count}; }}\n")
        lines = ["Batch at;", "(void)c; (void)point; (void)member;"]
        for number, axes in (("point", held), ("member", shared)):
            for x in reversed(axes):
                if x is axes[0]:
                    lines.append(f"at.x_{x.name} = {number};")
                else:
                    lines += [f"at.x_{x.name} = {number} % {self._extent(x)};", f"{number} /= {self._extent(x)};"]
        lines.append("return at;")
        out.append(function("static Batch batch_of(const Call& c, int64_t point, int64_t member)", lines))
        out.append("INLINE int64_t distances(const Call& c) { return c.N + c.M - 1; }\n")
        return "".join(out)

    def _rows(self) -> str:
        batch = [x.index for x in self.a.batch]
        names = ("grad", "out", "lse", "grad_lse")
        given = {n: Access(t, tuple(batch)) for n, t in zip(names, self.given_names, strict=True)}
        out = [
            self._pointer("lane_k_at", "const lane_k*", self._place(self.lane_k)),
            self._pointer("lane_v_at", "const lane_v*", self._place(self.lane_v)),
            self._pointer("query_at", "const query_element*", self._place(self.query)),
        ]
        for n, x in given.items():
            element = "grad_element" if n in ("grad", "out") else "real"
            out.append(self._pointer(f"{n}_at", f"const {element}*", self._along(f"t_{x.tensor}", self.a.batch)))
        for n in ("q", "k", "v"):
            axes = self.a.batch if n == "q" else self.g.held
            body = self._along(f"d{n}", axes) if n in self.g.operands else "(real*)nullptr"
            out.append(self._pointer(f"d{n}_at", "real*", body))
        sums = [f"if (n == {n}) return {self._along(f'sum{n}', self.a.batch)};" for n in range(len(self.g.loads))]
        steps = [
            f"if (n == {n}) return c.s_sum{n}[{len(self.a.batch)} + at];" for n, x in enumerate(self.g.loads) if x.over
        ]
        sums = ["(void)c; (void)b; (void)n;", *sums, "return nullptr;"]
        out.append(function("INLINE real* sums_at(const Call& c, const Batch& b, int n)", sums))
        steps = ["(void)c; (void)n; (void)at;", *steps, "return 1;"]
        out.append(function("INLINE int64_t sums_step(const Call& c, int n, int at = 0)", steps))
        body = ["t.lane[0][lane] = (lane_int)i;"]
        out.append(function("INLINE void set_lane(Tile& t, int64_t lane, const Group&, int64_t i)", body))
        return "\n".join(out)

    def _pointer(self, name: str, ctype: str, body: str) -> str:
        lines = ["(void)c; (void)b;", f"return {body};"]
        return function(f"INLINE {ctype} {name}(const Call& c, const Batch& b)", lines)

    def _along(self, name: str, axes: tuple[Axis, ...]) -> str:
        strides = name.removeprefix("t_")
        return " + ".join([f"c.{name}", *(f"b.x_{x.name} * c.s_{strides}[{n}]" for n, x in enumerate(axes))])

    # ---- hooks -----------------------------------------------------------------------------------------------------
    def _local(self) -> str:
        g = self.g
        roots: dict[str, Expr] = {"x": self.raw, "slope_x": folded(g.by_score), "factor_x": folded(g.by_weight)}
        roots |= {f"term{n}": folded(x.slope) for n, x in enumerate(g.loads)}
        lines = ["(void)c; (void)u; (void)r; (void)j; (void)s; (void)visible; (void)terms;"]
        if self.a.mask is not TRUE:
            masked = self.p.statements({"seen": self.a.mask})
            lines += ["if (MASKED) {", *(f"    {line}" for line in masked), "    visible &= seen;", "}"]
        lines += self.p.statements(roots)
        lines += ["logit = x;", "slope = slope_x;", "factor = factor_x;"]
        lines += [f"terms[{n}] = term{n};" for n in range(len(g.loads))]
        head = (
            "template <bool MASKED>\n"
            "INLINE void local(const Call& c, const Uniform& u, const RowValues& r, int64_t j, vreal s,\n"
            "                  vmask& visible, vreal& logit, vreal& slope, vreal& factor, vreal* terms)"
        )
        return function(head, lines)

    def _entry(self) -> str:
        lines = self._given()
        for n, (name, rank) in enumerate(self._ranks().items()):
            lines.append(f"c.{name} = (real*)outputs[{n}];")
            lines += [f"c.s_{name}[{d}] = out_strides[{n}][{d}];" for d in range(rank)]
        lines += [f"c.{name} = {code};" for name, code in self._strides().items()]
        return self._run(lines)

