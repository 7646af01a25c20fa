"""Layers that are traced once and copied: the shadow is the one that tracing everything gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from parameters.thinned import thinned
from torch import Tensor, fx

from attncc.driver import capture, repeats
from attncc.torch_private import floats

pytestmark = pytest.mark.slow


def shadow(function: Callable[..., Any], *inputs: Any, dynamic: bool | None = None, **more: Any) -> capture.Reading:
    found: list[capture.Reading] = []

    def backend(gm: fx.GraphModule, arguments: list[Any]) -> Any:
        floats.ask_for_known_floats(gm)
        found.append(capture.read(gm, arguments))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic)(*inputs, **more)
    return found[0]


def described(reading: capture.Reading) -> list[object]:
    """Every node of a shadow that is no size: what it computes of which nodes and sizes, how its value lies in memory,
    the first node that shares that memory, and the nodes of Dynamo's graph that it comes from."""
    at: dict[fx.Node, object] = {}
    count = 0
    memory: dict[int, object] = {}
    facts = reading.facts()
    lines: list[object] = []
    for n in reading.shadow.graph.nodes:
        value = n.meta.get("val")
        if n.op != "placeholder" and isinstance(value, torch.SymInt | torch.SymBool):
            at[n] = str(value)
            continue
        at[n] = count = count + 1
        args = fx.map_arg((n.args, dict(n.kwargs)), lambda x: ("node", at[x]))
        held: object = None
        if isinstance(value, Tensor):
            storage = facts.storage(n)
            first = None if storage is None else memory.setdefault(storage, at[n])
            held = (str((value.shape, value.stride(), value.storage_offset())), value.dtype, first)
        elif isinstance(value, tuple | list):
            held = [str(x.shape) for x in value]
        origin, owner = reading.origin.get(n), reading.owner.get(n)
        lines.append((n.op, str(n.target), repr(args), held, origin and origin.name, owner and owner.name))
    return lines


def layers(x: Tensor, w: Tensor) -> Tensor:
    """Reshapes that copy, splits, views of views, a repeated constant, in-place writes."""
    for n in range(3):
        q, k, v = (x @ w).split(8, -1)
        k = k.view(2, -1, 2, 4).transpose(1, 2)
        q = q.reshape(2, 2, -1, 4)
        weights = (q @ k.mT + torch.ones(6, 6).tril()[None, None]).softmax(-1, dtype=torch.float32)
        flat = (weights @ v.view(2, -1, 2, 4).transpose(1, 2)).transpose(1, 2).reshape(2, -1, 8)
        a, b = flat.chunk(2, -1)
        x = x + F.pad(torch.cat([b, a], -1)[:, None, :4].squeeze(1), (0, 0, 0, 2)) * (n + 1)
        x[:, 1].mul_(2)
        x.add_(1)
    return x


def unsqueezed(x: Tensor, w: Tensor) -> Tensor:
    """Dynamo's fakes show the last shape of a tensor, not the one an operation saw."""
    for _ in range(2):
        y = (x @ w)[..., :8]
        x = y.exp()
        y.unsqueeze_(0)
        x = x + y[0]
    return x


def losses(x: Tensor, w: Tensor) -> Tensor:
    """An operation whose trace goes through a list of tensors."""
    for _ in range(2):
        x = x + F.mse_loss(x @ w[:, :8], x)
    return x


def shifted(x: Tensor, w: Tensor) -> Tensor:
    """Relative positions shifted by reshapes: lengths with squares in them, which a trace cannot make of symbols."""
    b, n, _ = x.shape
    for _ in range(2):
        y = (x @ w[:, :8]).view(b, -1, 2, 4).transpose(1, 2)
        p = (torch.cat([x, x], 1) @ w[:, 8:16]).view(b, -1, 2, 4)
        y = (y @ p.permute(0, 2, 3, 1)).view(b, 2, -1, n)
        y = y[:, :, 1:].view(b, 2, n, -1)
        x = x + y[..., :n].mean(1) @ x
    return x


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=16,
        vocab_size=50, attn_implementation="eager")),
    "gpt2": lambda: transformers.GPT2Model(transformers.GPT2Config(
        n_embd=16, n_layer=3, n_head=2, vocab_size=50, bos_token_id=1, eos_token_id=1)),
    "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(
        d_model=16, num_layers=3, num_heads=2, d_kv=8, d_ff=16, vocab_size=50)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "gradients", "dynamic"), thinned([layers, unsqueezed, losses, shifted], [False, True], [None, True])
)
def test_copies_are_what_a_trace_gives(
    function: Callable[..., Any], gradients: bool, dynamic: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = torch.randn(2, 6, 8), torch.randn(8, 24, requires_grad=gradients)
    with torch.set_grad_enabled(gradients):
        copied = described(shadow(function, *inputs, dynamic=dynamic))
        monkeypatch.setattr(repeats.Repeats, "run", lambda self, n, args, kwargs, trace: trace())
        assert copied == described(shadow(function, *inputs, dynamic=dynamic))


@pytest.mark.parametrize(("name", "dynamic"), thinned(list(MODELS), [True, None]))
def test_models_read_as_if_traced(name: str, dynamic: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = MODELS[name]().eval(), torch.randint(1, 40, (2, 9))
    with torch.no_grad():
        copied = described(shadow(model, ids, dynamic=dynamic))
        monkeypatch.setattr(repeats.Repeats, "run", lambda self, n, args, kwargs, trace: trace())
        assert copied == described(shadow(model, ids, dynamic=dynamic))


@pytest.mark.parametrize("dynamic", [None, True])
def test_equal_layers_are_traced_once(dynamic: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations that are traced do not grow with the number of layers."""

    def traced(layers: int) -> int:
        config = transformers.LlamaConfig(
            hidden_size=16, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=16, vocab_size=50,
        )  # fmt: skip
        calls: list[fx.Node] = []
        plain = capture._Shadow.call_function

        def counted(self: Any, target: Any, args: Any, kwargs: Any) -> Any:
            calls.append(target)
            return plain(self, target, args, kwargs)

        monkeypatch.setattr(capture._Shadow, "call_function", counted)
        with torch.no_grad():
            model, ids = transformers.LlamaModel(config).eval(), torch.randint(1, 40, (2, 9))
            shadow(model, ids, dynamic=dynamic, use_cache=False)
        monkeypatch.setattr(capture._Shadow, "call_function", plain)
        return len(calls)

    assert traced(5) == traced(2)
