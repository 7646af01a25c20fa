"""Small models of well-known families with random weights, as targets to look at:

    attncc inspect examples.families:llama
    attncc inspect examples.families:whisper --ir

They need `transformers`. The attention is the one that transformers picks; `eager` spells it out in matmul and softmax.
"""

from typing import Any

import torch
from transformers import (
    AutoModel,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    ViTConfig,
    WhisperConfig,
)

Target = tuple[torch.nn.Module, dict[str, Any]]


def build(config: PretrainedConfig, attention: str = "sdpa") -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModel.from_config(config, attn_implementation=attention).eval()


def ids(batch: int, length: int, vocabulary: int = 1000) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, length))


def gpt2(attention: str = "sdpa") -> Target:
    config = GPT2Config(vocab_size=1000, n_embd=256, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return build(config, attention), {"input_ids": ids(2, 256), "use_cache": False}


def bert(attention: str = "sdpa") -> Target:
    config = BertConfig(
        vocab_size=1000, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512
    )
    mask = torch.ones(2, 256, dtype=torch.long)
    mask[1, 200:] = 0
    return build(config, attention), {"input_ids": ids(2, 256), "attention_mask": mask}


def llama(attention: str = "sdpa") -> Target:
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        intermediate_size=512,
    )  # fmt: skip
    return build(config, attention), {"input_ids": ids(2, 256), "use_cache": False}


def vit(attention: str = "sdpa") -> Target:
    config = ViTConfig(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512)
    return build(config, attention), {"pixel_values": torch.randn(2, 3, 224, 224)}


def whisper(attention: str = "sdpa") -> Target:
    config = WhisperConfig(
        vocab_size=1000, d_model=128, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    inputs = {"input_features": torch.randn(1, 80, 3000), "decoder_input_ids": ids(1, 64), "use_cache": False}
    return build(config, attention), inputs


def llama_eager() -> Target:
    return llama("eager")


def bert_eager() -> Target:
    return bert("eager")
