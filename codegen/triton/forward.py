"""The kernels of one attention: the pass over the keys, and the kernel that joins its parts."""

from __future__ import annotations

import math

from attncc.codegen.triton.frame import Frame, Parameter
from attncc.codegen.triton.kernel import BLOCK_COUNT, LISTS, PARTS, Kernel, kernel
from attncc.codegen.triton.loops import LOG2E, Loops, Mode, number
from attncc.codegen.triton.plan import TL_TYPES, Plan
from attncc.codegen.triton.segments import Segments

LN2 = math.log(2.0)


def forward(p: Plan) -> Kernel:
    f = Frame(p, "BLOCK_M")
    f.begin()
    if p.split:
        f.line("split, splits = tl.program_id(1), tl.num_programs(1)")
    if p.even:
        f.line("if EVEN:")
        f.scope.lines += [f"    {x.name} = {x.name} // {p.even} * {p.even}" for x in f.steps]
    loops = Loops(f)
    loops.constants()
    loops.queries()
    loops.start()
    if p.listed:
        loops.lists()
    if p.two_pass:
        _passes(f, loops, "stats", p.runs)
        _finish_statistics(f, loops)
        f.line("norm = tl.where(empty_row, 0.0, top + tl.log2(total))")
        wide = "weights" in p.a.outputs or p.empty != "zero"
        _passes(f, loops, "apply", p.every if wide else p.runs)
        _store(f, loops, divided=True)
        return kernel(f, "attention", _more(p))
    blocks = p.runs if p.softmax or "weights" not in p.a.outputs else p.every
    _passes(f, loops, "online" if p.softmax else "plain", blocks)
    if not p.split:
        _epilogue(f, loops)
        return kernel(f, "attention", _more(p))
    outer = f.scope.lines
    f.scope.lines = []
    _store_parts(f, loops)
    parts = f.scope.lines
    f.scope.lines = []
    _epilogue(f, loops)
    whole = f.scope.lines
    f.scope.lines = [*outer, "if PARTIAL:", *_indent(parts), "else:", *_indent(whole)]
    return kernel(f, "attention", (*PARTS, Parameter("PARTIAL", "constexpr", "splits > 1"), *_more(p)))


def _more(p: Plan) -> tuple[Parameter, ...]:
    lists = (*LISTS, BLOCK_COUNT) if p.listed else ()
    even = (Parameter("EVEN", "constexpr", "even"),) if p.even else ()
    return (*lists, *even, *((Parameter("TMA", "constexpr", "boxed"),) if p.descriptors else ()))


def _indent(lines: list[str]) -> list[str]:
    return [f"    {x}" for x in lines]


def _passes(f: Frame, loops: Loops, mode: Mode, blocks: Segments) -> None:
    if f.p.listed and blocks is f.p.runs:
        f.comment("the blocks of this tile's list: those whose keys all rows see, then those where the mask decides")
        loops.over_list(mode, masked=False)
        loops.over_list(mode, masked=True)
        return
    if blocks.full:
        if blocks.masked:
            f.comment("blocks whose keys all rows see")
        loops.over(blocks.full, mode, masked=False)
    if blocks.masked:
        if blocks.full:
            f.comment("blocks where the mask decides")
        loops.over(blocks.masked, mode, masked=True)


def _finish_statistics(f: Frame, loops: Loops) -> None:
    """From running statistics to `top`, the largest logit as a power of two, `total`, the sum of weights over it, and
    `empty_row`. A sink joins the sum."""
    p = f.p
    f.line(f"top = (m * {loops.c2})[:, None]")
    f.line("total = l[:, None]")
    if p.a.sink is not None:
        sink = f.scope.name("sink", f"{f.scope.atom(p.a.sink)} * {number(LOG2E)}")
        f.line(f"peak = tl.maximum(top, {sink})")
        f.line('peak = tl.where(peak == float("-inf"), 0.0, peak)')
        f.line("shrink = tl.exp2(top - peak)")
        f.line(f"total = total * shrink + tl.exp2({sink} - peak)")
        f.line("top = peak")
        if not p.two_pass:
            for acc in loops.accumulators:
                f.line(f"{acc} = {acc} * shrink")
    f.line("empty_row = total == 0.0")


def _epilogue(f: Frame, loops: Loops) -> None:
    p = f.p
    if not p.softmax:
        _store(f, loops, divided=True)
        return
    _finish_statistics(f, loops)
    if "out" in p.a.outputs and p.empty == "mean":
        loops.mean_of_values()
        f.line(f"scale = 1.0 / tl.where(empty_row, {f.scope.atom(p.a.j.extent)}, total)")
    _store(f, loops, divided=False)


