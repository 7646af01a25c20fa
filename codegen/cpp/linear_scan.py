"""From a linear attention whose decays change with the column to the hooks that `lib/linear_scan.h` calls.

    decay, rate   -> decay_at, rate_at, vectors over the columns e at a channel d
    loads with e  -> fetch, into rows of columns: once, or for each token where they mention it
"""

from __future__ import annotations

from collections.abc import Sequence

from attncc.codegen.cpp.expressions import literal, vector_op
from attncc.codegen.cpp.linear_expressions import LinearPrinter, along
from attncc.codegen.cpp.prepared import function
from attncc.ir import Const, Expr, Linear, Load, Op
from attncc.ir.expr import free, loads, walk


def is_scan(a: Linear) -> bool:
    """Whether decays or rates of `a` change with more than the token, and decays with one row of channels."""
    d, e = a.d.index, a.e.index
    return e in free(a.decay) | free(a.rate) or d in free(a.rate) or isinstance(along(a, a.decay), str)


def unsupported_scan(a: Linear) -> str | None:
    """Why no kernel goes over `a` token by token, or None."""
    if a.rule == "delta":
        return "the delta rule with a decay or a rate for each column or of several tensors with channels"
    if a.sees == "all":
        return "a decay or a rate for each column where every query sees every key"
    try:
        for x in (a.decay, a.rate):
            _vector(a, LinearPrinter(a), x, held_loads(a))
    except TypeError:
        return "a decay or a rate that is computed of the number of the column"
    return None


def held_loads(a: Linear) -> list[Load]:
    """What decays and rates read along the columns."""
    found = dict.fromkeys((*loads(a.decay), *loads(a.rate)))
    return [x for x in found if a.e.index in free(x)]


def computed_rows(a: Linear) -> list[Op]:
    """What decays and rates compute along the columns, the same for all channels: once a token."""
    found: dict[Op, None] = {}
    stack: list[Expr] = [a.decay, a.rate]
    while stack:
        x = stack.pop()
        if isinstance(x, Op) and x.kind == "float" and a.e.index in free(x) and a.d.index not in free(x):
            found[x] = None
        elif isinstance(x, Op):
            stack += x.args
    return sorted(found, key=lambda x: len(list(walk(x))))  # what is a part of others comes first


def scan_room(a: Linear) -> str:
    """How much room what is read and computed along the columns takes."""
    rows = [*held_loads(a), *computed_rows(a)]
    flags = ", ".join("true" if a.d.index in free(x) else "false" for x in rows) or "false"
    return f"constexpr int HELD = {max(len(rows), 1)};\nconstexpr bool HELD_D[] = {{{flags}}};\n"


def scan_rows(a: Linear, p: LinearPrinter) -> str:
    """What is fetched, and the expressions."""
    held = held_loads(a)
    lines = ["(void)c; (void)b; (void)r; (void)j; (void)e0; (void)width;"]
    for n, x in enumerate(held):
        by_d = a.d.index in free(x)
        at, step = f"r.held[{n}]{' + d * r.columns' if by_d else ''}", _step(a, x)
        if step is not None:
            first = tuple(Const(0) if y is a.e.index else y for y in x.index)
            body = f"take(c.t_{x.tensor} + {p.place(x.tensor, first)} + e0 * {step}, {step}, width, r.columns, {at});"
        else:
            place = p.place(x.tensor, x.index)
            body = (f"for (int64_t n = 0; n < r.columns; ++n) {{ const int64_t e = e0 + (n < width ? n : 0); "
                    f"({at})[n] = value(c.t_{x.tensor}[{place}]); }}")  # fmt: skip
        loop = "for (int64_t d = 0; d < c.D; ++d) " if by_d else ""
        lines.append(f"if (EACH_TOKEN == {'true' if a.j.index in free(x) else 'false'}) {loop}{body}")
    own = computed_rows(a)
    for n, x in enumerate(own, len(held)):
        store = f"store(r.held[{n}] + e, {_vector(a, p, x, [*held, *own[: n - len(held)]])});"
        lines.append(f"if (EACH_TOKEN) for (int64_t e = 0; e < r.columns; e += LANES) {store}")
    head = "INLINE void fetch(const Call& c, const Batch& b, Room& r, int64_t j, int64_t e0, int64_t width)"
    out = ["template <bool EACH_TOKEN>", function(head, lines)]
    for name, x in (("decay_at", a.decay), ("rate_at", a.rate)):
        head = f"INLINE vreal {name}(const Call& c, const Batch& b, const Room& r, int64_t j, int64_t d, int64_t e)"
        lines = ["(void)c; (void)b; (void)r; (void)j; (void)d; (void)e;", f"return {_vector(a, p, x, [*held, *own])};"]
        out.append(function(head, lines))
    return "\n".join(out)


def _step(a: Linear, x: Load) -> str | None:
    """The stride along the columns, where a load goes along them in one dimension and plainly."""
    dims = [n for n, y in enumerate(x.index) if a.e.index in free(y)]
    plain = len(dims) == 1 and x.index[dims[0]] is a.e.index
    return f"c.s_{x.tensor}[{dims[0]}]" if plain else None


def _vector(a: Linear, p: LinearPrinter, x: Expr, held: Sequence[Expr]) -> str:
    """A float, or a boolean of floats, as a vector over the columns."""
    if x in held:
        by_d = a.d.index in free(x)
        return f"load(r.held[{held.index(x)}] + {'d * r.columns + ' if by_d else ''}e)"
    if isinstance(x, Const):
        text = literal(x, double=p.double)
        return f"splat({text})" if x.kind == "float" else f"splat_mask({text})"
    if isinstance(x, Load):
        return f"splat({p.integer(x)})"
    if not isinstance(x, Op):
        raise TypeError(f"no vector for {type(x).__name__}")
    if a.e.index not in free(x) and all(y.kind != "float" for y in walk(x) if y is not x):
        return f"splat({p.integer(x)})" if x.kind == "float" else f"splat_mask({p.integer(x)})"
    return vector_op(x.name, x, [_vector(a, p, y, held) for y in x.args])
