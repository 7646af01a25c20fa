"""What is added to scores masks where it is as low as a mask's fill: the keys are left out, the numbers stay."""

from __future__ import annotations

import pytest
import torch
from cpp_kernels.build import check, host_isas
from masks.bounds import blocks, tiled

from attncc.ir import Attention, parse_attention, print_attention, verify
from attncc.passes.bounds.simulate import keys_of, simulate
from attncc.passes.tables.spans import FILL, spanned, tables

N, M = 192, 256
LOWEST = torch.finfo(torch.float32).min


def attention(score: str, rows: int = N) -> Attention:
    return verify(
        parse_attention(f"""attention
batch  b = 2, h = 2
axis   i = {rows}, j = {M}, d = 16, e = 16
tensor q: f32[2, 2, {rows}, 16]
tensor k: f32[2, 2, {M}, 16]
tensor v: f32[2, 2, {M}, 16]
tensor bias: f32[2, 1, {rows}, {M}]
tensor slope: f32[2, {M}]
q      q[b, h, i, d]
k      k[b, h, j, d]
v      v[b, h, j, e]
score  {score}
mask   True
norm   softmax
empty  zero
weight w
give   out
dtype  f32
""")
    )


def data(rows: int, fill: float) -> dict[str, torch.Tensor]:
    """A band, rows without any key, and, in the second batch point, two fills in a row without any."""
    g = torch.Generator().manual_seed(0)
    i, j = torch.arange(M - rows, M)[:, None], torch.arange(M)
    bias = torch.where((i - j).abs() < 24, 0.0, fill).expand(2, 1, rows, M).clone()
    bias[:, :, rows // 3 : rows // 3 + 5] = fill
    bias[1, :, rows // 2] = LOWEST
    bias[1, :, rows // 2, 3:9] = fill
    operands = {n: torch.randn(2, 2, rows if n == "q" else M, 16, generator=g) for n in "qkv"}
    return operands | {"bias": bias, "slope": torch.randn(2, M, generator=g)}


@pytest.mark.parametrize("fill", [LOWEST, -1e30, float("-inf")])
@pytest.mark.parametrize(
    ("score", "rows"),
    [("s * 0.25 + bias[b, 0, i, j]", N), ("s * 0.25 + bias[b, 0, i, j]", 1),
     ("bias[b, 0, i, j] + (tanh(s) + slope[h, j])", N)],
)  # fmt: skip
def test_numbers_and_keys(score: str, rows: int, fill: float) -> None:
    a, tensors = attention(score, rows), data(rows, fill)
    if fill == float("-inf"):
        tensors["bias"][..., :2] = LOWEST  # of a row of -inf alone nothing but NaN comes
    found = spanned(a)
    made = tensors | tables(found, tensors)
    check(found.attention, made, [], host_isas()[0], found.bounds)
    low = tensors["bias"][:, 0] <= FILL
    seen = ~low | low.all(-1, keepdim=True)
    tiles = simulate(found.attention, found.bounds, (), made, 64)
    visited = keys_of(tiles.visit, tiles.shape, M)
    wanted = tiled(seen, 64, "any")
    assert torch.equal(blocks(visited, 16), blocks(wanted, 16)[:, None].expand_as(blocks(visited, 16)))
    assert found.bounds.hidden == ()


def test_nan_is_no_fill() -> None:
    """Among keys that are left out, it has its row NaN, as in eager."""
    a, tensors = attention("s * 0.25 + bias[b, 0, i, j]"), data(N, LOWEST)
    tensors["bias"][0, 0, 7, 200], tensors["bias"][1, 0, 100, 0] = float("nan"), float("nan")
    found = spanned(a)
    out = check(found.attention, tensors | tables(found, tensors), [], host_isas()[0], found.bounds)["out"]
    assert out.isnan().all(-1).nonzero().tolist() == [[b, h, i] for b, i in ((0, 7), (1, 100)) for h in (0, 1)]


def test_a_mask_or_another_normaliser_is_left_alone() -> None:
    a = attention("s + bias[b, 0, i, j]")
    assert spanned(a).maps
    for other in ("score  bias[b, 0, i, j] * s", "norm   sigmoid", "mask   j <= i", "weight w * 2.0 + 1.0"):
        key = other.split()[0]
        text = "\n".join(other if line.startswith(key) else line for line in print_attention(a).splitlines())
        assert not spanned(verify(parse_attention(text))).maps

