"""Triton kernels under Triton's interpreter against the oracle. `test_triton.py` runs this file, in its own process."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import ceil

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a process of its own, from test_triton.py", allow_module_level=True)

import torch
from edge_numbers.edges import edges_of, hold
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from policies import dropping
from random_ir.programs import Program, programs
from triton_kernels import interpreter
from triton_kernels.cases import CASES, Case, case_of, make

from attncc.codegen.triton import TritonConfig, emit, unsupported
from attncc.codegen.triton.schedule import schedule
from attncc.ir import Attention, Bounds, W, interpret, print_attention
from attncc.ir.build import const
from attncc.ir.evaluate import DTYPE_OF
from attncc.ir.program import program_of_node
from attncc.kernels.first_use import differs
from attncc.passes.bounds.bounds import loop_bounds
from attncc.passes.rewrites.split_axes import SplitAxes
from attncc.passes.tables.spans import Looked, spanned, tables
from attncc.runtime.outputs import shapes_of
from attncc.runtime.triton_launch import TritonKernel

SMALL = TritonConfig(16, 16, 4, 1)
WIDE = TritonConfig(32, 32, 4, 1)
BOXES = TritonConfig(16, 16, 4, 1, split=True, descriptors=True)
SPLIT = TritonConfig(16, 16, 4, 1, split=True)
LISTS = TritonConfig(16, 16, 4, 1, split=True, lists=True)
#: Masks that data decides.
DATA = ("documents", "document starts", "padding", "prefix", "dense mask", "block table", "causal block table",
        "regions", "clusters", "pages")  # fmt: skip
EXAMPLES = int(os.environ.get("ATTNCC_TRITON_EXAMPLES", "9"))


def tolerance(a: Attention, tensors: dict[str, torch.Tensor], sizes: list[int], name: str) -> float:
    """How far a kernel may be from the exact result.

    Both the kernel and the eager model round each weight to the values' type and the result to the output's, which
    moves a result by at most eps * sum |w| |v|; what comes before (scores, exponentials) is as far off as eager is."""
    exact = interpret(a, tensors, sizes, compute=torch.float64)[name]
    eager = interpret(a, tensors, sizes, rounding=True)[name].double()
    finite = torch.isfinite(exact) & torch.isfinite(eager)
    off = float((eager - exact)[finite].abs().max()) if finite.any() else 0.0
    if name == "lse":
        return 4 * off + 2**-20 * (1 + float(exact[finite].abs().max()) if finite.any() else 1)
    eps = max(torch.finfo(DTYPE_OF[t]).eps for t in (a.dtype, a.tensor(a.v.tensor).dtype))
    weights = interpret(replace(a, outputs=("weights",)), tensors, sizes, compute=torch.float64)["weights"]
    weights = torch.nan_to_num(weights, nan=0.0)
    values = 1.0 if name == "weights" else float(torch.nan_to_num(tensors[a.v.tensor].double(), nan=0.0).abs().max())
    mass = float(weights.abs().sum(-1).max()) if weights.numel() else 0.0
    return 2 * off + (eps + 2**-20) * mass * values


def check(p: Program, config: TritonConfig, bounds: Bounds | None = None, **launch: int) -> None:
    a, tensors, sizes = p
    got = interpreter.run(a, bounds or loop_bounds(a, rows=True), config, tensors, sizes, **launch)
    want = interpret(a, tensors, sizes, compute=torch.float64)
    for name, exact in want.items():
        value = got[name].double()
        text = f"{name} of\n{print_attention(a)}{sizes} with {config}"
        assert torch.equal(torch.isnan(value), torch.isnan(exact)), text
        assert torch.equal(torch.isinf(value), torch.isinf(exact)), text
        finite = torch.isfinite(exact)
        error = float((value - exact)[finite].abs().max()) if finite.any() else 0.0
        assert error <= tolerance(a, tensors, sizes, name), f"{error} off in {text}"


@seed(20)
@settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)  # fmt: skip
@given(programs(simple=True, dtypes=("f32", "bf16", "f16")))
def test_random_programs(program: Program) -> None:
    if unsupported(program.attention) is not None:
        return
    check(program, SMALL)
    check(program, SPLIT, splits=3) if _splits(program) else check(program, WIDE)
    check(program, LISTS)


def _splits(p: Program) -> bool:
    return schedule(p.attention, loop_bounds(p.attention, rows=True), SPLIT).split


@pytest.mark.parametrize("name", CASES)
def test_forms(name: str) -> None:
    check(make(name), SMALL)


@pytest.mark.parametrize("name", ["causal", "decode", "d 80", "d 24, e 40", "padding", "window and sink tokens"])
def test_descriptors(name: str) -> None:
    """Keys and values through tensor descriptors; the second call's strides do not allow them."""
    p = make(name)
    check(p, BOXES)
    apart = {n: torch.cat([t, t[..., :1]], -1)[..., :-1] if n in ("k", "v") else t for n, t in p.tensors.items()}
    assert apart["k"].stride(-2) % 8 == 1
    check(p._replace(tensors=apart), BOXES)


