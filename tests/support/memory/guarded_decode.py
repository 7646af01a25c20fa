"""Run as a script: attentions over caches of which only the keys that a row sees can be read."""

from __future__ import annotations

import json
import sys

import torch

import attncc.kernels.skip_tables
from attncc.ir import interpret, parse_attention, print_attention, verify
from attncc.kernels.build import built
from memory.guarded import guarded

KEYS, WIDTH = 256, 64


def attention(mask: str, rows: int) -> str:
    return print_attention(verify(parse_attention(f"""attention
size   M
batch  b = 2, h = 2, g = 3
axis   i = {rows}, j = M, d = {WIDTH}, e = {WIDTH}
tensor q: f32[2, 6, {rows}, {WIDTH}]
tensor k: f32[2, 2, M, {WIDTH}]
tensor v: f32[2, 2, M, {WIDTH}]
tensor position: i64[{rows}]
tensor seen: bool[2, 1, {rows}, M]
tensor start: i64[2]
q      q[b, h * 3 + g, i, d]
k      k[b, h, j, d]
v      v[b, h, j, e]
score  s * 0.125
mask   {mask}
norm   softmax
empty  zero
weight w
give   out
dtype  f32
""")))  # fmt: skip


def main(mask: str, rows: int, first: int, end: int, readable: int) -> None:
    """Row r stands at position end - rows + r; keys first .. end are seen, modulo the length of the cache, of which
    those below `readable` can be read."""
    torch.manual_seed(0)
    spec = attention(mask, rows)
    position = torch.arange(end - rows, end)
    j = torch.arange(KEYS)
    tensors = {
        "q": torch.randn(2, 6, rows, WIDTH), "k": torch.randn(2, 2, KEYS, WIDTH), "v": torch.randn(2, 2, KEYS, WIDTH),
        "position": position, "start": torch.full((2,), first),
        "seen": ((first <= j) & (j <= position[:, None])).expand(2, 1, rows, KEYS).contiguous(),
    }  # fmt: skip
    a = parse_attention(spec)
    wanted = interpret(a, tensors, [KEYS])["out"]
    for name in "kv":
        tensors[name] = guarded(tensors[name], [n % KEYS for n in range(first, readable)])
    out = torch.empty_like(wanted)
    built(spec, "cpu").kernel([tensors[t.name] for t in a.tensors], [KEYS], [out])
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    attncc.kernels.skip_tables.WORTHWHILE = 0
    for case in json.loads(sys.argv[1]):
        print(case, flush=True)
        main(*case)
