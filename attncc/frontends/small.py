"""Real models made small: any model type of transformers, with random weights, and what to call it with."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from attncc.frontends.small_inputs import candidates
from attncc.frontends.targets import TargetError, one_line

#: What the names that configurations use are set to, where a configuration has them as numbers.
_SIZES: dict[int, str] = {
    32: "hidden_size d_model n_embd dim embed_dim emb_dim embedding_size word_embed_proj_dim encoder_hidden_size "
        "max_source_positions max_target_positions",
    48: "intermediate_size ffn_dim d_ff hidden_dim encoder_ffn_dim decoder_ffn_dim d_inner",
    64: "max_position_embeddings n_positions max_seq_len",
    99: "vocab_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
       "num_key_value_heads num_experts_per_tok num_experts_per_token num_codebooks expand eos_token_id",
    1: "bos_token_id decoder_start_token_id n_group topk_group first_k_dense_replace n_shared_experts "
       "num_shared_experts",
    0: "pad_token_id",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads rotary_dim "
       "attention_window num_local_experts num_experts n_routed_experts qk_rope_head_dim",
    8: "head_dim d_kv query_pre_attn_scalar qk_nope_head_dim num_mel_bins",
    6: "patch_size sliding_window",
    12: "v_head_dim",
    16: "moe_intermediate_size shared_expert_intermediate_size kv_lora_rank",
    24: "image_size q_lora_rank",
    3: "conv_l_cache",
}  # fmt: skip
_SIZE_OF = {name: size for size, names in _SIZES.items() for name in names.split()}
_COUNTS = {name: n for name, n in _SIZE_OF.items() if "layers" in name or name in ("n_layer", "vocab_size")}
#: The sizes to try, in this order: what fits together differs by type. The last keeps a type's own widths.
_RECIPES: tuple[dict[str, int], ...] = (
    _SIZE_OF, _SIZE_OF | {"num_key_value_heads": 4},
    _SIZE_OF | {"num_key_value_heads": 4, "v_head_dim": 8, "qk_rope_head_dim": 8, "head_dim": 16},
    _SIZE_OF | {"hidden_size": 64, "dim": 64, "image_size": 64, "patch_size": 8},
    _SIZE_OF | {"hidden_size": 512, "head_dim": 128}, _COUNTS,
)  # fmt: skip
_LAYERS = tuple(name for name in _COUNTS if name != "vocab_size")
_PARTS = (dict, list, tuple)
MOST_PARAMETERS = 30_000_000
#: Of a model at its own widths: four bytes each.
MOST_RANDOM_PARAMETERS = 2_000_000_000


class NotSmall(Exception):
    """A model type that this recipe makes no small model of, and why."""


def model_types() -> Iterator[str]:
    """Every type that the installed transformers has a base model of."""
    configs, models = _mappings()
    for name in configs:
        try:
            if configs[name] in models:
                yield name
        except (ImportError, ValueError):  # needs a library that is not installed
            continue


def small_models(name: str, spelling: str) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Models of a type with few, narrow layers and with what each is called with, from a fixed seed, until one runs:
    what fits together differs by type. `spelling` is transformers' `attn_implementation`. Raises NotSmall where there
    is none."""
    configs, models = _mappings()
    try:
        config_class = configs[name]
        found = models[config_class]
    except (ImportError, ValueError) as error:  # named in a table, and not there
        raise NotSmall(f"{type(error).__name__} while it was looked up") from error
    model_class = found[0] if isinstance(found, list | tuple) else found
    why: NotSmall | None = None
    made = False
    for sizes in _RECIPES:
        try:
            model, config = _model(model_class, _config(config_class, sizes), spelling)
        except NotSmall as error:
            why = why or error
            continue
        for inputs in candidates(model, config):
            made = True
            yield model, inputs
    if why is not None and not made:
        raise why


