"""The declared space of kernel configurations, and what a machine has room for.

`capability` names a target: "sm_80", "sm_90", "sm_100" (any "sm_NN") or "gfx942" (any "gfxNNN").
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from attncc.codegen.triton.operands import chunks
from attncc.codegen.triton.rows import row_axes
from attncc.ir import Attention, Axis, Const, Expr, Load, Op
from attncc.ir.attention import DTYPES
from attncc.ir.bounds import Bounds
from attncc.ir.build import TRUE
from attncc.ir.expr import free, loads, walk


@dataclass(frozen=True)
class TritonConfig:
    """One kernel of the space. A tile is `block_m` rows (rows of a group of heads folded together) by `block_n` keys.

    `split` adds the form in which several programs share the keys of one tile of rows and a second kernel joins them,
    used where there are too few tiles to fill the device. `together` batch points are walked at a time, so that their
    keys stay in the L2 cache. `precision` is how float32 products are made: "ieee" or "tf32".
    `descriptors` reads keys and values through tensor descriptors (the tensor memory accelerator) wherever a call's
    strides allow it, and `specialize` gives loads and products warps of their own. With `lists` each call first makes
    lists of the key blocks that its mask shows (`attncc.codegen.triton.lists`), and the kernel walks those.
    `persistent` programs a processor take one tile after the other, the longest first, where 0 starts one for each."""

    block_m: int = 64
    block_n: int = 64
    warps: int = 4
    stages: int = 2
    split: bool = False
    together: int = 8
    precision: str = "ieee"
    descriptors: bool = False
    specialize: bool = False
    lists: bool = False
    persistent: int = 0

    def __str__(self) -> str:
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))


#: The axes whose indices tell the rows of one tile apart, see `row_axes`.
Rows = tuple[Axis, ...]


@dataclass(frozen=True)
class Machine:
    """Bytes of shared memory a block may use, 32-bit registers a thread may spend on tiles, threads a warp has, whether
    every thread copies its part of a block, registers that a loop over tiles takes.

    What a thread has beside the tiles goes to addresses, masks and, before Hopper, to the factors of the products. The
    bound is where the compiler starts to spill in the loop over keys."""

    shared: int
    tile_registers: int
    lanes: int
    copies: bool = False
    outer: int = 0


def machine(capability: str) -> Machine:
    """Raises ValueError for a capability that is neither "sm_NN" nor "gfxNNN"."""
    if capability.startswith("gfx"):
        return Machine(160 * 1024 if capability.startswith("gfx95") else 64 * 1024, 464, 64)
    if not capability.startswith("sm_"):
        raise ValueError(f"capability {capability!r}: give sm_NN or gfxNNN")
    number = int(capability.removeprefix("sm_").rstrip("af"))
    if number in (80, 87):
        return Machine(163 * 1024, 144, 32, copies=True)
    if 90 <= number < 120:
        return Machine(227 * 1024, 167, 32) if number < 100 else Machine(227 * 1024, 144, 32, outer=24)
    return Machine(99 * 1024 if number > 75 else 64 * 1024, 144, 32, copies=True)


def _operand_bytes(a: Attention) -> int:
    return max(DTYPES[a.tensor(x.tensor).dtype][1] for x in (a.q, a.k, a.v))


def shared_bytes(a: Attention, rows: Rows, c: TritonConfig) -> int:
    """What the key and value tiles in flight and the query tile take at most."""
    width = _operand_bytes(a)
    d, e = sum(n for n, _ in chunks(int(extent_of(a.d.extent)))), sum(n for n, _ in chunks(int(extent_of(a.e.extent))))
    pairs = sum(DTYPES[a.tensor(x.tensor).dtype][1] for x in _pair_loads(a, rows)) * c.block_m
    return max(c.stages, 1) * c.block_n * (width * (d + e) + pairs) + width * c.block_m * d


def _by_pair(a: Attention, rows: Rows, x: Expr) -> bool:
    """Whether each row and key of a tile has a value of its own."""
    return a.j.index in free(x) and not free(x).isdisjoint(axis.index for axis in rows)


def _pair_loads(a: Attention, rows: Rows) -> list[Load]:
    """Loads of a value for each row and key: each takes a register or two an element of the tile, and a place in
    shared memory for each stage."""
    return [x for x in loads(a.score, a.mask, a.weight) if _by_pair(a, rows, x)]


def registers(a: Attention, rows: Rows, c: TritonConfig, m: Machine) -> int:
    """What the accumulator, the scores and the weights take of each thread, in 32-bit registers; and the addresses of
    blocks in flight and of a head's second chunk."""
    sizes = [int(extent_of(x.extent)) for x in (a.d, a.e)]
    parts = [chunks(n) for n in sizes]
    elements = c.block_m * c.block_n // (c.warps * m.lanes)
    tiles = c.block_m * (sum(n for n, _ in parts[1]) + c.block_n) // (c.warps * m.lanes) + elements // 2
    tiles += elements * 7 // 4 * (len(_pair_loads(a, rows)) + ("weights" in a.outputs))
    tiles += elements // 2 * _computes_pairs(a, rows)
    if m.outer and any(a.j.index in free(x) for x in loads(a.weight)):
        tiles += elements // 4  # what weights are multiplied with is laid out anew beside the accumulator
    for size, found in zip(sizes, parts, strict=True):
        wide = 40 if m.copies and size > 128 and found[-1][0] < 64 else 16  # narrow copies keep more addresses
        tiles += (len(found) - 1) * wide
    return tiles + 4 * (c.stages - 1)


