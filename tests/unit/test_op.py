"""The operator: eager calls, gradients, tracing, compilation with static and dynamic shapes, vmap, errors, threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from attncc.codegen.torch_form import run_blocked
from attncc.ir import Attention, interpret, parse_attention, print_attention
from attncc.runtime import op

SPEC = """attention
size   B, N, M
batch  b = B, h = 4
axis   i = N, j = M, d = 8, e = 6
tensor q: {dtype}[B, N, 32]
tensor k: {dtype}[B, 4, M, 8]
tensor v: {dtype}[B, 4, M, 6]
tensor bias: f32[4, N, M]
tensor length: i64[B]
q      q[b, i, h * 8 + d]
k      k[b, h, j, d]
v      v[b, h, j, e]
score  s * 0.25 + bias[h, i, j]
mask   j < length[b]
norm   softmax
empty  zero
weight w
give   {give}
dtype  {dtype}
layout b, i, h, e
"""


def spec(dtype: str = "f32", give: str = "out") -> str:
    return print_attention(parse_attention(SPEC.format(dtype=dtype, give=give)))


PLAIN = spec()


def inputs(b: int = 2, n: int = 5, m: int = 7, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(b + n + m)
    q, k, v, bias = (
        torch.randn(s, generator=random).to(dtype) for s in ((b, n, 32), (b, 4, m, 8), (b, 4, m, 6), (4, n, m))
    )
    return [q, k, v, bias.float(), torch.arange(1, b + 1)]


def build(a: Attention, text: str, device: torch.device) -> op.Kernel:
    def kernel(tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]) -> None:
        for out, value in zip(outputs, run_blocked(a, tensors, sizes), strict=True):
            out.copy_(value)

    return kernel


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    before = op._installed
    op.install(build, run_blocked)
    yield
    op._installed = before


def attend(tensors: Sequence[torch.Tensor], text: str = PLAIN) -> list[torch.Tensor]:
    q, k = tensors[:2]
    sizes = [q.shape[0], q.shape[1], k.shape[2]]
    return torch.ops.attncc.attention(list(tensors), sizes, text)


def reference(tensors: Sequence[torch.Tensor], text: str = PLAIN) -> list[torch.Tensor]:
    a = parse_attention(text)
    q, k = tensors[:2]
    named = {t.name: x for t, x in zip(a.tensors, tensors, strict=True)}
    return list(interpret(a, named, [q.shape[0], q.shape[1], k.shape[2]]).values())


def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """What a graph around the operator looks like: something before, the transpose after, something else."""
    (out,) = attend([q * 2.0, k + 1.0, v, bias, length])
    return out.transpose(1, 2).flatten(2).relu() + 1.0


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    (out,) = reference([q * 2.0, k + 1.0, v, bias, length])
    return out.transpose(1, 2).flatten(2).relu() + 1.0


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


def test_second_derivatives_are_refused() -> None:
    tensors = inputs()
    tensors[0].requires_grad_()
    (first,) = torch.autograd.grad(attend(tensors)[0].square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


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


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_inference(dynamic: bool) -> None:
    compiled = torch.compile(model, backend="inductor", dynamic=dynamic, fullgraph=True)
    for shape in ((2, 5, 7), (2, 5, 7), (3, 9, 4)):
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs(*shape)), eager(*inputs(*shape)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_training(dynamic: bool) -> None:
    compiled = torch.compile(model, backend="inductor", dynamic=dynamic, fullgraph=True)
    for shape in ((2, 5, 7), (3, 9, 4)):
        tensors = [inputs(*shape) for _ in range(2)]
        for twin in tensors:
            for t in twin[:4]:
                t.requires_grad_()
        got, want = compiled(*tensors[0]), eager(*tensors[1])
        torch.testing.assert_close(got, want)
        got.square().sum().backward()
        want.square().sum().backward()
        for g, w in zip(tensors[0][:4], tensors[1][:4], strict=True):
            torch.testing.assert_close(g.grad, w.grad)


def test_compiled_calls_copy_no_input() -> None:
    """Keys that are a transposed view reach the kernel with the strides they have."""
    strides: list[tuple[int, ...]] = []

    def watching(a: Attention, text: str, device: torch.device) -> op.Kernel:
        inner = build(a, text, device)

        def kernel(tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]) -> None:
            strides.append(tensors[1].stride())
            inner(tensors, sizes, outputs)

        return kernel

    op.install(watching, run_blocked)
    q, k, v, bias, length = inputs()

    def transposed(k: torch.Tensor) -> torch.Tensor:
        return attend([q, k.transpose(1, 2), v, bias, length])[0] * 2.0

    base = k.transpose(1, 2).contiguous()
    with torch.no_grad():
        torch.compile(transposed, backend="inductor", fullgraph=True)(base)
    assert strides == [base.transpose(1, 2).stride()]


def test_export_keeps_one_node() -> None:
    class Module(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return model(*tensors)

    program = torch.export.export(Module(), tuple(inputs()), strict=False)
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count(torch.ops.attncc.attention.default) == 1
    torch.testing.assert_close(program.module()(*inputs()), eager(*inputs()))


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
        return torch.ops.attncc.attention_backward(
            [out], [q, k, v, bias, length], [2, 5, 7], PLAIN, [True, False, True, False, False]
        )

    leaves = [q.clone().requires_grad_(), k, v.clone().requires_grad_(), bias, length]
    want = torch.autograd.grad(reference(leaves)[0].sum(), [leaves[0], leaves[2]])
    with torch._C._AutoDispatchBelowAutograd():
        torch.testing.assert_close(backward(), list(want))
    with torch.inference_mode():
        torch.testing.assert_close(backward(), list(want))


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


def test_nothing_installed_says_so() -> None:
    shapes = "(1, 1, 32), (1, 4, 1, 8), (1, 4, 1, 6), (4, 1, 1)"
    program = (
        "import torch; from attncc.runtime import op; "
        f"tensors = [torch.zeros(s) for s in ({shapes})] + [torch.ones(1, dtype=torch.int64)]; "
        f"torch.ops.attncc.attention(tensors, [1, 1, 1], {PLAIN!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "import attncc.dynamo" in done.stderr


CACHED = """
import torch
from torch._dynamo.utils import counters
from attncc.codegen.torch_form import run_blocked
from attncc.runtime import op

