"""Vision and speech models of transformers, tiny and random."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers

from zoo.case import Case, Made, lively
from zoo.text import VOCABULARY, padding, tokens

VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 24,
    "patch_size": 6, "num_channels": 3,
}  # fmt: skip
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}


def image(side: int = 24) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(7))


def seeing(
    family: str, implementation: str, settings: dict[str, Any], *, model: str = "Model", side: int = 24, **inputs: Any
) -> Callable[[], Made]:
    """A maker of a model that takes `pixel_values`."""

    def make() -> Made:
        config = getattr(transformers, f"{family}Config")(**settings)
        config._attn_implementation = implementation
        built = getattr(transformers, f"{family}{model}")(config)
        return lively(built), (), {"pixel_values": image(side), **inputs}

    return make


def hearing(family: str, settings: dict[str, Any], implementation: str = "eager", **inputs: Any) -> Callable[[], Made]:
    def make() -> Made:
        config = getattr(transformers, f"{family}Config")(**settings)
        config._attn_implementation = implementation
        return lively(getattr(transformers, f"{family}Model")(config)), (), inputs

    return make


def clip() -> Made:
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
            "vocab_size": VOCABULARY, "max_position_embeddings": 32, "projection_dim": 16,
            "bos_token_id": 0, "eos_token_id": 98}  # fmt: skip
    vision = VIT | {"num_hidden_layers": 1, "projection_dim": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    config._attn_implementation = "sdpa"
    model = lively(transformers.CLIPModel(config))
    return model, (), {"input_ids": tokens(19), "attention_mask": padding(), "pixel_values": image()}


def sam_vision(kind: str = "eager") -> Made:
    config = transformers.SamVisionConfig(
        hidden_size=16, output_channels=8, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=4,
        window_size=3, global_attn_indexes=[1], mlp_dim=24,
    )  # fmt: skip
    config._attn_implementation = kind
    return lively(transformers.SamVisionModel(config)), (), {"pixel_values": image(28)}


SPEECH = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": (16, 16), "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 32, "conv_depthwise_kernel_size": 3,
}  # fmt: skip
WAVE = torch.randn(2, 90, generator=torch.Generator().manual_seed(8))
WHISPER = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCABULARY, "num_mel_bins": 8,
    "max_source_positions": 16, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
MEL = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(9))
SEGFORMER = {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [4, 2], "hidden_sizes": [16, 32], "patch_sizes": [3, 3],
    "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
}  # fmt: skip
PVT = {
    "image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [4, 2], "hidden_sizes": [16, 32],
    "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
    "linear_attention": True,
}  # fmt: skip
CVT = {
    "embed_dim": [16, 32], "num_heads": [1, 2], "depth": [1, 2], "patch_sizes": [3, 3], "patch_stride": [2, 2],
    "patch_padding": [1, 1], "mlp_ratio": [2.0, 2.0], "attention_drop_rate": [0.0, 0.0], "drop_rate": [0.0, 0.0],
    "drop_path_rate": [0.0, 0.0], "qkv_bias": [True, True], "cls_token": [False, True],
    "qkv_projection_method": ["dw_bn", "dw_bn"], "kernel_qkv": [3, 3], "padding_kv": [1, 1], "stride_kv": [2, 2],
    "padding_q": [1, 1], "stride_q": [1, 1],
}  # fmt: skip
LEVIT = {
    "image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
    "key_dim": [8, 8, 8], "attention_ratio": [2, 2, 2], "mlp_ratio": [2, 2, 2],
    "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]],
}  # fmt: skip
HIERA = {
    "embed_dim": 16, "image_size": [32, 32], "patch_size": [7, 7], "patch_stride": [4, 4], "patch_padding": [3, 3],
    "depths": [1, 2], "num_heads": [1, 2], "query_stride": [2, 2], "num_query_pool": 1, "masked_unit_size": [4, 4],
    "masked_unit_attention": [True, False], "mlp_ratio": 2.0,
}  # fmt: skip
MOBILEVIT = {
    "image_size": 32, "hidden_sizes": [16, 24, 32], "num_attention_heads": 4, "mlp_ratio": 2.0,
    "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
}  # fmt: skip
DETR = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "d_model": 32, "encoder_layers": 1,
    "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "num_queries": 5,
}  # fmt: skip
PERCEIVER = {
    "num_latents": 8, "d_latents": 16, "d_model": 24, "num_blocks": 1, "num_self_attends_per_block": 1,
    "num_self_attention_heads": 2, "num_cross_attention_heads": 2,
}  # fmt: skip


def perceiver() -> Made:
    model = lively(transformers.PerceiverModel(transformers.PerceiverConfig(**PERCEIVER)))
    return model, (), {"inputs": torch.randn(2, 19, 24, generator=torch.Generator().manual_seed(3))}


def detr() -> Made:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(backbone_config=backbone, **DETR)
    config._attn_implementation = "eager"
    mask = torch.ones(2, 64, 64, dtype=torch.long)
    mask[1, :, 48:] = 0
    return lively(transformers.DetrModel(config)), (), {"pixel_values": image(64), "pixel_mask": mask}


VISION = (
    Case("vit-eager", seeing("ViT", "eager", VIT), 2, "plain, 17 tokens", golden=0),
    Case("vit-sdpa", seeing("ViT", "sdpa", VIT), 2, "plain", dtypes=(torch.float32, torch.bfloat16)),
    Case("dinov2", seeing("Dinov2", "sdpa", VIT), 2, "scaled residuals"),
    Case("siglip", seeing("SiglipVision", "eager", VIT), 3, "a pooling head with one query"),
    Case("siglip-dynamic", seeing("SiglipVision", "eager", VIT), 3, "a whole attention taken apart at an unknown batch",
         dynamic=True),
    Case("clip", clip, 2, "two towers"),
    Case("beit", seeing("Beit", "eager", VIT | {"use_relative_position_bias": True}), 2,
         "relative position table gathered by an index buffer", golden=0),
    Case("beit-sdpa", seeing("Beit", "sdpa", VIT | {"use_relative_position_bias": True}), 2, "the table in SDPA"),
    Case("data2vec-vision", seeing("Data2VecVision", "eager", VIT | {"use_shared_relative_position_bias": True}), 2,
         "one table for all layers"),
    Case("swin", seeing("Swin", "eager", SWIN, side=32), 4, "shifted windows, finite shift mask", golden=1),
    Case("swinv2", seeing("Swinv2", "eager", SWIN, side=32), 4,
         "cosine attention, clamped scale, sigmoid of a generated bias, mask added twice", golden=1),
    Case("swin2sr", seeing("Swin2SR", "eager", {"image_size": 16, "patch_size": 1, "embed_dim": 16, "depths": [2],
         "num_heads": [2], "window_size": 4}, side=16), 2, "Swin for super-resolution"),
    Case("sam-vision", sam_vision, 2, "decomposed relative positions by two einsums, padded windows"),
    Case("sam-vision-sdpa", partial(sam_vision, "sdpa"), 2, "the same as an SDPA mask made of two products", golden=0),
    Case("vitdet", seeing("VitDet", "eager", VIT | {"window_size": 3, "window_block_indices": [0],
         "use_relative_position_embeddings": True}), 2, "decomposed relative positions"),
    Case("segformer", seeing("Segformer", "eager", SEGFORMER, side=32), 2, "K and V reduced by convolution"),
    Case("pvt-v2", seeing("PvtV2", "eager", PVT, side=32), 2, "K and V pooled to a fixed grid"),
    Case("cvt", seeing("Cvt", "eager", CVT, side=32), 3, "convolutional projections, einsum"),
    Case("levit", seeing("Levit", "eager", LEVIT, side=64), 4,
         "index bias, pooled queries, wide values; the last stage has one token", refused=1),
    Case("hiera", seeing("Hiera", "eager", HIERA, side=32), 3, "pooled queries inside units"),
    Case("mobilevit", seeing("MobileViT", "eager", MOBILEVIT, side=32), 2,
         "pixels of patches as batch; the last stages have one patch, and a softmax of one key is none", refused=7),
    Case("detr", detr, 3, "boxes: encoder mask, queries, cross attention"),
    Case("perceiver", perceiver, 2, "few latents read many inputs"),
    Case("poolformer", seeing("PoolFormer", "eager", {"hidden_sizes": [8, 16], "depths": [1, 1], "strides": [2, 2],
         "num_encoder_blocks": 2, "patch_sizes": [3, 3], "padding": [1, 1]}, side=32), 0, "no attention: pooling"),
    Case("swiftformer", seeing("SwiftFormer", "eager", {"image_size": 64, "depths": [1, 1, 1, 1],
         "embed_dims": [8, 16, 24, 32]}, side=64), 0, "additive attention: no keys times queries",
         refused=4),
    Case("wav2vec2", hearing("Wav2Vec2", SPEECH, "sdpa", input_values=WAVE), 2, "speech encoder"),
    Case("wav2vec2-conformer", hearing("Wav2Vec2Conformer", SPEECH | {"position_embeddings_type": "relative"},
         input_values=WAVE), 2, "relative shift with two biases added to q", golden=0),
    Case("wav2vec2-bert", hearing("Wav2Vec2Bert", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "feature_projection_input_dim": 8, "position_embeddings_type": "relative_key",
         "left_max_position_embeddings": 6, "right_max_position_embeddings": 3, "conv_depthwise_kernel_size": 3},
         input_features=MEL.mT.contiguous()), 2, "relative keys by einsum"),
    Case("wavlm", hearing("WavLM", SPEECH | {"num_buckets": 8, "max_bucket_distance": 16}, input_values=WAVE), 2,
         "gated bucketed bias through multi_head_attention_forward"),
    Case("whisper", hearing("Whisper", WHISPER, "sdpa", input_features=MEL, decoder_input_ids=tokens(11)), 3,
         "encoder, decoder and cross attention"),
)  # fmt: skip
