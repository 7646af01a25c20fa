"""The kernel of kept boxes on this machine, and the check of it at its first use: against plain torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

import torch

from attncc.codegen import cpp
from attncc.codegen.cpp.boxes import RANKS, SIZES
from attncc.ir.evaluate import NAME_OF
from attncc.kernels.build import Target, default_store, target_of
from attncc.kernels.compiled import NOT_MADE, compiled, why_not_made
from attncc.kernels.first_use import Check
from attncc.runtime.cpp import CppKernelError, Ranks
from attncc.runtime.kept import Call, Kept
from attncc.runtime.op import Kernel
from attncc.torch_private import apart

_log = logging.getLogger(__name__)


def build_boxes(dtype: torch.dtype) -> Kernel | None:
    """The kernel for keys of a dtype, compiled and kept in the store; None where plain torch has to do."""
    return _built(dtype, target_of(torch.device("cpu")))


@lru_cache(maxsize=64)
def _built(dtype: torch.dtype, target: Target) -> Kernel | None:
    name = NAME_OF.get(dtype, str(dtype))
    reason = target.missing or cpp.unsupported_boxes(name)
    if not reason:
        assert target.toolchain is not None  # else the target would lack it
        ranks = Ranks(RANKS[0], len(SIZES), RANKS[1])
        check = Check(lambda kernel: wrong(kernel, dtype), lambda *_: None)
        try:
            return compiled(
                ranks, cpp.emit_boxes(name), target.arch, target.toolchain, f"boxes-{name}", default_store(), check,
                _no_other, None,
            )  # fmt: skip
        except NOT_MADE as error:
            reason = why_not_made(error)
    _log.info("boxes of keys of %s are made by torch: %s", name, reason)
    return None


def _no_other() -> Kernel:
    """What is made up always tells whether the kernel is right, so that no call is checked."""
    raise CppKernelError("there is no other kernel of boxes")


def wrong(kernel: Kernel, dtype: torch.dtype) -> str | None:
    """What is wrong with a kernel on made-up data, nothing if it is right: boxes from nothing, and renewed ones."""
    with apart(), torch.inference_mode(False), torch.no_grad():
        g = torch.Generator().manual_seed(0)
        x = made_up(dtype, g)
        mine, plain = Kept(x), Kept(x)
        for part in (x, changed(x, g)):
            found = mine.bounds(part, kernel)
            plain.renew(part)
            plain.whole = False
            for name in ("least", "largest", "was"):
                if not torch.equal(getattr(mine, name), getattr(plain, name)):
                    return f"the {name} of its pages is another than that of torch"
            exact = plain.exact(part)
            if not bool((found.double() - exact).abs().max() <= 1e-4 * exact.abs().max()):
                return "its bounds are not those of torch"
    return None


def made_up(dtype: torch.dtype, g: torch.Generator) -> Call:
    """A call of two sequences that begin elsewhere, two heads of keys, and pages that are not full."""
    q, keys = torch.randn(2, 2, 3, 24, generator=g), torch.randn(2, 2, 50, 24, generator=g).to(dtype)
    seen = (torch.arange(50) < 41).expand(2, 1, 50).contiguous()
    seen[1, :, :7] = False
    return Call(q, keys, seen, torch.tensor([[0], [1]]), None, 4, 14)


def changed(x: Call, g: torch.Generator, positions: Sequence[int] = (41, -30)) -> Call:
    """The same cache after keys were written, one of which is seen now and was not."""
    at = torch.tensor(positions)
    x.keys[:, :, at] = torch.randn(2, 2, len(at), 24, generator=g).to(x.keys.dtype)
    seen = x.seen.clone()
    seen[..., 41] = True
    return Call(x.q, x.keys, seen, x.shift, at, x.size, x.count)
