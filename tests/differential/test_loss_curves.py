"""Training for some steps: losses of a compiled model stay by those of eager, as near to float64 as eager's own are,
under autocast, with a GradScaler, over lengths that change, and in the Trainer of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attncc
from attncc.driver.backend import Collected, collecting

WORDS, WIDTH, HEADS, STEPS = 40, 32, 2, 6


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.near = nn.Embedding(9, HEADS)  # a bias by distance
        self.slope = nn.Parameter(torch.full((HEADS, 1, 1), 0.1))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        at = torch.arange(x.shape[1])
        far = at[:, None] - at
        scores = q @ k.mT * 0.25 + self.near(far.clamp(0, 8)).permute(2, 0, 1) - self.slope * far.abs()
        scores = scores.masked_fill(far < 0, -torch.inf).masked_fill(~real[:, None, None], -1e9)
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x, real)
        return F.layer_norm(x, x.shape[-1:]) @ self.words.weight.T


def batches(lengths: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    for n, length in enumerate(lengths):
        tokens = torch.randint(0, WORDS, (3, length), generator=torch.Generator().manual_seed(n))
        yield tokens, torch.arange(length) < torch.tensor([[length], [length - 5], [length // 2]])


def curve(
    model: nn.Module, call: Callable[..., Tensor], lengths: Sequence[int], *,
    around: Callable[[], AbstractContextManager[object]] = nullcontext, scale: float = 0.0,
) -> Tensor:  # fmt: skip
    """The loss of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=bool(scale), init_scale=scale or 1.0)
    losses: list[Tensor] = []
    for tokens, real in batches(lengths):
        with around():
            out = call(tokens, real)
        loss = F.cross_entropy(out.flatten(0, 1).to(torch.promote_types(out.dtype, torch.float32)), tokens.flatten())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach().double())
    return torch.stack(losses)


def curves(lengths: Sequence[int], options: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor, Tensor, Collected]:
    """Of the compiled model, of eager, and in float64; and what was found."""
    torch.manual_seed(0)
    models = [Model() for _ in range(3)]
    for m in models[1:]:
        m.load_state_dict(models[0].state_dict())
    found = Collected()
    token = collecting.set(found)
    try:
        run = torch.compile(models[0], backend="attncc", **options)
        got = curve(models[0], run, lengths, **more)
    finally:
        collecting.reset(token)
    return got, curve(models[1], models[1], lengths, **more), curve(models[2].double(), models[2], lengths), found


def off(got: Tensor, want: Tensor) -> float:
    """Of a curve as a whole: of a single loss, eager may be right by chance."""
    return float((got - want).square().mean().sqrt())


def half(dtype: torch.dtype) -> Callable[[], AbstractContextManager[object]]:
    return lambda: torch.autocast("cpu", dtype)


KINDS: dict[str, tuple[float, dict[str, Any]]] = {
    "float32": (1e-6, {}),
    "bfloat16": (2e-3, {"around": half(torch.bfloat16)}),
    "float16": (3e-4, {"around": half(torch.float16), "scale": 2.0**10}),
}


@pytest.mark.parametrize(
    "kind", ["float32", *(pytest.param(x, marks=pytest.mark.full) for x in ("bfloat16", "float16"))]
)
def test_losses(kind: str) -> None:
    unit, more = KINDS[kind]
    got, own, exact, found = curves([40] * STEPS, {"options": {"measure": False, "inductor": False}}, **more)
    assert [s.status for s in found.sites] == ["fused"] * 2 and not found.notes
    assert all("kernel" in s.backward for s in found.sites)
    assert off(got, exact) <= 2 * off(own, exact) + unit * off(exact, 0 * exact), (got, own, exact)
    assert float(exact[-1]) < 0.95 * float(exact[0]), "nothing is learned, so nothing is compared"


@pytest.mark.full
def test_losses_over_lengths_that_change() -> None:
    lengths = [40, 33, 64, 17, 40, 90]
    more = {"dynamic": True, "options": {"measure": False, "inductor": False}}
    got, own, exact, found = curves(lengths, more)
    assert {s.status for s in found.sites} == {"fused"} and len(found.sites) == 2, "one graph serves all lengths"
    assert off(got, exact) <= 2 * off(own, exact) + 1e-6 * off(exact, 0 * exact), (got, own, exact)


Trained = tuple[Any, list[dict[str, Tensor]]]  # a model with its data


def bert(t: Any) -> Trained:
    config = t.BertConfig(vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=2,
                          intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    data = [{"input_ids": x, "attention_mask": (torch.arange(24) < 24 - n).long(), "labels": torch.tensor(n % 2)}
            for n, x in enumerate(_rows())]  # fmt: skip
    return t.BertForSequenceClassification(config), data


def gpt2(t: Any) -> Trained:
    config = t.GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=2, n_positions=32, attn_pdrop=0.0,
                          embd_pdrop=0.0, resid_pdrop=0.0, loss_type="ForCausalLM")  # fmt: skip
    data = [{"input_ids": x, "attention_mask": (torch.arange(24) < 24 - n).long(), "labels": x}
            for n, x in enumerate(_rows())]  # fmt: skip
    return t.GPT2LMHeadModel(config), data


def t5(t: Any) -> Trained:
    config = t.T5Config(vocab_size=WORDS, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
                        decoder_start_token_id=0)  # fmt: skip
    return t.T5ForConditionalGeneration(config), [{"input_ids": x, "labels": x.flip(0)[:12]} for x in _rows()]


def _rows() -> list[Tensor]:
    return [torch.randint(1, WORDS, (24,), generator=torch.Generator().manual_seed(n)) for n in range(8)]


@pytest.mark.full
@pytest.mark.parametrize("make", [bert, gpt2, t5])
def test_the_trainer_of_transformers(make: Callable[[Any], Trained], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model, data = make(transformers)
    eager = copy.deepcopy(model)

    def losses(model: Any, name: str, **more: Any) -> Tensor:
        given = transformers.TrainingArguments(
            output_dir=str(tmp_path / name), max_steps=STEPS, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            gradient_accumulation_steps=2, disable_tqdm=True, save_strategy="no", logging_steps=1, learning_rate=1e-2,
            logging_nan_inf_filter=False, seed=0, data_seed=0, **more,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=given, train_dataset=data)
        trainer.train()
        return torch.tensor([x["loss"] for x in trainer.state.log_history if "loss" in x], dtype=torch.float64)

    own = losses(eager, "eager")
    with attncc.install_in_inductor({"measure": False}), attncc.record() as report:
        got = losses(model, "attncc", torch_compile=True)
    assert len(got) == len(own) == STEPS
    assert any(s.status == "fused" and s.trains for s in report.sites), report.sites
    torch.testing.assert_close(got, own, rtol=2e-3, atol=2e-4)  # logs are rounded
    assert abs(float(own[-1] - own[0])) > 0.02, "nothing is learned, so nothing is compared"
