"""The kernels of a backward: what is known of each row, then the gradients seen from the rows and from the keys."""

from __future__ import annotations

from attncc.codegen.triton.frame import Parameter, Shaped
from attncc.codegen.triton.gradient_block import GradientBlock
from attncc.codegen.triton.gradient_frame import STATISTICS, GradientFrame, Side
from attncc.codegen.triton.kernel import BLOCK_COUNT, LISTS, Kernel, kernel
from attncc.codegen.triton.loops import find_lists, visit
from attncc.codegen.triton.operands import Operand, operand
from attncc.codegen.triton.peak import LOG2E, number
from attncc.ir import Access
from attncc.ir.expr import substitute

#: The logarithm of a sum from which on weights made of it would be off by its rounding: their sums are made again.
ROUGH = 1e3


def statistics(side: Side) -> Kernel:
    """delta = g . out - dlse of each row, and `peak` and `rest`, which make weights of scores.

    Where the kept logarithm of a sum is large, its own rounding would show in all weights of the row: there the largest
    score and the sum over it are found again, and differences of scores are exact near the largest."""
    more = [] if side.p.a.sink is None else [side.p.a.sink]
    f = GradientFrame(side, {}, more=more, reads=("out", "lse", "grad_lse"))
    f.begin()
    block = GradientBlock(f, side)
    block.columns()
    block.bases()
    p, scope = side.p, f.scope
    block.tile("w", side.second, p.e_chunks, "f32")
    block.tile("kept", _out(side, f), p.e_chunks, "f32")
    names = ["" if len(p.e_chunks) == 1 else str(n) for n in range(len(p.e_chunks))]
    dots = " + ".join(f"tl.sum(w{n} * kept{n}, 1)" for n in names)
    at = {n: f.of_queries(f.given(n), scope) for n in ("lse", "grad_lse")}
    zeros = "tl.zeros([BLOCK_M, 1], tl.int32)"
    f.line(f"delta = ({dots})[:, None] - tl.load({at['grad_lse']} + {zeros}, mask=row_ok, other=0.0)")
    f.line(f'lse = tl.load({at["lse"]} + {zeros}, mask=row_ok, other=float("-inf"))')
    f.comment("a row that sees no key has no weights; one whose sum is no number has no other")
    f.line('rest = tl.where(lse == float("-inf"), float("inf"), lse * ' + number(LOG2E) + ")")
    f.line('rest = tl.where(lse == float("inf"), float("nan"), rest)')
    f.line("peak = tl.zeros([BLOCK_M, 1], tl.float32)")
    f.line(f'rough = (tl.abs(lse) > {number(ROUGH)}) & (tl.abs(lse) != float("inf"))')
    outer, inner = scope.lines, list[str]()
    scope.lines = inner
    block.tile("q", p.q, p.d_chunks, p.dot_type)
    f.line('m = tl.full([BLOCK_M, 1], float("-inf"), tl.float32)')
    f.line("l = tl.zeros([BLOCK_M, 1], tl.float32)")
    visit(block, p.runs, "stats")
    f.line("top = tl.zeros([BLOCK_M, 1], tl.float32)")
    if p.a.sink is not None:
        f.line(f"z = ({scope.atom(p.a.sink)} - m * {number(p.scale)}) * {number(LOG2E)}")
        f.line("top = tl.maximum(z, 0.0)")
        f.line("l = l * tl.exp2(-top) + tl.exp2(z - top)")
    f.line("peak = tl.where(rough, m, peak)")
    f.line("rest = tl.where(rough, top + tl.log2(l), rest)")
    scope.lines = [*outer, "if tl.max(tl.where(rough & row_ok, 1, 0)) > 0:", *_indent(inner)]
    for name in STATISTICS:
        f.line(f"tl.store({f.of_queries(f'.{name}', scope)} + {zeros}, {name}, mask=row_ok)")
    return kernel(f, "gradient_statistics", _sizes(side))


def of_rows(side: Side) -> Kernel:
    """A tile of query rows over its keys."""
    apart = [n for n, x, _ in side.summed if x.over == "j - i"]
    f = GradientFrame(side, _rows_outputs(side), more=side.roots, shared=bool(apart))
    f.begin()
    block = GradientBlock(f, side)
    block.columns()
    block.bases()
    block.load_tiles()
    zeros = "tl.zeros([BLOCK_M, 1], tl.int32)"
    for name in STATISTICS:
        other = 'float("inf")' if name == "rest" else "0.0"
        f.line(f"{name} = tl.load({f.of_queries(f'.{name}', f.scope)} + {zeros}, mask=row_ok, other={other})")
    _begin_sums(f, block)
    _totals(f, side, zero=True)
    if side.p.listed:
        find_lists(f)
    visit(block, side.p.runs, "plain")
    _store(f, block, "dq" if "q" in side.operands else None, None)
    _totals(f, side, zero=False)
    if apart:
        share = "tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)"
        head, body = f.scope.lines[: f.placed], f.scope.lines[f.placed :]
        places = [f"share{n}_at = share{n}_ptr + ({share}).to(tl.int64) * share_length + share_start" for n in apart]
        f.scope.lines = [
            *head, *places, "for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):", *_indent(body)
        ]  # fmt: skip
    more = [Parameter(f"share{n}_ptr", "*fp32", f"share{n}") for n in apart]
    more += [Parameter(x, "i32", x) for x in ("share_length", "share_start") if apart]
    return kernel(f, "gradient_rows", (*more, *_lists(side, "rows"), *_sizes(side)))


