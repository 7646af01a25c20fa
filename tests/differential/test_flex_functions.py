"""flex_attention with block masks that have no function, and with operators of other libraries in its functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import custom_op, register_vmap
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from attncc.driver.backend import Collected, collecting

Q = torch.Tensor
B, H, N, D, BLOCK = 2, 2, 192, 8, 64


def qkv() -> list[Q]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, N, D, generator=generator) for _ in range(3)]


def compiled(model: object, *args: Q) -> tuple[Q, list[str | None]]:
    torch._dynamo.reset()
    found = Collected()
    token = collecting.set(found)
    try:
        out = torch.compile(model, backend="attncc", options={"measure": False, "inductor": False})(*args)  # type: ignore[call-overload]
    finally:
        collecting.reset(token)
    return out, [s.status if s.status == "fused" else s.reason for s in found.sites]


@pytest.mark.parametrize("full", [True, pytest.param(False, marks=pytest.mark.full)])
def test_blocks_without_a_function_are_read(full: bool) -> None:
    """The blocks that each row of blocks lists are what it sees; what is beyond their number says nothing."""
    number = torch.tensor([[[1, 2, 0]], [[3, 1, 1]]], dtype=torch.int32).expand(B, H, 3)
    order = torch.tensor([[2, 0, 0], [1, 0, 2], [0, 1, 2]], dtype=torch.int32).expand(B, H, 3, 3).contiguous()
    more = torch.tensor([0, 1, 1], dtype=torch.int32).expand(B, H, 3).contiguous()
    last = torch.full((B, H, 3, 3), 2, dtype=torch.int32)
    tables = (number.contiguous(), order, more, last) if full else (number.contiguous(), order)
    mask = BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=BLOCK)
    shown = torch.zeros(B, H, 3, 3, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(torch.arange(B), torch.arange(H), torch.arange(3)).tolist():
        shown[b, h, i, order[b, h, i, : number[b, h, i]].long()] = True
        if full:
            shown[b, h, i, last[b, h, i, : more[b, h, i]].long()] = True
    x = qkv()
    out, sites = compiled(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), *x)
    dense = shown.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
    want = F.scaled_dot_product_attention(*x, attn_mask=dense).nan_to_num(0.0)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    assert sites == ["fused"]


def test_tables_that_do_not_list_every_block_are_left_alone() -> None:
    number = torch.ones(1, 1, 3, dtype=torch.int32)
    first = torch.zeros(1, 1, 3, 1, dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(number, first, BLOCK_SIZE=BLOCK, seq_lengths=(N, N))
    _, sites = compiled(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), *qkv())
    assert sites == [
        "its block mask hides keys by blocks alone, and its tables do not list each block of keys"
    ]


def test_the_tanh_of_attention_gym() -> None:
    @custom_op("approx::tanh", mutates_args=())
    def approximate(inp: Q) -> Q:
        return torch.tanh(inp)

    approximate.register_fake(torch.empty_like)
    register_vmap("approx::tanh", lambda info, dims, inp: (torch.tanh(inp), 0))
    x = qkv()

    def capped(q: Q, k: Q, v: Q) -> Q:
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: 2 * torch.ops.approx.tanh(s / 2))

    out, sites = compiled(capped, *x)
    q, k, v = x
    want = (2 * (q @ k.mT / D**0.5 / 2).tanh()).softmax(-1) @ v
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    assert sites == ["fused"]
