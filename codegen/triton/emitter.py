"""From an attention to the source of a Python module with its kernels."""

from __future__ import annotations

from attncc.codegen.triton.config import TritonConfig
from attncc.codegen.triton.forward import forward, join
from attncc.codegen.triton.helpers import HELPERS
from attncc.codegen.triton.launcher import launcher
from attncc.codegen.triton.lists import PACK, look
from attncc.codegen.triton.schedule import schedule
from attncc.codegen.triton.support import unsupported
from attncc.ir import Attention, print_attention
from attncc.ir.bounds import Bounds

_EQUATION = {
    "softmax": "softmax_j(score(q_i . k_j) where mask)",
    "sigmoid": "sigmoid(score(q_i . k_j)) where mask",
    "relu": "relu(score(q_i . k_j)) where mask",
    "none": "score(q_i . k_j) where mask",
}


def emit(a: Attention, bounds: Bounds, config: TritonConfig) -> str:
    """The module of `a`: kernels, `launch(tensors, sizes, outputs)`, and `SIGNATURES` for compiling ahead of time.

    `bounds` may hold row bounds. Raises ValueError for what `unsupported` names."""
    reason = unsupported(a)
    if reason is not None:
        raise ValueError(f"no Triton kernel: {reason}")
    p = schedule(a, bounds, config)
    kernels = (forward(p), *((join(p),) if p.split else ()), *((look(p), PACK) if p.listed else ()))
    helpers = sorted(set[str]().union(*(k.helpers for k in kernels)))
    modules = ["triton", "triton.language as tl"]
    if p.split or p.descriptors or p.listed or p.persistent:
        modules.insert(0, "torch")
    blocks = [
        _header(a, bounds),
        "\n".join(f"import {x}" for x in modules),
        f'CONFIG = "{config}"\nBLOCK_M = tl.constexpr({config.block_m})\nBLOCK_N = tl.constexpr({config.block_n})',
        *("\n" + HELPERS[h].strip("\n") for h in helpers),
        *("\n" + k.text for k in kernels),
        "\n" + launcher(p, kernels),
    ]  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def _header(a: Attention, bounds: Bounds) -> str:
    intervals = [f"{x.lo!r} <= {a.j.name} < {x.hi!r}" for x in bounds.visit]
    free = [f"{x.lo!r} <= {a.j.name} < {x.hi!r}" for x in bounds.full]
    index = ", ".join(x.name for x in (*a.batch, a.i))
    i, j, e = a.i.name, a.j.name, a.e.name
    lines = [
        f'"""out[{index}, {e}] = sum_{j} w_{j} v[{j}, {e}],  w = {_EQUATION[a.normalizer]}',
        "",
        f"Rows i0 <= {i} < i1 visit {' and '.join(intervals) or 'no key'}"
        + (f"; without mask {' and '.join(free)}." if free else "."),
        "",
        *(f"    {x}" for x in print_attention(a).splitlines()),
        '"""',
    ]
    return "\n".join(lines)
