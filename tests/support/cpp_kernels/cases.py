"""The forms that models use, as attentions with tensors, for the tests of the C++ kernels."""

from __future__ import annotations

import torch

from attncc.ir import Attention, parse_attention, verify
from attncc.ir.evaluate import DTYPE_OF

TEXT = """attention
size   N, M
batch  b = 2, hk = 2, g = {groups}
axis   i = N, j = M, d = {d}, e = {e}
tensor q: {dtype}[2, N, {heads}, {d}]
tensor k: {dtype}[2, 2, M, {d}]
tensor v: {dtype}[2, 2, M, {e}]
{tensors}
q      q[b, i, hk * {groups} + g, d]
k      k[b, hk, j, d]
v      v[b, hk, j, e]
score  {score}
mask   {mask}
norm   {norm}
empty  {empty}
{sink}
weight {weight}
give   out{lse}
dtype  {dtype}
layout b, i, hk, g, e
"""
DATA = {
    "doc: i64[2, M]": lambda n, m, h, r: torch.sort(torch.randint(0, 4, (2, m), generator=r)).values,
    "pad: bool[2, M]": lambda n, m, h, r: torch.arange(m) < torch.tensor([[max(m - 5, 1)], [0]]),
    "bias: f32[{heads}, N, M]": lambda n, m, h, r: torch.randn(h, n, m, generator=r),
    "half: bf16[N, M]": lambda n, m, h, r: torch.randn(n, m, generator=r).bfloat16(),
    "table: f32[{heads}, 32]": lambda n, m, h, r: torch.randn(h, 32, generator=r),
    "slope: f32[{heads}]": lambda n, m, h, r: torch.rand(h, generator=r),
    "sinks: f32[{heads}]": lambda n, m, h, r: torch.randn(h, generator=r),
    "words: i32[2, {heads}, N, 2]": lambda n, m, h, r: torch.randint(
        -(2**31), 2**31, (2, h, n, 2), generator=r, dtype=torch.int32),
    "length: i32[2]": lambda n, m, h, r: torch.tensor([m, m // 2], dtype=torch.int32),
}
HEAD = "hk * {groups} + g"
FORMS: dict[str, dict[str, str]] = {
    "dense": {},
    "causal": {"mask": "j <= i + M - N"},
    "window": {"mask": "j <= i and i - j < 20"},
    "two windows": {"mask": "j < 4 or (j <= i and i - j < 20)"},
    "documents": {"mask": "doc[b, i] == doc[b, j]", "tensors": "doc"},
    "padding": {"mask": "pad[b, j]", "tensors": "pad"},
    "padding, eager's mean": {"mask": "pad[b, j]", "tensors": "pad", "empty": "mean"},
    "padding, eager's nan": {"mask": "pad[b, j]", "tensors": "pad", "empty": "nan"},
    "length": {"mask": "j < length[b]", "tensors": "length"},
    "dilated": {"mask": "(j - i) % 3 == 0"},
    "chunks": {"mask": "j // 16 == i // 16"},
    "bias": {"score": f"s * 0.125 + bias[{HEAD}, i, j]", "tensors": "bias"},
    "bfloat16 bias, causal": {"score": "s * 0.125 + half[i, j]", "tensors": "half", "mask": "j <= i"},
    "relative table": {
        "score": f"s * 0.125 + table[{HEAD}, min(max(i - j, 0), 31)]", "tensors": "table",
    },
    "alibi": {"score": f"s * 0.125 - slope[{HEAD}] * float(i - j)", "tensors": "slope", "mask": "j <= i"},
    "softcap": {"score": "tanh(s * 0.0025) * 50.0", "mask": "j <= i"},
    "sinks": {"sink": f"sink   sinks[{HEAD}]", "tensors": "sinks", "mask": "j <= i and i - j < 9"},
    "sigmoid": {"norm": "sigmoid", "score": "s * 0.125 - log(float(M))"},
    "relu": {"norm": "relu", "mask": "j <= i", "weight": "w * 0.1"},
    "linear": {"norm": "none", "weight": "w * w / float(M)"},
    "decay": {"weight": "w * exp(float(j - i) * 0.01)", "mask": "j <= i"},
    "dropout": {
        "weight": f"w * where(mix(words[b, {HEAD}, i, 0], words[b, {HEAD}, i, 1], j) < 1717986918, 1.25, 0.0)",
        "tensors": "words", "mask": "j <= i + M - N",
    },
    "sharpened": {"weight": "w * w"},
    "squashed, eager's mean": {"weight": "tanh(w)", "mask": "pad[b, j]", "tensors": "pad", "empty": "mean"},
    "limited, eager's nan": {"weight": "min(w, 0.1)", "mask": "pad[b, j]", "tensors": "pad", "empty": "nan"},
    "less a part": {"weight": "w - w * exp(float(j - i) * 0.01)", "mask": "j <= i"},
}


def case(form: str, dtype: str = "f32", groups: int = 2, d: int = 32, e: int = 32, lse: bool = False) -> Attention:
    change = {"score": "s * 0.125", "mask": "True", "norm": "softmax", "empty": "zero", "sink": "", "weight": "w",
              "tensors": "", **FORMS[form]}  # fmt: skip
    values: dict[str, object] = {"groups": groups, "heads": 2 * groups, "d": d, "e": e, "dtype": dtype}
    declared = [f"tensor {x}" for x in DATA if x.partition(":")[0] in change["tensors"].split()]
    change["tensors"] = "\n".join(declared)
    change = {name: text.format(**values) for name, text in change.items()}
    return verify(parse_attention(TEXT.format(**values, **change, lse=", lse" if lse else "")))


def tensors_of(a: Attention, n: int, m: int, seed: int = 0) -> dict[str, torch.Tensor]:
    r = torch.Generator().manual_seed(seed)
    heads = int(a.tensor("q").shape[2].value)  # type: ignore[attr-defined]
    shapes = {"q": (2, n, heads, a.d.extent), "k": (2, 2, m, a.d.extent), "v": (2, 2, m, a.e.extent)}
    every = {}
    for t in a.tensors:
        if t.name in shapes:
            shape = [x if isinstance(x, int) else int(x.value) for x in shapes[t.name]]  # type: ignore[union-attr]
            every[t.name] = torch.randn(shape, generator=r, dtype=torch.float64).to(DTYPE_OF[t.dtype])
        else:
            make = next(f for x, f in DATA.items() if x.partition(":")[0] == t.name)
            every[t.name] = make(n, m, heads, r)
    return every