@pytest.mark.parametrize("name", ["causal", "two heads of 80", "weights", "block table", "window and columns"])
def test_persistent_programs(name: str) -> None:
    """Two programs take all tiles in turn."""
    check(make(name), TritonConfig(16, 16, 4, 1, persistent=2, lists="table" in name))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (17, 33), (32, 16), (5, 70)])
def test_odd_sizes(dtype: str, rows: int, keys: int) -> None:
    check(make("causal from the end", rows=rows, keys=keys, dtype=dtype), WIDE)


def test_a_wider_output_than_the_kernel_computes_in() -> None:
    p = make("causal", dtype="f32")
    check(p._replace(attention=replace(p.attention, dtype="f64")), SMALL)


@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize("name", ["decode", "decode with sink", "decode mean", "decode sigmoid", "two heads of 80"])
def test_split_keys(name: str, splits: int) -> None:
    """Also more splits than blocks: some see no key."""
    check(make(name), SPLIT, splits=splits)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("every seventh key", lambda rows: ceil(ceil((rows - 3) / 7) / 16)),
        ("far apart", lambda rows: ceil(rows / 40)),
    ],
)
def test_stripes_are_gathered(name: str, blocks: Callable[[int], int]) -> None:
    """A tile of rows visits as many blocks as its stripes fill, not those that they touch."""
    p = make(name)
    before = interpreter.products
    check(p, SMALL)
    group = CASES[name].groups
    rows, points = CASES[name].rows, 4
    tiles = [min(first + 16 // group, rows) for first in range(0, rows, 16 // group)]
    most = points * sum(blocks(end) for end in tiles)
    assert 0 < interpreter.products - before <= 2 * most < points * 2 * sum(ceil(end / 16) for end in tiles) / 2


@pytest.mark.parametrize("name", [*DATA, "dilated", "rectangles", "empty rows mean", "weights of empty rows"])
def test_block_lists(name: str) -> None:
    """Lists made by the call: the same numbers, and the blocks are those of the mask, no more and no less."""
    p = make(name)
    check(p, LISTS, **({"splits": 3} if name == "pages" else {}))
    bounds = loop_bounds(p.attention, rows=True)
    assert interpreter.lists(p.attention, bounds, LISTS, p.tensors, p.sizes) == listed(p, bounds)


def listed(p: Program, bounds: Bounds) -> list[tuple[list[int], list[int]]]:
    """The blocks that each tile of 16 rows sees in full and in part, from the mask at every pair."""
    decided = schedule(p.attention, bounds, LISTS)
    ones = replace(p.attention, score=const(1.0), normalizer="none", weight=W, sink=None, outputs=("weights",))
    seen = interpret(ones, p.tensors, p.sizes)["weights"] > 0
    names = [x.name for x in p.attention.batch]
    for at, name in reversed(list(enumerate(names))):
        if name not in [x.name for x in (*decided.list_points, *decided.folded)]:
            seen, names = seen.select(at, 0), [n for n in names if n != name]
    order = [names.index(x.name) for x in decided.list_points], [names.index(x.name) for x in decided.folded]
    seen = seen.permute(*order[0], len(names), *order[1], len(names) + 1)  # lists, i, heads of a group, j
    rows = seen.flatten(len(order[0]), -2).reshape(-1, seen.shape[len(order[0]) : -1].numel(), seen.shape[-1])
    found: list[tuple[list[int], list[int]]] = []
    for tile in (x for point in rows for x in point.split(16)):
        blocks = list(enumerate(tile.split(16, -1)))
        full = [n for n, block in blocks if block.shape[-1] == 16 and block.all()]
        found.append((full, [n for n, block in blocks if block.any() and n not in full]))
    return found


@pytest.mark.parametrize("config", [SMALL, WIDE])
@pytest.mark.parametrize("looking", ["none", "quick", "all"])
@pytest.mark.parametrize("name", ["documents", "document starts", "padding", "prefix", "dense mask", "decode"])
def test_bounds_from_tables(name: str, looking: Looked, config: TritonConfig) -> None:
    """Masks that read data by key bound the loop through tables made for the call."""
    a, tensors, sizes = make(name, rows=90) if name != "decode" else make(name)
    found = spanned(a, by_looking=looking)
    more = {**tensors, **tables(found, tensors, sizes)}
    check(Program(found.attention, more, sizes), config, bounds=found.bounds)


LITERALS = (
    "i - j < 9", "j <= i", "j % 7 == 3", "j % 32 < 5", "3 <= j % 24", "(i - j) % 30 == 0", "(j // 8 + b * 2) % 4 == 1",
    "i // 12 - j // 12 < 2", "(i - j) % 24 < 4", "j < 5", "table[b, i // 8, j // 32]", "doc[b, i] == doc[b, j]",
    "i % 16 == j % 16", "20 <= j", "i // 20 == j // 20", "(j - g * 8) % 24 < 8", "i - j < 5 + g * 4",
)  # fmt: skip


@st.composite
def masks(draw: st.DrawFn) -> Program:
    """Disjunctions of conjunctions of literals, as sparse patterns have them."""
    clauses = draw(st.lists(st.lists(st.sampled_from(LITERALS), min_size=1, max_size=3), min_size=1, max_size=3))
    mask = " or ".join(f"({' and '.join(f'({x})' for x in clause)})" for clause in clauses)
    tensors = tuple(t for t in ("table: bool[B, 9, 3]", "doc: i32[B, N]") if t.partition(":")[0] in mask)
    rows, groups = draw(st.sampled_from([40, 61, 70])), draw(st.sampled_from([1, 2, 3]))
    return case_of(Case(mask, tensors=tensors, heads=1, groups=groups, rows=rows, give="out, lse"))


@seed(22)
@settings(
    max_examples=EXAMPLES // 2, deadline=None, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)  # fmt: skip
@given(masks())
def test_random_masks(program: Program) -> None:
    """Each visible key counts once: in a run of blocks, in one of several stripes, or in a list."""
    check(program, SMALL)
    check(program, LISTS, splits=2)
    a, bounds = program.attention, loop_bounds(program.attention, rows=True)
    if schedule(a, bounds, LISTS).listed:
        assert interpreter.lists(a, bounds, LISTS, program.tensors, program.sizes) == listed(program, bounds)


@seed(21)
@settings(
    max_examples=EXAMPLES // 3, deadline=None, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)  # fmt: skip
@given(programs(simple=True, dtypes=("f32", "bf16"), longest=70))
def test_random_programs_with_tables(program: Program) -> None:
    a, tensors, sizes = program
    found = spanned(a)
    if unsupported(a) is not None or not (found.spans or found.maps):
        return
    more = {**tensors, **tables(found, tensors, sizes)}
    check(Program(found.attention, more, sizes), SMALL, bounds=found.bounds)


#: Edges in the order of their names; a few of them on every change.
EDGES = (
    "causal", "unscaled", "bias by pair", "decode with sink", "squared weights", "weights", "padding", "alibi",
    "masked bias", "masked bias, mean", "masked bias, weights",
)  # fmt: skip


BIASED = Case(score="s * SCALE + bias[hk * G + g, i, j]", tensors=("bias: f32[HQ, N, M]",), give="out, lse")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for n, name in enumerate(EDGES) for at, dtype in enumerate(("f32", "bf16", "f16"))
     if EXAMPLES >= 400 or n % 3 == at],
)  # fmt: skip
def test_edges_of_numbers(name: str, dtype: str) -> None:
    """docs/numbers.md."""
    at = 3 * EDGES.index(name) + ("f32", "bf16", "f16").index(dtype)
    config = (SMALL, SPLIT)[at % 2]
    masked = replace(BIASED, mask="j + 1 <= i")
    case = {"unscaled": Case("j <= i", score="s", give="out, lse"), "bias by pair": BIASED,
            "masked bias": replace(BIASED, mask="j <= i + 3"),
            "masked bias, mean": replace(masked, empty="mean"),
            "masked bias, weights": replace(masked, give="out, weights")}.get(name) or CASES[name]  # fmt: skip
    a, given, sizes = case_of(case, dtype=dtype, batch=1, rows=min(case.rows, 20), keys=40)
    edges = list(edges_of(a).items())
    for n, edge in edges if EXAMPLES >= 400 else edges[at % 9 :: 9]:
        tensors = dict(given)
        edge(tensors, torch.Generator().manual_seed(1))
        split = {"splits": 2} if config.split and schedule(a, loop_bounds(a), config).split else {}
        got = interpreter.run(a, loop_bounds(a, rows=True), config, tensors, sizes, **split)
        hold(a, tensors, sizes, got, f"{n}, {name}, {dtype}", rounds=True)


@pytest.mark.parametrize("name", ["causal", "documents", "decode with sink"])
def test_a_wrong_kernel_is_found_at_its_first_use(name: str) -> None:
    """Of two sources the first forgets a part of the sum; what the second gives is believed."""
    p = make(name, dtype="f32")
    a, bounds = p.attention, loop_bounds(p.attention, rows=True)
    right = emit(a, bounds, SMALL)
    wrong = right.replace("acc / total", "acc / (total * 1.01)")
    assert wrong != right
    said: list[str] = []
    kernel = TritonKernel([wrong, right], check=partial(differs, a), report=said.append)
    tensors = [p.tensors[t.name] for t in a.tensors]
    outputs = [shape.allocate(p.sizes, torch.device("cpu")) for shape in shapes_of(a)]
    kernel(tensors, p.sizes, outputs)
    assert len(said) == 1 and "where it should be" in said[0]
    want = interpret(a, p.tensors, p.sizes, compute=torch.float64)["out"]
    torch.testing.assert_close(outputs[0].double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(SMALL, id="plain"), pytest.param(LISTS, id="lists", marks=pytest.mark.full),
        pytest.param(SPLIT, id="split", marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_what_is_left_out_weighs_at_most_eps(config: TritonConfig) -> None:
    """Values are unit vectors, so that the output says which keys were left out."""
    a = SplitAxes()(program_of_node(dropping.attention("0.05", most=64))).steps[0].node
    assert isinstance(a, Attention)
    bounds = loop_bounds(a, rows=True)
    left: dict[str, float] = {}
    for shape in ("even", "climbing", "first"):
        for n, m in ((20, 64), (2, 60)):
            data = dropping.tensors(shape, n, m, torch.float32, most=64)
            split = {"splits": 2} if config is SPLIT else {}
            out = interpreter.run(a, bounds, config, data, [n, m], **split)["out"]
            found = dropping.kept(data, out.reshape(dropping.B, dropping.H, n, 64))
            assert float(found.mass.max()) <= 0.05 and found.off <= 1e-4
            left[shape] = max(left.get(shape, 0.0), found.share)
    assert left["even"] < 0.05 and left["climbing"] > 0.1 and left["first"] > 0.2, left


def test_masked_values_are_never_read() -> None:
    """A cache holds anything where nothing was written."""
    p = make("decode")
    clean = interpreter.run(p.attention, loop_bounds(p.attention, rows=True), SMALL, p.tensors, p.sizes)["out"]
    tensors = {n: t.clone() for n, t in p.tensors.items()}
    for b, length in enumerate(tensors["length"].tolist()):
        tensors["k"][b, :, length:] = float("nan")
        tensors["v"][b, :, length:] = float("inf")
    for config, more in ((SMALL, {}), (SPLIT, {"splits": 3})):
        bounds = loop_bounds(p.attention, rows=True)
        dirty = interpreter.run(p.attention, bounds, config, tensors, p.sizes, **more)["out"]
        assert torch.isfinite(dirty).all()
        assert torch.allclose(dirty.float(), clean.float(), atol=torch.finfo(torch.bfloat16).eps)
