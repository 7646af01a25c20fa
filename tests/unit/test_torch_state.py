"""Running a graph leaves torch as it was, wherever it fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attncc
from attncc.driver import capture, rewriting
from attncc.driver.backend import Collected, collecting
from attncc.torch_private.state import preserved, settings


def state() -> list[tuple[str, Any]]:
    return [(setting.name, setting.read()) for setting in settings()]


#: What changes each of the settings, by its name.
CHANGES: dict[str, Callable[[], object]] = {
    "transforms": lambda: torch._C._functorch._grad_increment_nesting(),
    "forward-mode level": lambda: torch._C._enter_dual_level(),
    "gradients": lambda: torch._C._set_grad_enabled(False),
    "forward-mode gradients": lambda: torch._C._set_fwd_grad_enabled(False),
    "threads of the backward": lambda: torch._C._set_multithreading_enabled(False),
    "hooks of saved tensors": lambda: torch._C._autograd._saved_tensors_hooks_disable("not here"),
    "autocast on cpu": lambda: torch.set_autocast_enabled("cpu", True),
    "autocast's dtype on cpu": lambda: torch.set_autocast_dtype("cpu", torch.float16),
    "autocast's cache": lambda: torch.set_autocast_cache_enabled(False),
    "autocast's nesting": lambda: torch.autocast_increment_nesting(),
    "flash attention": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "attention by products": lambda: torch.backends.cuda.enable_math_sdp(False),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_is_put_back(name: str) -> None:
    before = state()
    with pytest.raises(KeyError), preserved():
        CHANGES[name]()
        assert [x for x, y in zip(state(), before, strict=True) if x != y], "nothing was changed"
        raise KeyError
    assert state() == before


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 4).softmax(-1) @ v


def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v).square().sum()


TRANSFORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "grad": lambda q, k, v: torch.func.grad(loss)(q, k, v),
    "penalty": lambda q, k, v: torch.func.grad(loss)(q, k, v).square().sum(),
    "value and gradient": lambda q, k, v: torch.func.grad_and_value(loss)(q, k, v)[0],
    "jvp": lambda q, k, v: torch.func.jvp(lambda q: attend(q, k, v), (q,), (k,))[1],
    "vjp": lambda q, k, v: torch.func.vjp(lambda q: attend(q, k, v), q)[1](v)[0],
    "jacobian": lambda q, k, v: torch.func.jacrev(lambda x: attend(x, k[0], v[0]).sum(-1))(q[0]),
    "hessian": lambda q, k, v: torch.func.hessian(lambda x: loss(x, k[0, 0], v[0, 0]))(q[0, 0, :2, :3] @ k[0, 0, :3]),
    "mapped gradient": lambda q, k, v: torch.vmap(torch.func.grad(loss))(q, k, v),
    "gradient of mapped": lambda q, k, v: torch.func.grad(lambda q: torch.vmap(attend)(q, k, v).sin().sum())(q),
    "gradient of gradient": lambda q, k, v: torch.func.grad(
        lambda x: torch.func.grad(loss)(x, k, v).square().sum())(q),
    "beside one outside": lambda q, k, v: attend(torch.func.grad(loss)(q, k, v), k, v),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_inside_a_compiled_function(name: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    given = [torch.randn(2, 2, 12, 16) for _ in range(3)]
    before = state()
    want = TRANSFORMS[name](*given)
    found = Collected()
    token = collecting.set(found)
    try:
        have = torch.compile(TRANSFORMS[name], backend="attncc", options={"measure": False})(*given)
    finally:
        collecting.reset(token)
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    assert state() == before
    assert not found.notes
    inside, *outside = found.sites
    assert inside.status == "refused" and "under torch.func." in (inside.reason or "")
    assert [site.status for site in outside] == (["fused"] if name == "beside one outside" else [])


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        return attend(*self.qkv(x).chunk(3, -1))


def test_hooks_of_a_checkpoint_around_do_not_see_a_reading() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(2, 10, 16, requires_grad=True)
    compiled = torch.compile(layer, backend="attncc", options={"measure": False})
    out = checkpoint(compiled, x, use_reentrant=False)
    assert isinstance(out, Tensor)
    (have,) = torch.autograd.grad(out.square().sum(), x)
    (want,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def fails(*_: object, **__: object) -> None:
    raise LookupError("on purpose")


def test_an_unforeseen_error_keeps_its_traceback_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lenient: None
) -> None:
    monkeypatch.setattr(capture, "read", fails)
    with caplog.at_level(logging.ERROR, logger="attncc"):
        report = attncc.explain(attend, *(torch.randn(2, 5, 8) for _ in range(3)))
    assert "LookupError: on purpose" in report.notes[0]
    (record,) = [r for r in caplog.records if r.name == "attncc"]
    assert record.exc_info is not None and record.exc_info[0] is LookupError and record.exc_info[2] is not None


@pytest.mark.parametrize(("module", "name"), [(capture, "read"), (rewriting, "lift_all"), (rewriting, "Editor")])
def test_strict_mode_raises_it(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, name, fails)
    with pytest.raises(Exception, match="on purpose"):
        attncc.explain(attend, *(torch.randn(2, 5, 8) for _ in range(3)))
