"""torch's own modules: multi-head attention and encoder layers, which inference runs as one operation each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.torch_version import TorchVersion

from zoo.case import Case, Made, lively
from zoo.spellings import N, x

WIDTH = 32
#: Before torch 2.12 the operation has no fake form for symbolic sizes, and the layer runs outside of the graphs.
UNTRACED = "Dynamo breaks the graph" if TorchVersion(torch.__version__) < (2, 12) else ""
PADDED = torch.arange(N)[None] >= torch.tensor([N, N - 6])[:, None]  # True where torch's modules must not look
CAUSAL = nn.Transformer.generate_square_subsequent_mask(N)


class Wrapped(nn.Module):
    """A module and the arguments it is called with after x."""

    def __init__(self, module: nn.Module, **arguments: Any) -> None:
        super().__init__()
        self.module, self.arguments = module, arguments

    def forward(self, x: torch.Tensor) -> Any:
        return self.module(x, **self.arguments)


class SelfAttention(nn.Module):
    def __init__(self, *, weights: bool) -> None:
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(WIDTH, 4, batch_first=True), weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, weights = self.attention(x, x, x, key_padding_mask=PADDED, need_weights=self.weights)
        return out if weights is None else out + weights.mean(-1, keepdim=True)


class Cross(nn.Module):
    """Cross attention by the library's function, padding given as booleans, the weights asked for and dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(0, 1)
        biases = torch.cat((self.q.bias, self.k.bias, self.v.bias))
        return F.multi_head_attention_forward(
            x, x.flip(0), x.flip(0), WIDTH, 4, None, biases, None, None, False, 0.0, self.o.weight, self.o.bias,
            training=False, key_padding_mask=PADDED, need_weights=True, use_separate_proj_weight=True,
            q_proj_weight=self.q.weight, k_proj_weight=self.k.weight, v_proj_weight=self.v.weight,
        )[0]  # fmt: skip


class Native(nn.Module):
    """The one operation that inference runs, called by itself."""

    def __init__(self, *, weights: bool, cross: bool = False) -> None:
        super().__init__()
        self.attention, self.weights, self.cross = nn.MultiheadAttention(WIDTH, 4, batch_first=True), weights, cross

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.attention
        key = x.flip(1) if self.cross else x
        held = (a.in_proj_weight, a.in_proj_bias, a.out_proj.weight, a.out_proj.bias)
        out, weights = torch._native_multi_head_attention(
            x, key, key, WIDTH, 4, *held, mask=PADDED, need_weights=self.weights, mask_type=1
        )
        return out + weights.sum(-2)[..., None] if self.weights else out


class Kernel(nn.Module):
    """What SDPA runs on a CPU, called by its own name."""

    def __init__(self, *, sums: bool) -> None:
        super().__init__()
        self.qkv, self.sums = nn.Linear(WIDTH, 3 * WIDTH), sums

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True, scale=0.3)
        return (out + sums[..., None] if self.sums else out).transpose(1, 2).flatten(2)


def encoder(*, layers: int = 2, settings: dict[str, Any], **arguments: Any) -> Callable[[], Made]:
    def make() -> Made:
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, batch_first=True, **settings)
        stack = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        return lively(Wrapped(stack, **arguments)), (x(),), {}

    return make


def of(module: Callable[[], nn.Module]) -> Callable[[], Made]:
    return lambda: (lively(module()), (x(),), {})


GELU = {"activation": "gelu"}
LIBRARY = (
    Case("multihead-attention", of(lambda: SelfAttention(weights=False)), 1, "torch's own module"),
    Case("multihead-attention-weights", of(lambda: SelfAttention(weights=True)), 1, "and its averaged weights", kept=1),
    Case("multihead-attention-cross", of(Cross), 1, "by function, its masks written in place", backward=True),
    Case("native-attention", of(lambda: Native(weights=False)), 1, "one operation", golden=0),
    Case("native-attention-cross", of(lambda: Native(weights=False, cross=True)), 1, "keys from elsewhere"),
    Case("native-attention-weights", of(lambda: Native(weights=True)), 1, "averaged weights leave it", kept=1),
    Case("kernel-of-sdpa", of(lambda: Kernel(sums=False)), 1, "SDPA's kernel by its own name", golden=0),
    Case("kernel-of-sdpa-sums", of(lambda: Kernel(sums=True)), 0, "and its row sums", refused=1),
    Case("transformer-encoder", encoder(settings={"norm_first": True}, src_key_padding_mask=PADDED), 2,
         "torch's encoder in inference: a layer is one operation", golden=0, inductor=True),
    Case("transformer-encoder-post-norm", encoder(settings=GELU, mask=CAUSAL, is_causal=True), 2,
         "norms after, gelu, a causal mask", golden=0, dtypes=(torch.float32, torch.bfloat16)),
    Case("transformer-encoder-masks", encoder(settings={}, mask=CAUSAL < 0, is_causal=True,
         src_key_padding_mask=PADDED), 2, "a causal and a padding mask merged"),
    Case("transformer-encoder-training", encoder(settings={"dropout": 0.0}, src_key_padding_mask=PADDED), 2,
         "with gradients it runs as single operations", backward=True),
    Case("transformer-encoder-dynamic", encoder(settings={}), 2, "lengths known at the call only", dynamic=True,
         missing=UNTRACED),
)  # fmt: skip
