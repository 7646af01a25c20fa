"""Policies of a plan, against programs written from their sources: the same keys kept, the same outputs, in every
situation that the exact path lifts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from parameters.thinned import thinned
from policies.situations import SITUATIONS, B, Situation, applied, kept, masked, run_kernels
from torch import Tensor
from torch.testing import assert_close

from attncc.ir import Attention, Program, interpret_program, parse_attention, print_attention, verify_program
from attncc.ir.program import program_of_node
from attncc.ir.reasons import because
from attncc.passes.pipeline import PASSES, parse_pipeline
from attncc.passes.policies import (
    CERTIFIED,
    CLOSED_FORMS,
    EFFECTS,
    SELECTED,
    Chunks,
    SlidingTiles,
    Spans,
    Streaming,
    Strides,
)
from attncc.passes.policies.hiding import Form, Policy, hide, misfit

#: keep(row, key, length, head of the query, situation), from the sources of the rules; positions from the start.
Rule = Callable[[int, int, int, int, Situation], bool]


def streaming(row: int, key: int, length: int, h: int, s: Situation) -> bool:
    return key < 3 or abs(row - key) < 7


def spans(row: int, key: int, length: int, h: int, s: Situation) -> bool:
    blocks = max(1, int(8 // 4 + 0.125 * length / 4))
    return key // 4 == 0 or abs(row // 4 - key // 4) < blocks


def strides(row: int, key: int, length: int, h: int, s: Situation) -> bool:
    rows, keys, local, stride = row // 4, key // 4, 2, 8
    if not s.causal:
        return (max(0, rows - keys - local + 1) + max(0, keys - rows - local + 1)) % stride == 0
    step = max(1, stride // s.heads)
    return rows - keys < local or (keys + h // s.group * step) % stride == 0


def chunks(row: int, key: int, length: int, h: int, s: Situation) -> bool:
    return row // 10 == key // 10


CASES: list[tuple[Policy, Rule]] = [
    (Streaming(3, 7), streaming), (Spans(8, 0.125, 4), spans), (Strides(4, 2, 8), strides), (Chunks(10), chunks),
]  # fmt: skip
named = [pytest.param(policy, rule, id=rule.__name__) for policy, rule in CASES]


def wanted(rule: Rule, data: dict[str, Tensor], s: Situation) -> Tensor:
    out = torch.zeros(B, s.heads, s.n, s.m, dtype=torch.bool)
    for b in range(B):
        for i in range(s.n):
            keys, row, start = s.visible(data, b, i)
            for h in range(s.heads):
                for j in keys:
                    out[b, h, i, j] = rule(row, j - start, s.m - start, h, s)
    return out


@pytest.mark.parametrize("s", SITUATIONS, ids=str)
@pytest.mark.parametrize(("policy", "rule"), named)
def test_the_keys_of_the_source(policy: Policy, rule: Rule, s: Situation) -> None:
    data = s.tensors()
    p = applied(policy, s.attention())
    mask = wanted(rule, data, s)
    assert torch.equal(kept(p, data, s), mask)
    exact = {n: x.double() if x.is_floating_point() else x for n, x in data.items()}
    found = interpret_program(p, exact, s.sizes, compute=torch.float64)
    assert_close(found[p.outputs[0]], masked(data, s, mask))


@pytest.mark.parametrize("s", SITUATIONS, ids=str)
def test_no_row_loses_all_its_keys(s: Situation) -> None:
    """Its own key is kept wherever the model's mask leaves it any."""
    data = s.tensors()
    for policy, _ in CASES:
        rows = kept(applied(policy, s.attention()), data, s).any(-1)
        for b in range(B):
            for i in range(s.n):
                assert bool(rows[b, :, i].all()) == bool(s.visible(data, b, i)[0])


@pytest.mark.parametrize(
    "policy", [Streaming(0, 64), Spans(64, 0.0, 8), Spans(4, 1.0, 4), Chunks(64), Strides(4, 64, 1)], ids=str
)
def test_a_whole_budget_is_the_exact_attention(policy: Policy) -> None:
    for s in SITUATIONS:
        data = s.tensors()
        p = applied(policy, s.attention())
        exact = interpret_program(program_of_node(s.attention()), data, s.sizes)
        assert torch.equal(interpret_program(p, data, s.sizes)[p.outputs[0]], next(iter(exact.values())))


