"""Integers of masks in narrow dtypes: eager arithmetic wraps, and what may wrap is loaded from the model's tensor."""

from collections.abc import Callable

import pytest
import torch
from gradients.compared import compared, inputs

Q = torch.Tensor
N = 12
NARROW = (torch.uint8, torch.int8, torch.int16, torch.int32)

#: A mask made of one row of integers. Each is wrong where its arithmetic is done in wide integers.
FORMULAS: dict[str, Callable[[Q], Q]] = {
    "sub": lambda d: d[:, None] - d > 3,
    "add": lambda d: d[:, None] + d > 3,
    "mul": lambda d: d[:, None] * d > 3,
    "neg": lambda d: -d[:, None] > d,
    "abs": lambda d: d[:, None].abs() > d,
    "rsub": lambda d: 3 - d[:, None] > d,
    "alpha": lambda d: torch.sub(d[:, None], d, alpha=3) > 5,
    "square": lambda d: torch.square(d)[:, None] > d,
    "power": lambda d: d[:, None] ** 2 > d,
    "number": lambda d: d[:, None] + 300 > d,
    "no dimensions": lambda d: d[:, None] + torch.tensor(300) > d,
    "where": lambda d: torch.where(d[:, None] > d, d, -1) > 9,
    "difference of sums": lambda d: (d[:, None] + 7) - (d + 200) > 3,
    "maximum": lambda d: torch.maximum(d[:, None] - d, d) > 3,
    "in place": lambda d: d[:, None].expand(N, N).clone().sub_(d) > 3,
    "shift": lambda d: d[:, None] << 3 > d,
    "sum": lambda d: d.cumsum(0, dtype=d.dtype)[:, None] > d,
    "quotient": lambda d: torch.div(d[:, None] - d, 2, rounding_mode="floor") > 3,
}


def masked(formula: Callable[[Q], Q]) -> Callable[..., Q]:
    return lambda q, k, v, d: (q @ k.mT).masked_fill(formula(d), -1e9).softmax(-1) @ v


def operands() -> list[Q]:
    return inputs((2, N, 8), (2, N, 8), (2, N, 8), grad=False)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_arithmetic_wraps(name: str, dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    row = torch.cat([torch.arange(6) + info.max - 5, torch.arange(6) + info.min]).to(dtype)
    found = compared(masked(FORMULAS[name]), *operands(), row)
    assert found.statuses == ["fused"]
    assert found.output < 1e-12


@pytest.mark.parametrize("dtype", (*NARROW, torch.int64), ids=str)
def test_a_number_that_the_dtype_cannot_hold(dtype: torch.dtype) -> None:
    """Comparisons cast a number too: 300 is 44 beside `uint8`."""
    row = torch.arange(40, 40 + N).to(dtype)
    found = compared(masked(lambda d: (d[:, None] > 300) | (d == 300) | (d == -212)), *operands(), row)
    assert found.output < 1e-12


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_conversion_cuts(dtype: torch.dtype) -> None:
    row = torch.arange(N) * (torch.iinfo(dtype).max // 3)
    for formula in (lambda d: d.to(dtype)[:, None] > 3, lambda d: (d * 1.5).to(torch.int64).to(dtype)[:, None] > 3):
        assert compared(masked(formula), *operands(), row).output < 1e-12


def ir_of(formula: Callable[[Q], Q], *more: Q) -> str:
    (site,) = compared(masked(formula), *operands(), *more).sites
    assert site.ir is not None
    return site.ir


@pytest.mark.parametrize("dtype", (torch.int8, torch.int16, torch.int32), ids=str)
def test_positions_that_fit_are_written_out(dtype: torch.dtype) -> None:
    place = lambda d: torch.arange(N, dtype=dtype)  # noqa: E731 - a formula like the others
    text = ir_of(lambda d: place(d)[:, None] - place(d) > 3, torch.zeros(1))
    assert "mask   i <= j + 3" in text
    text = ir_of(lambda d: (place(d)[:, None] - place(d)).abs() > 3, torch.zeros(1))
    assert "mask   abs(i - j) <= 3" in text


def test_narrow_data_that_is_only_compared_is_written_out() -> None:
    for dtype in NARROW:
        assert "[i] == " in (text := ir_of(lambda d: d[:, None] != d, torch.arange(N, dtype=dtype))) or "t0[j]" in text


def test_bytes_widened_first_are_written_out() -> None:
    text = ir_of(lambda d: d.long()[:, None] - d.long() > 3, torch.arange(N, dtype=torch.uint8))
    assert "u8[12, 12]" not in text


def test_squares_of_wide_integers_are_exact() -> None:
    row = torch.arange(N) * 4099 + 1
    formula = lambda d: torch.square(d[:, None]) > d * d - 1 + (d[:, None] ** 2 - d[:, None] * d[:, None])  # noqa: E731
    assert compared(masked(formula), *operands(), row).output < 1e-12
