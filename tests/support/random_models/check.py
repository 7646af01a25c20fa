"""Whether a compiled random program gives what the program itself gives, and says what became of its softmaxes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map_only

from attncc.driver import backend, rewriting
from attncc.ir import Attention, interpret, parse_attention
from attncc.ir.evaluate import DTYPE_OF
from attncc.kernels import build, gradients
from attncc.kernels.build import Built
from attncc.report.site import Site
from attncc.runtime import op
from random_models.writer import Program, Sizes


class Mismatch(AssertionError):
    """The compiled program is not the program; the message says where."""


class Oracle:
    """The interpreter as a kernel: what it gets wrong, the lifter got wrong."""

    def __init__(self, a: Attention) -> None:
        self.attention = a

    def __call__(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> None:
        named = {t.name: x for t, x in zip(self.attention.tensors, tensors, strict=True)}
        found = interpret(self.attention, named, sizes, compute=torch.float64)
        narrow = interpret(self.attention, named, sizes, compute=DTYPE_OF[self.attention.compute_dtype])
        for out, name in zip(outputs, self.attention.outputs, strict=True):
            # two fills of the lowest number add up to -inf in the dtype that kernels compute in
            out.copy_(torch.where(narrow[name].isfinite(), found[name], narrow[name].double()))


def _oracle(spec: str, device: str) -> Built:
    return Built(Oracle(parse_attention(spec)), spec, "interpreter", "oracle")


@contextmanager
def kernels_of(kind: str) -> Any:
    op.install(build.build, build.blocked, gradients.backward)  # forget the kernels of another kind
    if kind == "oracle":
        with mock.patch.object(build, "built", _oracle), mock.patch.object(rewriting, "built", _oracle):
            yield
    else:
        yield


Run = Callable[[Any], None]


def through_dynamo(p: Program, run: Run, module: torch.nn.Module, data: list[torch.Tensor]) -> backend.Collected:
    """Run the program as `torch.compile` makes it."""
    found = backend.Collected()
    token = backend.collecting.set(found)
    torch._dynamo.reset()
    try:
        options = {"inductor": False, "measure": False}
        run(torch.compile(module, backend=backend.attncc_backend, options=options, dynamic=p.dynamic or None))
    finally:
        backend.collecting.reset(token)
    return found


def through_trace(p: Program, run: Run, module: torch.nn.Module, data: list[torch.Tensor]) -> backend.Collected:
    """Run the program's trace, rewritten: what a backend does, ten times as fast without Dynamo."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def flat(*values: torch.Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(state, values, strict=False)), values[len(state) :])

    with torch.no_grad():
        gm = make_fx(flat, pre_dispatch=True)(*copy.deepcopy([*state.values(), *data]))
        found = backend.Collected()
        token = backend.collecting.set(found)
        try:
            edited = backend.rewrite(gm, [*state.values(), *data], found, measure=False)
        finally:
            backend.collecting.reset(token)
        run(lambda *x: edited(*state.values(), *x))
    return found


Door = Callable[..., backend.Collected]


def check(p: Program, seed: int, kind: str = "oracle", door: Door = through_dynamo) -> list[Site]:
    """Raises Mismatch where the compiled program differs from the program in float64 by more than a small multiple of
    what the program itself does in its dtype; gives what was said of each site, nothing for a program that torch cannot
    run."""
    calls = [p.sizes] if not p.dynamic or door is through_trace else [p.sizes, _longer(p.sizes)]
    module = p.module(seed)
    data = [p.data(s, seed + n) for n, s in enumerate(calls)]
    eager, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    try:
        want = [_outputs(eager, x) for x in copy.deepcopy(data)]
    except RuntimeError:  # a view of what has no such strides, a fill that float16 does not hold
        return []
    best = [_outputs(exact, tree_map_only(torch.Tensor, _double, x)) for x in copy.deepcopy(data)]
    got: list[Any] = []
    with kernels_of(kind):
        found = door(p, lambda f: got.extend(_outputs(f, x) for x in data), module, data[0])
    if found.notes or any("could not be read: " in (s.reason or "") for s in found.sites):
        raise Mismatch(f"notes: {found.notes}")
    sites = found.sites
    for n, (a, b, c) in enumerate(zip(got, want, best, strict=True)):
        for k, (x, y, z) in enumerate(zip(a, b, c, strict=True)):
            _same(x, y, z, f"call {n}, result {k}")
    for (name, x), y, z in zip(module.named_buffers(), eager.buffers(), exact.buffers(), strict=True):
        _same(x, y, z, f"buffer {name}")
    if len(sites) < p.sites:
        raise Mismatch(f"{p.sites} sites, {len(sites)} reported")
    if any(s.status != "fused" and not s.reason for s in sites):
        raise Mismatch("a site is left alone and no reason is given")
    return sites