@pytest.mark.parametrize("policy", [Spans(4, 0.25, 4, 40), Spans(4, 0.25, 4)], ids=str)
def test_spans_that_are_fixed_at_prefill_are_those_of_every_step(policy: Spans) -> None:
    """Parts of a prefill and decoding steps see what the whole does; spans by the length of each call do not."""
    whole = Situation("padded", group=2, n=40, m=40, padding=(0, 8))
    data = whole.tensors()
    mask = kept(applied(policy, whole.attention()), data, whole)
    same = True
    for first, end in ((0, 16), (16, 31), (31, 32), (39, 40)):
        part = replace(whole, n=end - first, m=end)
        own = {"q": data["q"][:, :, first:end], "seen": data["seen"][:, :end]}
        own |= {x: data[x][:, :, :end] for x in "kv"}
        same &= torch.equal(kept(applied(policy, part.attention()), own, part), mask[:, :, first:end, :end])
    assert same == (policy.tokens == 40)


@pytest.mark.parametrize(("policy", "rule"), named)
def test_padding_before_a_sequence_changes_nothing(policy: Policy, rule: Rule) -> None:
    short = Situation("padded", n=30, m=30, padding=(0, 4))
    more = Situation("padded", n=36, m=36, padding=(6, 10))
    data = short.tensors()
    longer = {x: torch.nn.functional.pad(data[x], (0, 0, 6, 0), value=5.0) for x in "qkv"}
    longer["seen"] = more.tensors()["seen"]
    outs: list[Tensor] = []
    for s, given in ((short, data), (more, longer)):
        p = applied(policy, s.attention())
        outs.append(interpret_program(p, given, s.sizes, compute=torch.float64)[p.outputs[0]])
    assert_close(outs[1][..., 6:, :], outs[0])


@pytest.mark.parametrize(("policy", "rule"), named)
def test_sequences_of_a_batch_do_not_see_each_other(policy: Policy, rule: Rule) -> None:
    s = Situation("padded")
    data = s.tensors()
    p = applied(policy, s.attention())
    out = interpret_program(p, data, s.sizes)[p.outputs[0]]
    other = interpret_program(p, {x: t.flip(0) for x, t in data.items()}, s.sizes)[p.outputs[0]]
    assert torch.equal(other.flip(0), out)


KERNELS = thinned(range(len(CASES)), [SITUATIONS[at] for at in (1, 2, 4, 6, 9)])


@pytest.mark.parametrize(("number", "s"), KERNELS, ids=str)
def test_kernels_run_what_is_kept(number: int, s: Situation) -> None:
    policy, rule = CASES[number]
    data = s.tensors()
    out = run_kernels(applied(policy, s.attention()), data, s)
    assert_close(out.double(), masked(data, s, wanted(rule, data, s)), rtol=1e-5, atol=1e-5)


