"""Nothing of the size of a mask is made: not by the graph, not by Inductor's code, not by kernels and their tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from allocations import allocations

from attncc.dynamo import Collected, collecting

N = 1024  # from here on kernels make tables for documents and padding
SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50,
    "max_position_embeddings": N, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED: dict[str, Any] = SMALL | {"num_key_value_heads": 1}
T5: dict[str, Any] = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 16, "d_ff": 32, "vocab_size": 50}


def model(name: str, attention: str) -> Any:
    how = {"attn_implementation": attention}
    made: dict[str, Callable[[], Any]] = {
        "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**GROUPED, **how)),
        "mistral": lambda: transformers.MistralModel(transformers.MistralConfig(**GROUPED, **how, sliding_window=64)),
        "gemma2": lambda: transformers.Gemma2Model(
            transformers.Gemma2Config(**GROUPED, **how, head_dim=16, sliding_window=64)),
        "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)),
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL, **how)),
        "modernbert": lambda: transformers.ModernBertModel(
            transformers.ModernBertConfig(**SMALL, **how, cls_token_id=1, sep_token_id=2, local_attention=64)),
    }  # fmt: skip
    return made[name]().eval()


@pytest.mark.parametrize(
    ("name", "attention", "dtype", "padding"),
    [
        ("llama", "sdpa", torch.float32, 0),
        ("t5", "eager", torch.float32, N // 4),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ("llama", "eager", torch.bfloat16, 0), ("llama", "sdpa", torch.float32, -N // 4),
                ("mistral", "sdpa", torch.float32, 0), ("mistral", "eager", torch.bfloat16, 0),
                ("gemma2", "eager", torch.float32, 0), ("t5", "eager", torch.bfloat16, 0),
                ("bert", "sdpa", torch.float32, N // 4), ("bert", "eager", torch.bfloat16, N // 4),
                ("modernbert", "sdpa", torch.float32, N // 4), ("modernbert", "eager", torch.bfloat16, N // 4),
            )
        ),
    ],
)  # fmt: skip
def test_no_block_holds_a_byte_a_pair(name: str, attention: str, dtype: torch.dtype, padding: int) -> None:
    """`padding` tokens at the end are hidden, or at the start where it is negative."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    net, ids = model(name, attention).to(dtype), torch.randint(3, 50, (1, N))
    given: dict[str, Any] = {"input_ids": ids}
    if padding:
        kept = torch.arange(N)[None] < N - padding if padding > 0 else torch.arange(N)[None] >= -padding
        given["attention_mask"] = kept.to(torch.int64)
    compiled = torch.compile(net, backend="attncc", options={"measure": False})
    found = Collected()
    token = collecting.set(found)
    try:
        with torch.no_grad():
            compiled(**given)
            blocks = allocations(lambda: compiled(**given))
    finally:
        collecting.reset(token)
    assert [s.status for s in found.sites] == ["fused", "fused"]
    assert max(blocks) < N * N
    assert "masked_fill" not in found.after[-1] and "scaled_dot_product_attention" not in found.after[-1]
