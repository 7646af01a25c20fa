"""Real `generate()` runs: the same tokens as eager, with dynamic, static and sliding caches and left padding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

SMALL: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
    "intermediate_size": 64, "vocab_size": 100, "eos_token_id": 99, "bos_token_id": 98, "pad_token_id": 97,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "implementation", "cache"),
    [
        ("llama", "sdpa", None),
        ("llama", "eager", "static"),
        ("mistral", "eager", "static"),
        pytest.param("llama", "sdpa", "static", marks=pytest.mark.full),
        pytest.param("mistral", "sdpa", None, marks=pytest.mark.full),
    ],
)
def test_generate_gives_eagers_tokens(family: str, implementation: str, cache: str | None) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    if family == "llama":
        config: Any = transformers.LlamaConfig(**SMALL, attn_implementation=implementation)
    else:
        config = transformers.MistralConfig(**SMALL, attn_implementation=implementation, sliding_window=8)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, 90, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    asked: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, "disable_compile": True}
    if cache is not None:
        asked["cache_implementation"] = cache
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(
        compiled.forward, backend="attncc", options={"inductor": False, "measure": False}
    )
    assert torch.equal(compiled.generate(ids, **asked), model.generate(ids, **asked))
