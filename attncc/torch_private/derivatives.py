"""Derivatives that code which reads memory (a kernel, what Inductor compiled) does not know: private torch API, like
`torch_private`.

Batches of gradients, `torch.autograd.grad(..., is_grads_batched=True)`, as vectorised Jacobians and batched checks of
gradients ask for them: torch maps over such a batch by means of its own, older than `torch.vmap`, and its tensors have
no memory to speak of. The code is called once for each gradient instead.

Forward mode: a compiled graph reads the values of its inputs and loses their tangents. The graph itself is run instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

_C: Any = torch._C
_forward_ad: Any = forward_ad
_batched: Callable[[torch.Tensor], bool] = _C._functorch.is_legacy_batchedtensor
_remove: Callable[..., torch.Tensor] = torch._remove_batch_dim  # type: ignore[attr-defined]
_add: Callable[..., torch.Tensor] = torch._add_batch_dim  # type: ignore[attr-defined]

#: How far behind the outputs of a compiled graph its node in autograd's graph may be: some are views of its own.
_DEPTH = 3


def each_of_a_batch(args: Sequence[Any], call: Callable[[list[Any]], Sequence[Any]]) -> list[Any]:
    """One call for each gradient of the batch that some of `args` are of; the results as a batch, each in the strides
    that it was given in."""
    level = _C._vmapmode_increment_nesting() - 1
    _C._vmapmode_decrement_nesting()
    held = [isinstance(x, torch.Tensor) and _batched(x) for x in args]
    first = args[held.index(True)]
    count = _remove(first, level, 1, 0).shape[0]
    opened = [_remove(x, level, count, 0) if own else x for x, own in zip(args, held, strict=True)]
    _C._vmapmode_decrement_nesting()  # inside of which torch refuses random numbers, to kernels that are tried too
    try:
        results = [
            call([x[at] if own else x for x, own in zip(opened, held, strict=True)]) for at in range(count)
        ]
    finally:
        _C._vmapmode_increment_nesting()
    return [_together(same, level) for same in zip(*results, strict=True)]


def _together(same: Sequence[Any], level: int) -> Any:
    first = same[0]
    if not isinstance(first, torch.Tensor):
        return first
    room = 1 + sum((n - 1) * step for n, step in zip(first.shape, first.stride(), strict=True))
    made = first.new_empty_strided((len(same), *first.shape), (max(room, 0), *first.stride()))
    for at, x in enumerate(same):
        made[at] = x
    return _add(made, 0, level)


def has_tangents(args: Sequence[Any]) -> bool:
    """Whether forward mode differentiates with respect to any of some tensors."""
    if _forward_ad._current_level < 0:
        return False
    floats = (x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point())
    return any(_forward_ad.unpack_dual(x).tangent is not None for x in floats)


def with_derivatives(run: Callable[..., Any], graph: Callable[..., Any], *, learns: bool) -> Callable[..., Any]:
    """`run`, which Inductor compiled from `graph`, where nobody asks for a derivative that it does not know. `learns`:
    its inputs require gradients, of which it may be given batches."""
    known = not learns

    def call(*args: Any) -> Any:
        nonlocal known
        if _forward_ad._current_level >= 0 and has_tangents(args):
            return graph(*args)
        out = run(*args)
        if not known:
            known = _let_take_batches(out)
        return out

    return call


def _let_take_batches(out: Any) -> bool:
    """Change what the backward of a compiled graph does with batches of gradients. Whether there was one to change."""
    outputs = out if isinstance(out, tuple | list) else (out,)
    nodes = {x.grad_fn for x in outputs if isinstance(x, torch.Tensor) and x.grad_fn is not None}
    for _ in range(_DEPTH):
        functions: set[Any] = {getattr(n, "_forward_cls", None) for n in nodes}
        for function in functions:
            plain = getattr(function, "_backward_impl", None)
            if plain is not None:
                if not hasattr(plain, "takes_batches"):
                    function._backward_impl = staticmethod(_taking_batches(plain))
                return True
        nodes = {n for x in nodes for n, _ in x.next_functions if n is not None}
    return False


def _taking_batches(plain: Callable[[Any, list[Any]], Sequence[Any]]) -> Callable[[Any, list[Any]], Sequence[Any]]:
    def backward(ctx: Any, args: list[Any]) -> Sequence[Any]:
        if not any(isinstance(x, torch.Tensor) and _batched(x) for x in args):
            return plain(ctx, args)
        return each_of_a_batch(args, lambda given: plain(ctx, given))

    backward.takes_batches = True  # type: ignore[attr-defined]
    return backward
