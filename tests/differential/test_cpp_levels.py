"""C++ kernels where scores leave the range that a block expects, and over many keys: on every unit for bfloat16."""

from __future__ import annotations

import pytest
import torch
from cpp_kernels.build import check, host_isas, run
from cpp_kernels.cases import case, tensors_of

from attncc.ir import parse_attention

ISAS = [x for x in host_isas(every=True) if x in ("amx", "avx512bf16", "avx512", "avx2")]
PAIRS = [x for x in ISAS if x in ("amx", "avx512bf16")] or ISAS[:1]


@pytest.mark.parametrize("isa", PAIRS)
@pytest.mark.parametrize("reach", [0.5, 8.0, 3e4])
def test_a_capped_score_small_and_large(isa: str, reach: float) -> None:
    """tanh has a short form for small arguments; a block that holds larger ones is worked out again."""
    a = case("softcap", "bf16")
    t = tensors_of(a, 200, 200)
    t["k"][:, :, 150:] *= reach
    check(a, t, [200, 200], isa)


@pytest.mark.parametrize("isa", ISAS[:1] + PAIRS[1:])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("slope", [0.02, 1.0, 30.0])
def test_scores_that_climb_to_the_diagonal(isa: str, dtype: str, slope: float) -> None:
    """Tables of distances follow tiles and blocks over more rows and keys than they hold."""
    a = case("alibi", dtype, lse=True)
    t = tensors_of(a, 900, 900)
    t["slope"] = torch.full_like(t["slope"], slope)
    check(a, t, [900, 900], isa)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_lowest_numbers_in_a_table_of_distances(dtype: str) -> None:
    """They stand for minus infinity and stay finite in powers of two, so a row of nothing else is a mean."""
    a = case("relative table", dtype)
    t = tensors_of(a, 300, 300)
    t["table"][:, 8:] = torch.finfo(torch.float32).min
    t["table"][1] = torch.finfo(torch.float32).min
    check(a, t, [300, 300], ISAS[0])


LONG = """attention
size   N, M
batch  b = 1
axis   i = N, j = M, d = 64, e = 64
tensor q: {dtype}[1, N, 64]
tensor k: {dtype}[1, M, 64]
tensor v: {dtype}[1, M, 64]
q      q[b, i, d]
k      k[b, j, d]
v      v[b, j, e]
score  s * 0.125
mask   True
norm   softmax
empty  zero
weight w
give   out
dtype  {dtype}
"""


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype, most", [("f32", 2.0), ("bf16", 1.1)])
def test_errors_over_many_keys_are_those_of_torch(isa: str, dtype: str, most: float) -> None:
    """Root of the mean square against float64: float32 within twice SDPA's, bfloat16 within a tenth of that of SDPA's
    fused kernel, whose weights round to bfloat16 too (three dimensions would not reach it)."""
    a = parse_attention(LONG.format(dtype=dtype))
    r = torch.Generator().manual_seed(0)
    kind = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    q, k, v = (torch.randn(1, n, 64, generator=r).to(kind) for n in (128, 16384, 16384))
    ours = run(a, {"q": q, "k": k, "v": v}, [128, 16384], isa)["out"]
    attend = torch.nn.functional.scaled_dot_product_attention
    exact, torchs = attend(q.double(), k.double(), v.double()), attend(q[None], k[None], v[None])[0]
    error, theirs = ((x.double() - exact).square().mean().sqrt() for x in (ours, torchs))
    assert error <= most * theirs, f"{error:.2e}, SDPA's {theirs:.2e}"
