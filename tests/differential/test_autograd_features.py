"""What autograd can do beside a plain backward, around compiled attentions and inside: results are eager's.

Where Inductor itself cannot (loops over a scan, gradients of gradients), the edited graph is run as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parameters.thinned import thinned
from torch import nn
from torch._functorch import config as functorch
from torch._higher_order_ops.map import map as mapped_over
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from attncc.driver.backend import Collected, collecting

Q = torch.Tensor
Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def attend(q: Q, k: Q, v: Q) -> Q:
    return (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Q) -> Q:
        q, k, v = self.qkv(x).view(*x.shape[:-1], 3, 2, 8).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


def tensors(*, grad: bool = True) -> list[Q]:
    return [torch.randn(2, 2, 12, 16, requires_grad=grad) for _ in range(3)]


def compiled(f: Any, *, inductor: bool = True) -> Run:
    return torch.compile(f, backend="attncc", options={"measure": False} | ({} if inductor else {"inductor": False}))


def fused(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a call gives, and what became of each site that it compiled."""
    found = Collected()
    token = collecting.set(found)
    try:
        result = run()
    finally:
        collecting.reset(token)
    assert not found.notes
    return result, [site.status for site in found.sites]


def same(a: Sequence[Q], b: Sequence[Q]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def gradients(out: Q, of: Sequence[Q], **more: Any) -> tuple[Q, ...]:
    return torch.autograd.grad(out.square().sum(), of, **more)


MAKE: dict[str, Callable[[], tuple[Any, list[Q]]]] = {
    "attention": lambda: (attend, tensors()),
    "sdpa": lambda: (F.scaled_dot_product_attention, tensors()),
    "layer": lambda: (Layer(), [torch.randn(2, 10, 16, requires_grad=True)]),
}


@functorch.patch(donated_buffer=False)  # torch refuses to retain a graph of donated buffers
@pytest.mark.parametrize(("name", "shape"), thinned(list(MAKE), [(2, 2, 12, 16), (1, 1, 12, 16)]))
def test_batches_of_gradients(name: str, shape: tuple[int, ...]) -> None:
    """`is_grads_batched`: Inductor's own backward reads memory that such tensors do not have."""
    model, given = MAKE[name]()
    given = given if name == "layer" else [torch.randn(shape, requires_grad=True) for _ in given]
    learned = [*given, *(model.parameters() if isinstance(model, nn.Module) else ())]
    out, status = fused(lambda: compiled(model)(*given))
    seeds = torch.randn(3, *out.shape)
    got = torch.autograd.grad(out, learned, seeds, is_grads_batched=True, retain_graph=True)
    same(got, torch.autograd.grad(model(*given), learned, seeds, is_grads_batched=True))
    same(gradients(out, learned), gradients(model(*given), learned))
    assert status == ["fused"]


def test_a_backward_that_runs_twice() -> None:
    x = tensors()
    out, status = fused(lambda: compiled(attend)(*x))
    first = gradients(out, x, retain_graph=True)
    same(first, gradients(out, x))
    same(first, gradients(attend(*x), x))
    assert status == ["fused"]


def test_hooks_around_see_what_is_saved() -> None:
    x, seen = tensors(), list[torch.Size]()

    def pack(t: Q) -> Q:
        seen.append(t.shape)
        return t.clone()

    run = compiled(attend)
    with saved_tensors_hooks(pack, lambda t: t):
        out, status = fused(lambda: run(*x))
    same(gradients(out, x), gradients(attend(*x), x))
    assert status == ["fused"]
    assert seen and not any(size[-2:] == (12, 12) for size in seen), "an N x N tensor is saved"
    with save_on_cpu():
        out = run(*x)
    same(gradients(out, x), gradients(attend(*x), x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around_a_compiled_layer(reentrant: bool) -> None:
    """From the first call on, which reads the graph while the checkpoint's hooks are set."""
    layers, x = nn.ModuleList([Layer(), Layer()]), torch.randn(2, 10, 16, requires_grad=True)
    runs = [compiled(layer) for layer in layers]

    def model(calls: Sequence[Any], around: Run) -> list[Q]:
        y = x
        for call in calls:
            y = y + around(call, y)
        x.grad = None
        layers.zero_grad()
        y.square().sum().backward()
        return [t.grad.clone() for t in (x, *layers.parameters()) if t.grad is not None]

    for _ in range(2):
        got, _ = fused(lambda: model(runs, lambda f, y: checkpoint(f, y, use_reentrant=reentrant)))
        same(got, model(list(layers), lambda f, y: f(y)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_inside(reentrant: bool) -> None:
    layer, x = Layer(), torch.randn(2, 10, 16, requires_grad=True)

    def model(x: Q) -> Q:
        return x + checkpoint(layer, x, use_reentrant=reentrant)

    def backward(run: Run) -> list[Q]:
        x.grad = None
        layer.zero_grad()
        run(x).square().sum().backward()
        return [t.grad.clone() for t in (x, *layer.parameters()) if t.grad is not None]

    got, status = fused(lambda: backward(compiled(model)))
    same(got, backward(model))
    assert status == ["fused"]


def chosen(q: Q, k: Q, v: Q) -> Q:
    return torch.cond(q.sum() > 0, lambda q, k, v: attend(q, k, v), lambda q, k, v: 2 * attend(q, k, v), (q, k, v))


def chosen_once(q: Q, k: Q, v: Q) -> Q:
    return torch.cond(q.sum() > 0, lambda q, k, v: attend(q, k, v) + 1, lambda q, k, v: q.sin() + k + v, (q, k, v))


def looped(q: Q, k: Q, v: Q) -> Q:
    start = torch.zeros((), dtype=torch.int64)
    return while_loop(lambda i, q: i < 3, lambda i, q: (i + 1, attend(q, k, v)), (start, q))[1]


def scanned(q: Q, k: Q, v: Q) -> Q:
    def step(carried: Q, y: Q) -> tuple[Q, Q]:
        new = attend(carried, k, v) + y
        return new, new.clone()

    return scan(step, q, torch.stack([q, k, v]), dim=0)[1]


def over_the_batch(q: Q, k: Q, v: Q) -> Q:
    return mapped_over(lambda q: attend(q, k[0], v[0]), q)


@pytest.mark.parametrize(
    ("model", "sites", "inductor", "grad"),
    [
        (chosen, 2, True, True), (chosen_once, 1, True, True), (looped, 1, True, False), (looped, 1, False, True),
        (scanned, 1, False, True), (over_the_batch, 1, False, True),
    ],
)  # fmt: skip
def test_branches_and_loops(model: Run, sites: int, inductor: bool, grad: bool) -> None:
    """Their bodies are graphs of their own; Inductor compiles no scan on a CPU, and no loop with gradients."""
    x = tensors(grad=grad)
    out, status = fused(lambda: compiled(model, inductor=inductor)(*x))
    same([out], [model(*x)])
    if grad:
        same(gradients(out, x), gradients(model(*x), x))
    assert status == ["fused"] * sites


def test_forward_mode() -> None:
    """Inductor's code drops the tangents of its inputs: such a call runs the edited graph instead."""
    x, along = tensors(grad=False), tensors(grad=False)
    run = compiled(attend)
    want = run(*x)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a, b) for a, b in zip(x, along, strict=True)]
        (got, tangent), (_, exact) = (forward_ad.unpack_dual(f(*duals)) for f in (run, attend))
        assert tangent is not None and exact is not None
        same([got, tangent], [want, exact])


@functorch.patch(donated_buffer=False)  # else torch may name these buffers in the place of what it lacks
def test_gradients_of_gradients() -> None:
    """AOTAutograd has none, and says so; the edited graph has them."""
    x = tensors()

    def second(run: Run) -> tuple[Q, ...]:
        first = gradients(run(*x), x, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), x)

    got, status = fused(lambda: second(compiled(attend, inductor=False)))
    same(got, second(attend))
    assert status == ["fused"]
    with pytest.raises(RuntimeError, match="double backward"):
        second(compiled(attend))


@pytest.mark.parametrize("grad", [False, True])
def test_wrapper_subclasses(grad: bool) -> None:
    made: Any = TwoTensor
    x = [made(torch.randn(2, 2, 12, 16), torch.randn(2, 2, 12, 16)).requires_grad_(grad) for _ in range(3)]
    out, status = fused(lambda: compiled(attend)(*x))
    pairs: list[tuple[Any, Any]] = [(out, attend(*x))]
    if grad:
        pairs += zip(gradients(out, x), gradients(attend(*x), x), strict=True)
    for got, want in pairs:
        same([got.a, got.b], [want.a, want.b])
    assert status == ["fused"]


def test_tensors_without_data() -> None:
    found = Collected()
    token = collecting.set(found)
    try:
        assert compiled(attend)(*(x.to("meta") for x in tensors(grad=False))).shape == (2, 2, 12, 16)
        assert [(s.status, s.reason) for s in found.sites] == [("kept", "no emitter for device meta")]
        with FakeTensorMode():
            assert compiled(attend)(*tensors(grad=False)).shape == (2, 2, 12, 16)
    finally:
        collecting.reset(token)
    assert len(found.sites) == 1
    assert found.notes == ["a model that is called with fake tensors is compiled as it is: nothing can be timed"]


@pytest.mark.parametrize("of", ["weights", "queries"])
def test_hooks_on_tensors_inside(of: str) -> None:
    """A hook sees the gradient of its tensor: weights exist for it, queries do in any case."""

    def model(q: Q, k: Q, v: Q) -> Q:
        q = q * 2
        weights = (q @ k.transpose(-1, -2) / 4).softmax(-1)
        (weights if of == "weights" else q).register_hook(lambda g: g * 3)
        return weights @ v

    x = tensors()
    found = Collected()
    token = collecting.set(found)
    try:
        out = compiled(model)(*x)
    finally:
        collecting.reset(token)
    same(gradients(out, x), gradients(model(*x), x))
    (site,) = found.sites
    assert site.status == ("refused" if of == "weights" else "fused")
    assert of == "queries" or "register_hook" in (site.reason or "")


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Q) -> Q:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, g: Q) -> Q:
        return -g


