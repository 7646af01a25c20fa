"""From the gradient of an attention to the source of a Python module with its kernels.

Three kernels: `gradient_statistics` for each row, `gradient_rows` for dq, `gradient_keys` for dk and dv. The two that
loop are the same attention seen from its rows and from its keys, so both have loop bounds of the mask, and no sum is
made by atomics: every run adds in the same order.
"""

from __future__ import annotations

from dataclasses import replace

from attncc.codegen.triton.config import TritonConfig
from attncc.codegen.triton.gradient_frame import Side, sides
from attncc.codegen.triton.gradient_kernels import of_keys, of_rows, statistics
from attncc.codegen.triton.gradient_launcher import gradient_launcher
from attncc.codegen.triton.helpers import HELPERS
from attncc.codegen.triton.kernel import Kernel
from attncc.codegen.triton.lists import PACK, look
from attncc.codegen.triton.operands import operands
from attncc.codegen.triton.support import unsupported
from attncc.ir import Bounds, print_attention
from attncc.ir.attention_grad import AttentionGrad, print_grad
from attncc.ir.build import TRUE


def unsupported_gradient(g: AttentionGrad) -> str | None:
    """Why no Triton kernel gives the gradient `g`, or None."""
    a = g.attention
    if a.empty != "zero" and a.mask is not TRUE:
        return f"rows that see nothing give {'NaN' if a.empty == 'nan' else 'the mean of all values'}"
    if operands(g.by_key) is None:
        return "an operand's index is not affine in the axes"
    return unsupported(a)


def emit_gradient(
    g: AttentionGrad, rows: Bounds, keys: Bounds, by_rows: TritonConfig, by_keys: TritonConfig
) -> str:  # fmt: skip
    """The module of `g`: kernels, `launch(tensors, sizes, outputs)`, and `SIGNATURES` for compiling ahead of time.

    `rows` are loop bounds of the attention, `keys` those of `g.by_key`; the configurations are those of the two
    kernels. Raises ValueError where `unsupported_gradient(g)` has a reason."""
    reason = unsupported_gradient(g)
    if reason is not None:
        raise ValueError(f"no Triton kernel: {reason}")
    one, other = sides(g, rows, keys, by_rows, by_keys)
    kernels = _kernels(one, other)
    helpers = sorted(set[str]().union(*(k.helpers for k in kernels)))
    blocks = [
        _header(g, rows, keys),
        "import torch\nimport triton\nimport triton.language as tl",
        f'CONFIG = "{by_rows}; {by_keys}"',
        *("\n" + HELPERS[h].strip("\n") for h in helpers),
        *("\n" + k.text for k in kernels),
        "\n" + gradient_launcher(g, one, other, kernels),
    ]
    return "\n\n".join(blocks) + "\n"


def _kernels(one: Side, other: Side) -> tuple[Kernel, ...]:
    plain = replace(one, p=replace(one.p, config=replace(one.p.config, lists=False)))
    found = [statistics(plain)]
    listed: list[Kernel] = []
    for side, name, make in ((one, "rows", of_rows), (other, "keys", of_keys)):
        if side.needed:
            found.append(make(side))
            listed += [look(side.p, name)] if side.p.listed else []
    return (*found, *listed, *((PACK,) if listed else ()))


def _header(g: AttentionGrad, rows: Bounds, keys: Bounds) -> str:
    a = g.attention
    index = ", ".join(x.name for x in (*a.batch, a.i))
    i, j = a.i.name, a.j.name
    lines = [f'"""The gradient of out[{index}, {a.e.name}] = sum_{j} w_{j} v[{j}, {a.e.name}] for', ""]
    lines += [f"    {x}" for x in print_attention(a).splitlines()]
    lines += ["", *(f"    {x}" for x in print_grad(g)), ""]
    for bounds, of, over in ((rows, i, j), (keys, j, i)):
        found = " and ".join(f"{x.lo!r} <= {over} < {x.hi!r}" for x in bounds.visit) or "nothing"
        free = " and ".join(f"{x.lo!r} <= {over} < {x.hi!r}" for x in bounds.full)
        lines.append(f"A tile of {of} visits {found}" + (f"; without mask {free}." if free else "."))
    return "\n".join([*lines, '"""'])
