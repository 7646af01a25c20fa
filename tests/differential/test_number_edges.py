"""docs/numbers.md, held by C++ kernels of every instruction set: scores and values of every size, infinities, NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from cpp_kernels.cases import FORMS, case, tensors_of
from cpp_kernels.stand_ins import run_as, runnable
from edge_numbers.edges import edges_of, hold
from parameters.thinned import thinned

from attncc.codegen.cpp.isa import ISAS

#: Many rows; few, whose lanes run along keys; and keys enough that two threads share them.
SHAPES = ((40, 150), (3, 1700))


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def held(form: str, dtype: str, isa: str, d: int = 32, groups: int = 2) -> None:
    if not runnable(isa):
        pytest.skip(f"nothing here runs {isa}")
    a = case(form, dtype, lse=FORMS[form].get("norm", "softmax") == "softmax", d=d, e=d, groups=groups)
    for n, m in SHAPES:
        for name, edge in edges_of(a).items():
            t = tensors_of(a, n, m)
            edge(t, torch.Generator().manual_seed(1))
            hold(a, t, [n, m], run_as(a, t, [n, m], isa), f"{name}, {form}, {dtype}, {isa}, {n} x {m}")


@pytest.mark.parametrize(
    ("form", "dtype", "isa"),
    [("dense", "f32", "avx512"), ("causal", "bf16", "avx512bf16"), ("bias", "f32", "avx2"), ("window", "f16", "avx2"),
     ("padding, eager's mean", "f64", "avx512"), ("sharpened", "f32", "neon"), ("dense", "bf16", "amx")],
)  # fmt: skip
def test_edges(form: str, dtype: str, isa: str) -> None:
    held(form, dtype, isa)


DTYPES = ("f32", "bf16", "f16", "f64")
WIDTHS = ((4, 2), (17, 1), (64, 4), (96, 2), (128, 4), (256, 1))


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_edges_of_every_form(form: str, dtype: str) -> None:
    """Each instruction set in turn, so that every two of the three meet."""
    held(form, dtype, ISAS[(list(FORMS).index(form) + 2 * DTYPES.index(dtype)) % len(ISAS)])


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("width", WIDTHS)
def test_edges_of_head_sizes_and_groups(width: tuple[int, int], dtype: str) -> None:
    for form in ("dense", "causal"):
        held(form, dtype, ISAS[(WIDTHS.index(width) + 2 * DTYPES.index(dtype)) % len(ISAS)], *width)


@pytest.mark.parametrize("isa", ["avx2", "neon"])
@pytest.mark.parametrize("payload", [0x7FC00001, 0x7FFFFFFF, -1])
def test_every_nan_stays_one(payload: int, isa: str) -> None:
    """Its low bits are data like any other to what works on the bits of floats."""
    if not runnable(isa):
        pytest.skip(f"nothing here runs {isa}")
    a = case("bias", lse=True)
    t = tensors_of(a, 20, 40)
    t["bias"][1, 5, 7] = torch.tensor(payload, dtype=torch.int64).to(torch.int32).view(torch.float32)
    out = run_as(a, t, [20, 40], isa)["out"]
    assert out.isnan().any(-1).nonzero().tolist() == [[0, 0, 1, 5], [1, 0, 1, 5]]


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT).softmax(-1) @ v


def biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * 0.25 + bias).softmax(-1) @ v


def hidden(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * 0.25).masked_fill(bias < 0, -1e10).softmax(-1) @ v


@pytest.mark.parametrize(("model", "size"), thinned([plain, biased, hidden], [1e30, 1e4, 1.0]))
def test_models_and_their_gradients(model: Callable[..., torch.Tensor], size: float) -> None:
    """Scores of a size, an added -1e9 throughout some rows and on half of others, and one pair that is NaN."""
    r = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 70, 16, generator=r) * size**0.5 for _ in "qk")
    v = torch.randn(1, 2, 70, 16, generator=r)
    bias = torch.where(torch.rand(70, 70, generator=r) < 0.5, -1e9, 0.0)
    bias[:5], bias[9, 3] = -1e9, math.nan
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="attncc", options={"measure": False, "inductor": False})
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = compiled(*leaves, bias)
    exact = model(*(x.double() for x in (q, k, v, bias)))
    eager_leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    eager = model(*eager_leaves, bias)
    assert torch.equal(out.isnan(), eager.isnan())
    fine = ~eager.isnan()
    if size < 1e30:  # beyond, one score is all, but which of two that are close is up to how they are summed
        assert (out - exact)[fine].abs().max() <= 4 * (eager - exact)[fine].abs().max() + 1e-5
    (out * fine).nan_to_num().sum().backward()
    (eager * fine).nan_to_num().sum().backward()
    assert all(x.grad is not None for x in leaves)
    for x, y in zip(leaves, eager_leaves, strict=True):
        assert x.grad is not None and y.grad is not None
        assert x.grad[y.grad.isfinite()].isfinite().all()
