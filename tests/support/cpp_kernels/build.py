"""Building and running C++ kernels in tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch

from attncc.codegen.cpp import emit
from attncc.ir import Attention, Bounds, interpret
from attncc.ir.evaluate import DTYPE_OF
from attncc.passes.bounds.bounds import loop_bounds
from attncc.runtime.cpp import NEEDS, CppKernel, CppToolchain, processor

_folder = tempfile.TemporaryDirectory(prefix="attncc-test-")
#: Set by conftest.py where kernels are to be compiled as users have them.
AS_USERS_HAVE_IT = "ATTNCC_TESTS_OPTIMISED"
_ORDER = ("amx", "avx512bf16", "avx512", "avx2")


def host_isas(*, every: bool = False) -> list[str]:
    """The instruction sets this processor runs: the best and AVX2, or all of them."""
    info = Path("/proc/cpuinfo")
    flags = processor(info.read_text())[1] if info.exists() else frozenset[str]()
    found = [isa for isa in _ORDER if NEEDS[isa] <= flags]
    return found if every else [isa for n, isa in enumerate(found) if n == 0 or isa == "avx2"]


@cache
def toolchain() -> CppToolchain:
    found = CppToolchain.find()
    if found is None:
        pytest.skip("no C++ compiler")
    return found


class _Quick(CppToolchain):
    """Half the compile time, the same program: what it computes does not depend on how well it is optimised, once
    products and sums are fused (`-fexpensive-optimizations`)."""

    def flags(self, isa: str) -> tuple[str, ...]:
        kept = ["-O1" if x == "-O2" else x for x in super().flags(isa) if x not in _SLOW]
        return (*kept, "-fexpensive-optimizations")


_SLOW = ("-fpeel-loops", "-funswitch-loops")


@cache
def _built(source: str, isa: str, optimised: bool) -> Path:
    out = Path(_folder.name) / f"{abs(hash((source, isa, optimised)))}.so"
    found = toolchain()
    (found if optimised else _Quick(found.path, found.words)).compile(source, isa, out)
    return out


def compiled(source: str, isa: str, *, quick: bool = True) -> Path:
    """The library of a source; in the tests marked `full` as users have it, in the others compiled in less time where
    it can be (not what is inlined by way of pointers)."""
    return _built(source, isa, not quick or os.environ.get(AS_USERS_HAVE_IT) == "1")


def build(a: Attention, isa: str, bounds: Bounds | None = None) -> CppKernel:
    return CppKernel(compiled(emit(a, bounds or loop_bounds(a), isa), isa), a)


def run(a: Attention, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int], isa: str,
        bounds: Bounds | None = None) -> dict[str, torch.Tensor]:  # fmt: skip
    """Outputs by name. They start as NaN, so that what the kernel does not write shows."""
    shapes = interpret(a, tensors, sizes)
    outputs = {}
    for name, like in shapes.items():
        dtype = DTYPE_OF[a.dtype if name == "out" else a.compute_dtype]
        outputs[name] = torch.full(like.shape, float("nan"), dtype=dtype)
    build(a, isa, bounds)([tensors[t.name] for t in a.tensors], list(sizes), list(outputs.values()))
    return outputs


def check(a: Attention, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int], isa: str,
          bounds: Bounds | None = None) -> dict[str, torch.Tensor]:  # fmt: skip
    """Runs the kernel and holds it against the interpreter in float64: at most a few roundings of the output type, and
    of the weights where products run in bfloat16, beyond the interpreter's own error in the attention's types."""
    return compare(a, tensors, sizes, run(a, tensors, sizes, isa, bounds))


def compare(a: Attention, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int],
            got: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # fmt: skip
    """`got`, held against the interpreter; see `check`."""
    want = interpret(a, tensors, sizes, compute=torch.float64)
    eager = interpret(a, tensors, sizes)
    for name in a.outputs:
        g, w, e = got[name].double(), want[name].double(), eager[name].double()
        assert torch.equal(g.isnan(), e.isnan()), f"{name}: NaN at {(g.isnan() != e.isnan()).nonzero()[:4].tolist()}"
        assert torch.equal(g.isinf(), e.isinf()), f"{name}: infinite elsewhere"
        finite = w.isfinite() & e.isfinite()
        if not finite.any():
            continue
        scale = w[finite].abs().max().item()
        unit = max(torch.finfo(got[name].dtype).eps, torch.finfo(DTYPE_OF[a.compute_dtype]).eps)
        if a.compute_dtype == "f64":  # the interpreter's own error is not seen here: both sum in float64
            scale = max(scale, 1.0) * max(tensors[a.v.tensor].abs().max().item(), 1.0)
        halves = all(a.tensor(x.tensor).dtype == "bf16" for x in (a.q, a.k, a.v))
        if name == "lse" and halves:  # the power of two of weights that round to bfloat16 is good to 7.5e-5
            unit, scale = max(unit, 7.5e-5), max(scale, 1.0)
        if name == "out" and halves:
            # weights round to bfloat16 before their product with V, as SDPA rounds them
            unit = max(unit, torch.finfo(torch.bfloat16).eps)
            floats = (t for t in tensors.values() if t.is_floating_point() and t.numel())
            scale = max(scale, *(t.abs().max().item() for t in floats))
        own = (e - w)[finite].abs().max().item()
        error = (g - w)[finite].abs().max().item()
        assert error <= 4 * own + 4 * unit * scale, f"{name}: error {error}, eager {own}, scale {scale}"
    return got
