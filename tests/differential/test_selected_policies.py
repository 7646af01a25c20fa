"""Policies that select per call, against rules written from their sources: the same sets, the same outputs, in every
situation that the exact path lifts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from parameters.thinned import thinned
from policies.selected import (
    Rule,
    antidiagonal,
    block_means,
    chunk_means,
    flex_prefill,
    page_mass,
    pages,
    routed_streaming,
    self_similar,
    vertical_slash,
)
from policies.sequences import exactly, sequences
from policies.situations import SITUATIONS, B, D, Situation, applied, kept, masked, run_kernels
from torch import Tensor
from torch.testing import assert_close

from attncc.ir import Attention, Program, interpret_program, parse_program, print_program, verify_program
from attncc.ir.program import program_of_node
from attncc.ir.reasons import because
from attncc.passes.pipeline import Pipeline, parse_pipeline
from attncc.passes.policies import (
    SELECTED,
    Antidiagonal,
    BlockMeans,
    ChunkMeans,
    Chunks,
    Draft,
    FlexPrefill,
    PageMass,
    Pages,
    PooledRest,
    Rectified,
    RoutedStreaming,
    SelfSimilar,
    VerticalSlash,
)  # fmt: skip
from attncc.passes.policies.hiding import Form, Policy, hide
from attncc.passes.rewrites.split_axes import SplitAxes

#: Calls of a few rows, whose number is known: each of them may select for itself.
DECODE = [
    Situation("causal", heads=8, group=4, n=1, m=50, dynamic=False),
    Situation("padded", group=2, n=3, m=40, dynamic=False), Situation("placed", n=1, m=64, dynamic=False),
    Situation("padded", heads=8, group=8, n=5, m=37, dynamic=False),
    Situation("padded both ways", heads=4, group=2, n=1, m=40, dynamic=False),
]  # fmt: skip
PREFILL = [s for s in SITUATIONS if s.mask != "documents"]
STATIC = [replace(s, dynamic=False) for s in PREFILL if s.m == 37][:3]
ONE_HEAD = [replace(s, group=s.heads) for s in (*PREFILL[:3], *PREFILL[4:])]

CASES: list[tuple[Policy, Rule, list[Situation]]] = [
    (BlockMeans(8, 4, "mass", 0.6), block_means(8, 4, "mass", 0.6), [*PREFILL, *STATIC, *DECODE]),
    (BlockMeans(4, 8, "count", 3, 2, 2), block_means(4, 8, "count", 3, sinks=2, recent=2), PREFILL),
    (BlockMeans(5, 7, "fraction", 0.4, share="max"), block_means(5, 7, "fraction", 0.4, share="max"), PREFILL),
    (BlockMeans(4, 4, share="sum"), block_means(4, 4, "mass", 0.9, share="sum"), PREFILL[1:3]),
    (Antidiagonal(8, 4, amount=0.6), antidiagonal(8, 4, 0.6), [*PREFILL, *STATIC, *DECODE]),
    (Antidiagonal(6, 3, amount=0.5, share="mean"), antidiagonal(6, 3, 0.5, share="mean"), PREFILL[1:5]),
    (SelfSimilar(8, 4, amount=0.6, similar=0.3), self_similar(8, 4, 0.6, 0.3), [*PREFILL, *STATIC]),
    (ChunkMeans(4, 8, 5, 3, 2), chunk_means(4, 8, 5, 3, 2), ONE_HEAD),
    (VerticalSlash(4, 6, 8, 4, 2, 3), vertical_slash(4, 6, 8, 4, 2, 3), PREFILL[:-2]),
    (FlexPrefill(4, 0.5, 0.3, 8), flex_prefill(4, 0.5, 0.3, 8), [*PREFILL[:-2], *STATIC]),
    (FlexPrefill(4, 0.5, 0.0, 8), flex_prefill(4, 0.5, 0.0, 8), PREFILL[:-2]),
    (RoutedStreaming(2, 9, 0.4, 5), routed_streaming(2, 9, 0.4, 5), [*ONE_HEAD[:5], *ONE_HEAD[-2:]]),
    (Pages(4, 12), pages(4, 12, 1), DECODE),
    (Pages(4, 12, share="max"), pages(4, 12, 1, "max"), DECODE[:3]),
    (Pages(4, 8, 2, share="sum"), pages(4, 8, 2, "sum"), DECODE[1:4]),
    (PageMass(4, 16, 2), page_mass(4, 16, 2), [replace(s, group=s.heads) for s in DECODE]),
]  # fmt: skip
EVERY = [pytest.param(policy, rule, s, id=f"{policy}-{s}") for policy, rule, tried in CASES for s in tried]
NAMED = [pytest.param(policy, id=str(policy)) for policy, _, _ in CASES]


def wanted(rule: Rule, data: dict[str, Tensor], s: Situation) -> tuple[Tensor, Tensor]:
    """What a rule keeps, bool[b, h, i, j], and for which rows it says so."""
    out = torch.zeros(B, s.heads, s.n, s.m, dtype=torch.bool)
    told = torch.zeros(B, s.n, dtype=torch.bool)
    for b, g, rows, sequence in sequences(data, s):
        start = s.visible(data, b, 0)[2]
        told[b, rows] = True
        for n, h in enumerate(range(g * s.group, (g + 1) * s.group)):
            out[b, h, rows, start : start + sequence.length] = rule(sequence)[n]
    return out, told


@pytest.mark.parametrize(("policy", "rule", "s"), EVERY)
def test_the_sets_of_the_source(policy: Policy, rule: Rule, s: Situation) -> None:
    data = exactly(s.tensors())
    p = applied(policy, s.attention())
    mask, told = wanted(rule, data, s)
    found = kept(p, data, s)
    rows = told[:, None, :, None]
    assert torch.equal(found & rows, mask & rows)
    out = interpret_program(p, data, s.sizes, compute=torch.float64)[p.outputs[0]]
    assert_close(out, masked(data, s, found))
    for b in range(B):
        for i in range(s.n):
            assert bool(found[b, :, i].any(-1).all()) == bool(s.visible(data, b, i)[0]), "a row keeps a key"
    assert not out.isnan().any()
    assert parse_program(print_program(p)) == p


@pytest.mark.parametrize(
    "policy",
    [
        BlockMeans(8, 4, "mass", 1.0), BlockMeans(8, 4, "fraction", 1.0), BlockMeans(8, 4, "count", 99),
        BlockMeans(8, 4, "least", 0.0), Antidiagonal(8, 4, amount=1.0), SelfSimilar(8, 4, "mass", 1.0),
        SelfSimilar(8, 4, "mass", 0.1, similar=1.0), ChunkMeans(4, 400), VerticalSlash(99, 1), VerticalSlash(1, 99),
        FlexPrefill(4, 1.0, 0.0, 4), FlexPrefill(4, 1.0, 1.0, 4), FlexPrefill(8, 0.1, 0.0, 400), Pages(4, 400),
        PageMass(4, 400), RoutedStreaming(0, 1, 0.0, 64), RoutedStreaming(0, 400, 0.5),
    ],
    ids=str,
)  # fmt: skip
def test_a_whole_budget_is_the_exact_attention(policy: Policy) -> None:
    for s in (*PREFILL, *DECODE):
        if policy.applies(s.attention()) is None:
            data = s.tensors()
            p = applied(policy, s.attention())
            exact = interpret_program(program_of_node(s.attention()), data, s.sizes)
            assert torch.equal(interpret_program(p, data, s.sizes)[p.outputs[0]], next(iter(exact.values()))), s


def out_of(policy: Policy, s: Situation, data: dict[str, Tensor]) -> Tensor:
    p = applied(policy, s.attention())
    return interpret_program(p, exactly(data), s.sizes, compute=torch.float64)[p.outputs[0]]


@pytest.mark.parametrize("policy", NAMED)
def test_padding_before_a_sequence_changes_nothing(policy: Policy) -> None:
    decode = policy.name in ("pages", "page-mass")
    n = 3 if decode else 30
    short = Situation("padded", group=2, n=n, m=30, padding=(0, 4), dynamic=not decode)
    more = replace(short, n=n if decode else 36, m=36, padding=(6, 10))
    data = short.tensors()
    longer = {x: torch.nn.functional.pad(data[x], (0, 0, 6, 0), value=5.0) for x in "kv"}
    longer["q"] = data["q"] if decode else torch.nn.functional.pad(data["q"], (0, 0, 6, 0), value=5.0)
    longer["seen"] = more.tensors()["seen"]
    assert_close(out_of(policy, more, longer)[..., -n:, :], out_of(policy, short, data))


@pytest.mark.parametrize("policy", NAMED)
def test_sequences_of_a_batch_do_not_see_each_other(policy: Policy) -> None:
    decode = policy.name in ("pages", "page-mass")
    s = Situation("padded", group=2, n=4 if decode else 37, dynamic=not decode)
    data = s.tensors()
    p = applied(policy, s.attention())
    out = interpret_program(p, data, s.sizes)[p.outputs[0]]
    again = interpret_program(p, data, s.sizes)[p.outputs[0]]
    other = interpret_program(p, {x: t.flip(0) for x, t in data.items()}, s.sizes)[p.outputs[0]]
    assert torch.equal(out, again)
    assert_close(other.flip(0), out)


@pytest.mark.parametrize(
    "policy",
    [BlockMeans(8, 4, "count", 3), Antidiagonal(8, 4, amount=0.6), SelfSimilar(8, 4, amount=0.6)],
    ids=str,
)
def test_a_prefill_in_parts_of_whole_blocks_is_the_whole_prefill(policy: Policy) -> None:
    whole = Situation("padded", group=2, n=40, m=40, padding=(0, 8))
    data = whole.tensors()
    out = out_of(policy, whole, data)
    for first, end in ((0, 16), (16, 40)):
        part = replace(whole, n=end - first, m=end)
        own = {"q": data["q"][:, :, first:end], "seen": data["seen"][:, :end]}
        own |= {x: data[x][:, :, :end] for x in "kv"}
        found = out_of(policy, part, own)
        if not isinstance(policy, SelfSimilar):  # the mean that keys are less is that of the keys there are
            assert_close(found, out[:, :, first:end])
        assert not found.isnan().any()


def needle(s: Situation, at: int, margin: float) -> dict[str, Tensor]:
    """Keys of noise, and one that every row scores by `margin` more."""
    data = s.tensors()
    direction = torch.zeros(D)
    direction[0] = 1.0
    data["q"] = data["q"] * 0.05 + direction
    data["k"] = data["k"] * 0.05
    data["k"][:, :, at] = direction * margin / 0.25
    return data


@pytest.mark.parametrize(
    ("policy", "s", "at"),
    [
        (BlockMeans(8, 4, "count", 4), Situation("causal", group=2), 9),
        (Antidiagonal(8, 4, amount=0.5), Situation("causal", group=2), 13),
        (SelfSimilar(8, 4, amount=0.5, similar=-1.0), Situation("causal"), 9),
        (ChunkMeans(4, 4, 2, 2, 0), Situation("causal", group=4), 9),
        (VerticalSlash(3, 1, 4, 4, 0, 1), Situation("causal", group=2), 9),
        (FlexPrefill(4, 0.5, 0.0, 8), Situation("causal", group=2), 9),
        (Pages(4, 8), Situation("causal", group=2, n=2, dynamic=False), 9),
        (PageMass(4, 8, 1), Situation("causal", group=2, n=2, dynamic=False), 9),
    ],
    ids=str,
)  # fmt: skip
def test_a_needle_is_found(policy: Policy, s: Situation, at: int) -> None:
    data = needle(s, at, 30.0)
    mask = kept(applied(policy, s.attention()), data, s)
    for i in range(s.n):
        if i + s.m - s.n >= at:
            assert mask[:, :, i, at].all(), i
    assert mask.float().mean() < 0.5


def test_each_sequence_is_routed_by_itself() -> None:
    """Of two sequences one looks far: it keeps all keys, the other those near."""
    s = Situation("causal", group=2)
    data, far = s.tensors(), needle(s, 9, 30.0)
    at = torch.arange(s.m)[:, None] * 0.8 ** torch.arange(D // 2) * 0.9
    place = 5 * torch.cat([at.sin(), at.cos()], -1)
    data = {"q": place.expand_as(data["q"]).clone(), "k": place.expand_as(data["k"]).clone(), "v": data["v"]}
    for x in "qk":
        data[x][0] = far[x][0]
    mask = kept(applied(RoutedStreaming(2, 9, 0.4, 5), s.attention()), data, s)
    i, j = torch.arange(37)[:, None], torch.arange(37)
    assert torch.equal(mask[0], (j <= i).expand(4, -1, -1))
    assert torch.equal(mask[1], ((j <= i) & ((j < 2) | (i - j < 9))).expand(4, -1, -1))


def test_a_box_bounds_every_product_of_its_page() -> None:
    """So that a key which a row scores most, by any margin, is kept: alone of its page, among worse ones."""
    torch.manual_seed(0)
    s = Situation("causal", n=2, m=64, dynamic=False)
    data = s.tensors()
    for at in (5, 22, 49):
        best = {**data, "k": data["k"] * 0.1}
        best["k"][:, :, at] = data["q"].mean(2) * 3
        mask = kept(applied(Pages(4, 16), s.attention()), best, s)
        scores = data["q"] @ best["k"].mT
        first = scores.argmax(-1) == at
        assert mask[..., at][first].all() and first.any()


@pytest.mark.parametrize("policy", NAMED)
def test_gradients_are_those_of_the_masked_attention(policy: Policy) -> None:
    decode = policy.name in ("pages", "page-mass")
    s = Situation("padded", group=2, n=3 if decode else 21, m=24, dynamic=not decode)
    data = exactly(s.tensors())
    p = applied(policy, s.attention())
    leaves = {x: data[x].clone().requires_grad_() for x in "qkv"}
    upstream = torch.randn(B, s.heads, s.n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = interpret_program(p, data | leaves, s.sizes, compute=torch.float64)[p.outputs[0]]
    found = torch.autograd.grad((out * upstream).sum(), list(leaves.values()))
    mask = kept(p, data, s)
    q, k, v = leaves.values()
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.25).masked_fill(~mask, -1e30)
    weights = torch.where(mask, scores.softmax(-1), 0.0)
    reference = (weights @ v.repeat_interleave(2, 1) * upstream).sum()
    for x, y in zip(found, torch.autograd.grad(reference, list(leaves.values())), strict=True):
        assert_close(x, y)


#: One situation of each kind a policy: whole, in part of a longer sequence, padded, with a cache.
RUN = thinned(
    [CASES[n][0] for n in (0, 4, 6, 8, 9, 11)],
    [PREFILL[at] for at in (1, 2, 4)] + [replace(SITUATIONS[0], dynamic=False)],
)


@pytest.mark.parametrize(("policy", "s"), RUN, ids=str)
def test_kernels_run_what_is_selected(policy: Policy, s: Situation) -> None:
    data = s.tensors()
    p = applied(policy, s.attention())
    assert_close(run_kernels(p, data, s).double(), masked(data, s, kept(p, data, s)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("policy", "s"), thinned([Pages(4, 12), PageMass(4, 16, 2)], DECODE[:2]), ids=str)
def test_kernels_run_what_is_selected_at_decode(policy: Policy, s: Situation) -> None:
    test_kernels_run_what_is_selected(policy, s)


def test_rows_without_positions_select_by_what_they_score() -> None:
    """Cross attention has no own blocks: each row keeps its best block at least."""
    s = Situation("all", n=10, m=23, dynamic=False)
    data = exactly(s.tensors())
    rule = block_means(4, 4, "count", 2, sinks=0, positions=False)
    found = kept(applied(BlockMeans(4, 4, "count", 2, 0), s.attention()), data, s)
    assert torch.equal(found, wanted(rule, data, s)[0])
    assert torch.equal(found.sum(-1).clamp(max=8), found.sum(-1))


@pytest.mark.parametrize(
    ("policy", "s", "code"),
    [
        (BlockMeans(), Situation("documents"), "policy-by-pair"),
        (VerticalSlash(), Situation("all"), "policy-not-causal"),
        (FlexPrefill(), Situation("padded both ways"), "policy-not-causal"),
        (ChunkMeans(), Situation("all", n=10, m=20, dynamic=False), "policy-no-distance"),
        (RoutedStreaming(), Situation("all", n=10, m=20, dynamic=False), "policy-no-distance"),
        (Pages(), Situation("causal"), "policy-many-rows"),
        (PageMass(), Situation("causal", n=65, m=65, dynamic=False), "policy-many-rows"),
    ],
    ids=str,
)  # fmt: skip
def test_where_a_rule_means_nothing(policy: Policy, s: Situation, code: str) -> None:
    reason = policy.applies(s.attention())
    assert reason is not None and reason.code == code
    p = program_of_node(s.attention())
    assert hide(p, Form(policy)) is p


def test_what_is_no_softmax_is_left_alone() -> None:
    a = replace(Situation("causal").attention(), normalizer="sigmoid")
    for kind in (BlockMeans, Antidiagonal, SelfSimilar, VerticalSlash, FlexPrefill, ChunkMeans):
        assert kind().applies(a) == because("policy-no-softmax")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("block-means{rows=0}", "at least 1 token"), ("block-means{take=most}", "take is one of"),
        ("block-means{share=all}", "share is one of"), ("block-means{take=mass,amount=1.5}", "mass cannot be 1.5"),
        ("antidiagonal{stride=3}", "do not divide"), ("self-similar{similar=2}", "a cosine"),
        ("vertical-slash{columns=0}", "at least 1"), ("flex-prefill{gamma=0}", "gamma is above 0"),
        ("chunk-means{budget=1}", "the budget one chunk"), ("pages{budget=8}", "the budget is at least a page"),
        ("routed-streaming{window=0}", "window at least 1"), ("routed-streaming{miss=1}", "a share from 0"),
        ("page-mass{page=0}", "at least 1 token"), ("draft", "name as many sides"),
        ("draft{grid=6x8,patch=4x4}", "do not divide"), ("draft{grid=6x8,patch=2x4,sparsity=1}", "below 1"),
    ],
)  # fmt: skip
def test_parameters_that_mean_nothing(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_pipeline(text)


def test_a_selection_is_one_form_of_some_heads_beside_others() -> None:
    s = Situation("padded", group=2)
    data = exactly(s.tensors())
    forms = Form(BlockMeans(8, 4, "mass", 0.6), (1, 2)), Form(Chunks(10), (3,))
    p = verify_program(hide(program_of_node(s.attention()), *forms))
    found = kept(p, data, s)
    assert torch.equal(found[:, 1:3], wanted(block_means(8, 4, "mass", 0.6), data, s)[0][:, 1:3])
    assert torch.equal(found[:, 3], kept(applied(Chunks(10), s.attention()), data, s)[:, 3])
    assert torch.equal(found[:, 0], kept(program_of_node(s.attention()), data, s)[:, 0])


@pytest.mark.parametrize("policy", NAMED)
def test_heads_counted_through_by_two_axes_are_the_same_heads(policy: Policy) -> None:
    """Groups of heads as an axis of their own, as models spell them too."""
    decode = policy.name in ("pages", "page-mass")
    s = Situation("padded", group=2, n=3 if decode else 37, dynamic=not decode)
    data = exactly(s.tensors())
    whole = program_of_node(s.attention())
    outs: list[Tensor] = []
    for p in (whole, Pipeline((SplitAxes(),)).run(whole)):
        hidden = verify_program(hide(p, Form(policy)))
        assert hidden != p
        outs.append(interpret_program(hidden, data, s.sizes, compute=torch.float64)[p.outputs[0]])
    assert_close(outs[1].reshape(outs[0].shape), outs[0])


def test_the_attention_reads_the_map_alone() -> None:
    """What rules make on the way is no tensor of the kernel."""
    for policy, _, (s, *_) in CASES:
        p: Program = applied(policy, s.attention())
        (a,) = (x.node for x in p.steps if isinstance(x.node, Attention))
        own = {t.name for t in s.attention().tensors}
        read = {t.name for t in a.tensors} - own
        assert read <= {"map", "start", "last", "page", "chunk", "column", "cell", "diagonal_blocks", "diagonal",
                        "distance", "pair", "alike", "alike_", "missed"}, policy  # fmt: skip


def test_every_selecting_policy_is_tried() -> None:
    assert {type(policy) for policy, _, _ in CASES} | {Draft, PooledRest, Rectified} == set(SELECTED)
