"""A language model that generates with attncc's kernels: prefill and decoding, with a cache of fixed size.

    python examples/generate.py

Random weights, so that nothing is fetched; with a model of your own the lines that matter are the same three.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attncc

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=1000, hidden_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
    intermediate_size=512,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()
prompt = torch.randint(1, 1000, (1, 128))
settings = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
wanted = model.generate(prompt, disable_compile=True, **settings)

model.forward = torch.compile(model.forward, backend="attncc")
with attncc.record() as report:
    found = model.generate(prompt, disable_compile=True, **settings)
print(report)
print("the same tokens as eager:", torch.equal(found, wanted))
