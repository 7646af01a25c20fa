"""Triton's interpreter for tests: import this before any kernel module is loaded, in a process of its own.

Triton decides at decoration whether a kernel is interpreted, so the variable must be set first and stays set.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from attncc.codegen.triton import TritonConfig, emit, emit_gradient
from attncc.ir import Attention, Bounds, interpret
from attncc.ir.attention_grad import AttentionGrad, shapes_of_grad
from attncc.ir.evaluate import DTYPE_OF
from attncc.passes.bounds.bounds import loop_bounds
from attncc.runtime.triton_module import load_module

warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")


def _floats(handle: interpreter.TensorHandle) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:  # kept as uint16, the upper half of a float32
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


#: Products of tiles made so far.
products = 0


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """Products in float32 as tensor cores make them. Triton's own multiplies bfloat16 as the integers it keeps."""
    global products
    products += 1
    return interpreter.TensorHandle(np.matmul(_floats(a), _floats(b)) + d.data, d.dtype.scalar)


interpreter.InterpreterBuilder.create_dot = _dot

_patch_tensor = interpreter._patch_lang_tensor


def _patched(tensor, *scope):
    """Scalars are arrays of one element there, which numpy no longer turns into a loop bound."""
    _patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = _patched

#: Half of its time goes into asking whether integers overflow, which at these sizes they do not.
interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)

_patch = interpreter._patch_lang
_patched_langs: set[frozenset[int]] = set()


class _Restored:
    def __init__(self, scope):
        self.scope = scope

    def restore(self):
        _patched_langs.clear()
        self.scope.restore()


def _patch_once(fn):
    """Every call of a device function patches the language anew; once for a kernel is enough."""
    langs = frozenset(id(x) for x in fn.__globals__.values() if x is tl or x is tl.core)
    if langs in _patched_langs:
        return None
    _patched_langs.add(langs)
    return _Restored(_patch(fn))


interpreter._patch_lang = _patch_once


def outputs_of(a: Attention, like: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Outputs full of a number that no kernel may leave there, in the memory order the attention asks for."""
    outs: list[torch.Tensor] = []
    for name in a.outputs:
        dtype = torch.float32 if name == "lse" else DTYPE_OF[a.dtype]
        shape = list(like[name].shape)
        order = list(range(len(shape)))
        if name == "out" and a.layout:
            names = [x.name for x in a.out_axes]
            order = [names.index(n) for n in a.layout]
        memory = torch.full([shape[n] for n in order], 777.0, dtype=dtype)
        outs.append(memory.permute([order.index(n) for n in range(len(shape))]))
    return outs


def run(
    a: Attention,
    bounds: Bounds,
    config: TritonConfig,
    tensors: dict[str, torch.Tensor],
    sizes: list[int],
    **launch: int,
) -> dict[str, torch.Tensor]:
    """What the emitted kernel makes of the tensors, under the interpreter."""
    module = load_module(emit(a, bounds, config))
    shapes = interpret(a, tensors, sizes)
    outs = outputs_of(a, shapes)
    module.launch([tensors[t.name] for t in a.tensors], sizes, outs, **launch)
    return dict(zip(a.outputs, outs, strict=True))


def lists(
    a: Attention, bounds: Bounds, config: TritonConfig, tensors: dict[str, torch.Tensor], sizes: list[int]
) -> list[tuple[list[int], list[int]]]:
    """The blocks that each tile of rows sees in full and in part, as the kernels before the attention list them."""
    module = load_module(emit(a, bounds, config))
    found: dict[str, torch.Tensor] = {}

    class Recorder:
        def __getitem__(self, grid):
            def take(*arguments, **options):
                found.update(zip(module.SIGNATURES["attention"], arguments, strict=True))

            return take

    attention, module.attention = module.attention, Recorder()
    try:
        module.launch([tensors[t.name] for t in a.tensors], sizes, outputs_of(a, interpret(a, tensors, sizes)))
    finally:
        module.attention = attention
    return [
        (blocks[:full].tolist(), blocks.flip(0)[:part].tolist())
        for blocks, (full, part) in zip(found["blocks_ptr"], found["counts_ptr"].tolist(), strict=True)
    ]


def run_backward(
    g: AttentionGrad, configs: tuple[TritonConfig, TritonConfig], tensors: dict[str, torch.Tensor],
    given: Sequence[torch.Tensor], sizes: list[int],
) -> list[torch.Tensor]:  # fmt: skip
    """What the emitted backward makes of the tensors; it starts as NaN, so that what is not written shows."""
    a = g.attention
    module = load_module(emit_gradient(g, loop_bounds(a, rows=True), loop_bounds(g.by_key, rows=True), *configs))
    outputs = [torch.full(shape, float("nan")) for shape in shapes_of_grad(g, sizes)]
    for out, x in zip(outputs[len(g.operands) :], g.loads, strict=True):
        if x.over == "i, j":
            out.zero_()  # what no tile visits is not written
    module.launch([*(tensors[t.name] for t in a.tensors), *given], sizes, outputs)
    return outputs
