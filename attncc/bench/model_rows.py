"""What `attncc bench --suite models` runs: whole models of usual sizes, random weights, a call of inference each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Made:
    """A model, what it is called with, and what is done to that before each call, the same for every rival."""

    model: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    before: Callable[[dict[str, Any]], None] = lambda _: None


@dataclass(frozen=True)
class ModelRow:
    """`make(quick, dtype)` gives the model; `least` is the goal against Inductor, by dtype."""

    name: str
    make: Callable[[bool, torch.dtype], Made]
    least: dict[str, float] = field(default_factory=dict[str, float])


def rows() -> list[ModelRow]:
    """What is measured. `quick` makes two layers of each."""
    return [
        ModelRow("MiniLM 8x128", lambda quick, _: _bert(quick, 8, 128, layers=6, width=384), {"f32": 1.10}),
        ModelRow("BERT-base 1x512", lambda quick, _: _bert(quick, 1, 512, layers=12, width=768), {"f32": 1.10}),
        ModelRow("ViT-B 224", _vit, {"f32": 1.08}),
        ModelRow("Swin-T 224", _swin, {"f32": 1.15}),
        ModelRow("ModernBERT-base 1x4096", _modernbert, {"f32": 2.0}),
        ModelRow("Llama-300M prefill 2048", _prefill, {"f32": 1.15}),
        ModelRow("Llama-300M decode at 8192", _llama_decode, {"f32": 1.5}),
        ModelRow("GPT-2 decode at 1024", _gpt2_decode),
        ModelRow("Whisper-base encoder", _whisper, {"f32": 1.15}),
        ModelRow("SD-like UNet 64x64", _unet, {"f32": 1.15}),
    ]


def _transformers() -> Any:
    return importlib.import_module("transformers")  # takes seconds


def _layers(quick: bool, layers: int) -> int:
    return 2 if quick else layers


def _tokens(batch: int, length: int, vocabulary: int = 30000) -> torch.Tensor:
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def _bert(quick: bool, batch: int, length: int, *, layers: int, width: int) -> Made:
    """A batch whose sequences have different lengths, padded, as an encoder is called."""
    t = _transformers()
    config = t.BertConfig(hidden_size=width, num_hidden_layers=_layers(quick, layers), num_attention_heads=12,
                          intermediate_size=4 * width)  # fmt: skip
    ends = torch.linspace(length, length // 2 if batch > 1 else length, batch).long().view(-1, 1)
    mask = (torch.arange(length) < ends).long()
    return Made(t.BertModel(config), (_tokens(batch, length),), {"attention_mask": mask})


def _vit(quick: bool, dtype: torch.dtype) -> Made:
    t = _transformers()
    return Made(t.ViTModel(t.ViTConfig(num_hidden_layers=_layers(quick, 12))), (_image(dtype),))


def _swin(quick: bool, dtype: torch.dtype) -> Made:
    t = _transformers()
    sizes: dict[str, Any] = {"depths": [2, 2], "num_heads": [3, 6]} if quick else {}
    return Made(t.SwinModel(t.SwinConfig(**sizes)), (_image(dtype),))


def _image(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(2)).to(dtype)


def _modernbert(quick: bool, _: torch.dtype) -> Made:
    t = _transformers()
    config = t.ModernBertConfig(num_hidden_layers=_layers(quick, 22))
    length = 512 if quick else 4096
    ids = _tokens(1, length)
    return Made(t.ModernBertModel(config), (ids,), {"attention_mask": torch.ones_like(ids)})


def _llama(quick: bool) -> Any:
    return _transformers().LlamaConfig(hidden_size=1024, num_hidden_layers=_layers(quick, 20), num_attention_heads=16,
                                       num_key_value_heads=8, intermediate_size=3072, vocab_size=32000,
                                       max_position_embeddings=16384)  # fmt: skip


def _prefill(quick: bool, _: torch.dtype) -> Made:
    ids = _tokens(1, 256 if quick else 2048)
    return Made(_transformers().LlamaModel(_llama(quick)), (ids,), {"use_cache": False})


def _llama_decode(quick: bool, dtype: torch.dtype) -> Made:
    config = _llama(quick)
    length = 512 if quick else 8192
    return _decode(_transformers().LlamaModel(config), config, config.num_key_value_heads, length, dtype)


def _gpt2_decode(quick: bool, dtype: torch.dtype) -> Made:
    config = _transformers().GPT2Config(n_layer=_layers(quick, 12))
    return _decode(_transformers().GPT2Model(config), config, config.n_head, 256 if quick else 1024, dtype)


def _decode(model: torch.nn.Module, config: Any, heads: int, length: int, dtype: torch.dtype) -> Made:
    """One more token where the cache holds `length - 1`. The cache counts what it has been given: the count is set back
    before each call, so that every call is the same step."""
    cache = _transformers().StaticCache(config=config, max_cache_len=length)
    width = config.hidden_size // config.num_attention_heads
    cache.early_initialization(1, heads, width, dtype, torch.device("cpu"))
    random = torch.Generator().manual_seed(3)
    for layer in cache.layers:
        layer.keys.normal_(generator=random)
        layer.values.normal_(generator=random)

    def again(given: dict[str, Any]) -> None:
        for layer in given["past_key_values"].layers:
            layer.cumulative_length.fill_(length - 1)

    position = torch.tensor([[length - 1]])
    given = {"past_key_values": cache, "position_ids": position, "use_cache": True}
    return Made(model, (_tokens(1, 1),), given, again)


def _whisper(quick: bool, dtype: torch.dtype) -> Made:
    t = _transformers()
    encoder: Any = importlib.import_module("transformers.models.whisper.modeling_whisper").WhisperEncoder
    config = t.WhisperConfig(d_model=512, encoder_layers=_layers(quick, 6), encoder_attention_heads=8,
                             encoder_ffn_dim=2048)  # fmt: skip
    sound = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(4)).to(dtype)
    return Made(encoder(config), (sound,))


def _unet(quick: bool, dtype: torch.dtype) -> Made:
    """The blocks of Stable Diffusion 1.5 at half its width."""
    diffusers: Any = importlib.import_module("diffusers")
    widths = (64, 128) if quick else (160, 320, 640, 640)
    down = ["CrossAttnDownBlock2D"] * (len(widths) - 1) + ["DownBlock2D"]
    up = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (len(widths) - 1)
    model = diffusers.UNet2DConditionModel(sample_size=64, block_out_channels=widths, down_block_types=tuple(down),
                                           up_block_types=tuple(up), cross_attention_dim=768, attention_head_dim=8,
                                           layers_per_block=1 if quick else 2)  # fmt: skip
    side, random = 32 if quick else 64, torch.Generator().manual_seed(5)
    noise = torch.randn(1, 4, side, side, generator=random).to(dtype)
    text = torch.randn(1, 77, 768, generator=random).to(dtype)
    return Made(model, (noise, torch.tensor(10), text))
