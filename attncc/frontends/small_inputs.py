"""What to call a small model of transformers with: tensors for the names that its `forward` takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_TOKENS, _PADDED, _SAMPLES, _FRAMES, _PATCHES = 19, 4, 4000, 64, 4
Maker = Callable[[Any, torch.Generator], Tensor]


def candidates(model: Any, config: Any, tokens: int = _TOKENS) -> Iterator[dict[str, Any]]:
    """Arguments to try, from a fixed seed: its main input, others that this may be, then more of what it takes. Texts
    have `tokens` tokens."""
    taken = inspect.signature(model.forward).parameters
    required = {n for n, p in taken.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    fixed: dict[str, Any] = {"use_cache": False} if "use_cache" in taken else {}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        required.add("decoder_input_ids")
    if "attention_mask" in taken and model.main_input_name == "input_ids":
        required.add("attention_mask")
    main = model.main_input_name
    first = required | ({main} if isinstance(main, str) else {*main})
    text = {n for n in ("input_ids", "attention_mask") if n in taken}
    images = {n for n in ("pixel_values", "bbox") if n in taken}
    tried: list[set[str]] = []
    for names in (first, first | images, first | text | images, first - {"input_ids", "attention_mask"}):
        if names in tried:
            continue
        tried.append(names)
        makers = _MAKERS | _texts(tokens)
        for kinds in (makers, makers | _OTHERWISE):
            g = torch.Generator().manual_seed(0)
            if names <= kinds.keys() and (kinds is makers or not names.isdisjoint(_OTHERWISE)):
                try:
                    yield {name: kinds[name](config, g) for name in sorted(names)} | fixed
                except (AttributeError, TypeError):  # the configuration does not say how large it is
                    continue


def _of(config: Any, *names: str, default: int) -> int:
    """The first of these sizes that a configuration or a part of it holds."""
    parts = [config, *(getattr(config, n, None) for n in ("vision_config", "audio_config", "text_config", "encoder"))]
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            if isinstance(value, list | tuple) and value and isinstance(value[0], int):
                value = value[0]
            if isinstance(value, int):
                return value
    return default


def _tokens(n: int) -> Maker:
    return lambda config, g: torch.randint(3, 99, (2, n), generator=g)


def _texts(tokens: int) -> dict[str, Maker]:
    """Two texts of this length, the second padded at its end."""

    def seen(config: Any, g: torch.Generator) -> Tensor:
        mask = torch.ones(2, tokens, dtype=torch.long)
        mask[1, tokens - _PADDED :] = 0
        return mask

    def boxes(config: Any, g: torch.Generator) -> Tensor:
        corners = torch.rand(2, tokens, 2, 2, generator=g).sort(2).values.flatten(2)
        return (corners * 31).long()

    return {
        "input_ids": _tokens(tokens), "decoder_input_ids": _tokens(tokens // 2), "attention_mask": seen, "bbox": boxes,
    }


def _image(config: Any, g: torch.Generator) -> Tensor:
    size = _of(config, "image_size", default=64)
    return torch.randn(2, _of(config, "num_channels", default=3), size, size, generator=g)


def _video(config: Any, g: torch.Generator) -> Tensor:
    size = _of(config, "image_size", default=64)
    return torch.randn(1, _of(config, "num_frames", default=4), 3, size, size, generator=g)


def _features(config: Any, g: torch.Generator) -> Tensor:
    frames = 2 * _of(config, "max_source_positions", default=_FRAMES // 2)
    return torch.randn(2, _of(config, "num_mel_bins", "feature_size", default=80), frames, generator=g)


def _patches(config: Any, g: torch.Generator) -> Tensor:
    """The patches of two images of `_grid`, each a row."""
    size = _of(config, "patch_size", default=14)
    width = _of(config, "in_channels", "in_chans", default=3) * _of(config, "temporal_patch_size", default=1) * size**2
    return torch.randn(int(_grid(config, g).prod(1).sum()), width, generator=g)


def _grid(config: Any, g: torch.Generator) -> Tensor:
    """Frames, rows and columns of two images."""
    return torch.tensor([[1, _PATCHES, _PATCHES], [1, _PATCHES, 2 * _PATCHES]])


_MAKERS: dict[str, Maker] = {
    "pixel_values": _image,
    "input_values": lambda config, g: torch.randn(2, _SAMPLES, generator=g),
    "input_features": _features,
    "input_features_mask": lambda config, g: torch.ones(2, _features(config, g).shape[-1], dtype=torch.long),
    "hidden_states": _patches,
    "grid_thw": _grid,
    "past_values": lambda config, g: torch.randn(2, _of(config, "context_length", default=_FRAMES), 1, generator=g),
}
#: What other models mean by the same names.
_OTHERWISE: dict[str, Maker] = {
    "pixel_values": _video,
    "input_features": lambda config, g: _features(config, g).mT.contiguous(),
    "input_values": lambda config, g: torch.randn(2, 1, _SAMPLES, generator=g),
}