def _store(f: Frame, loops: Loops, *, divided: bool) -> None:
    """Write the outputs; `divided` says that the accumulators hold the result already."""
    p = f.p
    if "out" in p.a.outputs:
        at = f.output("out", (*p.points, *p.folded, p.a.i))
        step = f.scope.atom(f.output_stride("out", len(p.a.batch) + 1))
        for n, (acc, part) in enumerate(zip(loops.accumulators, p.e_chunks, strict=True)):
            e = "e" if len(p.e_chunks) == 1 else f"e{n}"
            if not divided:
                f.line(f"{acc} = {_divided(f, acc)}")
            mask = f"row_ok & ({e} < {p.e_size})" if sum(part) > p.e_size else "row_ok"
            f.line(f"tl.store({at} + {e} * {step}, {acc}.to({out_type(p)}), mask={mask})")
    if "lse" in p.a.outputs:
        at = f.output("lse", (*p.points, *p.folded, p.a.i))
        value = f"(top + tl.log2(total)) * {number(LN2)}" if p.softmax else f"tl.zeros([{f.rows}, 1], tl.float32)"
        f.line(f"tl.store({at} + tl.zeros([{f.rows}, 1], tl.int32), {value}, mask=row_ok)")


def _divided(f: Frame, acc: str) -> str:
    """The sum of weighted values over the sum of weights. `scale` is set where rows may be their values' mean."""
    p = f.p
    if p.empty == "mean":
        return f"{acc} * scale"
    nothing = 'float("nan")' if p.empty == "nan" else "0.0"
    if p.empty == "nan" and p.a.empty != "nan" and p.a.sink is None:  # all scores are minus infinity, or no key exists
        nothing = f'tl.where({f.scope.text(p.a.j.extent)} > 0, float("nan"), 0.0)'
    return f"tl.where(empty_row, {nothing}, {acc} / total)"


def out_type(p: Plan) -> str:
    return TL_TYPES[p.a.dtype]


def _width(p: Plan) -> int:
    return sum(w for w, _ in p.e_chunks)


def _store_parts(f: Frame, loops: Loops) -> None:
    """What this share of the keys gives: the sum of values, the largest logit, the sum of weights.

    part[split, point, row, e] and stat[2, split, point, row], all contiguous."""
    p = f.p
    f.line(f"at = (split.to(tl.int64) * {_points(f)} + {_point_index(f)}) * rows + row")
    for n, (acc, (_, start)) in enumerate(zip(loops.accumulators, p.e_chunks, strict=True)):
        e = "e" if len(p.e_chunks) == 1 else f"e{n}"
        column = f"{e} - {start} + {_before(p, n)}" if start else e
        f.line(f"tl.store(part_ptr + at * {_width(p)} + {column}, {acc}, mask=row_ok)")
    if p.softmax:
        f.line(f"tl.store(stat_ptr + at, (m * {loops.c2})[:, None], mask=row_ok)")
        f.line(f"tl.store(stat_ptr + splits.to(tl.int64) * {_points(f)} * rows + at, l[:, None], mask=row_ok)")


def _before(p: Plan, n: int) -> int:
    return sum(w for w, _ in p.e_chunks[:n])


def _points(f: Frame) -> str:
    return f.scope.atom(f.point_count)


def _point_index(f: Frame) -> str:
    return f.scope.atom(f.point_index)


def join(p: Plan) -> Kernel:
    """One row a program: the parts of all splits rescaled to a common largest logit and added."""
    f = Frame(p, "1")
    f.begin()
    loops = Loops(f)
    loops.constants(("v",))
    f.line(f"at = {f.wide(f.point_index)} * rows + tile")
    f.line(f"step = {f.wide(f.point_count)} * rows")
    if p.softmax:
        f.line('m = tl.full([1], float("-inf"), tl.float32)')
        f.line("l = tl.zeros([1], tl.float32)")
    for acc, (width, _) in zip(loops.accumulators, p.e_chunks, strict=True):
        f.line(f"{acc} = tl.zeros([1, {width}], tl.float32)")
    f.line("for s0 in range(0, splits, 16):")
    inner = ["s = s0 + tl.arange(0, 16)", "s_ok = s < splits", "s_at = at + s * step"]
    if p.softmax:
        inner += [
            'ms = tl.load(stat_ptr + s_at, mask=s_ok, other=float("-inf"))',
            "ls = tl.load(stat_ptr + splits * step + s_at, mask=s_ok, other=0.0)",
            "m_new = tl.maximum(m, tl.max(ms, 0))",
            'm_use = tl.where(m_new == float("-inf"), 0.0, m_new)',
            "share = tl.exp2(ms - m_use)",
            "shrink = tl.exp2(m - m_use)",
            "l = l * shrink + tl.sum(ls * share, 0)",
            "m = m_new",
        ]
    for n, (acc, (_, start)) in enumerate(zip(loops.accumulators, p.e_chunks, strict=True)):
        e = "e" if len(p.e_chunks) == 1 else f"e{n}"
        column = f"{e} - {start} + {_before(p, n)}" if start else e
        load = f"tl.load(part_ptr + s_at[:, None] * {_width(p)} + {column}, mask=s_ok[:, None], other=0.0)"
        if p.softmax:
            inner.append(f"{acc} = {acc} * shrink[:, None] + tl.sum({load} * share[:, None], 0)[None, :]")
        else:
            inner.append(f"{acc} += tl.sum({load}, 0)[None, :]")
    f.scope.lines += _indent(inner)
    loops.c2 = "1.0"
    _epilogue(f, loops)
    return kernel(f, "join", (*PARTS, Parameter("splits", "i32", "splits")))