def test_sliding_tiles() -> None:
    """A grid of 6 x 8 tokens in tiles of 2 x 4: each tile of rows sees 3 x 1 tiles."""
    s = Situation("all", n=48, m=48, dynamic=False)
    mask = kept(applied(SlidingTiles((6, 8), (2, 4), (3, 1)), s.attention()), {}, s)
    for i in range(48):
        for j in range(48):
            (y, x), (v, u) = (divmod(t, 8) for t in (i, j))
            centre = min(max(y // 2, 1), 1)  # of 3 tiles, the box of 3 is all
            near = abs(v // 2 - centre) <= 1 and x // 4 == u // 4
            assert bool(mask[0, 0, i, j]) == near, (i, j)
    s = Situation("all", heads=1, n=60, m=60, dynamic=False)
    mask = kept(applied(SlidingTiles((10, 6), (2, 3), (3, 1)), s.attention()), {}, s)
    for i in range(60):
        for j in range(60):
            row, key = i // 6 // 2, j // 6 // 2
            centre = min(max(row, 1), 3)
            assert bool(mask[0, 0, i, j]) == (abs(key - centre) <= 1 and i % 6 // 3 == j % 6 // 3), (i, j)
    assert applied(SlidingTiles((10, 6), (2, 3), (5, 3)), s.attention()) == program_of_node(s.attention())


def test_tiles_need_the_grid_that_they_divide() -> None:
    policy = SlidingTiles((6, 8), (2, 4), (3, 1))
    for s in (Situation("all", n=48, m=48), Situation("all", n=50, m=50, dynamic=False)):
        assert policy.applies(s.attention()) == because("policy-other-grid", "6x8")


def test_cross_attention_has_no_distances() -> None:
    a = Situation("all", n=10, m=20, dynamic=False).attention()
    for policy, _ in CASES:
        reason = policy.applies(a)
        assert reason is not None and reason.code == "policy-no-distance"
        p = program_of_node(a)
        assert policy(p) is p  # type: ignore[operator] - closed forms are passes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("streaming{window=0}", "sinks is at least 0 and window at least 1"),
        ("spans{beta=1.5}", "beta is from 0 to 1"), ("spans{tokens=-1}", "tokens is at least 0"),
        ("strides{local=0}", "block, local and stride are at least 1"),
        ("chunks{size=0}", "size is at least 1"),
        ("sliding-tiles{grid=8x8,tile=3x4,window=3x3}", "tiles of 3x4 do not divide a grid of 8x8"),
        ("sliding-tiles{grid=8x8,tile=4x4,window=2x3}", "an odd number of tiles"),
        ("sliding-tiles", "name as many sides each"),
    ],
)
def test_parameters_that_mean_nothing(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_pipeline(text)


def test_every_policy_is_approximate_and_can_be_named() -> None:
    names = [x for x, kind in PASSES.items() if kind.legality == "approximate"]
    assert names == [kind.name for kind in (*CLOSED_FORMS, *SELECTED, *CERTIFIED, *EFFECTS)]
    assert parse_pipeline("spans{alpha=512,beta=0.25,block=32}") == (Spans(512, 0.25, 32),)


def by_head(a: Attention, *forms: Form) -> Program:
    return verify_program(hide(program_of_node(a), *forms))


HEADS = [x for x in SITUATIONS if x.heads > 1]


@pytest.mark.parametrize("s", HEADS, ids=str)
def test_each_head_keeps_what_its_own_form_keeps(s: Situation) -> None:
    data = s.tensors()
    forms = Form(Streaming(3, 7), (1,)), Form(Chunks(10), (0, s.heads - 1))
    mask = kept(by_head(s.attention(), *forms), data, s)
    rules = dict.fromkeys((0, s.heads - 1), chunks) | {1: streaming}
    for h in range(s.heads):
        assert torch.equal(mask[:, h], wanted(rules.get(h, lambda *_: True), data, s)[:, h])


@pytest.mark.parametrize("s", thinned(HEADS), ids=str)
def test_one_kernel_runs_heads_of_different_forms(s: Situation) -> None:
    data = s.tensors()
    forms = Form(Streaming(3, 7), (1,)), Form(Chunks(10), (0, s.heads - 1))
    p = by_head(s.attention(), *forms)
    out = run_kernels(p, data, s)
    assert_close(out.double(), masked(data, s, kept(p, data, s)), rtol=1e-5, atol=1e-5)


def test_layers_whose_heads_are_decided_differently_share_a_kernel() -> None:
    a = Situation("causal").attention()
    one, other = (by_head(a, Form(Streaming(3, 7), heads)) for heads in ((1,), (0, 3)))
    assert one.steps[-1].node == other.steps[-1].node
    assert one != other


def test_heads_that_all_take_one_form_read_no_table() -> None:
    a = Situation("causal").attention()
    assert by_head(a, Form(Chunks(10), (0, 1, 2, 3))) == by_head(a, Form(Chunks(10)))


def test_forms_of_heads_that_are_not_there() -> None:
    a = Situation("causal").attention()
    assert misfit(a, Form(Chunks(10), (4,))) == because("policy-other-heads", "4", "4")
    assert by_head(a, Form(Chunks(10), (4,))) == program_of_node(a)
    merged = print_attention(a).replace("b = 2, h = 4", "bh = 8").replace("[b, h, ", "[bh, ").replace("[2, 4, ", "[8, ")
    assert misfit(parse_attention(merged), Form(Chunks(10), (0,))) == because("policy-no-heads")


def test_heads_of_a_single_sequence() -> None:
    """A batch of one has no axis of its own."""
    a = Situation("causal").attention()
    one = parse_attention(print_attention(a).replace("b = 2, h = 4", "h = 4").replace("[b, ", "[0, "))
    assert misfit(one, Form(Chunks(10), (3,))) is None
    p = by_head(one, Form(Streaming(3, 7), (3,)))
    data = Situation("causal").tensors()
    both = interpret_program(by_head(a, Form(Streaming(3, 7), (3,))), data, [37, 37])
    assert torch.equal(interpret_program(p, data, [37, 37])[p.outputs[0]], next(iter(both.values()))[0])
