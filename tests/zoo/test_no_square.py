"""Nothing of the size of a mask is made: not by the graph, not by Inductor's code, not by kernels and their tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from memory.allocations import allocations

from attncc.driver.backend import Collected, collecting

N = 1024  # from here on kernels make tables for documents and padding
SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50,
    "max_position_embeddings": 2 * N + 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED: dict[str, Any] = SMALL | {"num_key_value_heads": 1}
T5: dict[str, Any] = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 16, "d_ff": 32, "vocab_size": 50}


@dataclass(frozen=True)
class Case:
    """`padding` tokens at the end are hidden, or at the start where it is negative. With `dynamic` the compiler does
    not know the length; `cache` is the length of a static cache, of which the tokens fill the first half."""

    name: str
    attention: str = "sdpa"
    dtype: torch.dtype = torch.float32
    padding: int = 0
    dynamic: bool = False
    n: int = N
    cache: int = 0

    @property
    def title(self) -> str:
        more = [f"{n} {what}" for n, what in ((self.padding, "padded"), (self.cache, "cached")) if n]
        kind = [self.name, self.attention, str(self.dtype).removeprefix("torch."), str(self.n)]
        return " ".join([*kind, *more, *(["dynamic"] if self.dynamic else [])])


def model(name: str, attention: str) -> Any:
    how = {"attn_implementation": attention}
    made: dict[str, Callable[[], Any]] = {
        "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**GROUPED, **how)),
        "mistral": lambda: transformers.MistralModel(transformers.MistralConfig(**GROUPED, **how, sliding_window=64)),
        "gemma2": lambda: transformers.Gemma2Model(
            transformers.Gemma2Config(**GROUPED, **how, head_dim=16, sliding_window=64)),
        "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)),
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL, **how)),
        "modernbert": lambda: transformers.ModernBertModel(
            transformers.ModernBertConfig(**SMALL, **how, cls_token_id=1, sep_token_id=2, local_attention=64)),
        "longformer": lambda: transformers.LongformerModel(
            transformers.LongformerConfig(**SMALL, attention_window=64), add_pooling_layer=False),
    }  # fmt: skip
    return made[name]().eval()


CASES = [
    Case("llama"), Case("t5", "eager", padding=N // 4), Case("mistral", padding=-N // 4, dynamic=True),
    *(
        pytest.param(case, marks=pytest.mark.full)
        for case in (
            Case("llama", "eager", torch.bfloat16), Case("llama", padding=-N // 4), Case("llama", n=2 * N),
            Case("llama", padding=N // 4, n=2 * N, dynamic=True), Case("llama", "eager", dynamic=True),
            Case("llama", cache=2 * N), Case("llama", "eager", cache=2 * N, padding=-N // 4),
            Case("mistral"), Case("mistral", "eager", torch.bfloat16), Case("gemma2", "eager"),
            Case("gemma2", "eager", dynamic=True), Case("t5", "eager", torch.bfloat16),
            Case("bert", padding=N // 4), Case("bert", "eager", torch.bfloat16, N // 4),
            Case("bert", padding=N // 4, dynamic=True), Case("bert", "eager", padding=N // 4, n=2 * N),
            Case("modernbert", padding=N // 4), Case("modernbert", "eager", torch.bfloat16, N // 4),
            Case("modernbert", padding=N // 4, dynamic=True),
        )
    ),
    pytest.param(Case("t5", "eager", padding=N // 4, dynamic=True), marks=pytest.mark.full),
]  # fmt: skip


def blocks_of(case: Case) -> tuple[list[int], Collected]:
    """The bytes of each block of memory of a second call, and the sites found."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    net, ids = model(case.name, case.attention).to(case.dtype), torch.randint(3, 50, (1, case.n))
    given: dict[str, Any] = {"input_ids": ids}
    if case.padding:
        at = torch.arange(case.n)[None]
        kept = at < case.n - case.padding if case.padding > 0 else at >= -case.padding
        given["attention_mask"] = kept.to(torch.int64)
    if case.dynamic:
        for x in given.values():
            torch._dynamo.mark_dynamic(x, 1)
    compiled = torch.compile(net, backend="attncc", options={"measure": False})

    def run() -> Any:
        more = {}
        if case.cache:
            cache.reset()
            more["past_key_values"] = cache
        with torch.no_grad():
            return compiled(**given, **more)

    if case.cache:
        cache = transformers.StaticCache(config=net.config, max_cache_len=case.cache)
    found = Collected()
    token = collecting.set(found)
    try:
        run()
        return allocations(run), found
    finally:
        collecting.reset(token)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_no_block_holds_a_byte_a_pair(case: Case) -> None:
    blocks, found = blocks_of(case)
    assert {s.status for s in found.sites} == {"fused"}
    assert max(blocks) < case.n * max(case.n, case.cache)
    assert "masked_fill" not in found.after[-1] and "scaled_dot_product_attention" not in found.after[-1]


@pytest.mark.full
def test_a_model_that_leaves_blocks_out_itself() -> None:
    """Whatever becomes of its sites, nothing larger is made than the model makes."""
    blocks, _ = blocks_of(Case("longformer", "eager", n=2 * N))
    net = model("longformer", "eager")
    with torch.no_grad():
        own = allocations(lambda: net(torch.randint(3, 50, (1, 2 * N))))
    assert max(blocks) <= max(own)