def again(f: Callable[[Q], Q], x: Q) -> Q:
    return checkpoint(f, x, use_reentrant=False)


def chosen(by: Q, x: Q) -> Q:
    return torch.cond(by.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (x,))


BODIES: dict[str, tuple[Run, str]] = {
    "scores in a function": (
        lambda q, k, v: Reversed.apply(q @ k.mT).softmax(-1) @ v,
        "its scores are autograd_function_apply of a product of queries and keys, which has no rule"),
    "weights in a function": (
        lambda q, k, v: Reversed.apply((q @ k.mT).softmax(-1)) @ v,
        "its weights go through autograd_function_apply before they meet the values, which is not read"),
    "scores in a checkpoint": (
        lambda q, k, v: again(torch.sin, q @ k.mT).softmax(-1) @ v,
        "its scores are tag_activation_checkpoint of a product of queries and keys, which has no rule"),
    "weights in a checkpoint": (
        lambda q, k, v: again(torch.sin, (q @ k.mT).softmax(-1)) @ v,
        "its weights go through tag_activation_checkpoint before they meet the values, which is not read"),
    "weights chosen": (
        lambda q, k, v: chosen(q, (q @ k.mT).softmax(-1)) @ v,
        "its weights go through cond before they meet the values, which is not read"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "grad"), thinned(list(BODIES), [True, False]))