def _computes_pairs(a: Attention, rows: Rows) -> bool:
    """Whether numbers made from indices (distances, 64-bit positions) take a place for each row and key, or a loop over
    stripes computes where its keys are."""
    inside = {n for x in loads(a.score, a.mask) for n in walk(*x.index)}
    for x in walk(a.score, a.mask):
        if isinstance(x, Op) and x.name == "float" and _by_pair(a, rows, x) and x not in inside:
            return True
        if isinstance(x, Op) and x.name == "mod" and a.j.index in free(x) and x not in inside:
            return True
        if isinstance(x, Load) and x not in inside and a.tensor(x.tensor).dtype == "i64":
            return True
    return False


def extent_of(x: object) -> int:
    """An extent, or a guess of what is not known before a call."""
    return int(x.value) if isinstance(x, Const) else 128


def residents(a: Attention, rows: Rows, c: TritonConfig, m: Machine) -> int:
    """How many programs a processor holds at a time: by shared memory, and by its 65536 registers, 255 a thread."""
    return max(1, min(m.shared // shared_bytes(a, rows, c), 65536 // (255 * c.warps * m.lanes)))


def fits(a: Attention, rows: Rows, c: TritonConfig, capability: str) -> bool:
    """Whether a machine has room for tiles whose rows are those of the axes `rows`."""
    m = machine(capability)
    return shared_bytes(a, rows, c) <= m.shared and registers(a, rows, c, m) <= m.tile_registers


_NVIDIA = (
    (128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 2), (128, 32, 4, 3), (64, 64, 8, 2), (64, 32, 8, 2),
    (64, 32, 4, 3), (64, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 1),
)  # fmt: skip
_HOPPER = ((128, 128, 8, 2), (128, 128, 8, 3), *_NVIDIA)
_AMD = (
    (128, 64, 4, 1), (128, 64, 4, 2), (128, 32, 4, 2), (64, 64, 4, 1), (64, 32, 4, 1), (128, 64, 8, 1), (32, 32, 4, 1),
    (16, 32, 4, 1), (16, 16, 4, 1),
)  # fmt: skip
#: Exact float32 products are made by the ordinary units, whose operands all pass through registers.
_FLOAT32 = ((64, 32, 8, 2), (32, 32, 4, 2), (64, 16, 8, 2), (32, 16, 8, 2), (16, 32, 8, 2), (16, 16, 4, 1))
#: For a handful of rows against many keys: all speed is in reading them.
_DECODE = ((16, 64, 4, 3), (16, 128, 4, 2), (16, 32, 4, 4), (16, 64, 2, 3), (16, 32, 4, 2), (16, 16, 4, 1))

_MOST = 7


def _few_rows(rows: Rows) -> int | None:
    """The rows of one tile column where they are known and fit one small tile, else None."""
    count = 1
    for axis in rows:
        if not isinstance(axis.extent, Const):
            return None
        count *= int(axis.extent.value)
    return count if count <= 64 else None


def configs(
    a: Attention, bounds: Bounds, capability: str, *, tf32: bool = False, lists: bool = False
) -> tuple[TritonConfig, ...]:
    """The configurations worth trying for `a`, best guess first; what does not fit the machine is left out.

    `tf32` says that float32 products may be made from rounded factors (torch's own flags decide that), `lists` that
    the kernels walk lists of blocks."""
    m = machine(capability)
    axes = row_axes(a, bounds, lists=lists)
    few = _few_rows(axes)
    float32 = _operand_bytes(a) >= 4
    amd = capability.startswith("gfx")
    hopper = not amd and m.shared > 200 * 1024
    shapes = _AMD if amd else _HOPPER if hopper and not float32 else _NVIDIA
    if float32 and not amd and not tf32:
        # two products a thread and step where a head is wide: more of them, and the factors do not fit the registers
        wide = max(int(extent_of(a.d.extent)), int(extent_of(a.e.extent))) > 64
        shapes = tuple(x for x in _FLOAT32 if not wide or x[0] * x[1] <= 64 * x[2])
        shapes = tuple(x for x in shapes if few is None or x[0] <= max(16, few))
    elif few is not None:
        rows = max(16, 1 << (few - 1).bit_length())
        shapes = tuple((rows, n, w, 1 if amd else s) for _, n, w, s in _DECODE)
    elif float32:
        shapes = tuple(x for x in shapes if x[0] * x[1] <= 64 * 64)
    split = few is not None or not isinstance(a.i.extent, Const)
    precision = "tf32" if tf32 and float32 and not amd else "ieee"
    found = dict.fromkeys(
        TritonConfig(bm, bn, warps, stages, split=split, precision=precision, lists=lists)
        for bm, bn, warps, stages in shapes
        if bn <= max(16, 2 * _keys(a))
    )
    fitting = [c for c in found if fits(a, axes, c, capability)]
    more: list[TritonConfig] = []
    if hopper and few is None and fitting and not float32:
        # behind the plain ones: these win or lose by the shape, which only a measurement can tell
        more = [replace(c, descriptors=True) for c in fitting[:2]]
        more += [replace(more[0], specialize=True)] if capability.startswith("sm_10") else []
        small = [c for c in fitting if registers(a, axes, c, m) + m.outer <= m.tile_registers]
        if a.mask is not TRUE and small:  # tiles of unequal length
            more.append(replace(small[0], split=False, persistent=residents(a, axes, small[0], m)))
    if few is None and split:  # the rows may turn out to be a handful
        small = TritonConfig(16, 64, 4, 1 if amd else 3, split=True, precision=precision, lists=lists)
        more += [small] if not float32 and fits(a, axes, small, capability) and small not in fitting else []
    fitting = [*fitting[: _MOST - len(more)], *more]
    return tuple(fitting) or (TritonConfig(16, 16, 4, 1, split=split, precision=precision, lists=lists),)


def _keys(a: Attention) -> int:
    return int(a.j.extent.value) if isinstance(a.j.extent, Const) else 1 << 30
