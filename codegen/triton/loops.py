"""The loops over keys: which blocks the iterations of this program visit, and in which order."""

from __future__ import annotations

from attncc.codegen.triton.block import Block, Mode
from attncc.codegen.triton.expressions import Scope
from attncc.codegen.triton.frame import Frame, index_in
from attncc.codegen.triton.segments import Run, Segments, Striped, total
from attncc.ir import Const
from attncc.ir.build import add, const, floordiv


def visit(b: Block, blocks: Segments, mode: Mode) -> None:
    """Loops over all of `blocks`, the full ones without their masks; over the tile's lists where it has some."""
    f = b.f
    if f.p.listed and blocks is f.p.runs:
        if mode == "online" and f.p.a.spare is not None:
            f.line(f"meets = tl.maximum(full + part, 1) / {_splits(f)}")
            f.comment("the blocks of this tile's list: where the mask decides, then the others, the nearest first")
            _over_list(b, mode, masked=True)
            _over_list(b, mode, masked=False, back="tl.where(t == 0, 0, full - t)")
            return
        f.comment("the blocks of this tile's list: those whose keys all rows see, then those where the mask decides")
        _over_list(b, mode, masked=False)
        _over_list(b, mode, masked=True)
        return
    if mode == "online" and f.p.a.spare is not None:
        _nearest_first(b, blocks)
        return
    if blocks.full:
        if blocks.masked:
            f.comment("blocks whose keys all rows see")
        _over_runs(b, blocks.full, mode, masked=False)
    if blocks.masked:
        if blocks.full:
            f.comment("blocks where the mask decides")
        _over_runs(b, blocks.masked, mode, masked=True)
    for stripes in blocks.striped:
        f.comment("stripes of keys, gathered into blocks")
        _over_stripes(b, stripes, mode)


def _nearest_first(b: Block, blocks: Segments) -> None:
    """The order in which most blocks prove to weigh little: those where the mask decides, which are near, the first
    one, then the others from the last to the second."""
    f, size = b.f, b.p.config.block_n
    counts = [total(blocks.masked), total(blocks.full)]
    counts += [floordiv(add(x.slots, const(size - 1)), const(size)) for x in blocks.striped]
    count = const(0)
    for n in counts:
        count = add(count, n)
    f.line(f"meets = tl.maximum({f.scope.text(count)}, 1) / {_splits(f)}")
    f.comment("blocks where the mask decides, then those whose keys all rows see, the first and the nearest first")
    _over_runs(b, blocks.masked, "online", masked=True)
    for run in blocks.full:
        if run.length is not Const(0):
            start, stop = f.scope.atom(run.start), f.scope.atom(run.stop)
            head = _for(f, "t", *_share(f, f.scope.name("count", f.scope.text(run.length))), "online")
            _loop(f, b.body("online", masked=False), [head, f"block = tl.where(t == 0, {start}, {stop} - t)"])
    for stripes in blocks.striped:
        f.comment("stripes of keys, gathered into blocks")
        _over_stripes(b, stripes, "online")


def _splits(f: Frame) -> str:
    """How many programs share the blocks of a tile."""
    return "splits" if f.p.split else "1.0"


def find_lists(f: Frame) -> None:
    """Where this tile's list of blocks lies, and how long its two parts are."""
    point = index_in(f.p.list_points)
    tile = "tile" if point is Const(0) else f"({f.scope.text(point)}) * tiles + tile"
    f.line(f"list_at = ({tile}).to(tl.int64)")
    f.line("full = tl.load(counts_ptr + list_at * 2)")
    f.line("part = tl.load(counts_ptr + list_at * 2 + 1)")
    f.line("list_at = list_at * block_count")


def _over_runs(b: Block, runs: tuple[Run, ...], mode: Mode, *, masked: bool) -> None:
    runs = tuple(r for r in runs if r.length is not Const(0))
    if runs:
        _loop(b.f, b.body(mode, masked=masked), _head(b.f, runs, mode))


def _over_list(b: Block, mode: Mode, *, masked: bool, back: str = "t") -> None:
    """`back`: at which place of the list of full blocks iteration t looks."""
    at = "list_at + block_count - 1 - t" if masked else f"list_at + {back}"
    head = _for(b.f, "t", *_share(b.f, "part" if masked else "full"), mode)
    _loop(b.f, b.body(mode, masked=masked), [head, f"block = tl.load(blocks_ptr + {at})"])


def _over_stripes(b: Block, stripes: Striped, mode: Mode) -> None:
    size = b.p.config.block_n
    blocks = floordiv(add(stripes.slots, const(size - 1)), const(size))
    count = b.f.scope.name("count", b.f.scope.text(blocks))
    head = [_for(b.f, "t", *_share(b.f, count), mode), "slot0 = t * BLOCK_N"]
    if b.in_whole_blocks(stripes):
        head.append(f"j0 = {b.place(stripes, 'slot0')}")
    _loop(b.f, b.body(mode, masked=not stripes.full, stripes=stripes), head)


def _loop(f: Frame, body: Scope, head: list[str]) -> None:
    f.scope.lines += [head[0], *(f"    {x}" for x in (*head[1:], *body.lines))]


def _for(f: Frame, name: str, lo: str, hi: str, mode: Mode) -> str:
    if f.p.config.specialize and mode != "seen" and f.p.a.spare is None:
        return f"for {name} in tl.range({lo}, {hi}, warp_specialize=True):"
    return f"for {name} in range({lo}, {hi}):"


def _share(f: Frame, count: str) -> tuple[str, str]:
    """This program's share of `count` iterations."""
    return (f"{count} * split // splits", f"{count} * (split + 1) // splits") if f.p.split else ("0", count)


def _head(f: Frame, runs: tuple[Run, ...], mode: Mode) -> list[str]:
    """The `for` line, and how an iteration finds its block."""
    text = f.scope.text
    if len(runs) == 1 and not f.p.split:
        return [_for(f, "block", text(runs[0].start), text(runs[0].stop), mode)]
    share = _share(f, f.scope.name("count", text(total(runs))))
    start = f.scope.atom(runs[0].start)
    if len(runs) == 1 and start == "0":
        return [_for(f, "block", *share, mode)]
    lines = [_for(f, "t", *share, mode), f"block = {start} + t"]
    for n, run in enumerate(runs[1:], 1):
        before = f.scope.name("before", text(total(runs[:n])))
        lines.append(f"block = tl.where(t >= {before}, {f.scope.atom(run.start)} + t - {before}, block)")
    return lines