def build(a, text, device):
    def kernel(tensors, sizes, outputs):
        for out, value in zip(outputs, run_blocked(a, tensors, sizes)):
            out.copy_(value)
    return kernel

def model(q, k, v, bias, length):
    return torch.ops.attncc.attention([q * 2.0, k, v, bias, length], [2, 5, 7], SPEC)[0].relu()

op.install(build, run_blocked)
shapes = ((2, 5, 32), (2, 4, 7, 8), (2, 4, 7, 6), (4, 5, 7))
tensors = [torch.linspace(-1, 1, torch.Size(s).numel()).view(s).requires_grad_() for s in shapes]
out = torch.compile(model)(*tensors, torch.tensor([3, 7]))
out.sum().backward()
print(counters["aot_autograd"]["autograd_cache_hit"], f"{out.sum().item():.5f} {tensors[0].grad.norm().item():.5f}")
"""


@pytest.mark.full
def test_graphs_cached_on_disk_run_in_a_fresh_process_and_see_a_changed_spec(tmp_path: Path) -> None:
    def run(text: str) -> list[str]:
        program = CACHED.replace("SPEC", repr(text))
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env)
        return done.stdout.split()

    first, second, changed = run(PLAIN), run(PLAIN), run(PLAIN.replace("s * 0.25", "s * 0.75"))
    assert (first[0], second[0], changed[0]) == ("0", "1", "0")
    assert first[1:] == second[1:] != changed[1:]