def of_keys(side: Side) -> Kernel:
    """A tile of keys over the query rows that see it, of all members of the group that shares the keys."""
    f = GradientFrame(side, _keys_outputs(side), more=side.roots)
    f.begin()
    block = GradientBlock(f, side)
    block.columns()
    block.load_tiles()
    _begin_sums(f, block)
    outer = f.enter_members()
    block.bases()
    _totals(f, side, zero=True)
    if side.p.listed:
        find_lists(f)
    visit(block, side.p.runs, "plain")
    _totals(f, side, zero=False)
    f.leave_members(outer)
    _store(f, block, "dk" if "k" in side.operands else None, "dv" if "v" in side.operands else None)
    return kernel(f, "gradient_keys", (*_lists(side, "keys"), *_sizes(side)))


def _rows_outputs(side: Side) -> dict[str, Shaped]:
    a = side.p.a
    rows = tuple(x.extent for x in (*a.batch, a.i))
    found: dict[str, Shaped] = {"dq": ("f32", (*rows, a.d.extent))} if "q" in side.operands else {}
    for n, x, _ in side.summed:
        if x.over != "j - i":
            found[f"sum{n}"] = ("f32", (*rows, a.j.extent) if x.over == "i, j" else rows)
    return found


def _keys_outputs(side: Side) -> dict[str, Shaped]:
    a = side.p.a
    held = (*(x.extent for x in side.g.held), a.i.extent)
    found: dict[str, Shaped] = {
        f"d{n}": ("f32", (*held, (a.d if n == "k" else a.e).extent)) for n in side.operands
    }  # fmt: skip
    return found | {f"sum{n}": ("f32", tuple(x.extent for x in (*a.batch, a.i))) for n in side.loads}


def _sizes(side: Side) -> tuple[Parameter, ...]:
    """A tile's rows and a block's keys: the kernels of a file have their own."""
    c = side.p.config
    return Parameter("BLOCK_M", "constexpr", str(c.block_m)), Parameter("BLOCK_N", "constexpr", str(c.block_n))


def _lists(side: Side, name: str) -> tuple[Parameter, ...]:
    if not side.p.listed:
        return ()
    return tuple(Parameter(x.name, x.type, f"{x.value}_{name}") for x in (*LISTS, BLOCK_COUNT))


def _out(side: Side, f: GradientFrame) -> Operand:
    a = side.p.a
    index = tuple(substitute(x.index, side.ones) for x in (*a.batch, a.i, a.e))
    found = operand(Access(f.given("out"), index), a.axes)
    assert found is not None  # plain indices
    return found


def _begin_sums(f: GradientFrame, block: GradientBlock) -> None:
    for acc, width in (*block.sums, *block.values):
        f.line(f"{acc} = tl.zeros([BLOCK_M, {width}], tl.float32)")


def _totals(f: GradientFrame, side: Side, *, zero: bool) -> None:
    """Sums of loads that are one number a row of the tile."""
    for n, x, _ in side.summed:
        if x.over in ("j - i", "i, j"):
            continue
        if zero:
            f.line(f"total{n} = tl.zeros([BLOCK_M, 1], tl.float32)")
        else:
            at = f.written_at(f"sum{n}", side.p.a.batch, side.p.a.i)
            f.line(f"tl.store({at} + tl.zeros([BLOCK_M, 1], tl.int32), total{n}, mask=row_ok)")


def _store(f: GradientFrame, block: GradientBlock, sums: str | None, values: str | None) -> None:
    """Write the gradients of operands."""
    side, p = f.side, f.p
    held = side.g.held if side.by_key else p.a.batch
    parts = (
        (sums, block.sums, "d", p.d_chunks, p.d_size, side.slope[1]),
        (values, block.values, "e", p.e_chunks, p.e_size, 1.0),
    )
    for name, accumulators, letter, chunks, size, factor in parts:
        if name is None:
            continue
        at = f.written_at(name, held, p.a.i)
        step = f.scope.atom(f.output_stride(name, len(held) + 1))
        for n, (acc, _) in enumerate(accumulators):
            column = letter if len(chunks) == 1 else f"{letter}{n}"
            inside = f" & ({column} < {size})" if sum(chunks[n]) > size else ""
            value = acc if factor == 1.0 else f"{acc} * {number(factor)}"
            f.line(f"tl.store({at} + {column} * {step}, {value}, mask=row_ok{inside})")


def _indent(lines: list[str]) -> list[str]:
    return [f"    {x}" for x in lines]
