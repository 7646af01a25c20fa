"""The kernels of one attention: the pass over the keys, and the kernel that joins its parts."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from attncc.codegen.triton.block import Block
from attncc.codegen.triton.expressions import LARGEST
from attncc.codegen.triton.frame import Frame, Parameter
from attncc.codegen.triton.kernel import BLOCK_COUNT, LISTS, PARTS, Kernel, kernel
from attncc.codegen.triton.loops import find_lists, visit
from attncc.codegen.triton.peak import LOG2E, number
from attncc.codegen.triton.schedule import TL_TYPES, Schedule
from attncc.ir.build import TRUE

LN2 = math.log(2.0)


def forward(p: Schedule) -> Kernel:
    f = Frame(p, "BLOCK_M")
    f.begin()
    if p.split:
        f.line("split, splits = tl.program_id(1), tl.num_programs(1)")
    if p.even:
        f.line("if EVEN:")
        f.scope.lines += [f"    {x.name} = {x.name} // {p.even} * {p.even}" for x in f.steps]
    block = Block(f)
    block.constants()
    block.queries()
    block.start()
    if p.listed:
        find_lists(f)
    if p.two_pass:
        visit(block, p.runs, "stats")
        _finish_statistics(f, block)
        if _lost(p):
            with _if_keys_are_seen(f, block):
                f.line("empty_row = empty_row & (seen == 0)")
        f.line(f"inverse = tl.where(empty_row, 1.0, {'shrink / ' if p.a.sink is not None else '1.0 / '}total)")
        wide = "weights" in p.a.outputs or p.empty != "zero"
        visit(block, p.every if wide else p.runs, "apply")
        _store(f, block, divided=True)
    else:
        blocks = p.runs if p.softmax or "weights" not in p.a.outputs else p.every
        visit(block, blocks, "online" if p.softmax else "plain")
        _finish(f, block)
    if p.persistent:
        each = "for pid in range(tl.program_id(0), programs, tl.num_programs(0)):"
        f.scope.lines = [each, *_indent(f.scope.lines)]
    return kernel(f, "attention", _more(p))


def _finish(f: Frame, block: Block) -> None:
    """Write what one pass over the keys gave: the results, or a part of them where several programs share the keys."""
    if not f.p.split:
        _epilogue(f, block)
        return
    outer, parts, whole = f.scope.lines, list[str](), list[str]()
    f.scope.lines = parts
    _store_parts(f, block)
    f.scope.lines = whole
    _epilogue(f, block)
    f.scope.lines = [*outer, "if PARTIAL:", *_indent(parts), "else:", *_indent(whole)]


def _more(p: Schedule) -> tuple[Parameter, ...]:
    """What the kernel is told beside tensors, sizes and outputs."""
    return (
        *((*PARTS, Parameter("PARTIAL", "constexpr", "splits > 1")) if p.split else ()),
        *((*LISTS, BLOCK_COUNT) if p.listed else ()),
        *((Parameter("programs", "i32", "programs"),) if p.persistent else ()),
        *((Parameter("EVEN", "constexpr", "even"),) if p.even else ()),
        *((Parameter("TMA", "constexpr", "boxed"),) if p.descriptors else ()),
    )


def _indent(lines: list[str]) -> list[str]:
    return [f"    {x}" for x in lines]


def _finish_statistics(f: Frame, block: Block) -> None:
    """From running statistics to `top`, the largest logit as a power of two, `total`, the sum of weights over it, and
    `empty_row`. A sink joins the sum; `shrink` is what sums without it are worth then."""
    p = f.p
    f.scope.lines += block.peak.against("m")
    f.line(f"far = tl.abs(m) >= {number(block.peak.far)}")
    limited = f"tl.maximum(tl.minimum(m * {number(block.peak.c2)}, {LARGEST!r}), -{LARGEST!r})"
    f.line(f"top = tl.where(far, {limited}, base)[:, None]")
    f.line("total = l[:, None]")
    if p.a.sink is not None:
        sink = f.scope.name("sink", f"{f.scope.atom(p.a.sink)} * {number(LOG2E)}")
        f.line(f"peak = tl.maximum(top, {sink})")
        f.line("shrink = tl.exp2(top - peak)")
        f.line(f"total = total * shrink + tl.exp2({sink} - peak)")
        f.line("top = peak")
        if not p.two_pass:
            for acc in block.accumulators:
                f.line(f"{acc} = {acc} * shrink")
    f.line("empty_row = total == 0.0")


def _lost(p: Schedule) -> bool:
    """Whether a row whose weights sum to zero may see keys, all at minus infinity: softmax makes it NaN, which zero
    over zero is."""
    return p.softmax and p.a.mask is not TRUE and p.a.sink is None and p.empty != "nan"


@contextmanager
def _if_keys_are_seen(f: Frame, block: Block) -> Generator[None]:
    """Lines for tiles with rows whose weights sum to zero, which are few: `seen` says whether such a row sees a key.
    The masks are worked out again for that, when nothing else is held any more."""
    f.comment("rows whose weights sum to zero: those that see keys, all at minus infinity, are not empty")
    outer, inner = f.scope.lines, list[str]()
    f.scope.lines = inner
    f.line(f"seen = tl.full([{f.rows}, 1], 0, tl.int32)")
    visit(block, f.p.runs, "seen")
    yield
    outer += ["if tl.max(tl.where(empty_row, 1, 0)) > 0:", *_indent(inner)]
    f.scope.lines = outer


def _epilogue(f: Frame, block: Block, *, joins: bool = False) -> None:
    p = f.p
    if not p.softmax:
        _store(f, block, divided=True)
        return
    _finish_statistics(f, block)
    if joins and _lost(p):
        f.line("empty_row = empty_row & (seen == 0)")
    if "out" in p.a.outputs and p.empty == "mean":
        block.mean_of_values()
        f.line("scale = 1.0 / tl.where(empty_row, 1.0, total)")
    apart = _lost(p) and not joins
    _store(f, block, divided=False, apart=apart)
    if apart and "out" in p.a.outputs:
        with _if_keys_are_seen(f, block):
            for acc, (e, at, inside) in zip(block.accumulators, _columns(f), strict=True):
                mask = f"row_ok & empty_row & ({inside or f'{e} >= 0'})"
                value = f'tl.where(seen > 0, float("nan"), {acc if p.empty == "mean" else "0.0"})'
                f.line(f"tl.store({at}, {value}.to({out_type(p)}), mask={mask})")


def _store(f: Frame, block: Block, *, divided: bool, apart: bool = False) -> None:
    """Write the outputs; `divided` says that the accumulators hold the result already, `apart` that the output of empty
    rows is written elsewhere."""
    p = f.p
    if "out" in p.a.outputs:
        for acc, (_, at, inside) in zip(block.accumulators, _columns(f), strict=True):
            if not divided:
                f.line(f"{acc} = {_divided(f, acc)}")
            mask = " & ".join(["row_ok", *(["(total != 0.0)"] if apart else []), *([f"({inside})"] if inside else [])])
            f.line(f"tl.store({at}, {acc}.to({out_type(p)}), mask={mask})")
    if "lse" in p.a.outputs:
        at = f.output("lse", (*p.points, *p.folded, p.a.i))
        value = f"(top + tl.log2(total)) * {number(LN2)}" if p.softmax else f"tl.zeros([{f.rows}, 1], tl.float32)"
        if p.softmax and p.a.sink is None:  # a score near the largest number is beyond it as a power of two
            alone = f"(m * {number(p.scale)} + tl.log2(l) * {number(LN2)})[:, None]"
            value = f"tl.where(far[:, None], {alone}, {value})"
        if p.softmax:
            value = f'tl.where((m == float("inf"))[:, None], float("inf"), {value})'
        f.line(f"tl.store({at} + tl.zeros([{f.rows}, 1], tl.int32), {value}, mask=row_ok)")


def _columns(f: Frame) -> Iterator[tuple[str, str, str]]:
    """For each chunk of the output's columns their numbers, where they lie, and the condition that they are there."""
    p = f.p
    at = f.output("out", (*p.points, *p.folded, p.a.i))
    step = f.scope.atom(f.output_stride("out", len(p.a.batch) + 1))
    for n, part in enumerate(p.e_chunks):
        e = "e" if len(p.e_chunks) == 1 else f"e{n}"
        yield e, f"{at} + {e} * {step}", f"{e} < {p.e_size}" if sum(part) > p.e_size else ""