def check_gradients(p: Program, seed: int) -> bool:
    """Whether the program can be differentiated at all; raises Mismatch where its compiled form gives other gradients
    of its float inputs and parameters."""
    data = p.data(p.sizes, seed)

    def gradients(run: Callable[..., Any], module: torch.nn.Module, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [*module.parameters(), *(x for x in inputs if x.is_floating_point())]
        for x in leaves:
            x.requires_grad_()
        outs = [x for x in tree_leaves(run(*inputs)) if x.is_floating_point() and x.requires_grad]
        loss = sum((x * torch.arange(x.numel(), dtype=x.dtype).cos().view(x.shape)).sum() for x in outs)
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]

    eager, exact, module = p.module(seed), p.module(seed).double(), p.module(seed)
    try:
        want = gradients(eager, eager, copy.deepcopy(data))
    except (RuntimeError, TypeError, AttributeError):  # it writes to what the backward pass needs
        return False
    best = gradients(exact, exact, tree_map_only(torch.Tensor, _double, copy.deepcopy(data)))
    torch._dynamo.reset()
    options = {"inductor": False, "measure": False}
    with kernels_of("oracle"):
        got = gradients(torch.compile(module, backend=backend.attncc_backend, options=options), module, data)
    for n, (a, b, c) in enumerate(zip(got, want, best, strict=True)):
        known = torch.isfinite(b) & torch.isfinite(c)  # a row that sees nothing may have no gradient, but must not
        _same(*(torch.where(known, x, torch.zeros_like(x)) for x in (a, b, c)), f"gradient {n}")
    return True


def _longer(s: Sizes) -> Sizes:
    return replace(s, b=s.b + 1 if s.b > 1 else 1, n=s.n + 3 if s.n > 1 else 1, m=s.m + 3 if s.m > 1 else 1)


def _double(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else x


def _outputs(f: Callable[..., Any], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        result = f(*inputs)
    return [x.clone() for x in (*tree_leaves(result), *inputs)]  # what it wrote to its inputs is a result too


def _same(got: torch.Tensor, want: torch.Tensor, best: torch.Tensor, where: str) -> None:
    if got.shape != want.shape or got.dtype != want.dtype:
        raise Mismatch(f"{where}: {got.dtype} {tuple(got.shape)}, wanted {want.dtype} {tuple(want.shape)}")
    if not want.is_floating_point():
        if not torch.equal(got, want):
            raise Mismatch(f"{where}: integers differ")
        return
    # where eager alone overflows (an exponential in float16), the exact value is as good as its NaN
    odd = ~torch.isfinite(want) & ~(torch.isfinite(best) & torch.isfinite(got))
    if not torch.equal(torch.nan_to_num(got[odd], 7.0), torch.nan_to_num(want[odd], 7.0)):
        raise Mismatch(f"{where}: where eager is not finite it gives {got[odd][:4]}, not {want[odd][:4]}")
    want = torch.where(torch.isfinite(want), want, best.to(want.dtype))
    x, y, z = (torch.where(odd | ~torch.isfinite(best), 0.0, t.double()) for t in (got, want, best))
    error, own = (x - z).abs(), (y - z).abs()
    own = own.amax(-1, keepdim=True) if own.dim() and own.numel() else own
    allowed = 4 * own + max(1e-5, 2 * torch.finfo(want.dtype).eps) * (1 + z.abs())
    if not bool((error <= allowed).all()):
        worst = (error - allowed).max()
        raise Mismatch(f"{where}: off by {worst:.3g} at {int((error > allowed).sum())} of {error.numel()} places")
