"""Library calls that hold a whole attention, or several products, written out in the operations they are made of.

torch runs `nn.TransformerEncoderLayer` and `nn.MultiheadAttention` as one operation each in inference. The shadow of a
graph runs what is here in their place, so that the attention in them is found; an edit then takes the parts over. The
kernels of `scaled_dot_product_attention`, called by their own names, are that function where only its result is used.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils._pytree import tree_leaves

Tensor = torch.Tensor


def native_multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_head: int, qkv_weight: Tensor, qkv_bias: Tensor,
    proj_weight: Tensor, proj_bias: Tensor, mask: Tensor | None = None, need_weights: bool = True,
    average_attn_weights: bool = True, mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`torch._native_multi_head_attention`: (B, T, C) queries, keys and values; the weights where they are asked for.

    A mask hides keys where it is not zero, whatever its dtype. `mask_type` says what it is: 0 of (T, T), 1 of (B, T)
    keys, 2 of (B, H, T, T)."""
    if query is key and key is value:
        parts = F.linear(query, qkv_weight, qkv_bias).chunk(3, -1)
    else:
        split = zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
        parts = tuple(F.linear(x, w, b) for x, w, b in split)
    q, k, v = (x.unflatten(-1, (num_head, embed_dim // num_head)).transpose(1, 2) for x in parts)
    scores = (q * (embed_dim // num_head) ** -0.5) @ k.mT
    if mask is not None:
        hidden = mask.to(torch.bool)
        hidden = hidden[:, None, None] if mask_type == 1 else hidden
        scores = scores.masked_fill(hidden, float("-inf"))
    weights = scores.softmax(-1)
    out = F.linear((weights @ v).transpose(1, 2).flatten(2), proj_weight, proj_bias)
    if not need_weights:
        return out, None
    return out, weights.mean(1) if average_attn_weights else weights


def transformer_encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor,
    proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Tensor, norm_bias_1: Tensor,
    norm_weight_2: Tensor, norm_bias_2: Tensor, ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor,
    ffn_bias_2: Tensor, mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """`torch._transformer_encoder_layer_fwd` on (B, T, C): attention and a layer of two products, each with its norm
    before (`norm_first`) or after."""

    def attention(x: Tensor) -> Tensor:
        return native_multi_head_attention(
            x, x, x, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, False, True, mask_type
        )[0]

    def products(x: Tensor) -> Tensor:
        inner = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(inner) if use_gelu else F.relu(inner), ffn_weight_2, ffn_bias_2)

    def first(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attention(first(src))
        return x + products(second(x))
    x = first(src + attention(src))
    return second(x + products(x))


def einsum(equation: str, *operands: Any) -> Tensor:
    """`torch.einsum` as one of two factors at a time, those with the smallest result first; one that sums nothing is a
    multiplication."""
    factors: list[Tensor] = list(operands[0] if len(operands) == 1 else operands)
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        letters = left.replace(",", "")
        out = "".join(sorted(x for x in set(letters) if letters.count(x) == 1))
    while len(terms) > 1:
        pair = min(combinations(range(len(terms)), 2), key=lambda pair: len(_kept(terms, pair, out)))
        made = out if len(terms) == 2 else _kept(terms, pair, out)
        first, second = pair
        product = _product(factors[first], factors[second], terms[first], terms[second], made)
        terms = [*(x for at, x in enumerate(terms) if at not in pair), made]
        factors = [*(x for at, x in enumerate(factors) if at not in pair), product]
    return factors[0]


def _kept(terms: Sequence[str], pair: tuple[int, int], out: str) -> str:
    """The letters of two terms that are not summed yet."""
    others = [out, *(term for at, term in enumerate(terms) if at not in pair)]
    both = terms[pair[0]] + terms[pair[1]]
    return "".join(x for x in dict.fromkeys(both) if any(x in term for term in others))


def _product(a: Tensor, b: Tensor, left: str, right: str, out: str) -> Tensor:
    if set(left) | set(right) != set(out):
        return torch.einsum(f"{left},{right}->{out}", a, b)

    def aligned(x: Tensor, letters: str) -> Tensor:
        x = x.permute([letters.index(c) for c in out if c in letters])
        return x[tuple(slice(None) if c in letters else None for c in out)]

    return aligned(a, left) * aligned(b, right)


def _is_several(equation: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether an einsum holds several products, or none: each letter of a factor once, and no ellipsis."""
    if not isinstance(equation, str):
        return False
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    plain = all(len(set(x)) == len(x) for x in terms) and "." not in equation
    summed = not arrow or set(left) - {","} != set(out)
    return plain and len(terms) == len(tensors) > 1 and (len(terms) > 2 or not summed)


def _attention(schema: torch.FunctionSchema, *args: Any, **kwargs: Any) -> tuple[Tensor]:
    """The first result of one of the kernels of `scaled_dot_product_attention`, whose arguments it names."""
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    mask = given.get("attn_mask", given.get("attn_bias"))
    options = {name: given[name] for name in ("dropout_p", "is_causal", "scale", "enable_gqa") if name in given}
    return (F.scaled_dot_product_attention(given["query"], given["key"], given["value"], mask, **options),)


_KERNELS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention", "attention_math")
#: Operations that give an attention first, and what an edit has no use for.
_SDPA = {x: packet.default._schema
         for packet in (getattr(torch.ops.aten, f"_scaled_dot_product_{name}") for name in _KERNELS)
         for x in (packet, packet.default)}  # fmt: skip
#: What to call in place of a library call, on plain tensors.
PARTS: dict[object, Callable[..., Any]] = {
    torch._transformer_encoder_layer_fwd: transformer_encoder_layer,  # pyright: ignore[reportPrivateImportUsage]
    torch.ops.aten._transformer_encoder_layer_fwd.default: transformer_encoder_layer,
    torch._native_multi_head_attention: native_multi_head_attention,  # pyright: ignore[reportPrivateImportUsage]
    torch.ops.aten._native_multi_head_attention.default: native_multi_head_attention,
    torch.einsum: einsum,
    torch.ops.aten.einsum.default: einsum,
}


_library: Any = torch.library.Library("shadow", "DEF")  # whose name says nothing of attention
_library.define("register_hook(Tensor x) -> Tensor")
_library.impl("register_hook", torch.clone, "CompositeExplicitAutograd")
#: Operators that run graphs of their own, and what stands for all others.
_WITH_GRAPHS = (
    "autograd_function_apply", "tag_activation_checkpoint", "cond", "while_loop", "scan", "map_impl", "invoke_subgraph",
    "higher_order_operator",
)  # fmt: skip
for _name in _WITH_GRAPHS:
    _library.define(f"{_name}(Tensor made, Tensor[] given) -> Tensor")
    _library.impl(_name, lambda made, given: torch.empty_like(made), "CompositeExplicitAutograd")


def hooked(x: Tensor) -> Tensor:
    """In a shadow, a tensor whose gradient a hook of the model's sees: the same values, which nothing is read through,
    as an attention that took them over would have no such gradient."""
    return torch.ops.shadow.register_hook(x)


def given_by(operator: str, made: Tensor, given: Sequence[Tensor]) -> Tensor:
    """In a shadow, what an operator that runs a graph of its own makes of tensors: one like `made`, which nothing is
    read through, and which is known to be computed from them."""
    return getattr(torch.ops.shadow, operator if operator in _WITH_GRAPHS else _WITH_GRAPHS[-1])(made, given)


def is_given(n: fx.Node) -> bool:
    """Whether a node of a shadow stands for what an operator that runs a graph of its own gives."""
    return getattr(n.target, "namespace", "") == "shadow" and getattr(n.target, "_opname", "") in _WITH_GRAPHS


def in_place_of(n: fx.Node, args: Sequence[Any]) -> Callable[..., Any] | None:
    """What to call in place of a call with these arguments, if anything."""
    if n.target in _SDPA:
        alone = all(user.target is operator.getitem and user.args[1] == 0 for user in n.users)
        return partial(_attention, _SDPA[n.target]) if alone else None
    if getattr(n.target, "__name__", "") == "_get_data_attr":
        return torch.Tensor.detach
    found = PARTS.get(n.target)
    tensors = [x for x in tree_leaves(list(args)) if isinstance(x, torch.Tensor)]
    if found is None or any(x.is_nested for x in tensors) or (found is einsum and not _is_several(args[0], tensors)):
        return None
    return found
