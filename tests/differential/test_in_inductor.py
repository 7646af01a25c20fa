"""`attncc.install_in_inductor`: programs that ask for Inductor get attncc's kernels, until it is undone."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import compile_fx
from torch.nn.functional import scaled_dot_product_attention

import attncc

FRESH = {"measure": False}


class Window(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.arange(x.shape[-2])
        near = (tokens[:, None] - tokens).abs() < 8
        return scaled_dot_product_attention(self.project(x), x, x, attn_mask=near)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    entry = compile_fx.compile_fx
    yield
    assert compile_fx.compile_fx is entry, "what was installed is left"


def statuses(report: Any) -> list[str]:
    return [site.status for site in report.sites]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "how",
    [
        pytest.param({}, id="plain"),
        pytest.param({"backend": "inductor"}, id="named"),
        pytest.param({"mode": "max-autotune-no-cudagraphs"}, id="mode", marks=pytest.mark.full),
        pytest.param({"options": {"epilogue_fusion": False}}, id="options", marks=pytest.mark.full),
    ],
)
def test_whatever_asks_for_inductor_is_fused(how: dict[str, Any]) -> None:
    model, x = Window(), torch.randn(1, 2, 64, 32)
    with attncc.install_in_inductor(FRESH), attncc.record() as report:
        close(torch.compile(model, **how)(x), model(x))
    assert statuses(report) == ["fused"] and report.sites[0].mask == "abs(i - j) <= 7"


@torch.no_grad()
def test_it_is_undone_and_what_was_compiled_stays() -> None:
    x = torch.randn(1, 2, 64, 32)
    before, during, after = Window(), Window(), Window()
    compiled = {m: torch.compile(m) for m in (before, during, after)}
    compiled[before](x)
    installed = attncc.install_in_inductor(FRESH)
    compiled[during](torch.cat([x, x], 2))
    installed.undo()
    installed.undo()
    with attncc.record() as report:
        compiled[during](torch.cat([x, x], 2))
    assert statuses(report) == ["fused"]
    torch._dynamo.reset()
    with attncc.record() as report:
        close(torch.compile(after)(x), after(x))
    assert statuses(report) == []


def test_two_may_be_undone_in_any_order() -> None:
    own = compile_fx.compile_fx
    first = attncc.install_in_inductor(FRESH)
    second = attncc.install_in_inductor(FRESH)
    first.undo()
    assert compile_fx.compile_fx is not own
    second.undo()
    assert compile_fx.compile_fx is own


def test_options_are_attnccs_own() -> None:
    with pytest.raises(RuntimeError, match="no option 'mesure'"):
        attncc.install_in_inductor({"mesure": False})
    with pytest.raises(RuntimeError, match="has no option 'inductor'"):
        attncc.install_in_inductor({"inductor": False})


def test_gradients_are_those_of_eager() -> None:
    model, x = Window(), torch.randn(1, 2, 64, 32, requires_grad=True)
    model(x).square().sum().backward()
    wanted, x.grad = x.grad, None
    with attncc.install_in_inductor(FRESH), attncc.record() as report:
        torch.compile(model)(x).square().sum().backward()
    assert statuses(report) == ["fused"] and x.grad is not None and wanted is not None
    torch.testing.assert_close(x.grad, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.full
@torch.no_grad()
def test_export_for_another_process_is_left_to_inductor(tmp_path: Path) -> None:
    model, x = Window(), torch.randn(1, 2, 64, 32)
    program = torch.export.export(model, (x,))
    with attncc.install_in_inductor(FRESH), attncc.record() as report:
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    close(torch._inductor.aoti_load_package(path)(x), model(x))
    assert statuses(report) == []


def tiny_bert() -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers, config


@pytest.mark.full
def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    """It knows backends by a list, and attncc is not in it."""
    transformers, config = tiny_bert()
    pytest.importorskip("accelerate")
    model = transformers.BertForSequenceClassification(config)
    data = [{"input_ids": torch.randint(0, 50, (16,)), "labels": torch.tensor(n % 2)} for n in range(8)]
    given = transformers.TrainingArguments(
        output_dir=str(tmp_path), torch_compile=True, max_steps=2, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    with attncc.install_in_inductor(FRESH), attncc.record() as report:
        done = transformers.Trainer(model=model, args=given, train_dataset=data).train()
    assert done.global_step == 2 and done.training_loss > 0
    assert statuses(report) and set(statuses(report)) == {"fused"}


@pytest.mark.full
@torch.no_grad()
def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, x = Window(), torch.randn(1, 2, 64, 32)
    with attncc.install_in_inductor(FRESH), attncc.record() as report:
        prepared = accelerate.Accelerator(cpu=True, dynamo_backend="inductor").prepare_model(model)
        close(prepared(x), model(x))
    assert statuses(report) == ["fused"]


@pytest.mark.full
@torch.no_grad()
def test_sentence_transformers() -> None:
    transformers, config = tiny_bert()
    sentences = pytest.importorskip("sentence_transformers")
    pooling = importlib.import_module("sentence_transformers.models").Pooling(config.hidden_size)
    model = transformers.BertModel(config).eval()
    given = {"input_ids": torch.randint(0, 50, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.long)}

    class Words(nn.Module):
        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            found = model(features["input_ids"], features["attention_mask"])
            return features | {"token_embeddings": found.last_hidden_state}

    pooled = sentences.SentenceTransformer(modules=[Words(), pooling], device="cpu")
    wanted = pooled(dict(given))["sentence_embedding"]
    with attncc.install_in_inductor(FRESH), attncc.record() as report:
        pooled.compile()
        close(pooled(dict(given))["sentence_embedding"], wanted)
    assert statuses(report) == ["fused"]


@pytest.mark.full
@torch.no_grad()
def test_repeated_blocks_and_a_pipeline_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    denoiser = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=16,
        num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    pipeline = diffusers.DiTPipeline(denoiser, vae, diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def made() -> Tensor:
        g = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipeline([1], generator=g, num_inference_steps=2, output_type="np").images)

    wanted = made()
    with attncc.install_in_inductor(FRESH), attncc.record() as report:
        denoiser._repeated_blocks = ["BasicTransformerBlock"]
        denoiser.compile_repeated_blocks(fullgraph=True)
        torch.testing.assert_close(made(), wanted, rtol=1e-3, atol=1e-3)
    assert statuses(report) and set(statuses(report)) == {"fused"}


@pytest.mark.full
@torch.no_grad()
def test_generate_with_a_configuration_of_compiling() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    given = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    tokens = torch.randint(1, 50, (1, 8))
    wanted = model.generate(tokens, disable_compile=True, **given)
    compiling = transformers.generation.CompileConfig(mode="default")
    compiling._compile_all_devices = True
    with attncc.install_in_inductor(FRESH), attncc.record() as report:
        found = model.generate(tokens, compile_config=compiling, **given)
    assert torch.equal(found, wanted)
    assert statuses(report) and set(statuses(report)) == {"fused"}
