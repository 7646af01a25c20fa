"""Text models of transformers, tiny and random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from zoo.case import Case, Made, lively

VOCABULARY = 99
WIDE = (torch.float32, torch.bfloat16)
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BERT = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip


def tokens(n: int = 19, batch: int = 2, seed: int = 5) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(seed))


def padding(n: int = 19) -> torch.Tensor:
    """The second sequence is four tokens shorter."""
    mask = torch.ones(2, n, dtype=torch.long)
    mask[1, -4:] = 0
    return mask


def left_padding(n: int = 19) -> torch.Tensor:
    return padding(n).flip(1)


def of(
    family: str, implementation: str, settings: dict[str, Any], *, model: str = "Model", n: int = 19, **inputs: Any
) -> Callable[[], Made]:
    """A maker of `<family>Model`, from `<family>Config` with these settings, on random tokens."""

    def make() -> Made:
        config = getattr(transformers, f"{family}Config")(**settings)
        config._attn_implementation = implementation
        config._experts_implementation = "batched_mm"  # the grouped product knows no float64
        built = getattr(transformers, f"{family}{model}")(config)
        return lively(built), (), {"input_ids": tokens(n), **inputs}

    return make


def decoder(family: str, implementation: str, n: int = 19, **settings: Any) -> Callable[[], Made]:
    return of(family, implementation, LLAMA | settings, n=n, use_cache=False)


def encoder(family: str, implementation: str, **settings: Any) -> Callable[[], Made]:
    return of(family, implementation, BERT | settings, attention_mask=padding())


def seq2seq(family: str, implementation: str, settings: dict[str, Any]) -> Callable[[], Made]:
    inputs = {"attention_mask": padding(), "decoder_input_ids": tokens(11, seed=6), "use_cache": False}
    return of(family, implementation, settings, **inputs)


def padded_llama(implementation: str, mask: torch.Tensor) -> Callable[[], Made]:
    return of("Llama", implementation, LLAMA, attention_mask=mask, use_cache=False)


def gpt2(implementation: str, **settings: Any) -> Callable[[], Made]:
    small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
    return of("GPT2", implementation, small | settings, use_cache=False)


MLA = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 16, "first_k_dense_replace": 2,
}  # fmt: skip
T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 4,
    "vocab_size": VOCABULARY, "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
WINDOWED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}

TEXT = (
    Case("llama-eager", decoder("Llama", "eager"), 2, "grouped heads expanded, float32 softmax", dtypes=WIDE,
         golden=0, inductor=True),
    Case("llama-sdpa", decoder("Llama", "sdpa"), 2, "grouped heads in SDPA", dtypes=WIDE, golden=0),
    Case("llama-right-padded", padded_llama("eager", padding()), 2, "a padding mask gathered in the graph", golden=0),
    Case("llama-left-padded", padded_llama("eager", left_padding()), 2, "rows that see nothing but fill"),
    Case("llama-left-padded-sdpa", padded_llama("sdpa", left_padding()), 2, "rows that see nothing under a bool mask"),
    Case("llama-dynamic", decoder("Llama", "eager"), 2, "lengths known at the call only", dynamic=True, golden=1),
    Case("mistral-window", decoder("Mistral", "eager", sliding_window=6), 2, "a sliding window", golden=0),
    Case("mistral-window-sdpa", decoder("Mistral", "sdpa", sliding_window=6), 2, "a sliding window"),
    Case("gemma2", decoder("Gemma2", "eager", attn_logit_softcapping=5.0, query_pre_attn_scalar=8, **WINDOWED), 2,
         "soft-capped scores, every other layer windowed", dtypes=WIDE, golden=0),
    Case("gemma3", decoder("Gemma3Text", "sdpa", query_pre_attn_scalar=8, **WINDOWED), 2, "q and k normalised"),
    Case("qwen2", decoder("Qwen2", "sdpa"), 2, "biases in the projections"),
    Case("qwen3", decoder("Qwen3", "eager", head_dim=12), 2, "q and k normalised, heads wider than hidden / heads"),
    Case("phi3", decoder("Phi3", "eager"), 2, "q, k and v from one projection"),
    Case("olmo2", decoder("Olmo2", "sdpa"), 2, "norms over all heads at once"),
    Case("granite", decoder("Granite", "eager", attention_multiplier=0.3), 2, "a scale of its own"),
    Case("cohere", decoder("Cohere", "eager"), 2, "interleaved rotary"),
    Case("glm", decoder("Glm", "sdpa", head_dim=8), 2, "partial interleaved rotary"),
    Case("starcoder2", decoder("Starcoder2", "sdpa", sliding_window=6), 2, "window in every layer"),
    Case("stablelm", decoder("StableLm", "eager"), 2, "partial rotary"),
    Case("llama4-chunked", decoder("Llama4Text", "eager", attention_chunk_size=8, head_dim=8, num_local_experts=2,
         intermediate_size_mlp=48, moe_layers=[], layer_types=["chunked_attention", "full_attention"],
         no_rope_layers=[1, 0], attn_temperature_tuning=True), 2, "chunked causal, query temperature"),
    Case("granite-swa", decoder("GraniteSWA", "eager", **WINDOWED), 2, "a gate on the sums of rows"),
    Case("gpt-oss-sinks", decoder("GptOss", "eager", num_local_experts=4, num_experts_per_tok=2, **WINDOWED), 2,
         "a sink column in the softmax; routers", refused=2, golden=0),
    Case("mixtral", decoder("Mixtral", "sdpa", num_local_experts=4, num_experts_per_tok=2), 2,
         "the softmax of a router is no attention", refused=2),
    Case("deepseek-v3", decoder("DeepseekV3", "eager", **MLA), 2, "latent attention: K in parts, wider than V",
         golden=0),
    Case("diffllama", decoder("DiffLlama", "eager"), 4, "two attentions subtracted, over halves of the values"),
    Case("gpt2-eager", gpt2("eager"), 2, "conv1d projections, causal buffer"),
    Case("gpt2-sdpa", gpt2("sdpa"), 2, "is_causal"),
    Case("gpt2-scaled-by-layer", gpt2("eager", scale_attn_by_inverse_layer_idx=True), 2, "two scales"),
    Case("gpt-neox", of("GPTNeoX", "eager", BERT, use_cache=False), 2, "q, k and v interleaved by head"),
    Case("gpt-neo-local", of("GPTNeo", "eager", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 6,
         "attention_types": [[["global", "local"], 1]], "vocab_size": VOCABULARY, "max_position_embeddings": 64,
         "intermediate_size": 48}, use_cache=False), 2, "unscaled scores, a local mask kept as a buffer"),
    Case("gptj", of("GPTJ", "eager", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64,
         "vocab_size": VOCABULARY}, use_cache=False), 2, "interleaved rotary on part of the head"),
    Case("opt", of("OPT", "sdpa", {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": VOCABULARY, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
         attention_mask=padding(), use_cache=False), 2, "q scaled before the product"),
    Case("bloom", of("Bloom", "eager", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
         attention_mask=padding(), use_cache=False), 2, "ALiBi through baddbmm", golden=0),
    Case("mpt", of("Mpt", "eager", {"d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2,
         "max_seq_len": 64, "vocab_size": VOCABULARY}, attention_mask=padding(), use_cache=False), 2,
         "ALiBi added, masked_fill"),
    Case("falcon-alibi", of("Falcon", "eager", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": VOCABULARY, "alibi": True, "multi_query": False, "new_decoder_architecture": False},
         attention_mask=padding(), use_cache=False), 2, "ALiBi from a padding mask"),
    Case("falcon-multi-query", of("Falcon", "sdpa", {"hidden_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "vocab_size": VOCABULARY, "multi_query": True, "new_decoder_architecture": False},
         use_cache=False), 2, "one K and V for all heads"),
    Case("bert-eager", encoder("Bert", "eager"), 2, "an additive padding mask", dtypes=WIDE, golden=0),
    Case("bert-sdpa", encoder("Bert", "sdpa"), 2, "a padding mask in SDPA", inductor=True),
    Case("bert-dynamic", encoder("Bert", "sdpa"), 2, "dynamic batch and length", dynamic=True),
    Case("albert", encoder("Albert", "eager", embedding_size=16), 2, "layers that share weights"),
    Case("distilbert", of("DistilBert", "eager", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4,
         "vocab_size": VOCABULARY, "max_position_embeddings": 64}, attention_mask=padding()), 2, "masked by fill"),
    Case("esm", encoder("Esm", "eager", position_embedding_type="rotary", mask_token_id=3), 2, "rotary encoder"),
    Case("roformer", encoder("RoFormer", "eager"), 2, "rotary by stacked halves"),
    Case("modernbert", of("ModernBert", "sdpa", BERT | {"local_attention": 8, "global_attn_every_n_layers": 2},
         attention_mask=padding()), 2, "bidirectional windows", golden=1),
    Case("deberta-v2", of("DebertaV2", "eager", BERT | {"relative_attention": True, "position_buckets": 8,
         "pos_att_type": ["c2p", "p2c"], "share_att_key": True, "norm_rel_ebd": "layer_norm"},
         attention_mask=padding()), 2, "disentangled attention: c2p and p2c by gathers", golden=0),
    Case("deberta", of("Deberta", "eager", BERT | {"relative_attention": True, "max_relative_positions": 16,
         "pos_att_type": ["c2p", "p2c"]}, attention_mask=padding()), 0,
         "a graph break between product and softmax", refused=1),
    Case("t5", seq2seq("T5", "eager", T5), 4, "bucketed position bias shared by layers, no scale", golden=0),
    Case("mt5-encoder", of("MT5", "eager", T5, model="EncoderModel", attention_mask=padding()), 2, "encoder alone"),
    Case("longt5-local", of("LongT5", "eager", T5 | {"local_radius": 4, "encoder_attention_type": "local"},
         model="EncoderModel", attention_mask=padding()), 2, "blocked local attention by einsum", golden=0),
    Case("bart", seq2seq("Bart", "sdpa", SEQ2SEQ), 3, "encoder, decoder and cross attention"),
    Case("pegasus", seq2seq("Pegasus", "eager", SEQ2SEQ), 3, "fixed positions"),
    Case("longformer", of("Longformer", "eager", BERT | {"attention_window": [4, 8]}, n=16,
         attention_mask=padding(16)), 2, "windows in chunks: scores written in parts, weights skewed", dtypes=WIDE,
         golden=0),
    Case("longformer-one-window", of("Longformer", "eager", BERT | {"attention_window": [16, 16]}, n=14), 2,
         "a window as long as the padded sequence"),
    Case("led", of("LED", "eager", SEQ2SEQ | {"attention_window": [4], "max_encoder_position_embeddings": 64,
         "max_decoder_position_embeddings": 64}, n=16, attention_mask=padding(16), decoder_input_ids=tokens(7)), 3,
         "windows in chunks beside full decoders", golden=0),
    Case("bigbird", of("BigBird", "eager", BERT | {"attention_type": "block_sparse", "block_size": 4,
         "num_random_blocks": 1, "max_position_embeddings": 64}, n=48), 5,
         "five-part random blocks, written into a matrix of all weights that leaves the graph", kept=5),
    Case("pegasus-x", of("PegasusX", "eager", {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
         "vocab_size": VOCABULARY, "num_global_tokens": 4, "block_size": 8}, n=24, decoder_input_ids=tokens(7)), 7,
         "blocks and global tokens, in pieces", golden=0),
    Case("xlnet", of("XLNet", "eager", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48,
         "vocab_size": VOCABULARY}, use_mems=False), 2, "relative shift by pad and reshape"),
    Case("xlnet-dynamic", of("XLNet", "eager", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48,
         "vocab_size": VOCABULARY}, use_mems=False), 2, "the shift's reshapes at an unknown length", dynamic=True,
         golden=0),
    Case("funnel", of("Funnel", "eager", {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48,
         "block_sizes": [1, 1], "num_decoder_layers": 1, "vocab_size": VOCABULARY}, n=16), 3,
         "pooled queries, relative shift, both by einsum"),
    Case("layoutlmv3", of("LayoutLMv3", "eager", BERT | {"has_relative_attention_bias": True,
         "has_spatial_attention_bias": True, "visual_embed": False, "coordinate_size": 6, "shape_size": 4,
         "max_2d_position_embeddings": 64, "rel_pos_bins": 8, "rel_2d_pos_bins": 8},
         bbox=torch.arange(2 * 19 * 4).view(2, 19, 4) % 32), 2, "two bucketed biases, safe softmax"),
    Case("fnet", of("FNet", "eager", BERT), 0, "no attention at all"),
    Case("convbert", encoder("ConvBert", "eager", embedding_size=32, head_ratio=2, conv_kernel_size=3), 4,
         "span-dynamic convolution beside attention: softmax over the taps of a window"),
)  # fmt: skip
