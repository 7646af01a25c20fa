"""Orders of tokens: each is exact, comes back, cancels between layers, and carries masks and block maps."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from attncc.driver.running import compiled, run
from attncc.ir import (
    Attention,
    Layout,
    Program,
    Step,
    VerifyError,
    interpret_program,
    parse_attention,
    parse_program,
    print_program,
    verify_program,
)
from attncc.ir.node import kind_called, kind_of
from attncc.ir.order import Order
from attncc.ir.program import program_of_node
from attncc.passes.pipeline import Pipeline, parse_pipeline, standard
from attncc.passes.policies import BlockMeans, SlidingTiles
from attncc.passes.protocol import Pass
from attncc.passes.rewrites.curve import curve
from attncc.passes.rewrites.layouts import CancelLayouts, DropUnused, TileTokens
from attncc.passes.rewrites.orders import ClusterTokens, CurveTokens, OrderTokens

GRID = (4, 6, 8)
N, D = prod(GRID), 4
ORDERS: list[Pass] = [
    TileTokens(GRID, (2, 3, 4)), OrderTokens(GRID, (1, 2, 0)), OrderTokens(GRID, (2, 0, 1)), CurveTokens(GRID),
    ClusterTokens(6, 2),
]  # fmt: skip


def attention(mask: str = "True", score: str = "s * 0.5", group: int = 2, n: int = N, read: str = "") -> Attention:
    k = f"h // {group}" if group > 1 else "h"
    return parse_attention(
        f"attention\nbatch  b = 2, h = 4\naxis   i = {n}, j = {n}, d = {D}, e = {D}\ntensor q: f32[2, 4, {n}, {D}]\n"
        f"tensor k: f32[2, {4 // group}, {n}, {D}]\ntensor v: f32[2, {4 // group}, {n}, {D}]\n{read}"
        f"q      q[b, h, i, d]\nk      k[b, {k}, j, d]\nv      v[b, {k}, j, e]\nscore  {score}\nmask   {mask}\n"
        "norm   softmax\nempty  zero\nweight w\ngive   out\ndtype  f32\n"
    )


def data(a: Attention, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {t.name: [int(getattr(x, "value", 0)) for x in t.shape] for t in a.tensors}
    found = {x: torch.randn(shape, generator=g, dtype=torch.float64) for x, shape in shapes.items() if x in "qkv"}
    return found | {x: torch.rand(shape, generator=g) < 0.8 for x, shape in shapes.items() if x not in "qkv"}


def result(p: Program, tensors: dict[str, Tensor]) -> Tensor:
    return interpret_program(p, tensors, compute=torch.float64)[p.outputs[0]]


MASKED = attention("seen[b, j] and (j <= i or i // 8 == j // 8)", "s * 0.5 - float(abs(i - j)) * 0.01", 2, N,
                   f"tensor seen: bool[2, {N}]\n")  # fmt: skip


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("a", [attention(), MASKED, attention(group=1)], ids=["plain", "masked", "ungrouped"])
def test_the_attention_is_the_same(order: Pass, a: Attention) -> None:
    tensors, p = data(a), program_of_node(a)
    moved = verify_program(order(p))
    layouts = [step.node for step in moved.steps if isinstance(step.node, Layout)]
    assert sum(x.inverse for x in layouts) == 1 and len(layouts) == 4
    assert_close(result(moved, tensors), result(p, tensors))
    assert parse_program(print_program(moved)) == moved


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_layout_and_its_inverse_are_nothing(order: Pass) -> None:
    """Bit for bit, of the tensors themselves."""
    a = attention()
    p, tensors = order(program_of_node(a)), data(a)
    values = dict(tensors)
    for step in p.steps:
        if isinstance(step.node, Attention):
            break
        given = {t.name: values[x] for t, x in zip(step.node.tensors, step.arguments, strict=True)}
        values[step.results[0]] = kind_of(step.node).interpret(step.node, given, [])["out"]
        if isinstance(step.node, Layout):
            back = replace(step.node, inverse=not step.node.inverse)
            there = {**given, "x": values[step.results[0]]}
            assert torch.equal(kind_of(back).interpret(back, there, [])["out"], given["x"])
            assert not torch.equal(values[step.results[0]], given["x"])


@pytest.mark.parametrize("order", ORDERS[:4], ids=str)
def test_nothing_is_moved_between_two_layers_in_one_order(order: Pass) -> None:
    p = program_of_node(attention(group=1))
    (step,) = p.steps
    second = replace(step, results=("again",), arguments=(step.results[0], "k", "v"))
    twice = verify_program(replace(p, steps=(step, second), outputs=("again",)))
    after = Pipeline((order, CancelLayouts(), DropUnused())).run(twice)
    assert_close(result(after, data(attention(group=1))), result(twice, data(attention(group=1))))
    between = [s for s in after.steps if isinstance(s.node, Layout) and step.results[0] in (*s.arguments, *s.results)]
    assert not between
    assert sum(isinstance(s.node, Layout) for s in after.steps) == 6


def test_orders_of_clusters_do_not_cancel_where_the_keys_differ() -> None:
    p = program_of_node(attention(group=1))
    (step,) = p.steps
    second = replace(step, results=("again",), arguments=(step.results[0], step.results[0], "v"))
    twice = verify_program(replace(p, steps=(step, second), outputs=("again",)))
    after = Pipeline((ClusterTokens(6), CancelLayouts(), DropUnused())).run(twice)
    assert_close(result(after, data(attention(group=1))), result(twice, data(attention(group=1))))
    assert sum(isinstance(s.node, Order) for s in after.steps) == 2


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_sliding_tiles_in_an_order_are_those_of_the_grid(order: Pass) -> None:
    """What is hidden by where tokens are in the grid stays hidden wherever they lie."""
    a = attention()
    tiles, tensors = SlidingTiles(GRID, (2, 3, 4), (1, 3, 1)), data(a)
    hidden = tiles(program_of_node(a))
    assert_close(result(Pipeline((tiles, order)).run(program_of_node(a)), tensors), result(hidden, tensors))  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_blocks_behind_an_order_are_blocks_of_it(order: Pass) -> None:
    """A block map over reordered tokens is that of the reordered tensors."""
    a = attention()
    tensors, p = data(a), order(program_of_node(a))
    blocks = BlockMeans(16, 16, "fraction", 0.4)
    at = next(n for n, s in enumerate(p.steps) if isinstance(s.node, Attention))
    step = p.steps[at]
    before = replace(p, steps=p.steps[:at], outputs=step.arguments[:3])
    moved = interpret_program(before, tensors, compute=torch.float64)
    alone = {x: moved[n] for x, n in zip("qkv", step.arguments[:3], strict=True)}
    wanted = result(blocks(program_of_node(a)), alone)
    back = next(s for s in p.steps if isinstance(s.node, Layout) and s.node.inverse)
    whole = replace(p, steps=(*p.steps[:at], back), outputs=back.results,
                    inputs=(*p.inputs, replace(p.values()[step.results[0]], name=step.results[0])))  # fmt: skip
    wanted = result(whole, {**tensors, step.results[0]: wanted})
    assert_close(result(Pipeline((order, blocks)).run(program_of_node(a)), tensors), wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "order", [ORDERS[3], *(pytest.param(x, marks=pytest.mark.full) for x in (*ORDERS[:3], ORDERS[4]))], ids=str
)
def test_kernels_run_blocks_of_an_order(order: Pass) -> None:
    """As a model runs them: compiled, but for the attention, which is a kernel."""
    a = attention("seen[b, j]", read=f"tensor seen: bool[2, {N}]\n")
    p = Pipeline((order, BlockMeans(16, 16, "fraction", 0.4))).run(program_of_node(a))  # type: ignore[arg-type]
    tensors = {x: t.float() if t.is_floating_point() else t for x, t in data(a).items()}
    (out,) = run(standard().run(p), tensors, {})
    wanted = interpret_program(p, tensors)[p.outputs[0]]
    assert_close(out.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_an_order_is_compiled() -> None:
    a = attention()
    p = Pipeline((ClusterTokens(6), BlockMeans(16, 16, "fraction", 0.4), *standard().passes)).run(program_of_node(a))  # type: ignore[arg-type]
    tensors = {x: t.float() for x, t in data(a).items()}
    (out,) = cast(tuple[Tensor], compiled(p, tensors, {})(tensors))
    (wanted,) = run(p, tensors, {})
    assert_close(out, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [(32, 32), (8, 8, 16)])
def test_runs_of_a_curve_are_near_in_the_grid(grid: tuple[int, ...]) -> None:
    """64 tokens in a row lie in a small box, where those of row-major order reach over a whole side."""
    along = list(curve(grid))
    runs = [along[n : n + 64] for n in range(0, len(along), 64)]
    reach = [max(max(x) - min(x) + 1 for x in zip(*run, strict=True)) for run in runs]
    assert max(reach) <= {2: 16, 3: 8}[len(grid)]


@pytest.mark.parametrize(
    "grid", [(2, 2), (8, 8), (5, 7), (3, 9), (1, 5), (4, 4, 4), (6, 8, 8), (5, 5, 5), (7, 3, 2), (1, 1, 1), (9, 1, 1)]
)
def test_a_curve_visits_each_point_once_and_moves_to_a_neighbour(grid: tuple[int, ...]) -> None:
    points = list(curve(grid))
    assert len(points) == len({*points}) == prod(grid)
    assert all(0 <= x < side for p in points for x, side in zip(p, grid, strict=True))
    steps = [[abs(x - y) for x, y in zip(p, q, strict=True)] for p, q in pairwise(points)]
    assert all(max(step) == 1 for step in steps)
    if all(side % 2 == 0 for side in grid):
        assert all(sum(step) == 1 for step in steps)


def test_clusters_are_sorted_stably_and_those_that_are_not_there_come_last() -> None:
    text = ("order\nbatch  b = 1\naxis   t = 8, d = 1\ntensor x: f32[1, 8, 1]\ntensor there: bool[1, 8]\n"
            "value  x[b, t, d]\nthere  there[b, t]\nover   2\nrounds 3\n")  # fmt: skip
    kind = kind_called("order")
    assert kind is not None
    node = kind.parse(text)
    assert kind.print(node) == text
    x = torch.tensor([[0.0, 9.0, 0.1, 9.1, 0.0, 9.0, 0.2, 9.2]])[..., None]
    there = torch.tensor([[True] * 3 + [False] + [True] * 4])
    found = kind.interpret(node, {"x": x, "there": there})["out"]
    assert found.tolist() == [[1, 5, 7, 0, 2, 4, 6, 3]]
    with pytest.raises(VerifyError, match="at least 1 cluster"):
        kind.verify(replace(node, count=0))


@pytest.mark.parametrize(
    ("text", "a", "message"),
    [
        ("order-tokens{grid=4x6,sides=0x0}", None, "each once"),
        ("curve-tokens{grid=8}", None, "two or three sides"),
        ("cluster-tokens{clusters=0}", None, "at least 1 cluster"),
        ("curve-tokens{grid=4x4}", attention(), "not the 16 of the grid"),
        ("order-tokens{grid=2x8,sides=1x0}", attention(), "not the 16 of the grid"),
        (
            "cluster-tokens",
            parse_attention(
                "attention\nsize   n\nbatch  h = 2\naxis   i = n, j = n, d = 4, e = 4\ntensor q: f32[2, n, 4]\n"
                "tensor k: f32[2, n, 4]\ntensor v: f32[2, n, 4]\n"
                "q      q[h, i, d]\nk      k[h, j, d]\nv      v[h, j, e]\n"
                "score  s\nmask   True\nnorm   softmax\nempty  zero\nweight w\ngive   out\ndtype  f32\n"
            ),
            "known at the call alone",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_does_not_fit_is_refused(text: str, a: Attention | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        (order,) = parse_pipeline(text)
        if a is not None:
            order(program_of_node(a))


def test_tokens_behind_other_dimensions_have_one_order() -> None:
    """Values whose heads come behind their tokens cannot follow an order of each head."""
    a = attention(group=1)
    late = replace(a, v=replace(a.v, index=(a.v.index[0], a.v.index[2], a.v.index[1], a.v.index[3])), tensors=tuple(
        replace(t, shape=(t.shape[0], t.shape[2], t.shape[1], t.shape[3])) if t.name == "v" else t for t in a.tensors
    ))  # fmt: skip
    tensors = data(late)
    p = program_of_node(late)
    assert_close(result(CurveTokens(GRID)(p), tensors), result(p, tensors))
    with pytest.raises(ValueError, match="behind that of the tokens"):
        ClusterTokens(4)(p)
    assert isinstance(p.steps[0], Step)
