"""Policies that put an output together: means beside the keys, rectified outputs, the blend with a row's own value."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from policies.joined import Outputs, pooled_rest, rectified
from policies.sequences import exactly, sequences
from policies.situations import SITUATIONS, B, D, Situation, applied, run_kernels
from torch import Tensor
from torch.testing import assert_close

from attncc.errors import PlanError
from attncc.ir import (
    Attention,
    Program,
    interpret_program,
    parse_attention,
    parse_program,
    print_attention,
    print_program,
    verify_program,
)
from attncc.ir.program import program_of_node
from attncc.passes.pipeline import parse_pipeline
from attncc.passes.policies import Blend, BlockMeans, Chunks, PooledRest, Rectified
from attncc.passes.policies.hiding import Form, Policy, hide
from attncc.plans.forms import chosen

PREFILL = [s for s in SITUATIONS if s.mask != "documents"]
DECODE = Situation("padded", group=2, n=3, m=40, dynamic=False)
CASES: list[tuple[Policy, Outputs, list[Situation]]] = [
    (PooledRest(8, 4, "fraction", 0.4), pooled_rest(8, 4, "fraction", 0.4), [*PREFILL, DECODE]),
    (PooledRest(4, 8, "count", 2, 0, share="sum"), pooled_rest(4, 8, "count", 2, 0, "sum"), PREFILL[:5]),
    (PooledRest(16, 4, "mass", 0.5), pooled_rest(16, 4, "mass", 0.5), PREFILL[1:6]),
    (Rectified(4, 0.3, 0.6), rectified(4, 0.3, 0.6, 1), [*PREFILL, DECODE]),
    (Rectified(5, 0.2, 0.9, 0), rectified(5, 0.2, 0.9, 0), PREFILL[:6]),
]  # fmt: skip
EVERY = [
    pytest.param(p, rule, s, id=f"{p}-{s}", marks=[pytest.mark.full] if n % 3 else [])
    for p, rule, tried in CASES
    for n, s in enumerate(tried, 2)
]  # fmt: skip
POLICIES = [PooledRest(8, 4, "fraction", 0.3), Rectified(4, 0.3, 0.6)]


def out_of(p: Program, data: dict[str, Tensor], s: Situation) -> Tensor:
    return interpret_program(p, data, s.sizes, compute=torch.float64)[p.outputs[0]]


@pytest.mark.parametrize(("policy", "rule", "s"), EVERY)
def test_the_outputs_of_the_source(policy: Policy, rule: Outputs, s: Situation) -> None:
    data = exactly(s.tensors())
    p = applied(policy, s.attention())
    out = out_of(p, data, s)
    assert not out.isnan().any()
    for b, g, rows, sequence in sequences(data, s):
        start = s.visible(data, b, 0)[2]
        v = data["v"][b, g, start : start + sequence.length]
        heads = slice(g * s.group, (g + 1) * s.group)
        assert_close(out[b, heads][:, rows], rule(sequence, v))
    assert parse_program(print_program(p)) == p


@pytest.mark.parametrize(
    "policy", [PooledRest(8, 4, "fraction", 1.0), Rectified(4, 1.0), Rectified(4, 0.1, 0.0), Blend(0.0)], ids=str
)
def test_a_whole_budget_is_the_exact_attention(policy: Policy) -> None:
    met = 0
    for s in (*PREFILL, replace(PREFILL[1], dynamic=False)):
        if policy.applies(s.attention()) is None:
            data, met = s.tensors(), met + 1
            p = applied(policy, s.attention())
            exact = interpret_program(program_of_node(s.attention()), data, s.sizes)
            assert torch.equal(interpret_program(p, data, s.sizes)[p.outputs[0]], next(iter(exact.values()))), s
    assert met >= 3


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_padding_before_a_sequence_changes_nothing(policy: Policy) -> None:
    short = Situation("padded", group=2, n=30, m=30, padding=(0, 4))
    more = replace(short, n=36, m=36, padding=(6, 10))
    data = short.tensors()
    longer = {x: torch.nn.functional.pad(data[x], (0, 0, 6, 0), value=5.0) for x in "qkv"}
    longer["seen"] = more.tensors()["seen"]
    found = out_of(applied(policy, more.attention()), exactly(longer), more)
    assert_close(found[..., 6:, :], out_of(applied(policy, short.attention()), exactly(data), short))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_sequences_of_a_batch_do_not_see_each_other(policy: Policy) -> None:
    s = Situation("padded", group=2)
    data, p = exactly(s.tensors()), applied(policy, s.attention())
    out = out_of(p, data, s)
    assert torch.equal(out, out_of(p, data, s))
    assert_close(out_of(p, {x: t.flip(0) for x, t in data.items()}, s).flip(0), out)


def test_keys_that_are_alike_are_none_the_worse_for_standing_by_their_mean() -> None:
    """Whatever is dropped: blocks of equal keys and values are exactly what their means stand for."""
    s = Situation("causal", group=2, n=40, m=40)
    data = exactly(s.tensors())
    for x in "kv":
        data[x] = data[x][:, :, ::4].repeat_interleave(4, 2)
    exact = out_of(program_of_node(s.attention()), data, s)
    dropped = out_of(applied(BlockMeans(8, 4, "count", 1), s.attention()), data, s)
    assert (dropped - exact).abs().max() > 0.1
    assert_close(out_of(applied(PooledRest(8, 4, "count", 1), s.attention()), data, s), exact)


def reads(p: Program, data: dict[str, Tensor], s: Situation, name: str) -> Tensor:
    before = [step for step in p.steps if not isinstance(step.node, Attention)]
    at = next(n for n, step in enumerate(before) if step.results == (name,))
    return interpret_program(replace(p, steps=tuple(before[: at + 1]), outputs=(name,)), data, s.sizes)[name]


def test_gradients_are_those_of_the_same_softmax_in_torch() -> None:
    """Those of the means included, through which keys and values that are not visited learn."""
    s = Situation("causal", group=2, n=24, m=24, dynamic=False)
    data = exactly(s.tensors())
    p = applied(PooledRest(8, 4, "fraction", 0.3), s.attention())
    upstream = torch.randn(B, s.heads, s.n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = {x: data[x].clone().requires_grad_() for x in "qkv"}
    found = torch.autograd.grad((out_of(p, data | leaves, s) * upstream).sum(), list(leaves.values()))

    kept, rest = reads(p, data, s, "map"), reads(p, data, s, "rest")
    causal = torch.arange(24) <= torch.arange(24)[:, None]
    kept = kept.repeat_interleave(8, -2).repeat_interleave(4, -1) & causal
    rest = rest.repeat_interleave(8, -2)
    assert rest.any() and (~kept & causal).any()
    q, k, v = leaves["q"], *(leaves[x].repeat_interleave(2, 1) for x in "kv")
    km, vm = (x.unflatten(2, (6, 4)).mean(3) for x in (k, v))
    scores = torch.cat([q @ k.mT, q @ km.mT], -1) * 0.25 + torch.tensor([0.0] * 24 + [4.0] * 6).clamp_min(1.0).log()
    weights = scores.double().masked_fill(~torch.cat([kept, rest], -1), -torch.inf).softmax(-1)
    out = weights @ torch.cat([v, vm], -2)
    assert_close(out_of(p, data, s), out.detach())
    for x, y in zip(found, torch.autograd.grad((out * upstream).sum(), list(leaves.values())), strict=True):
        assert_close(x, y)


@pytest.mark.parametrize(
    ("policy", "s"),
    [
        (POLICIES[0], Situation("padded", group=2)),
        pytest.param(POLICIES[0], DECODE, marks=pytest.mark.full),
        pytest.param(POLICIES[1], Situation("padded", group=2), marks=pytest.mark.full),
        pytest.param(Blend(0.3), Situation("all"), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_kernels_run_both_attentions(policy: Policy, s: Situation) -> None:
    data = s.tensors()
    p = applied(policy, s.attention())
    assert_close(run_kernels(p, data, s).double(), out_of(p, exactly(data), s), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_narrow_types(dtype: str) -> None:
    s = Situation("padded", group=2, n=40, m=40)
    text = print_attention(s.attention()).replace(" f32[", f" {dtype}[").replace("dtype  f32", f"dtype  {dtype}")
    p = verify_program(PooledRest(8, 4, "fraction", 0.3)(program_of_node(parse_attention(text))))
    narrow = {"bf16": torch.bfloat16, "f16": torch.float16}[dtype]
    data = {x: t.to(narrow) if t.is_floating_point() else t for x, t in s.tensors().items()}
    own = interpret_program(p, data, s.sizes)[p.outputs[0]]
    assert own.dtype == narrow
    assert_close(own.double(), out_of(p, exactly(data), s), rtol=0.05, atol=0.02)


def test_one_form_of_some_heads_beside_others() -> None:
    s = Situation("padded", group=2)
    data, whole = exactly(s.tensors()), program_of_node(s.attention())
    mean, chunks = PooledRest(8, 4, "fraction", 0.3), Chunks(10)
    out = out_of(verify_program(hide(whole, Form(mean, (1, 2)), Form(chunks, (3,)))), data, s)
    assert_close(out[:, :1], out_of(whole, data, s)[:, :1])
    assert_close(out[:, 1:3], out_of(applied(mean, s.attention()), data, s)[:, 1:3])
    assert_close(out[:, 3:], out_of(applied(chunks, s.attention()), data, s)[:, 3:])


def test_a_blend_is_of_the_rows_own_value() -> None:
    s = Situation("padded both ways", group=2)
    data, whole = exactly(s.tensors()), program_of_node(s.attention())
    exact, own = out_of(whole, data, s), data["v"].repeat_interleave(2, 1)
    assert_close(out_of(applied(Blend(0.25), s.attention()), data, s), 0.75 * exact + 0.25 * own)
    some = out_of(verify_program(hide(whole, Form(Blend(), (2,)))), data, s)
    assert_close(some[:, [0, 1, 3]], exact[:, [0, 1, 3]])
    assert_close(some[:, 2], own[:, 2])


@pytest.mark.parametrize(
    ("policy", "a", "code"),
    [
        (PooledRest(), Situation("documents").attention(), "policy-by-pair"),
        (Rectified(), Situation("documents").attention(), "policy-by-pair"),
        (Blend(), Situation("causal").attention(), "policy-not-aligned"),
        (Blend(), Situation("all", n=10, m=20, dynamic=False).attention(), "policy-not-aligned"),
        (PooledRest(), replace(Situation("causal").attention(), normalizer="sigmoid"), "policy-no-softmax"),
        (PooledRest(), replace(Situation("causal").attention(), outputs=("out", "lse")), "policy-sums-asked"),
        (
            PooledRest(),
            parse_attention(print_attention(Situation("causal").attention()).replace("s * 0.25", "s - float(i - j)")),
            "policy-score-by-pair",
        ),
    ],
    ids=["documents", "documents-rectified", "cache", "cross", "sigmoid", "sums", "bias"],
)
def test_where_a_rule_means_nothing(policy: Policy, a: Attention, code: str) -> None:
    reason = policy.applies(a)
    assert reason is not None and reason.code == code
    p = program_of_node(a)
    assert hide(p, Form(policy)) is p


def test_an_effect_is_no_candidate() -> None:
    with pytest.raises(PlanError, match="an effect, not an approximation"):
        chosen(["blend{u=0.5}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blend{u=2}", "u is from 0 to 1"), ("rectified{block=0}", "at least 1 token"),
        ("rectified{mass=0}", "mass is above 0"), ("pooled-rest{take=most}", "take is one of"),
    ],
)  # fmt: skip
def test_parameters_that_mean_nothing(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_pipeline(text)
