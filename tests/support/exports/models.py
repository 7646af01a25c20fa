"""Models as they are exported: tensors in, tensors out, few and narrow layers of random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LAYERS, HEADS, WIDTH, ROWS = 2, 4, 32, 12


@dataclass(frozen=True)
class Model:
    """A model with what to call it with. `open_axes` are the dimensions that may be open, by name, for each argument;
    `sites` is how many attentions it has."""

    module: nn.Module
    args: tuple[Tensor, ...]
    open_axes: tuple[dict[int, str], ...]
    sites: int


class Last(nn.Module):
    """A model of transformers whose result is its first output, called by the names of its arguments."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        self.model, self.names = model.eval(), names

    def forward(self, *args: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, args, strict=True)), return_dict=False)[0]


class NoCache(Last):
    def forward(self, *args: Tensor) -> Tensor:
        given = dict(zip(self.names, args, strict=True))
        return self.model(**given, use_cache=False, return_dict=False)[0]


class Cached(nn.Module):
    """A decoder as it is served: new tokens, a mask over all, and keys and values of the past in and out."""

    def __init__(self, model: nn.Module, layers: int) -> None:
        super().__init__()
        self.model, self.layers = model.eval(), layers

    def forward(self, ids: Tensor, mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache  # noqa: PLC0415

        pairs = [(past[2 * n], past[2 * n + 1]) for n in range(self.layers)]
        cache = DynamicCache(pairs)
        out = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        new = [x for layer in out.past_key_values.layers for x in (layer.keys, layer.values)]
        return (out.last_hidden_state, *new)


class First(nn.Module):
    """A decoder's first call: no past, and keys and values out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        out = self.model(input_ids=ids, attention_mask=mask, use_cache=True)
        return (out.last_hidden_state, *(x for layer in out.past_key_values.layers for x in (layer.keys, layer.values)))


TEXT = {0: "batch", 1: "length"}


def _ids(batch: int = 2, rows: int = ROWS) -> Tensor:
    return torch.randint(3, 90, (batch, rows), generator=torch.Generator().manual_seed(0))


def _mask(batch: int = 2, rows: int = ROWS) -> Tensor:
    mask = torch.ones(batch, rows, dtype=torch.long)
    mask[-1, rows - 3 :] = 0
    return mask


def _text(model: nn.Module, wrapper: type[Last] = Last, sites: int = LAYERS) -> Model:
    return Model(wrapper(model, "input_ids", "attention_mask"), (_ids(), _mask()), (TEXT, TEXT), sites)


def bert() -> Model:
    from transformers import BertConfig, BertModel  # noqa: PLC0415

    return _text(BertModel(BertConfig(
        vocab_size=99, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=48,
        max_position_embeddings=64,
    )))  # fmt: skip


def deberta() -> Model:
    from transformers import DebertaV2Config, DebertaV2Model  # noqa: PLC0415

    return _text(DebertaV2Model(DebertaV2Config(
        vocab_size=99, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=48,
        max_position_embeddings=64, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"],
        share_att_key=True, norm_rel_ebd="layer_norm",
    )))  # fmt: skip


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model  # noqa: PLC0415

    return GPT2Model(GPT2Config(vocab_size=99, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel  # noqa: PLC0415

    return LlamaModel(LlamaConfig(
        vocab_size=99, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64,
    ))  # fmt: skip


def gpt2() -> Model:
    return _text(_gpt2(), NoCache)


def llama() -> Model:
    return _text(_llama(), NoCache)


def _with_past(model: nn.Module, heads: int) -> Model:
    past, new = 7, 3
    g = torch.Generator().manual_seed(1)
    pairs = tuple(torch.randn(2, heads, past, WIDTH // HEADS, generator=g) for _ in range(2 * LAYERS))
    axes = {0: "batch", 2: "past"}
    return Model(Cached(model, LAYERS), (_ids(2, new), torch.ones(2, past + new, dtype=torch.long), *pairs),
                 ({0: "batch", 1: "new"}, {0: "batch", 1: "total"}, *(axes for _ in pairs)), LAYERS)  # fmt: skip


def gpt2_first() -> Model:
    return Model(First(_gpt2()), (_ids(), _mask()), (TEXT, TEXT), LAYERS)


def gpt2_cached() -> Model:
    return _with_past(_gpt2(), HEADS)


def llama_cached() -> Model:
    return _with_past(_llama(), 2)


def vit() -> Model:
    from transformers import ViTConfig, ViTModel  # noqa: PLC0415

    model = ViTModel(ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=48, image_size=24,
        patch_size=6,
    ))  # fmt: skip
    return Model(Last(model, "pixel_values"), (torch.randn(2, 3, 24, 24),), ({0: "batch"},), LAYERS)


def swin() -> Model:
    from transformers import SwinConfig, SwinModel  # noqa: PLC0415

    model = SwinModel(SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4,
    ))  # fmt: skip
    return Model(Last(model, "pixel_values"), (torch.randn(2, 3, 32, 32),), ({0: "batch"},), 4)


def t5() -> Model:
    from transformers import T5Config, T5Model  # noqa: PLC0415

    model = T5Model(T5Config(
        vocab_size=99, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=LAYERS, num_decoder_layers=LAYERS, num_heads=HEADS,
        decoder_start_token_id=1, pad_token_id=0,
    ))  # fmt: skip
    names = "input_ids", "attention_mask", "decoder_input_ids"
    return Model(NoCache(model, *names), (_ids(), _mask(), _ids(2, 8)), (TEXT, TEXT, {0: "batch", 1: "answer"}),
                 3 * LAYERS)  # fmt: skip


def whisper() -> Model:
    from transformers import WhisperConfig, WhisperModel  # noqa: PLC0415

    model = WhisperModel(WhisperConfig(
        vocab_size=99, num_mel_bins=8, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_source_positions=32, max_target_positions=64, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, suppress_tokens=None, begin_suppress_tokens=None,
    ))  # fmt: skip
    names = "input_features", "decoder_input_ids", "decoder_attention_mask"
    answer = {0: "batch", 1: "answer"}
    return Model(NoCache(model, *names), (torch.randn(2, 8, 64), _ids(2, 8), torch.ones(2, 8, dtype=torch.long)),
                 ({0: "batch"}, answer, answer), 3 * LAYERS)  # fmt: skip


class TwoTowers(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.eval()

    def forward(self, ids: Tensor, pixels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(input_ids=ids, pixel_values=pixels, attention_mask=mask)
        return out.text_embeds, out.image_embeds


def clip() -> Model:
    from transformers import CLIPConfig, CLIPModel  # noqa: PLC0415

    size: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
                            "num_attention_heads": HEADS}  # fmt: skip
    model = CLIPModel(CLIPConfig(
        text_config={**size, "vocab_size": 99, "max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 1},
        vision_config={**size, "image_size": 24, "patch_size": 6}, projection_dim=16,
    ))  # fmt: skip
    return Model(TwoTowers(model), (_ids(), torch.randn(2, 3, 24, 24), _mask()), (TEXT, {0: "batch"}, TEXT), 2 * LAYERS)


class Denoiser(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.eval()

    def forward(self, x: Tensor, at: Tensor, text: Tensor) -> Tensor:
        return self.model(x, at, text, return_dict=False)[0]


def unet() -> Model:
    from diffusers import UNet2DConditionModel  # noqa: PLC0415

    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    args = torch.randn(2, 4, 8, 8), torch.tensor([3, 3]), torch.randn(2, 5, 16)
    # one block down, the one between, two up, each with one attention on itself and one on the text
    return Model(Denoiser(model), args, ({0: "batch"}, {0: "batch"}, {0: "batch", 1: "length"}), 8)


MODELS: dict[str, Callable[[], Model]] = {
    f.__name__: f for f in (bert, deberta, gpt2, gpt2_first, gpt2_cached, llama, llama_cached, vit, swin, t5, whisper,
                            clip, unet)
}  # fmt: skip


def made(name: str, spelling: str = "eager") -> Model:
    """A model from a fixed seed, its attentions spelled so where it is one of transformers."""
    torch.manual_seed(0)
    found = MODELS[name]()
    for x in found.module.modules():
        config = getattr(x, "config", None)
        if config is not None and hasattr(config, "_attn_implementation") and name != "deberta":
            set_spelling = getattr(x, "set_attn_implementation", None)
            if set_spelling is not None:
                set_spelling(spelling)
    return found
