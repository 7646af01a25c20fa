"""Derivatives of expressions are those of torch's autograd, operation by operation."""

from __future__ import annotations

import pytest
import torch

from attncc.ir import S, parse_attention
from attncc.ir.build import TRUE
from attncc.ir.evaluate import Evaluator
from attncc.ir.terms import Expr, loads
from attncc.passes.gradient import NotDifferentiable, derivative, gradient_of

TEXT = """attention
size   N
batch  h = 2
axis   i = N, j = N, d = 4, e = 4
tensor q: f64[2, N, 4]
tensor k: f64[2, N, 4]
tensor v: f64[2, N, 4]
tensor x: f64[2]
tensor row: f64[N]
tensor key: f64[N]
tensor table: f64[2, 9]
tensor dense: f64[N, N]
tensor pairs: f64[2, N, N]
q      q[h, i, d]
k      k[h, j, d]
v      v[h, j, e]
score  {score}
mask   True
norm   {norm}
empty  zero
weight {weight}
give   out, lse
dtype  f64
"""


def score_of(text: str) -> Expr:
    return parse_attention(TEXT.format(score=text, norm="softmax", weight="w")).score


OPERATIONS = [
    "s + 2.0", "2.0 - s", "s * s", "1.0 / (s + 3.0)", "-s", "abs(s)", "exp(s)", "log(s + 5.0)", "log1p(abs(s))",
    "tanh(s * 0.5) * 3.0", "sigmoid(s)", "sqrt(s + 5.0)", "rsqrt(s + 5.0)", "erf(s)", "sin(s)", "cos(s)",
    "pow(s + 4.0, 3.0)", "floor(s) * s", "min(s, 0.5)", "max(s, x[h])", "minfirst(s, 0.0)", "maxfirst(0.0, s)",
    "where(s < 0.25, s * s, s)", "stop(s) * s", "bf16(s) * 2.0", "s * x[h] + x[h] / (s + 4.0)",
]  # fmt: skip


@pytest.mark.parametrize("text", OPERATIONS)
def test_each_operation(text: str) -> None:
    x = score_of(text)
    # ties at 0 and at 0.5 included
    s = torch.tensor([-1.5, -0.75, 0.0, 0.25, 0.5, 1.25], dtype=torch.float64).requires_grad_()
    given = torch.tensor([0.5, 0.5], dtype=torch.float64).requires_grad_()

    def evaluated() -> Evaluator:
        index = {n: torch.zeros(6, dtype=torch.int64) for n in _indices(x)}
        return Evaluator({S: s, **index}, {"x": given}, torch.float64)

    value = evaluated()(x)
    for leaf, source in ((S, s), *((n, given) for n in loads(x))):
        (want,) = torch.autograd.grad(value.sum(), source, retain_graph=True, allow_unused=True)
        found = derivative(x, leaf)
        got = torch.zeros(6, dtype=torch.float64) if found is None else evaluated()(found).detach().expand(6)
        got = got if source is s else torch.stack([got.sum(), torch.zeros((), dtype=torch.float64)])
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want)


def _indices(x: Expr) -> list[Expr]:
    return [n for load in loads(x) for n in load.index]


def test_an_operation_without_a_rule_is_named() -> None:
    with pytest.raises(NotDifferentiable, match="pow"):
        derivative(score_of("pow(abs(s) + 1.0, s)"), S)


@pytest.mark.parametrize(
    ("score", "over"),
    [
        ("s * x[h]", ""), ("s + row[i]", "i"), ("s + key[j]", "j"),
        ("s + table[h, max(min(i - j, 4), -4) + 4]", "j - i"), ("s + pairs[h, i, j]", "i, j"),
    ],
)  # fmt: skip
def test_what_the_gradient_of_a_load_is_summed_along(score: str, over: str) -> None:
    a = parse_attention(TEXT.format(score=score, norm="softmax", weight="w"))
    g = gradient_of(a, ["x", "row", "key", "table", "pairs"])
    assert not isinstance(g, str)
    assert [x.over for x in g.loads] == [over]
    assert g.operands == () and g.attention.mask is TRUE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"norm": "sigmoid"}, "sigmoid"), ({"weight": "w * w"}, "not linear"),
        ({"weight": "w * x[h]"}, "which the weight"),
        ({"score": "s + dense[i, (i + j) // 2]"}, "no simple way"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_said(change: dict[str, str], reason: str) -> None:
    text = TEXT.format(**({"score": "s", "norm": "softmax", "weight": "w"} | change))
    if "sigmoid" in reason:
        text = text.replace("give   out, lse", "give   out")
    found = gradient_of(parse_attention(text), ["q", "x", "dense"])
    assert isinstance(found, str) and reason in found
