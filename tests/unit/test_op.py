"""The operator called by itself: gradients, fake tensors, vmap, errors, threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from attentions.op_case import PLAIN, attend, build, inputs, reference, spec
from torch.utils.checkpoint import checkpoint

from attncc.codegen.torch_form import run_blocked
from attncc.ir import Attention
from attncc.runtime import op


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    before = op._installed
    op.install(build, run_blocked)
    yield
    op._installed = before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_eager_calls(mode: Callable[[], torch.no_grad]) -> None:
    text = spec(give="out, lse, weights")
    with mode():
        got, want = attend(inputs(), text), reference(inputs(), text)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    assert got[0].transpose(1, 2).is_contiguous()  # as the layout says
    assert not any(g.requires_grad for g in got)


def test_outputs_have_the_declared_dtypes() -> None:
    out, lse, weights = attend(inputs(dtype=torch.bfloat16), spec("bf16", "out, lse, weights"))
    assert (out.dtype, lse.dtype, weights.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)


def test_gradients_equal_the_interpreters() -> None:
    text = spec("f64", "out, lse")
    leaves = [t.double().requires_grad_() if n < 3 else t for n, t in enumerate(inputs())]
    leaves[3].requires_grad_()
    seeds = [torch.randn_like(o, dtype=torch.float64) for o in reference(leaves, text)]
    got = torch.autograd.grad(attend(leaves, text), leaves[:4], seeds)
    want = torch.autograd.grad(reference(leaves, text), leaves[:4], seeds)
    for g, w, leaf in zip(got, want, leaves, strict=False):
        torch.testing.assert_close(g, w)
        assert g.dtype == leaf.dtype


def test_gradient_only_where_it_is_wanted() -> None:
    tensors = inputs()
    tensors[2].requires_grad_()
    seen: list[list[bool]] = []

    def differentiable(a: Attention, t: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        seen.append([x.requires_grad for x in t])
        return run_blocked(a, t, sizes)

    op.install(build, differentiable)
    attend(tensors)[0].sum().backward()
    assert seen == [[False, False, True, False, False]]
    assert tensors[2].grad is not None and tensors[0].grad is None


def test_gradients_with_respect_to_a_view_and_an_expanded_tensor() -> None:
    q, _, v, bias, length = inputs()
    flat = torch.randn(2, 4, 8, 1, requires_grad=True)
    got = torch.autograd.grad(attend([q, flat.expand(2, 4, 8, 7).mT, v, bias, length])[0].square().sum(), flat)
    want = torch.autograd.grad(reference([q, flat.expand(2, 4, 8, 7).mT, v, bias, length])[0].square().sum(), flat)
    torch.testing.assert_close(got, want)


def test_derivatives_of_first_and_second_order_in_both_modes() -> None:
    *operands, bias, length = inputs(1, 2, 3)
    leaves = [x.double().requires_grad_() for x in operands]
    text = spec("f64", "out, lse")

    def f(*x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(attend([*x, bias, length], text))

    check: Any = torch.autograd
    assert check.gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert check.gradgradcheck(f, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)


def test_second_derivatives_stop_where_first_ones_do() -> None:
    text = spec("f64").replace("score  s * 0.25", "score  minfirst(stop(s), 0.5) * s")
    tensors = [t.double().requires_grad_() if n < 3 else t for n, t in enumerate(inputs())]

    def both(f: Callable[..., list[torch.Tensor]]) -> list[torch.Tensor]:
        first = torch.autograd.grad(f(tensors, text)[0].square().sum(), tensors[:3], create_graph=True)
        return [*first, *torch.autograd.grad(first[0].square().sum(), tensors[:3])]

    torch.testing.assert_close(both(attend), both(reference))


def test_hessians() -> None:
    tensors = inputs(1, 2, 3)
    q, k, v = (x.double() for x in tensors[:3])
    bias, length = tensors[3:]
    text = spec("f64")

    def second(f: Callable[..., list[torch.Tensor]], outer: Any) -> torch.Tensor:
        return outer(torch.func.grad(lambda x: f([x, k, v, bias, length], text)[0].square().sum()))(q)

    for outer in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(second(attend, outer), second(reference, outer))


def test_a_gradient_penalty() -> None:
    def penalty(f: Callable[..., list[torch.Tensor]]) -> torch.Tensor:
        tensors = [t.double().requires_grad_() if n < 3 else t for n, t in enumerate(inputs())]
        (first,) = torch.autograd.grad(f(tensors, spec("f64"))[0].square().sum(), tensors[0], create_graph=True)
        return torch.stack([g.norm() for g in torch.autograd.grad(first.square().sum(), tensors[:3])])

    torch.testing.assert_close(penalty(attend), penalty(reference))


def test_backward_twice_and_under_hooks_of_saved_tensors() -> None:
    tensors = [t.requires_grad_() if n < 3 else t for n, t in enumerate(inputs())]
    want = torch.autograd.grad(reference(tensors)[0].square().sum(), tensors[:3])
    loss = attend(tensors)[0].square().sum()
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(loss, tensors[:3], retain_graph=True), want)
    saved = torch.autograd.graph
    with saved.saved_tensors_hooks(lambda t: t.clone(), lambda t: t), saved.save_on_cpu():
        loss = attend(tensors)[0].square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, tensors[:3]), want)
    again = checkpoint(lambda *x: attend([*x, *tensors[3:]])[0], *tensors[:3], use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), tensors[:3]), want)


def test_fake_and_meta_give_the_real_shapes_and_strides() -> None:
    text = spec("bf16", "out, lse, weights")
    tensors = inputs(dtype=torch.bfloat16)
    real = attend(tensors, text)
    meta = attend([t.to("meta") for t in tensors], text)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = attend([mode.from_tensor(t) for t in tensors], text)
    for r, m, f in zip(real, meta, fake, strict=True):
        assert r.shape == m.shape == f.shape
        assert r.stride() == m.stride() == f.stride()
        assert r.dtype == m.dtype == f.dtype


def test_the_operator_passes_torchs_own_checks() -> None:
    tensors = inputs()
    for t in tensors[:4]:
        t.requires_grad_()
    torch.library.opcheck(torch.ops.attncc.attention.default, (tensors, [2, 5, 7], spec()))


def test_vmap() -> None:
    q, k, v, bias, length = inputs()
    many = torch.stack([k, k * 2.0, k - 1.0], 1)
    got = torch.vmap(lambda x: attend([q, x, v, bias, length])[0], in_dims=1, out_dims=2)(many)
    want = torch.stack([reference([q, x, v, bias, length])[0] for x in many.unbind(1)], 2)
    torch.testing.assert_close(got, want)


def test_functional_gradient_under_torch_func() -> None:
    q, k, v, bias, length = inputs()

    def loss(f: Callable[..., list[torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
        return f([x, k, v, bias, length])[0].square().sum()

    got = torch.func.grad(lambda x: loss(attend, x))(q)
    torch.testing.assert_close(got, torch.func.grad(lambda x: loss(reference, x))(q))


def test_gradients_of_each_sample_and_jacobians() -> None:
    q, k, v, bias, length = inputs()

    def loss(f: Callable[..., list[torch.Tensor]], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return f([x[None], y[None], v[:1], bias, length[1:]])[0].square().sum()

    def each(f: Callable[..., list[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
        return torch.vmap(torch.func.grad(lambda x, y: loss(f, x, y), argnums=(0, 1)))(q, k)

    torch.testing.assert_close(each(attend), each(reference))

    def jacobian(f: Callable[..., list[torch.Tensor]]) -> torch.Tensor:
        return torch.func.jacrev(lambda x: f([q, k, x, bias, length])[0].sum((0, 1, 3)))(v)

    torch.testing.assert_close(jacobian(attend), jacobian(reference))


def test_the_gradient_operator_runs_where_autograd_is_shut_out() -> None:
    q, k, v, bias, length = inputs()
    out = torch.ones(2, 4, 5, 6)

    def backward() -> list[torch.Tensor]:
        return torch.ops.attncc.attention_gradients(
            [out], [q, k, v, bias, length], [], "", [2, 5, 7], PLAIN, [True, False, True, False, False]
        )

    leaves = [q.clone().requires_grad_(), k, v.clone().requires_grad_(), bias, length]
    want = torch.autograd.grad(reference(leaves)[0].sum(), [leaves[0], leaves[2]])
    with torch._C._AutoDispatchBelowAutograd():
        torch.testing.assert_close(backward(), list(want))
    with torch.inference_mode():
        torch.testing.assert_close(backward(), list(want))


def test_graphs_that_were_cached_before_outputs_were_kept_still_run() -> None:
    q, k, v, bias, length = inputs()
    leaves = [q.clone().requires_grad_(), k, v, bias, length]
    (want,) = torch.autograd.grad(reference(leaves)[0].sum(), leaves[:1])
    wanted = [True, False, False, False, False]
    (got,) = torch.ops.attncc.attention_backward(
        [torch.ones(2, 4, 5, 6)], [q, k, v, bias, length], [2, 5, 7], PLAIN, wanted
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_nothing_to_do(shape: tuple[int, int, int]) -> None:
    tensors = inputs(*shape)
    tensors[0].requires_grad_()
    (out,) = attend(tensors)
    torch.testing.assert_close(out, reference(tensors)[0])
    out.sum().backward()
    assert tensors[0].grad is not None and not tensors[0].grad.any()


def test_one_build_for_all_threads() -> None:
    built: list[str] = []

    def slow(a: Attention, text: str, device: torch.device) -> op.Kernel:
        built.append(text)
        threading.Event().wait(0.05)
        return build(a, text, device)

    op.install(slow, run_blocked)
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.extend(attend(inputs()))) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert built == [spec()] and len(results) == 8
    for r in results:
        torch.testing.assert_close(r, reference(inputs())[0])


def test_errors_name_the_attention() -> None:
    with pytest.raises(ValueError, match="declares 5 tensors and 3 sizes; the call has 4 and 3"):
        torch.ops.attncc.attention(inputs()[:4], [2, 5, 7], spec())

    q, k, *rest = inputs()
    with pytest.raises(ValueError, match=r"declares k: f32\[2, 4, 7, 8\], the call has f64\[2, 4, 7, 8\]"):
        attend([q, k.double(), *rest])
    with pytest.raises(ValueError, match=r"declares q: f32\[2, 5, 32\], the call has f32\[2, 5, 31\]"):
        attend([q[..., 1:], k, *rest])

    def failing(a: Attention, text: str, device: torch.device) -> op.Kernel:
        def kernel(*args: object) -> None:
            raise OSError("no such symbol")

        return kernel

    op.install(failing, run_blocked)
    with pytest.raises(op.KernelError, match=r"no such symbol\nattention\nsize   B, N, M"):
        attend(inputs())

    def impossible(a: Attention, text: str, device: torch.device) -> op.Kernel:
        raise FileNotFoundError("no compiler")

    op.install(impossible, run_blocked)
    with pytest.raises(op.KernelError, match=r"no kernel for this attention on cpu: no compiler"):
        attend(inputs())


def test_a_build_that_failed_is_tried_again() -> None:
    tries: list[int] = []

    def flaky(a: Attention, text: str, device: torch.device) -> op.Kernel:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("busy")
        return build(a, text, device)

    op.install(flaky, run_blocked)
    with pytest.raises(op.KernelError):
        attend(inputs())
    torch.testing.assert_close(attend(inputs())[0], reference(inputs())[0])


@pytest.mark.slow
def test_importing_attncc_is_enough() -> None:
    """A program that holds the operator is loaded and run, with gradients, without the compiler's being asked for."""
    shapes = "(1, 1, 32), (1, 4, 1, 8), (1, 4, 1, 6), (4, 1, 1)"
    program = (
        "import sys, torch, attncc; assert 'attncc.driver.backend' not in sys.modules; "
        f"tensors = [torch.zeros(s).requires_grad_() for s in ({shapes})] + [torch.ones(1, dtype=torch.int64)]; "
        f"torch.ops.attncc.attention(tensors, [1, 1, 1], {PLAIN!r})[0].sum().backward(); "
        "assert tensors[2].grad.unique() == 1"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_specs_that_never_come_back_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op._installed.sites, "most", 3)
    texts = [PLAIN.replace("0.25", f"0.{n}5") for n in range(1, 8)]
    for text in (*texts, *texts):
        torch.testing.assert_close(attend(inputs(), text), reference(inputs(), text))
        assert len(op._installed.sites) <= 3 and text in op._installed.sites