def random_model(name: str, layers: int, tokens: int) -> tuple[nn.Module, dict[str, Any]]:
    """A model of a type at its own default widths, with random weights and as many layers as asked for, and texts of
    `tokens` tokens (or images) that it runs on. Raises TargetError."""
    configs, models = _mappings()
    known = list(configs)
    if name not in known:
        if not name:
            raise TargetError("hf: needs a type of transformers' models, as in hf:bert")
        near = get_close_matches(name, known, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise TargetError(f"hf:{name}: transformers has no type of models of this name{hint}")
    try:
        config = configs[name]()
        _with_layers(config, layers)
        found = models[type(config)]
        model_class = found[0] if isinstance(found, list | tuple) else found
        with torch.device("meta"):
            count = sum(p.numel() for p in model_class(config).parameters())
        if count > MOST_RANDOM_PARAMETERS:
            raise TargetError(
                f"hf:{name}: {count / 1e9:.1f} billion parameters with {layers} layers, where "
                f"{MOST_RANDOM_PARAMETERS / 1e9:.0f} are the most; write a factory that returns (model, args)"
            )
        torch.manual_seed(0)
        model = model_class(config).eval()
    except TargetError:
        raise
    except Exception as error:
        raise TargetError(f"hf:{name}: making the model raised {one_line(error)}") from error
    why = "there is no way known to call it"
    for inputs in candidates(model, config, tokens):
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception as error:
            why = f"calling it raised {one_line(error)}"
        else:
            return model, inputs
    raise TargetError(f"hf:{name}: {why}; write a factory that returns (model, args)")


def _with_layers(config: Any, layers: int) -> None:
    """A configuration, and its parts, with this many layers: the first kinds of layers stay."""
    part_class = importlib.import_module("transformers").PretrainedConfig
    for key in _LAYERS:
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, layers)
    if _has_kinds(config):
        config.layer_types = config.layer_types[:layers]
    for part in list(vars(config).values()):
        if isinstance(part, part_class):
            _with_layers(part, layers)


def _model(model_class: Any, config: Any, spelling: str) -> tuple[nn.Module, Any]:
    try:
        config._attn_implementation = spelling
        with torch.device("meta"):
            count = sum(p.numel() for p in model_class(config).parameters())
        if count <= MOST_PARAMETERS:
            torch.manual_seed(0)
            return _lively(model_class(config).eval()), config
    except Exception as error:
        raise NotSmall(f"{type(error).__name__} while it was made") from error
    raise NotSmall(f"{count / 1e6:.0f} million parameters")


def _mappings() -> tuple[Any, Any]:
    """Transformers' tables of configurations and base models. The import takes seconds. Raises TargetError."""
    if importlib.util.find_spec("transformers") is None:
        raise TargetError("types of models come from transformers, which is not installed: pip install transformers")
    return (importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING,
            importlib.import_module("transformers.models.auto.modeling_auto").MODEL_MAPPING)  # fmt: skip


def _config(config_class: Any, sizes: dict[str, int]) -> Any:
    """The default configuration with other sizes, in its parts too, and with a layer of each kind."""
    try:
        base = config_class().to_dict()
        given: dict[str, Any] = {k: v for k, v in sizes.items() if k in base and not isinstance(base[k], _PARTS)}
        for name in ("head_dim", "sliding_window"):
            if base.get(name) is None:
                given.pop(name, None)
        if isinstance(base.get("layer_types"), list):
            given["layer_types"] = _each_kind(base["layer_types"])
            given["num_hidden_layers"] = len(given["layer_types"])
        config = config_class(**given)
        _shrink_parts(config, sizes)
    except Exception as error:
        raise NotSmall(f"{type(error).__name__} while it was configured") from error
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "batched_mm"  # the grouped product has no float64 on CPUs
    return config


def _shrink_parts(config: Any, sizes: dict[str, int]) -> None:
    part_class = importlib.import_module("transformers").PretrainedConfig
    for part in list(vars(config).values()):
        if not isinstance(part, part_class):
            continue
        for name, size in sizes.items():
            value = getattr(part, name, None)
            if isinstance(value, int | float) and not isinstance(value, bool) and not name.endswith("_token_id"):
                setattr(part, name, size)
        if _has_kinds(part):
            part.layer_types = _each_kind(part.layer_types)
            part.num_hidden_layers = len(part.layer_types)
        _shrink_parts(part, sizes)


def _has_kinds(config: Any) -> bool:
    """Whether the kinds of its layers are given, not made from their number."""
    fixed = isinstance(made := getattr(type(config), "layer_types", None), property) and made.fset is None
    return not fixed and isinstance(getattr(config, "layer_types", None), list)


def _each_kind(kinds: list[str]) -> list[str]:
    return (list(dict.fromkeys(kinds)) * 2)[: max(2, len(set(kinds)))]


def _lively(model: nn.Module) -> nn.Module:
    """The model with weights at which attention is far from uniform, so that a wrong mask or bias shows."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and p.ndim < 2:
                p += 0.2 * torch.randn_like(p)
            elif p.is_floating_point():
                p.normal_(std=1.0 if id(p) in embeddings else (p.numel() / p.shape[0]) ** -0.5)
    return model
