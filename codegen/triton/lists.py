"""Lists of key blocks, made on the device at each call: for masks that data decides and no interval bounds well.

    look   for each tile of rows and each block of keys: does any row see any key, does every row see every key
    pack   for each tile of rows: the blocks seen in full from the left of its list, those in part from the right

A block is looked at from afar first. Each literal of the mask has two answers for the whole block, *some pair may* and
*every pair does*, from few values: a comparison from the extremes of its row side and of its key side, a literal that
reads blocks of keys (`table[h, i // 64, j // 64]`) from one key for each of them. Conjunctions and disjunctions combine
the answers (some: may only be too true; every: only too false), and the pairs themselves are evaluated where both are
left open. Lists are exact then, and cost little where the mask is made of blocks, documents or closed forms. Nothing
waits for the host, and shapes depend on sizes alone, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from attncc.codegen.triton.expressions import Scope
from attncc.codegen.triton.frame import Frame, Parameter
from attncc.codegen.triton.kernel import BLOCK_COUNT, FLAGS, LISTS, Kernel, kernel
from attncc.codegen.triton.schedule import Schedule
from attncc.codegen.triton.segments import Run
from attncc.ir import Const, Expr, Op
from attncc.ir.affine import linear_in
from attncc.ir.analysis import Sides, blocks_of, comparison_sides
from attncc.ir.build import ZERO, add, and_, const, floordiv, not_, or_
from attncc.ir.expr import free, loads

#: Blocks of keys that one program of `look` answers for.
LOOKS = 16

_PACK = '''@triton.jit
def pack(flags_ptr, blocks_ptr, counts_ptr, block_count):
    """From flags (0 unseen, 1 in part, 2 in full) to lists in ascending order and their lengths (full, part)."""
    tile = tl.program_id(0)
    at = tile.to(tl.int64) * block_count
    full = 0
    part = 0
    for first in range(0, block_count, 256):
        block = first + tl.arange(0, 256)
        flag = tl.load(flags_ptr + at + block, mask=block < block_count, other=0)
        is_full = tl.where(flag == 2, 1, 0)
        is_part = tl.where(flag == 1, 1, 0)
        tl.store(blocks_ptr + at + full + tl.cumsum(is_full, 0) - 1, block, mask=flag == 2)
        tl.store(blocks_ptr + at + block_count - part - tl.cumsum(is_part, 0), block, mask=flag == 1)
        full += tl.sum(is_full, 0)
        part += tl.sum(is_part, 0)
    tl.store(counts_ptr + tile * 2, full)
    tl.store(counts_ptr + tile * 2 + 1, part)'''
PACK = Kernel("pack", (FLAGS, *LISTS, BLOCK_COUNT), frozenset(), _PACK)


@dataclass(frozen=True)
class Answer:
    """What is known of a predicate over a whole block, as texts of scalars. `exact`: both are the truth."""

    some: str
    every: str
    exact: bool = False


_OPEN = Answer("True", "False")


def look(p: Schedule, of: str = "") -> Kernel:
    """One program for each tile of rows, of the batch points that the mask mentions, and LOOKS blocks of keys. `of`
    tells the kernels of a file apart that has more than one, each with tiles and blocks of its own."""
    a = p.a
    used = {x.tensor for x in loads(a.mask, *_bound_expressions(p))}
    seen = replace(a, tensors=tuple(t for t in a.tensors if t.name in used), outputs=())
    plain = replace(p.config, together=0, persistent=0)
    f = Frame(replace(p, a=seen, points=p.list_points, config=plain), "BLOCK_M")
    f.begin()
    f.line("at = pid.to(tl.int64) * block_count")
    return _Look(f).kernel(of)


def _bound_expressions(p: Schedule) -> list[Expr]:
    ends = [x for run in (*p.runs.masked, *p.runs.full) for x in (run.start, run.stop)]
    return [*ends, *(r.expr for r in p.bounds.rows)]


class _Look:
    def __init__(self, f: Frame) -> None:
        self.f, self.p = f, f.p
        self.a, self.j = f.p.a, f.p.a.j.index
        self.keys = f.scope.atom(f.p.a.j.extent)
        self.body = f.scope.inner()
        self.blocks = floordiv(add(f.p.a.j.extent, const(f.p.config.block_n - 1)), const(f.p.config.block_n))
        self.known: dict[Expr, Answer] = {}

    def kernel(self, of: str) -> Kernel:
        f, lines = self.f, self.body.lines
        lines.append("j0 = block * BLOCK_N")
        whole = f"j0 + BLOCK_N <= {self.keys}" if self.p.ragged else ""
        some, every = self._in_runs()
        answer = self.of(self.a.mask)
        lines.append(f"some = {_bare(_all(some, answer.some))}")
        lines.append(f"every = {_bare(_all(_any(every, answer.every), whole))}")
        if not answer.exact:
            self._pairs(whole)
        lines.append("flag = tl.where(some, tl.where(every, 2, 1), 0).to(tl.uint8)")
        lines.append("tl.store(flags_ptr + at + block, flag)")
        f.line(f"first = tl.program_id(1) * {LOOKS}")
        f.line(f"for block in range(first, tl.minimum(first + {LOOKS}, block_count)):")
        f.scope.lines += [f"    {x}" for x in lines]
        if not of:
            return kernel(f, "look", (FLAGS, BLOCK_COUNT))
        c = self.p.config
        sizes = (Parameter(n, "constexpr", str(x)) for n, x in (("BLOCK_M", c.block_m), ("BLOCK_N", c.block_n)))
        own = (Parameter(x.name, x.type, f"{x.value}_{of}") for x in (FLAGS, BLOCK_COUNT))
        return kernel(f, f"look_{of}", (*own, *sizes))

    def _in_runs(self) -> tuple[str, str]:
        """Whether the block is in a run that the loop bounds visit, and in one whose keys all rows see."""
        scope = self.f.scope

        def within(run: Run) -> str:
            start = "" if run.start is ZERO else f"{scope.atom(run.start)} <= block"
            stop = "" if run.stop is self.blocks else f"block < {scope.atom(run.stop)}"
            return _all(start, stop)

        full = [within(r) for r in self.p.runs.full]
        return _any(*full, *(within(r) for r in self.p.runs.masked)), _any(*full)

    def _pairs(self, whole: str) -> None:
        """The mask at every row and key of the block, where afar is not near enough."""
        lines = self.body.lines
        inner = self._keys("tl.arange(0, BLOCK_N)", "j_ok")
        mask = inner.atom(self.a.mask)
        visible = _all("row_ok", mask, inner.guard or "")
        lines.append("if some & (every == 0):")
        lines += [f"    {x}" for x in inner.lines]
        lines.append(f"    some = tl.max(tl.where({_bare(visible)}, 1, 0)) > 0")
        lines.append(f"    every = {_bare(_all(f'tl.min(tl.where({mask} | (row_ok == 0), 1, 0)) > 0', whole))}")

    def _keys(self, offsets: str, guard: str) -> Scope:
        """A scope in which the key index runs over offsets from the block's first key."""
        scope = self.body.inner()
        scope.define(self.j, scope.name(self.a.j.name, f"(j0 + {offsets})[None, :]"))
        if self.p.ragged:
            scope.guard = scope.name(guard, f"{scope.text(self.j)} < {self.keys}")
        return scope

    def of(self, x: Expr) -> Answer:
        """The answer for `x` over this block."""
        if x not in self.known:
            self.known[x] = self._answer(x)
        return self.known[x]

    def _answer(self, x: Expr) -> Answer:
        match x:
            case Const(value):
                return Answer(str(bool(value)), str(bool(value)), exact=True)
            case Op("and", (a, b)):
                one, two = self.of(a), self.of(b)
                return Answer(_all(one.some, two.some), _all(one.every, two.every))
            case Op("or", (a, b)):
                one, two = self.of(a), self.of(b)
                return Answer(_any(one.some, two.some), _any(one.every, two.every))
            case Op("not", (a,)):
                other = self.of(a)
                return Answer(_not(other.every), _not(other.some), other.exact)
            case Op("where", (c, a, b)):
                return self.of(or_(and_(c, a), and_(not_(c), b)))
            case _:
                return self._literal(x)

    def _literal(self, x: Expr) -> Answer:
        rowed, keyed = bool(free(x) & self.p.row_leaves), self.j in free(x)
        if not rowed and not keyed:
            text = self.f.scope.atom(x)
            return Answer(text, text, exact=True)
        sides = comparison_sides(x, self.j, self.p.row_leaves) if rowed and keyed else None
        if sides is not None:
            return self._compared(sides)
        block = self.p.config.block_n
        width = group_of(x, self.j, block)
        if rowed and keyed and width is None:
            return _OPEN
        step = width or 1
        offsets = f"tl.arange(0, {block // step})" + (f" * {step}" if 1 < step < block else "")
        scope = self._keys(offsets, "j_ok") if keyed else self.f.scope
        text = scope.atom(x)
        if keyed:
            self.body.lines += scope.lines
        inside = _all("row_ok" if rowed else "", (scope.guard or "") if keyed else "")
        seen = text if inside == "True" else f"{_closed(text)} & {inside}"
        hidden = text if inside == "True" else f"{_closed(text)} | ({inside} == 0)"
        home = self.body if keyed else self.f.scope
        some = home.name("some", f"tl.max(tl.where({seen}, 1, 0)) > 0")
        return Answer(some, home.name("every", f"tl.min(tl.where({hidden}, 1, 0)) > 0"), exact=True)

    def _compared(self, x: Sides) -> Answer:
        """row <= key, row == key or row != key, from the extremes of both sides; not exact where a side has gaps."""
        low, high = self._row_extremes(x.row)
        least, most = self._key_extremes(x.key)
        if x.relation == "le":
            return Answer(f"({low} <= {most})", f"({high} <= {least})", exact=True)
        apart = f"(({most} < {low}) | ({high} < {least}))"
        alike = f"(({low} == {most}) & ({high} == {least}))"
        return Answer(_not(apart), alike) if x.relation == "eq" else Answer(_not(alike), apart)

    def _row_extremes(self, x: Expr) -> tuple[str, str]:
        scope, text = self.f.scope, self.f.scope.atom(x)
        return (
            scope.name("low", f"tl.min(tl.where(row_ok, {text}, {_MOST}))"),
            scope.name("high", f"tl.max(tl.where(row_ok, {text}, {-_MOST}))"),
        )

    def _key_extremes(self, x: Expr) -> tuple[str, str]:
        split = linear_in(x, self.j)
        if split is not None and not loads(x) and set(split[0]) == {()}:
            ends = ["j0", f"tl.minimum(j0 + BLOCK_N, {self.keys}) - 1" if self.p.ragged else "j0 + BLOCK_N - 1"]
            texts: list[str] = []
            for end in ends if split[0][()] > 0 else reversed(ends):
                scope = self.body.inner()
                scope.define(self.j, f"({end})")
                texts.append(scope.atom(x))
                self.body.lines += scope.lines
            return texts[0], texts[1]
        scope = self._keys("tl.arange(0, BLOCK_N)", "j_ok")
        text = scope.atom(x)
        self.body.lines += scope.lines
        low = f"tl.where({scope.guard}, {text}, {_MOST})" if scope.guard else text
        high = f"tl.where({scope.guard}, {text}, {-_MOST})" if scope.guard else text
        return self.body.name("least", f"tl.min({low})"), self.body.name("most", f"tl.max({high})")


