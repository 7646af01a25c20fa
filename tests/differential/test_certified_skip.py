"""Certified skip: the weights that a kernel leaves out sum to at most eps in every row, whatever the scores are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cpp_kernels.build import build, host_isas
from policies.dropping import GROUP, MOST, SHAPES, B, H, Kept, attention, kept, tensors
from policies.situations import Situation
from torch import Tensor
from torch.testing import assert_close

from attncc.ir import Attention, interpret, parse_attention, print_attention
from attncc.ir.build import const
from attncc.ir.evaluate import DTYPE_OF
from attncc.ir.program import program_of_node
from attncc.ir.reasons import because
from attncc.ir.verify import VerifyError, verify
from attncc.kernels.first_use import wrong
from attncc.passes.pipeline import Pipeline, parse_pipeline
from attncc.passes.policies import CertifiedSkip, Streaming
from attncc.passes.policies.hiding import Form, hide

EPS = 0.02
#: Rows and keys of a call: prefills, a part of one, decoding of one row and of a few.
CALLS = [(300, 300), (40, 310), (1, 320), (3, 250)]
DTYPES = "f32", "bf16"
KERNELS = [
    ("f32", host_isas()[0]), ("bf16", host_isas()[0]),
    *(pytest.param(dtype, isa, marks=pytest.mark.full) for isa in host_isas(every=True)[1:] for dtype in DTYPES),
]  # fmt: skip


def run(a: Attention, data: dict[str, Tensor], isa: str) -> Tensor:
    n, m = data["q"].shape[-2], data["k"].shape[-2]
    out = torch.full((B, H, n, MOST), float("nan"), dtype=DTYPE_OF[a.dtype])
    build(a, isa)([data[t.name] for t in a.tensors], [n, m], [out])
    return out


def check(a: Attention, data: dict[str, Tensor], isa: str, eps: float = EPS, sink: Tensor | None = None) -> Kept:
    found = kept(data, run(a, data, isa), sink)
    assert float(found.mass.max()) <= eps
    assert found.off <= (1e-4 if a.dtype == "f32" else 2e-2)
    return found


@pytest.mark.parametrize(("dtype", "isa"), KERNELS)
def test_what_is_left_out_weighs_at_most_eps(dtype: str, isa: str) -> None:
    a = attention(str(EPS), dtype)
    left: dict[str, float] = {}
    for shape in SHAPES:
        for seed, (n, m) in enumerate(CALLS):
            found = check(a, tensors(shape, n, m, DTYPE_OF[dtype], seed), isa)
            left[shape] = max(left.get(shape, 0.0), found.share)
    # It is of use where the weights of neighbouring rows gather, and leaves out nothing where all weigh alike.
    assert left["even"] == 0
    useful = ("falling", "first") if dtype == "bf16" else ("falling", "first", "climbing", "needle")
    assert all(left[shape] > 0.2 for shape in useful), left


def test_any_scores() -> None:
    """Random scales of scores and random calls, the kernel of the test above."""
    a, isa = attention(str(EPS)), host_isas()[0]
    g = torch.Generator().manual_seed(7)
    for seed in range(40):
        n = int(torch.randint(1, 60, (), generator=g))
        m = int(torch.randint(n, MOST + 1, (), generator=g))
        data = tensors("peaked", n, m, torch.float32, seed)
        scale = 10 ** (torch.rand((), generator=g) * 3 - 2)
        mixed = torch.randn(m, generator=g).cumsum(0)[torch.randperm(m, generator=g) if seed % 2 else slice(None)]
        data["q"] = data["q"] * scale
        data["k"][..., 0] = mixed
        check(a, data, isa)


@pytest.mark.parametrize("isa", host_isas()[:1])
def test_heads_with_shares_of_their_own_padding_and_sinks(isa: str) -> None:
    a = attention("share[h]", padded=True, sink=True)
    share, sink = torch.tensor([0.0, 0.05, 0.3, 0.001]), torch.tensor([-2.0, 1.0, 0.0, 3.0])
    for shape in ("falling", "first", "needle"):
        data = tensors(shape, 300, 300, torch.float32)
        data |= {"share": share, "sink": sink, "seen": torch.arange(300) >= torch.tensor([[0], [70]])}
        found = kept(data, run(a, data, isa), sink)
        worst = found.mass.amax((0, 2))
        assert bool((worst <= share.clamp(min=1e-9)).all()), worst
        assert found.off <= 1e-4 and found.share > 0.02
        other = {x: y.flip(0) if y.shape[0] == B and y.dim() > 1 else y for x, y in data.items()}
        assert torch.equal(run(a, other, isa), run(a, data, isa).flip(0)), "sequences do not see each other"


def test_what_is_no_number_is_not_left_out() -> None:
    a, isa = attention(str(EPS)), host_isas()[0]
    for n, m in ((300, 300), (2, 300)):
        data = tensors("first", n, m, torch.float32)
        data["k"][0, 0, 150, 3] = float("nan")
        found = run(a, data, isa)
        sees = torch.arange(n) + (m - n) >= 150
        assert bool(found[0, :GROUP][:, sees].isnan().any(-1).all())
        assert not found[1].isnan().any() and not found[0, GROUP:].isnan().any()


def test_the_same_call_gives_the_same_bits() -> None:
    a, isa = attention(str(EPS)), host_isas()[0]
    data = tensors("peaked", 300, 300, torch.float32)
    assert torch.equal(run(a, data, isa), run(a, data, isa))


def test_a_new_kernel_is_held_against_the_exact_form() -> None:
    """A kernel that leaves out what it may is right, one that gives zeros is not."""
    a = parse_attention(
        print_attention(attention(str(EPS))).replace("size   n, m\n", "").replace("n, ", "48, ").replace("(m - n)", "0")
        .replace("= n, j = m", "= 48, j = 48").replace("m, ", "48, ")
    )  # fmt: skip
    kernel = build(a, host_isas()[0])
    assert wrong(kernel, a) is None
    assert wrong(lambda tensors, sizes, outputs: [out.zero_() for out in outputs] and None, a) is not None


def test_a_plan_for_some_heads() -> None:
    a = Situation("causal").attention()
    assert parse_pipeline("certified-skip{eps=0.05}") == (CertifiedSkip(0.05),)
    whole = Pipeline((CertifiedSkip(0.05),)).run(program_of_node(a)).steps[-1].node
    assert whole == replace(a, drop=const(0.05)) and parse_attention(print_attention(whole)) == whole
    some = hide(program_of_node(a), Form(CertifiedSkip(0.05), (1, 2))).steps[-1].node
    assert isinstance(some, Attention) and some.mask == a.mask and some.drop is not None
    both = hide(program_of_node(a), Form(CertifiedSkip(0.05), (1,)), Form(Streaming(3, 7), (2,))).steps[-1].node
    assert isinstance(both, Attention) and both.drop == some.drop and both.mask != a.mask


def test_sums_and_gradients_are_exact() -> None:
    """Where the sums of the weights are kept, as for a backward pass, nothing is left out."""
    a = attention(str(EPS))
    assert a.spare is not None and replace(a, outputs=("out", "lse")).spare is None
    data = tensors("first", 20, 40, torch.float32)
    given = {x: y.clone().requires_grad_() for x, y in data.items()}
    (out,) = torch.ops.attncc.attention(list(given.values()), [20, 40], print_attention(a))
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((out * weight).sum(), list(given.values()))
    wide = {x: y.double().requires_grad_() for x, y in data.items()}
    exact = interpret(a, wide, [20, 40], compute=torch.float64)["out"]
    wanted = torch.autograd.grad((exact * weight).sum(), list(wide.values()))
    for x, y in zip(found, wanted, strict=True):
        assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


def test_where_it_means_nothing() -> None:
    a = Situation("causal").attention()
    assert CertifiedSkip().applies(replace(a, normalizer="sigmoid")) == because("policy-no-softmax")
    assert CertifiedSkip().applies(replace(a, outputs=("out", "lse"))) == because("policy-sums-asked")
    with pytest.raises(VerifyError, match="those of a softmax"):
        verify(replace(a, normalizer="relu", drop=const(0.1)))
    for eps in (0.0, 1.0):
        with pytest.raises(ValueError, match="eps is between 0 and 1"):
            CertifiedSkip(eps)
