"""What is computed before the loop over keys: scalars of a tile, vectors of its rows, and tables of a block of keys."""

from __future__ import annotations

from attncc.codegen.cpp.expressions import Printer


def function(head: str, lines: list[str]) -> str:
    """A C++ function, its body indented."""
    return "\n".join([f"{head} {{", *(f"    {line}" for line in lines), "}"]) + "\n"


def slots(p: Printer) -> str:
    """The structs of what is computed once a tile; the functions that fill them come after Tile."""
    u, r = p.uniforms.fields, p.vectors.fields
    return (
        "// Scalars of a tile, and vectors of its rows, that no key changes. For a block of keys from j0 on, `near`\n"
        "// holds what is loaded by row and key, transposed; `slanted` what their distance gives, `slant` apart.\n"
        f"struct Uniform {{\n    {' '.join(f'{t} {n};' for t, n, _ in u)}\n"
        "    const real *near, *slanted;\n    int64_t j0, slant;\n};\n"
        f"struct RowValues {{ {' '.join(f'{t} {n};' for t, n, _ in r)} }};\n"
        "struct Tile;\n"
    )


def fills(p: Printer) -> str:
    u, r = p.uniforms.fields, p.vectors.fields
    unused = "(void)c; (void)b; (void)t;"
    return function(
        "static Uniform uniform(const Call& c, const Batch& b, const Tile& t)",
        [unused, "Uniform u;", *(f"u.{n} = {code};" for _, n, code in u), "return u;"],
    ) + function(
        "static RowValues row_values(const Call& c, const Batch& b, const Uniform& u, const Tile& t, int64_t at)",
        [unused, "(void)u; (void)at;", "RowValues r;", *(f"r.{n} = {code};" for _, n, code in r), "return r;"],
    )


def staged(p: Printer) -> str:
    """Loads by row and key, transposed a block at a time."""
    lines = ["(void)c; (void)u; (void)r; (void)count; (void)near;"]
    for n, x in enumerate(p.staged.values()):
        lines += [
            "{",
            f"    const auto* first = {x.pointer};",
            "    decltype(first) rows[LANES];",
            f"    for (int l = 0; l < LANES; ++l) rows[l] = first + r.{x.rows}[l];",
            f"    const int64_t stride = {x.stride};",
            f"    to_lanes(rows, stride, count, near + {n} * KEYS * LANES);",
            "    // Rows lie far apart, so the processor does not foresee what the next block needs.",
            "    if (stride == 1)",
            "        for (int l = 0; l < LANES; ++l) foresee(rows[l] + count, rows[l] + 2 * count);",
            "}",
        ]
    return function(
        "static void bring_near(const Call& c, const Uniform& u, const RowValues& r, int64_t count, real* near)", lines
    )


def slanted(p: Printer) -> str:
    """The tables of diagonals at the distances in the lanes of `distance`."""
    lines = ["(void)c; (void)b; (void)u; (void)t; (void)at; (void)distance; (void)to;", *p.slants()]
    lines += [f"store(to + {n} * SLANT_ROOM, x{n});" for n in range(len(p.diagonals.tables))]
    return function(
        "INLINE void slanted_at(const Call& c, const Batch& b, const Uniform& u, const Tile& t, int64_t at,\n"
        "                       vint distance, real* to)",
        lines,
    )