_MOST = 2**31 - 1


def _all(*parts: str) -> str:
    """The conjunction of texts of scalars; an empty text says nothing."""
    if "False" in parts:
        return "False"
    left = list(dict.fromkeys(x for x in parts if x not in ("", "True")))
    return left[0] if len(left) == 1 else f"({' & '.join(_closed(x) for x in left)})" if left else "True"


def _any(*parts: str) -> str:
    if "True" in parts:
        return "True"
    left = list(dict.fromkeys(x for x in parts if x != "False"))
    return left[0] if len(left) == 1 else f"({' | '.join(_closed(x) for x in left)})" if left else "False"


def _closed(x: str) -> str:
    return x if x.isidentifier() or _bare(x) != x else f"({x})"


def _bare(x: str) -> str:
    """`x` without the parentheses around all of it."""
    depth = 0
    for at, character in enumerate(x):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return x[1:-1] if x[0] == "(" and at == len(x) - 1 else x
    return x


def _not(x: str) -> str:
    return {"True": "False", "False": "True"}.get(x, f"({_closed(x)} == 0)")


def group_of(x: Expr, j: Expr, block: int) -> int | None:
    """c where the keys of a block of `block` fall into whole groups of c, or one group, that `x` tells not apart: `j`
    occurs in it only as `j // n` of one n, and one of n and `block` divides the other. None where it occurs otherwise.
    """
    found = blocks_of(x, j)
    if found is None:
        return None
    _, size = found
    return block if size % block == 0 else size if block % size == 0 else None