def test_bodies_between_the_products_are_said(name: str, grad: bool) -> None:
    """What runs a graph of its own on scores or weights is not read, and the reason says so: the products are there.
    Without gradients a function of autograd's is what it computes, and fused."""
    model, reason = BODIES[name]
    x, found = tensors(grad=grad), Collected()
    token = collecting.set(found)
    try:
        out = compiled(model, inductor=False)(*x)
    finally:
        collecting.reset(token)
    same([out], [model(*x)])
    if grad:
        same(gradients(out, x), gradients(model(*x), x))
    (site,) = found.sites
    assert site.reason == reason or (not grad and "function" in name and site.status == "fused")


def _shifted(q: Q, k: Q, v: Q) -> Q:
    out = attend(q, k, v)
    out.add_(1)
    return out


def _shifted_in_part(q: Q, k: Q, v: Q) -> Q:
    out = attend(q, k, v).transpose(1, 2)
    out[..., ::2].mul_(2)
    return out


@pytest.mark.parametrize("model", [_shifted, _shifted_in_part])
def test_a_result_that_the_model_writes_to(model: Run) -> None:
    """Eager's product keeps nothing of its result; what its gradients need of ours is not what is written to."""
    x = tensors()
    out, status = fused(lambda: compiled(model, inductor=False)(*x))
    same([out], [model(*x)])
    same(gradients(out, x), gradients(model(*x), x))
    assert status == ["fused"]
