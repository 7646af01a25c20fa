"""Triton backward kernels under Triton's interpreter, against the equations in float64. `test_triton.py` runs this
file, in its own process."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a process of its own, from test_triton.py", allow_module_level=True)

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from random_ir.programs import Program, programs
from triton_kernels import interpreter
from triton_kernels.cases import CASES, Case, case_of

from attncc.codegen.triton import TritonConfig, emit_gradient, unsupported_gradient
from attncc.ir import Attention, interpret, print_attention
from attncc.ir.attention_grad import AttentionGrad, interpret_grad, shapes_of_grad
from attncc.ir.evaluate import DTYPE_OF
from attncc.kernels import gradients
from attncc.kernels.build import Target
from attncc.kernels.first_gradient import differs, size_of_terms
from attncc.passes.bounds.bounds import loop_bounds
from attncc.passes.gradient import gradient_of
from attncc.runtime.triton_launch import TritonKernel

SMALL = TritonConfig(16, 16, 4, 1), TritonConfig(16, 16, 4, 1)
WIDE = TritonConfig(16, 32, 4, 1), TritonConfig(32, 16, 4, 1)
LISTS = TritonConfig(16, 16, 4, 1, lists=True), TritonConfig(16, 16, 4, 1, lists=True)
EXAMPLES = int(os.environ.get("ATTNCC_TRITON_EXAMPLES", "6"))


def backward_of(a: Attention, wanted: Sequence[str] | None = None) -> AttentionGrad | str:
    a = replace(a, outputs=("out", "lse"))
    g = gradient_of(a, [t.name for t in a.tensors if t.kind == "float"] if wanted is None else wanted)
    return g if isinstance(g, str) else unsupported_gradient(g) or g


FORMS = {name: a for name, c in CASES.items() if not isinstance(a := backward_of(case_of(c).attention), str)}
#: Forms that ask for something of their own; the rest in the larger run.
SOME = ("causal", "one head a group", "window and sink tokens", "every seventh key", "stripes by head",
        "soft cap", "alibi", "t5 table", "bias of both", "sink", "d 80", "documents", "dropout stream")  # fmt: skip


def check(
    p: Program, configs: tuple[TritonConfig, TritonConfig], wanted: Sequence[str] | None = None
) -> list[torch.Tensor]:  # fmt: skip
    """At most twice what the equations are off in float32, and roundings of what the products take."""
    a, tensors, sizes = p
    g = backward_of(a, wanted)
    assert not isinstance(g, str), g
    a = g.attention
    made = interpret(a, tensors, sizes)
    random = torch.Generator().manual_seed(5)
    grads = {n: torch.randn(x.shape, generator=random).to(x.dtype) for n, x in made.items()}
    beside = [grads["out"], made["out"], made["lse"], grads["lse"]]
    got = interpreter.run_backward(g, configs, tensors, beside, sizes)
    want = interpret_grad(g, tensors, beside, sizes, compute=torch.float64)
    own = interpret_grad(g, tensors, beside, sizes)
    types = {a.tensor(x.tensor).dtype for x in (a.q, a.k, a.v)} | {a.dtype}
    unit = max(torch.finfo(DTYPE_OF[t]).eps for t in types) if len(types) > 0 else 0.0
    least = 8 * torch.finfo(torch.float32).eps * size_of_terms(g, [*tensors.values(), *beside])
    for name, x, w, e in zip([*g.operands, *(repr(x.load) for x in g.loads)], got, want, own, strict=True):
        text = f"{name} of\n{print_attention(a)}{sizes} with {configs}"
        assert bool(x.isfinite().all()), text
        if not w.numel():
            continue
        error, eager = float((x.double() - w).abs().max()), float((e.double() - w).abs().max())
        assert error <= 2 * eager + 4 * unit * float(w.abs().max()) + least, f"{error} off in {text}"
    return got


@pytest.mark.parametrize("name", [n for n in FORMS if n in SOME or EXAMPLES >= 100])
def test_forms(name: str) -> None:
    for dtype in ("bf16", "f32") if EXAMPLES >= 100 else ("bf16",):
        check(case_of(CASES[name], dtype=dtype), SMALL)


@pytest.mark.parametrize("name", ["causal", "t5 table", "soft cap", "window and columns"])
def test_in_float32_and_with_other_tiles(name: str) -> None:
    check(case_of(CASES[name], dtype="f32", rows=50, keys=45 if "table" in name else 0), WIDE)


@pytest.mark.parametrize("name", ["documents", "causal block table", "clusters", "regions"])
def test_block_lists(name: str) -> None:
    """Both kernels walk lists of what the mask shows, of keys for rows and of rows for keys."""
    before = interpreter.products
    check(case_of(CASES[name], dtype="f32"), LISTS)
    listed, before = interpreter.products - before, interpreter.products
    check(case_of(CASES[name], dtype="f32"), SMALL)
    assert 0 < listed <= interpreter.products - before


@pytest.mark.parametrize("by", [40.0, 3000.0])
def test_large_scores(by: float) -> None:
    """The logarithms of the sums of rows are large, and their rounding with them: sums are made again."""
    case = Case("j <= i", score=f"s * {by}", sink="sinks[hk * G + g]", tensors=("sinks: f32[HQ]",), give="out, lse")
    p = case_of(case, dtype="f32")
    p.tensors["sinks"] *= 3 * by
    assert float(interpret(p.attention, p.tensors, p.sizes)["lse"].abs().max()) > (1e3 if by > 100 else 100)
    check(p, SMALL)


def test_only_what_is_wanted() -> None:
    p = case_of(CASES["one key head"], dtype="f32")
    for wanted in ("q", "v", "k"):
        check(p, SMALL, wanted=(wanted,))


def test_it_sums_in_the_same_order_every_time() -> None:
    p = case_of(CASES["t5 table"], rows=60)
    first, again = check(p, SMALL), check(p, SMALL)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@seed(24)
@settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)  # fmt: skip
@given(programs(simple=True, dtypes=("f32", "bf16"), normalizers=("softmax",)))
def test_random_programs(program: Program) -> None:
    if isinstance(backward_of(program.attention), str):
        return
    made = interpret(replace(program.attention, outputs=("out", "lse")), program.tensors, program.sizes)
    if not bool(made["out"].isfinite().all()) or not bool((made["lse"] < float("inf")).all()):
        return
    check(program, SMALL)
    check(program, LISTS)


@pytest.mark.parametrize("name", ["t5 table", "clusters"])
def test_what_a_gpu_would_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's kernels for a GPU: gradients of tensors as they lie, and a kernel that is wrong is not used."""
    monkeypatch.setattr("attncc.kernels.skip_tables.WORTHWHILE", 1)  # lists at once, where there are any
    p = case_of(CASES[name], dtype="f32", rows=33)
    a = replace(p.attention, outputs=("out", "lse"))
    wanted = tuple(t.name for t in a.tensors if t.kind == "float")
    built = gradients._built(a, wanted, Target("cuda", "sm_90"))
    assert built.run is not None and built.name == "Triton sm_90 kernels"
    leaves = {n: x.double().requires_grad_() if n in wanted else x for n, x in p.tensors.items()}
    made = interpret(a, leaves, p.sizes, compute=torch.float64)
    grads = {n: torch.randn(x.shape, generator=torch.Generator().manual_seed(3)) for n, x in made.items()}
    pairs = [(made[n], grads[n].double()) for n in made]
    want = torch.autograd.grad([x for x, _ in pairs], [leaves[n] for n in wanted], [x for _, x in pairs])
    kept = {n: x.detach().float() for n, x in made.items()}
    got = built.run(grads, [p.tensors[t.name] for t in a.tensors], kept, p.sizes, wanted)
    for x, w in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), w, rtol=1e-4, atol=1e-5)