def _divided(f: Frame, acc: str) -> str:
    """The sum of weighted values over the sum of weights. `scale` is set where rows may be their values' mean."""
    p = f.p
    if p.empty == "mean":
        return f"{acc} * scale"
    nothing = 'float("nan")' if p.empty == "nan" else "0.0"
    if p.empty == "nan" and p.a.empty != "nan" and p.a.sink is None:  # all scores are minus infinity, or no key exists
        nothing = f'tl.where({f.scope.text(p.a.j.extent)} > 0, float("nan"), 0.0)'
    return f"tl.where(empty_row, {nothing}, {acc} / total)"


def out_type(p: Schedule) -> str:
    return TL_TYPES[p.a.dtype]


def _width(p: Schedule) -> int:
    return sum(w for w, _ in p.e_chunks)


def _store_parts(f: Frame, block: Block) -> None:
    """What this share of the keys gives: the sum of values, the largest logit, the sum of weights.

    part[split, point, row, e] and stat[2, split, point, row], all contiguous."""
    p = f.p
    f.line(f"at = (split.to(tl.int64) * {_points(f)} + {_point_index(f)}) * rows + row")
    for n, (acc, (_, start)) in enumerate(zip(block.accumulators, p.e_chunks, strict=True)):
        e = "e" if len(p.e_chunks) == 1 else f"e{n}"
        column = f"{e} - {start} + {_before(p, n)}" if start else e
        f.line(f"tl.store(part_ptr + at * {_width(p)} + {column}, {acc}, mask=row_ok)")
    if p.softmax:
        total_at = f"stat_ptr + splits.to(tl.int64) * {_points(f)} * rows + at"
        f.line("tl.store(stat_ptr + at, m[:, None], mask=row_ok)")
        f.line(f"tl.store({total_at}, l[:, None], mask=row_ok{' & (l[:, None] != 0.0)' if _lost(p) else ''})")
        if _lost(p):  # minus one says that keys were seen, all at minus infinity
            f.line("empty_row = l[:, None] == 0.0")
            with _if_keys_are_seen(f, block):
                f.line(f"tl.store({total_at}, tl.where(seen > 0, -1.0, 0.0), mask=row_ok & empty_row)")


