"""Real `generate()` runs: the same tokens as eager, with dynamic, static, sliding, hybrid and chunked caches, left
padding and cross attention; and of a static cache, what was written alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers.cache_utils import StaticLayer

import attncc.kernels.skip_tables

SMALL: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
    "intermediate_size": 64, "vocab_size": 100, "eos_token_id": 99, "bos_token_id": 98, "pad_token_id": 97,
}  # fmt: skip
CROSS: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 100, "bos_token_id": 0, "pad_token_id": 1,
    "eos_token_id": 99, "decoder_start_token_id": 2,
}  # fmt: skip
HYBRID = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
CHUNKED = {
    "head_dim": 16, "attention_chunk_size": 8, "num_local_experts": 1, "intermediate_size_mlp": 64,
    "layer_types": ["chunked_attention", "full_attention"],
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 8, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
T5 = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 16, "d_ff": 32, "vocab_size": 100, "pad_token_id": 0,
      "decoder_start_token_id": 0, "eos_token_id": 99}  # fmt: skip
#: family -> (model class, configuration class, configuration)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL),
    "mistral": ("MistralForCausalLM", "MistralConfig", SMALL | {"sliding_window": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", SMALL | HYBRID),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", SMALL | HYBRID),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", SMALL | CHUNKED),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", SMALL | HYBRID),
    "gpt-oss": (
        "GptOssForCausalLM", "GptOssConfig", SMALL | HYBRID | {"num_local_experts": 2, "num_experts_per_tok": 1}
    ),
    "deepseek-v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", SMALL | LATENT),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "bart": (
        "BartForConditionalGeneration", "BartConfig",
        CROSS | {"max_position_embeddings": 64, "forced_eos_token_id": None},
    ),
    "whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig",
        CROSS | {"num_mel_bins": 8, "max_source_positions": 50, "max_target_positions": 64},
    ),
}  # fmt: skip


def model_of(family: str, implementation: str) -> Any:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, config, values = FAMILIES[family]
    how = {} if family == "t5" else {"attn_implementation": implementation}
    return getattr(transformers, model)(getattr(transformers, config)(**values, **how)).eval()


def compiled(model: Any) -> Any:
    model = copy.deepcopy(model)
    model.forward = torch.compile(model.forward, backend="attncc", options={"inductor": False, "measure": False})
    return model


def question(family: str, tokens: int = 11) -> dict[str, Any]:
    """A prompt, padded: at its left for decoders, at its right for encoders."""
    if family == "whisper":
        return {"input_features": torch.randn(2, 8, 100)}
    ids = torch.randint(3, 90, (2, tokens))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask if family in ("t5", "bart") else mask.flip(-1)}


@pytest.mark.parametrize(
    ("family", "implementation", "cache"),
    [
        ("llama", "sdpa", None),
        ("gemma2", "eager", "static"),
        ("mistral", "eager", "static"),
        ("whisper", "sdpa", "static"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ("llama", "eager", "static"), ("llama", "sdpa", "static"), ("mistral", "sdpa", None),
                ("gemma2", "eager", None), ("gemma3", "sdpa", "static"), ("gemma3", "eager", None),
                ("llama4", "sdpa", "static"), ("t5", "eager", None), ("t5", "eager", "static"), ("bart", "eager", None),
                ("whisper", "eager", None), ("cohere2", "sdpa", "static"), ("gpt-oss", "eager", "static"),
                ("deepseek-v3", "eager", "static"),
            )
        ),
    ],
)  # fmt: skip
def test_generate_gives_eagers_tokens(family: str, implementation: str, cache: str | None) -> None:
    model = model_of(family, implementation)
    asked: dict[str, Any] = question(family) | {"max_new_tokens": 12, "do_sample": False, "disable_compile": True}
    if cache is not None:
        asked["cache_implementation"] = cache
    assert torch.equal(compiled(model).generate(**asked), model.generate(**asked))


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.full)])
def test_what_a_static_cache_does_not_hold_yet_is_not_read(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in every place that was not written: a weight of 0 would not keep it out, as eager shows.

    The prompt fills whole blocks of the map of its mask, so that no block holds a place that was not written."""
    monkeypatch.setattr(attncc.kernels.skip_tables, "WORTHWHILE", 0)  # as for caches of many tokens
    model = model_of(family, "sdpa")
    given = {"input_ids": torch.randint(3, 90, (2, 16))}
    asked: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "disable_compile": True}
    wanted = model.generate(**given, **asked)
    prepare = StaticLayer.lazy_initialization

    def filled(self: Any, *args: Any) -> None:
        prepare(self, *args)
        self.keys.fill_(torch.nan)
        self.values.fill_(torch.nan)

    monkeypatch.setattr(StaticLayer, "lazy_initialization", filled)
    asked["cache_implementation"] = "static"
    assert not torch.equal(model.generate(**given, **asked), wanted)
    assert torch.equal(compiled(model).generate(**given, **asked), wanted)