def test_a_wrong_kernel_is_not_used() -> None:
    p = case_of(CASES["causal"], dtype="f32")
    g = backward_of(p.attention)
    assert not isinstance(g, str)
    right = emit_gradient(g, loop_bounds(g.attention, rows=True), loop_bounds(g.by_key, rows=True), *SMALL)
    wrong = right.replace("ws = p * (u - delta)", "ws = p * (u - delta * 1.02)")
    assert wrong != right
    said: list[str] = []
    kernel = TritonKernel([wrong, right], check=partial(differs, g), report=said.append)
    made = interpret(g.attention, p.tensors, p.sizes)
    beside = [torch.ones_like(made["out"]), made["out"], made["lse"], torch.zeros_like(made["lse"])]
    outputs = [torch.empty(shape) for shape in shapes_of_grad(g, p.sizes)]
    kernel([*p.tensors.values(), *beside], p.sizes, outputs)
    assert len(said) == 1 and "the gradient of q is off" in said[0]
    want = interpret_grad(g, p.tensors, beside, p.sizes, compute=torch.float64)
    for x, w in zip(outputs, want, strict=True):
        torch.testing.assert_close(x.double(), w, rtol=1e-4, atol=1e-5)


def test_what_has_a_kernel() -> None:
    assert {*SOME} <= {*FORMS}
