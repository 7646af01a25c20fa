"""Diffusion models of diffusers, tiny and random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import AttnProcessor

from zoo.case import Case, Made, lively


def noise(*shape: int, seed: int = 11) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(name: str, settings: dict[str, Any], inputs: Callable[[], dict[str, Any]]) -> Callable[[], Made]:
    def make() -> Made:
        return lively(getattr(diffusers, name)(**settings)), (), {**inputs(), "return_dict": False}

    return make


def unet(*, plain: bool) -> Callable[[], Made]:
    """The UNet of Stable Diffusion; `plain` writes attention with baddbmm, softmax and bmm."""

    def make() -> Made:
        model = diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=24,
            attention_head_dim=4, norm_num_groups=4,
        )  # fmt: skip
        if plain:
            model.set_attn_processor(AttnProcessor())
        inputs = {"sample": noise(2, 4, 8, 8), "timestep": torch.tensor([3, 7]),
                  "encoder_hidden_states": noise(2, 7, 24), "return_dict": False}  # fmt: skip
        return lively(model), (), inputs

    return make


def autoencoder() -> Made:
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        sample_size=16,
    )  # fmt: skip
    return lively(model), (), {"sample": noise(1, 3, 16, 16), "return_dict": False}


def sd3() -> dict[str, Any]:
    return {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 7, 24),
            "pooled_projections": noise(2, 16), "timestep": torch.tensor([3.0, 7.0])}  # fmt: skip


def flux() -> dict[str, Any]:
    rows, columns = torch.arange(16) // 4, torch.arange(16) % 4
    ids = torch.stack([torch.zeros(16), rows.float(), columns.float()], -1)
    return {"hidden_states": noise(1, 16, 8), "encoder_hidden_states": noise(1, 5, 24), "img_ids": ids,
            "pooled_projections": noise(1, 16), "timestep": torch.tensor([0.5]),
            "txt_ids": torch.zeros(5, 3)}  # fmt: skip


def pixart() -> dict[str, Any]:
    mask = torch.ones(2, 7)
    mask[1, 4:] = 0
    return {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 7, 24),
            "encoder_attention_mask": mask, "timestep": torch.tensor([3, 7]), "added_cond_kwargs": {
                "resolution": None, "aspect_ratio": None}}  # fmt: skip


def wan() -> dict[str, Any]:
    return {"hidden_states": noise(1, 4, 2, 8, 8), "timestep": torch.tensor([3]),
            "encoder_hidden_states": noise(1, 7, 16)}  # fmt: skip


DIFFUSION = (
    Case("unet-sdpa", unet(plain=False), 8, "self and cross attention in a UNet"),
    Case("unet-plain", unet(plain=True), 8, "baddbmm with beta 0 and alpha, heads in the batch", golden=1),
    Case("autoencoder", autoencoder, 2, "one head over pixels"),
    Case("sd3", made("SD3Transformer2DModel", {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 24, "caption_projection_dim": 16, "pooled_projection_dim": 16,
        "out_channels": 4, "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}, sd3), 3,
        "text and image joined and split, two attentions summed", golden=0),
    Case("flux", made("FluxTransformer2DModel", {
        "patch_size": 1, "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 4, 8)}, flux), 2, "joint attention with rotary over three axes"),
    Case("pixart", made("PixArtTransformer2DModel", {
        "sample_size": 8, "num_layers": 1, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2,
        "in_channels": 4, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 24,
        "use_additional_conditions": False}, pixart), 2, "a text mask of -10000"),
    Case("dit", made("DiTTransformer2DModel", {
        "sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2,
        "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 100}, lambda: {
        "hidden_states": noise(2, 4, 8, 8), "timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])}), 2,
        "class-conditional"),
    Case("sana", made("SanaTransformer2DModel", {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16,
        "caption_channels": 24, "sample_size": 8, "patch_size": 1}, lambda: {
        "hidden_states": noise(1, 4, 8, 8), "encoder_hidden_states": noise(1, 7, 24),
        "timestep": torch.tensor([3])}), 2,
         "linear attention by relu with a ones column, beside cross attention", kept=1, golden=0),
    Case("wan", made("WanTransformer3DModel", {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
        "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 1, "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32}, wan), 2, "video: rotary over three axes"),
    Case("cogvideox", made("CogVideoXTransformer3DModel", {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
        "text_embed_dim": 16, "num_layers": 1, "sample_width": 8, "sample_height": 8, "sample_frames": 5,
        "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 7}, lambda: {
        "hidden_states": noise(1, 2, 4, 8, 8), "encoder_hidden_states": noise(1, 7, 16),
        "timestep": torch.tensor([3])}), 1, "text and video in one sequence"),
)  # fmt: skip
