"""The plain-torch form gives what the interpreter gives, forward and backward, however it is cut into blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_ir.programs import Program, programs

from attncc.codegen.torch_form import is_plain, run_blocked
from attncc.ir import Attention, interpret, parse_attention
from attncc.ir.evaluate import DTYPE_OF, Evaluator

many = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def agree(a: Attention, got: torch.Tensor, want: torch.Tensor, eager: torch.Tensor) -> None:
    """`got` is as near to the float64 result as the interpreter in the attention's own types is, within a few roundings
    of the output type."""
    got, eager = got.double(), eager.double()
    assert torch.equal(got.isnan(), eager.isnan())
    assert torch.equal(got.isinf(), eager.isinf())
    scale = want.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if want.numel() else 0.0
    unit = max(torch.finfo(DTYPE_OF[a.dtype]).eps, torch.finfo(DTYPE_OF[a.compute_dtype]).eps)
    error = (got - want).nan_to_num(0.0, 0.0, 0.0).abs().max().item() if want.numel() else 0.0
    own = (eager - want).nan_to_num(0.0, 0.0, 0.0).abs().max().item() if want.numel() else 0.0
    assert error <= 4 * own + 4 * unit * scale


@many
@given(programs(), st.sampled_from([None, 1, 64, 300]))
def test_blocks_equal_the_interpreter(program: Program, budget: int | None) -> None:
    a, tensors, sizes = program
    want = interpret(a, tensors, sizes, compute=torch.float64)
    eager = interpret(a, tensors, sizes)
    got = run_blocked(a, list(tensors.values()), sizes, budget=budget)
    assert len(got) == len(a.outputs)
    for name, value in zip(a.outputs, got, strict=True):
        assert value.dtype == eager[name].dtype and value.shape == eager[name].shape
        agree(a, value, want[name], eager[name])


@settings(many, max_examples=80)
@given(programs(dtypes=("f64",), longest=12, largest_head=6), st.sampled_from([None, 64]))
def test_gradients_equal_the_interpreters(program: Program, budget: int | None) -> None:
    a, tensors, sizes = program
    floats = {n: t.detach().clone().requires_grad_() for n, t in tensors.items() if t.dtype == torch.float64}
    every = {**tensors, **floats}
    random = torch.Generator().manual_seed(7)

    def gradients(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        seeds = [torch.randn(o.shape, generator=random.manual_seed(n), dtype=torch.float64).to(o.dtype)
                 for n, o in enumerate(outputs)]  # fmt: skip
        # an output that is infinite or NaN, or depends on nothing, carries no gradient to compare
        kept = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad and o.isfinite().all()]
        if not kept:
            return []
        outs, seeds = zip(*kept, strict=True)
        got = torch.autograd.grad(outs, list(floats.values()), seeds, allow_unused=True, materialize_grads=True)
        return list(got)

    want = gradients(list(interpret(a, every, sizes).values()))
    got = gradients(run_blocked(a, list(every.values()), sizes, budget=budget))
    assert len(got) == len(want)
    # float32 loads round at 1e-7 of what enters the scores; everything else is float64
    unit = torch.finfo(torch.float64).eps if a.dtype == "f64" else torch.finfo(DTYPE_OF[a.dtype]).eps
    for g, w in zip(got, want, strict=True):
        assert (g - w).abs().nan_to_num(0.0).max() <= 1e3 * unit * (1 + w.abs().nan_to_num(0.0).max())


PLAIN = """attention
size   B, N, M
batch  b = B, hk = 2, g = 3
axis   i = N, j = M, d = 16, e = {e}
tensor q: {dtype}[B, N, 6, 16]
tensor k: {dtype}[B, 2, M, 16]
tensor v: {dtype}[B, 2, M, {e}]
q      q[b, i, hk * 3 + g, d]
k      k[b, hk, j, d]
v      v[b, hk, j, e]
score  {score}
mask   {mask}
norm   softmax
empty  zero
weight w
give   out
dtype  {dtype}
"""


@pytest.mark.parametrize("mask", ["True", "j <= i"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
@pytest.mark.parametrize("lengths", [(20, 20), (7, 20), (20, 7), (1, 9)])
@pytest.mark.parametrize("e", [16, 8])
def test_plain_attention_by_torchs_own_kernel(mask: str, dtype: str, lengths: tuple[int, int], e: int) -> None:
    a = parse_attention(PLAIN.format(e=e, dtype=dtype, score="s * 0.25", mask=mask))
    assert is_plain(a)
    n, m = lengths
    random = torch.Generator().manual_seed(3)
    shapes = ((2, n, 6, 16), (2, 2, m, 16), (2, 2, m, e))
    tensors = [torch.randn(s, generator=random, dtype=torch.float64).to(DTYPE_OF[dtype]) for s in shapes]
    named = dict(zip("qkv", tensors, strict=True))
    sizes = [2, n, m]
    want = interpret(a, named, sizes, compute=torch.float64)["out"]
    (got,) = run_blocked(a, tensors, sizes)
    agree(a, got, want, interpret(a, named, sizes)["out"])


@pytest.mark.parametrize("change", ["score=s + 1.0", "mask=j < i", "mask=i <= j", "mask=j <= i + 1"])
def test_what_torchs_own_kernel_cannot_do_is_not_plain(change: str) -> None:
    field, _, text = change.partition("=")
    wanted = {"score": "s * 0.25", "mask": "True", field: text}
    assert not is_plain(parse_attention(PLAIN.format(e=16, dtype="f32", **wanted)))


def test_no_keys_at_all() -> None:
    a = parse_attention(PLAIN.format(e=16, dtype="f32", score="s", mask="j <= i"))
    tensors = [torch.zeros(2, 5, 6, 16), torch.zeros(2, 2, 0, 16), torch.zeros(2, 2, 0, 16)]
    (got,) = run_blocked(a, tensors, [2, 5, 0])
    assert torch.equal(got, torch.zeros(2, 2, 3, 5, 16))


def test_hidden_keys_may_hold_anything() -> None:
    a = parse_attention(PLAIN.format(e=16, dtype="f32", score="s * 0.5", mask="j <= i + 2"))
    random = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(s, generator=random) for s in ((1, 4, 6, 16), (1, 2, 9, 16), (1, 2, 9, 16)))
    (want,) = run_blocked(a, [q, k, v], [1, 4, 9])
    k[:, :, 6:] = torch.tensor([float("nan"), float("inf"), -float("inf")]).view(3, 1)
    (got,) = run_blocked(a, [q, k, v], [1, 4, 9])
    assert torch.equal(got, want)


@pytest.mark.parametrize("score", ["s * 0.25", "tanh(s)"])
def test_autocast_changes_nothing(score: str) -> None:
    a = parse_attention(PLAIN.format(e=16, dtype="f32", score=score, mask="j <= i"))
    random = torch.Generator().manual_seed(5)
    tensors = [torch.randn(s, generator=random) for s in ((1, 4, 6, 16), (1, 2, 9, 16), (1, 2, 9, 16))]
    (want,) = run_blocked(a, tensors, [1, 4, 9])
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = run_blocked(a, tensors, [1, 4, 9])
    assert torch.equal(got, want)


def test_affine_operands_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged heads, slices and windows are views; gathering them would cost a copy a call."""
    text = PLAIN.format(e=16, dtype="f32", score="tanh(s)", mask="j <= i")
    merged = text.replace("q: f32[B, N, 6, 16]", "q: f32[B, N, 101]").replace(
        "q[b, i, hk * 3 + g, d]", "q[b, i, hk * 48 + g * 16 + d + 5]"
    )
    a = parse_attention(merged)
    random = torch.Generator().manual_seed(5)
    tensors = [torch.randn(s, generator=random) for s in ((1, 4, 101), (1, 2, 9, 16), (1, 2, 9, 16))]
    want = interpret(a, dict(zip("qkv", tensors, strict=True)), [1, 4, 9])["out"]

    def gathered(*args: object) -> None:
        raise AssertionError("a gather")

    monkeypatch.setattr(Evaluator, "_load", gathered)
    monkeypatch.setattr(torch.Tensor, "reshape", gathered)  # follows the gather of an operand
    (got,) = run_blocked(a, tensors, [1, 4, 9])
    torch.testing.assert_close(got, want)


def test_vmap_and_meta() -> None:
    a = parse_attention(PLAIN.format(e=16, dtype="f32", score="tanh(s)", mask="j <= i"))
    random = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(3, *s, generator=random) for s in ((1, 4, 6, 16), (1, 2, 9, 16), (1, 2, 9, 16)))
    got = torch.vmap(lambda *t: run_blocked(a, t, [1, 4, 9])[0])(q, k, v)
    want = torch.stack([run_blocked(a, t, [1, 4, 9])[0] for t in zip(q, k, v, strict=True)])
    torch.testing.assert_close(got, want)
    (meta,) = run_blocked(a, [t[0].to("meta") for t in (q, k, v)], [1, 4, 9])
    assert meta.is_meta and meta.shape == want.shape[1:]