def test_many_threads_with_specs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are held ready, so that specs come and go under the threads that use them."""
    monkeypatch.setattr(op._installed.sites, "most", 3)
    texts = [PLAIN.replace("0.25", f"0.{n}5") for n in range(1, 8)]
    wanted = [reference(inputs(), text)[0] for text in texts]

    def run(seed: int) -> None:
        for n in range(30):
            at = (seed * n) % len(texts)
            torch.testing.assert_close(attend(inputs(), texts[at])[0], wanted[at])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(16)))
    assert len(op._installed.sites) <= 3


def test_a_gpu_has_a_kernel_for_each_precision_of_products() -> None:
    """What a caller switches between calls is read at each of them, by either of torch's two ways to say it."""
    built: list[str] = []

    def recorded(a: Attention, text: str, device: torch.device) -> op.Kernel:
        built.append(str(device))
        return build(a, text, device)

    op.install(recorded, run_blocked)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for value in ("ieee", "tf32", "ieee", "tf32"):
            matmul.fp32_precision = value
            for device in ("cuda:0", "cuda:1", "cpu"):
                op.kernel_of(PLAIN, torch.device(device))
    finally:
        matmul.fp32_precision = before
    assert built == ["cuda:0", "cuda:1", "cpu", "cuda:0", "cuda:1"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_forked_in_the_middle_of_a_build() -> None:
    inside, done = threading.Event(), threading.Event()

    def slow(a: Attention, text: str, device: torch.device) -> op.Kernel:
        inside.set()
        done.wait(20)
        return build(a, text, device)

    op.install(slow, run_blocked)
    thread = threading.Thread(target=attend, args=(inputs(),))
    thread.start()
    inside.wait(20)
    child = os.fork()
    if child == 0:
        done.set()
        op.kernel_of(PLAIN, torch.device("cpu"))
        os._exit(0)
    done.set()
    thread.join()
    for _ in range(200):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        threading.Event().wait(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child waits for a lock of its parent")
    assert os.waitstatus_to_exitcode(status) == 0
