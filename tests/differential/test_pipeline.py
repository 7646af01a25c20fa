"""The pipeline and its passes: interpret(before) == interpret(after), verified after each, repeated by a command."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_ir import programs as random_ir

from attncc.ir import (
    Attention,
    Axis,
    Const,
    Index,
    Layout,
    Program,
    Rearrange,
    Size,
    Step,
    Tensor,
    interpret_program,
    kind_of,
    parse_attention,
    parse_expr,
    parse_program,
    print_program,
    verify_program,
)  # fmt: skip
from attncc.passes.pipeline import PASSES, PassError, Pipeline, Stage, parse_pipeline, spelled, standard
from attncc.passes.protocol import Legality
from attncc.passes.rewrites.layouts import CancelLayouts, DropUnused, TileTokens
from attncc.passes.rewrites.rearrangements import MergeRearrangements
from attncc.passes.rewrites.split_axes import SplitAxes

RANDOM = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def alone(a: Attention) -> Program:
    """An attention as a program."""
    names = tuple(f"x_{t.name}" for t in a.tensors)
    results = tuple(f"y_{t.name}" for t in kind_of(a).gives(a))
    inputs = tuple(replace(t, name=name) for t, name in zip(a.tensors, names, strict=True))
    return verify_program(Program(a.sizes, inputs, (Step(results, a, names, a.sizes),), results))


def same(before: Program, after: Program, tensors: dict[str, torch.Tensor], sizes: Sequence[int] = ()) -> None:
    wanted = interpret_program(before, tensors, sizes, compute=torch.float64)
    found = interpret_program(verify_program(after), tensors, sizes, compute=torch.float64)
    for old, new in zip(before.outputs, after.outputs, strict=True):
        torch.testing.assert_close(found[new], wanted[old], rtol=1e-12, atol=1e-12, equal_nan=True)
    assert parse_program(print_program(after)) == after


@RANDOM
@given(random_ir.programs())
def test_the_standard_pipeline_keeps_what_a_program_computes(drawn: random_ir.Program) -> None:
    p = alone(drawn.attention)
    stages: list[Stage] = []
    after = standard().run(p, stages.append)
    same(p, after, {f"x_{name}": x for name, x in drawn.tensors.items()}, drawn.sizes)
    assert [s.made_by.name for s in stages] == [x.name for x in standard().passes]
    assert all(a.after is b.before for a, b in pairwise(stages))


GROUPED = """attention
size   BH, B
batch  h = BH
axis   i = 5, j = 7, d = 4, e = 4
tensor q: f32[BH, 5, 4]
tensor k: f32[B, 2, 7, 4]
tensor v: f32[B, 2, 7, 4]
q      q[h, i, d]
k      k[h // 8, h % 8 // 4, j, d]
v      v[h // 8, h % 8 // 4, j, e]
score  s * 0.5
mask   j <= i + 2
norm   softmax
empty  zero
weight w
give   out, lse, weights
dtype  f32
layout h, i, e
"""


def test_split_axes_are_put_together_again() -> None:
    torch.manual_seed(0)
    p = alone(parse_attention(GROUPED))
    total, batch = (Size(n) for n in ("BH", "B"))
    names = {"B": batch}
    after = SplitAxes(((total, parse_expr("B * 8", names, {})),))(p)
    (attention, *joins) = after.steps
    assert isinstance(attention.node, Attention)
    assert [x.extent for x in attention.node.batch] == [batch, Const(2), Const(4)]
    assert [type(s.node) for s in joins] == [Rearrange] * 3
    tensors = {"x_q": torch.randn(24, 5, 4), "x_k": torch.randn(3, 2, 7, 4), "x_v": torch.randn(3, 2, 7, 4)}
    same(p, after, tensors, [24, 3])
    assert SplitAxes()(p) is p, "nothing says what the size is a product of"


def axes(**extents: int) -> tuple[Axis, ...]:
    return tuple(Axis(name, Const(n)) for name, n in extents.items())


def tensor(*shape: int) -> Tensor:
    return Tensor("x", "f32", tuple(map(Const, shape)))


def rearrangement(shape: Sequence[int], form: str, **extents: int) -> Rearrange:
    dims = [tuple(tuple(g.split("+")) if g else () for g in side.split(" ")) for side in form.split(" -> ")]
    return Rearrange((), axes(**extents), (tensor(*shape),), dims[0], dims[1])


@st.composite
def two_rearrangements(draw: st.DrawFn) -> tuple[Rearrange, Rearrange, tuple[int, ...]]:
    """Axes in groups, permuted and grouped anew; then the result's dimensions cut into axes and permuted again."""

    def groups(names: list[str]) -> tuple[tuple[str, ...], ...]:
        found: list[tuple[str, ...]] = []
        while names:
            n = draw(st.integers(1, len(names)))
            found.append(tuple(names[:n]))
            names = names[n:]
        return tuple(found)

    names = list("abcde"[: draw(st.integers(1, 5))])
    extents = {n: draw(st.sampled_from([1, 2, 3])) for n in names}
    source, kept = groups(names), draw(st.permutations(names))
    target = groups(list(kept[: draw(st.integers(1, len(kept)))]))
    shape = tuple(math.prod(extents[n] for n in g) for g in source)
    first = Rearrange((), axes(**extents), (tensor(*shape),), source, target)
    middle = tuple(math.prod(extents[n] for n in g) for g in target)
    cut = {f"m{k}": n for k, n in enumerate(middle)}
    fine = {n: extents[n] for g in target for n in g}
    again = dict(fine) if draw(st.booleans()) else cut
    before = target if again is not cut else tuple((n,) for n in cut)
    order = draw(st.permutations(list(again)))
    return first, Rearrange((), axes(**again), (tensor(*middle),), before, groups(list(order))), shape


@RANDOM
@given(two_rearrangements())
def test_rearrangements_of_rearrangements_are_one(drawn: tuple[Rearrange, Rearrange, tuple[int, ...]]) -> None:
    first, second, shape = drawn
    steps = Step(("y",), first, ("x",)), Step(("z",), second, ("y",))
    p = verify_program(Program((), (tensor(*shape),), steps, ("z",)))
    after = MergeRearrangements()(p)
    same(p, after, {"x": torch.randn(shape)})
    assert len(after.steps) <= 1


def test_a_rearrangement_that_changes_nothing_is_none_and_one_that_orders_memory_is_kept() -> None:
    nothing = rearrangement((2, 3), "a b -> a b", a=2, b=3)
    p = Program((), (tensor(2, 3),), (Step(("y",), nothing, ("x",)),), ("y",))
    assert MergeRearrangements()(p) == Program((), (tensor(2, 3),), (), ("x",))
    kept = replace(p, steps=(replace(p.steps[0], node=replace(nothing, memory=(1, 0))),))
    assert MergeRearrangements()(kept) is kept


def test_layouts_that_undo_each_other_cancel() -> None:
    source = parse_expr("t * 5 % 12", {"t": Index("t")}, {})
    node = Layout((), axes(t=12, e=3), (tensor(12, 3),), "t", source)
    steps = [Step(("a",), node, ("x",)), Step(("b",), replace(node, inverse=True), ("a",)), Step(("c",), node, ("b",))]
    p = verify_program(Program((), (tensor(12, 3),), tuple(steps), ("b", "c")))
    after = DropUnused()(CancelLayouts()(p))
    assert after.outputs == ("x", "c") and [s.results for s in after.steps] == [("c",)]
    same(p, after, {"x": torch.randn(12, 3)})
    other = replace(node, source=parse_expr("t * 7 % 12", {"t": Index("t")}, {}), inverse=True)
    kept = replace(p, steps=(steps[0], replace(steps[1], node=other)), outputs=("b",))
    assert CancelLayouts()(kept) is kept


NEIGHBOURS = """attention
batch  h = 2
axis   i = 32, j = 32, d = 4, e = 4
tensor q: f32[2, 32, 4]
tensor k: f32[2, 32, 4]
tensor v: f32[32, 2, 4]
q      q[h, i, d]
k      k[h, j, d]
v      v[j, h, e]
score  s * 0.5 - float(abs(i - j)) * 0.125
mask   abs(i // 8 - j // 8) <= 1 and abs(i % 8 - j % 8) <= 1
norm   softmax
empty  zero
weight w
give   out, lse, weights
dtype  f32
layout h, i, e
"""


def test_tokens_in_tile_order_between_layouts_that_cancel() -> None:
    torch.manual_seed(1)
    p = alone(parse_attention(NEIGHBOURS))
    tensors = {"x_q": torch.randn(2, 32, 4), "x_k": torch.randn(2, 32, 4), "x_v": torch.randn(32, 2, 4)}
    tiled = TileTokens((4, 8), (2, 4))
    same(p, tiled(p), tensors)
    (step,) = p.steps
    q, out = p.inputs[0], "y_out"
    twice = replace(
        p, steps=(step, replace(step, results=tuple(f"{n}2" for n in step.results), arguments=(out, "x_k", "x_v"))),
        outputs=("y_out2",),
    )  # fmt: skip
    assert q.shape == verify_program(twice).values()[out].shape
    after = DropUnused()(CancelLayouts()(tiled(twice)))
    same(twice, after, tensors)
    layouts = [s for s in after.steps if isinstance(s.node, Layout)]
    assert sum(s.arguments[0] == out or s.results[0] == out for s in layouts) == 0, "nothing between the two moves"


def test_the_text_of_passes_is_read_and_written() -> None:
    passes = parse_pipeline("split-axes, fold-predicates,tile-tokens{grid=4x8,tile=2x4}")
    assert [x.name for x in passes] == ["split-axes", "fold-predicates", "tile-tokens"]
    assert passes[2] == TileTokens((4, 8), (2, 4))
    assert parse_pipeline(",".join(map(spelled, passes))) == passes
    assert all(kind.legality in ("exact", "approximate", "trained") for kind in PASSES.values())
    for text, message in (
        ("fold", "no pass 'fold'; there are split-axes"), ("tile-tokens{grid=4x8,tall=2}", "no parameter 'tall'"),
        ("tile-tokens{grid=4y8,tile=1}", "grid cannot be '4y8'"), ("tile-tokens", "missing 2 required"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            parse_pipeline(text)


@dataclass(frozen=True)
class Breaks:
    name: ClassVar[str] = "breaks"
    legality: ClassVar[Legality] = "exact"

    def __call__(self, p: Program, /) -> Program:
        return replace(p, outputs=("nowhere",))


def test_a_pass_that_fails_leaves_what_it_was_given_and_says_how_to_repeat_it(tmp_path: Path) -> None:
    p = alone(parse_attention(NEIGHBOURS))
    with pytest.raises(PassError, match="the pass breaks failed: the output nowhere is made by no step") as caught:
        Pipeline((*standard().passes, Breaks()), repros=tmp_path / "new").run(p)
    (written,) = (tmp_path / "new").iterdir()
    assert caught.value.repro == written and f"attncc opt {written} -p 'breaks' --verify-each" in str(caught.value)
    assert verify_program(parse_program(written.read_text())).outputs == p.outputs
    Pipeline((Breaks(), *standard().passes[:0]), verify_each=False)  # what is checked is the end alone
    with pytest.raises(PassError):
        Pipeline((Breaks(),), verify_each=False, repros=tmp_path).run(p)