def _before(p: Schedule, n: int) -> int:
    return sum(w for w, _ in p.e_chunks[:n])


def _points(f: Frame) -> str:
    return f.scope.atom(f.point_count)


def _point_index(f: Frame) -> str:
    return f.scope.atom(f.point_index)


def join(p: Schedule) -> Kernel:
    """One row a program: the parts of all splits rescaled to a common largest logit and added."""
    f = Frame(p, "1")
    f.begin()
    block = Block(f)
    block.constants(("v",))
    f.line(f"at = {f.wide(f.point_index)} * rows + tile")
    f.line(f"step = {f.wide(f.point_count)} * rows")
    if p.softmax:
        f.scope.lines += block.peak.start("1")
        if _lost(p):
            f.line("seen = tl.full([1, 1], 0, tl.int32)")
    for acc, (width, _) in zip(block.accumulators, p.e_chunks, strict=True):
        f.line(f"{acc} = tl.zeros([1, {width}], tl.float32)")
    f.line("for s0 in range(0, splits, 16):")
    inner = ["s = s0 + tl.arange(0, 16)", "s_ok = s < splits", "s_at = at + s * step"]
    if p.softmax:
        inner += [
            "ms = tl.load(stat_ptr + s_at, mask=s_ok, other=0.0)",
            "ls = tl.load(stat_ptr + splits * step + s_at, mask=s_ok, other=0.0)",
            *block.peak.raised('tl.max(tl.where(s_ok, ms, float("-inf")), 0)'),
            f'share = tl.exp2(tl.where(s_ok & (ms > float("-inf")), {block.peak.of("ms")}, float("-inf")) - base)',
            "l = l * shrink + tl.sum(ls * share, 0)",
        ]
        if _lost(p):
            inner.append("seen = tl.maximum(seen, tl.max(tl.where(s_ok & (ls < 0.0), 1, 0), 0))")
    for n, (acc, (_, start)) in enumerate(zip(block.accumulators, p.e_chunks, strict=True)):
        e = "e" if len(p.e_chunks) == 1 else f"e{n}"
        column = f"{e} - {start} + {_before(p, n)}" if start else e
        load = f"tl.load(part_ptr + s_at[:, None] * {_width(p)} + {column}, mask=s_ok[:, None], other=0.0)"
        if p.softmax:
            inner.append(f"{acc} = {acc} * shrink[:, None] + tl.sum({load} * share[:, None], 0)[None, :]")
        else:
            inner.append(f"{acc} += tl.sum({load}, 0)[None, :]")
    f.scope.lines += _indent(inner)
    _epilogue(f, block, joins=True)
    return kernel(f, "join", (*PARTS, Parameter("splits", "i32", "splits")))
