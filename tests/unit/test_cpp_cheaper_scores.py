"""What becomes of score expressions before they are printed: constants folded, tables for what the distance gives."""

from __future__ import annotations

import pytest
import torch
from attentions.dense import attention

from attncc.codegen.cpp.diagonals import Diagonals
from attncc.codegen.cpp.fold import folded
from attncc.ir import Expr, Index, Load, S, Size
from attncc.ir.text import parse_expr

NAMES = {"i": Index("i"), "j": Index("j"), "h": Index("h"), "N": Size("N"), "s": S}
PLAIN = attention(*[torch.zeros(1, 1, 4, 8)] * 3)


def expression(text: str) -> Expr:
    return parse_expr(text, NAMES, {"t": "float", "u": "float"})


@pytest.mark.parametrize(
    ("before", "after"),
    [("s / 50.0", "s * 0.02"), ("s * 0.125 / 4.0", "s * 0.03125"), ("tanh(s / 2.0) * 2.0", "tanh(s * 0.5) * 2.0"),
     ("s / t[i]", "s / t[i]"), ("s / 1e-40", "s / 1e-40"),
     ("where(s / 3.0 < 1.0, s / 2.0, s)", "where(s / 3.0 < 1.0, s * 0.5, s)")],
)  # fmt: skip
def test_divisions_by_constants_become_products(before: str, after: str) -> None:
    assert folded(expression(before)) is expression(after)


@pytest.mark.parametrize(
    "text", ["i - j", "t[min(max(j - i + 8, 0), 16)]", "exp(float(2 * i - 2 * j) * 0.5)", "t[j - i + N - 1]",
             "where(j <= i, u[h, i - j], 0.0)"],
)  # fmt: skip
def test_what_the_distance_gives(text: str) -> None:
    assert Diagonals(PLAIN).by_distance(expression(text))


@pytest.mark.parametrize(
    "text", ["i", "i + j", "2 * i - j", "s * float(i - j)", "t[i // 2 - j // 2]", "t[j] - t[i]", "i * j - j * i + i"]
)
def test_what_it_does_not(text: str) -> None:
    assert not Diagonals(PLAIN).by_distance(expression(text))


def test_a_table_has_to_save_something() -> None:
    tables = Diagonals(PLAIN)
    assert tables.place(expression("float(i - j)")) is None
    x = expression("t[i - j] * 2.0")
    assert isinstance(x.children[0], Load)
    assert tables.place(x) == 0 and tables.place(x) == 0 and tables.place(expression("u[h, i - j]")) == 1
    assert tables.place(expression("t[h] * 2.0")) is None
