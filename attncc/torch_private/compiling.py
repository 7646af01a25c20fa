"""What Dynamo does for one backend and for no other: private torch API, like `attncc.torch_private`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from types import CodeType
from typing import Any

import torch

Backend = Callable[..., Any]


def is_backend(compiler: object, backend: Backend) -> bool:
    """Whether what Dynamo calls with its graphs is `backend`, bare or with options, or says by an attribute
    `compiler_fn` that it stands for it."""
    compiler = getattr(compiler, "_torchdynamo_orig_backend", compiler)
    return compiler is backend or getattr(compiler, "compiler_fn", None) is backend


def trace_through_breaks(backend: Backend) -> None:
    """Let Dynamo trace what it leaves the graph for in torch's own attention modules, where `backend` compiles."""
    trace_through_sdp_kernel(backend)
    trace_through_transformers(backend)


def trace_through_sdp_kernel(backend: Backend) -> None:
    """Let Dynamo trace the deprecated `torch.backends.cuda.sdp_kernel` as the context manager that took its place,
    where `backend` compiles. It breaks the graph there for other backends, and goes on to do so."""
    from torch._dynamo.variables.ctx_manager import SDPAKernelVariable  # noqa: PLC0415 - Dynamo takes a second
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable  # noqa: PLC0415 - as above
    from torch.nn.attention import SDPBackend  # noqa: PLC0415 - as above

    kinds = {
        "enable_flash": SDPBackend.FLASH_ATTENTION, "enable_math": SDPBackend.MATH,
        "enable_mem_efficient": SDPBackend.EFFICIENT_ATTENTION, "enable_cudnn": SDPBackend.CUDNN_ATTENTION,
    }  # fmt: skip

    def entered(_: object, tx: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(kinds, args, strict=False)) | kwargs
        if not is_backend(tx.output.compiler_fn, backend) or not given.keys() <= kinds.keys():
            return None  # as if this were not here
        if not all(x.is_python_constant() for x in given.values()):
            return None
        chosen = [kind for name, kind in kinds.items() if name not in given or given[name].as_python_constant()]
        return SDPAKernelVariable.create(tx, chosen)

    handlers = TorchInGraphFunctionVariable._get_handlers()
    handlers.setdefault(torch.backends.cuda.sdp_kernel, entered)


def trace_through_transformers(backend: Backend) -> None:
    """Let Dynamo trace two helpers of `nn.Transformer`'s modules and of `nn.MultiheadAttention` without what it leaves
    the graph for, where `backend` compiles: one compares a mask with the causal one, to tell kernels of it (attncc
    reads what a mask is); the other warns of masks of two types. It breaks the graph there for other backends, which
    for these modules is to run them uncompiled, and goes on to do so."""
    from torch._dynamo.trace_rules import get_torch_obj_rule_map  # noqa: PLC0415 - Dynamo takes a second
    from torch._dynamo.variables.functions import UserFunctionVariable  # noqa: PLC0415 - as above
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable  # noqa: PLC0415 - as above
    from torch.nn import functional  # noqa: PLC0415 - beside the others
    from torch.nn.modules import transformer  # noqa: PLC0415 - beside the others

    rules, handlers = get_torch_obj_rule_map(), TorchInGraphFunctionVariable._get_handlers()

    def inlined(own: Callable[..., Any], by: Callable[..., Any]) -> None:
        def entered(_: object, tx: Any, *args: Any, **kwargs: Any) -> Any:
            chosen = by if is_backend(tx.output.compiler_fn, backend) else own
            return UserFunctionVariable(chosen).call_function(tx, list(args), kwargs)

        if own not in rules:
            rules[own] = TorchInGraphFunctionVariable
            handlers[own] = entered

    inlined(transformer._detect_is_causal_mask, _told_causal)
    inlined(functional._canonical_mask, _canonical_mask)


def _told_causal(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True


def _canonical_mask(
    mask: Any, mask_name: str, other_type: Any, other_name: str, target_type: torch.dtype, check_other: bool = True
) -> Any:
    """Added to scores: zero, or -inf where a mask of truth values hides."""
    if mask is None or torch.is_floating_point(mask):
        return mask
    if mask.dtype != torch.bool:
        raise AssertionError(f"only bool and floating types of {mask_name} are supported")
    return torch.zeros_like(mask, dtype=target_type).masked_fill_(mask, float("-inf"))


@contextmanager
def compiled_apart(backend: Backend) -> Iterator[Callable[[Any], Any]]:
    """Gives a function that is like `torch.compile(.., backend=backend)`. What it compiles nobody else finds, and on
    leaving it is gone, and with it what Dynamo learnt from it: code that is compiled already stays compiled.

    Other threads that compile meanwhile lose what Dynamo learns about changing sizes. A version of torch without caches
    of one's own counts an explanation of code that is compiled already as one of its recompilations."""
    from torch._dynamo import config, eval_frame, pgo  # noqa: PLC0415 - Dynamo takes a second to import

    most = max((len(_entries(code)) for code in _seen()), default=0)
    names = ("_CODE_STATE", "_INIT_CODE_STATE", "_LOGGED_DYNAMIC_ALLOWLIST")
    learnt = {name: getattr(pgo, name) for name in names}
    pgo._CODE_STATE, pgo._INIT_CODE_STATE = defaultdict(pgo.CodeState), None
    apart = {"isolate_recompiles": True} if "isolate_recompiles" in signature(eval_frame._optimize).parameters else {}
    before = {id(code) for code in _seen()}
    try:
        with config.patch(
            automatic_dynamic_local_pgo=False, automatic_dynamic_remote_pgo=False,
            recompile_limit=config.recompile_limit + most,
            accumulated_recompile_limit=config.accumulated_recompile_limit + most,
        ):  # fmt: skip
            yield torch._dynamo.optimize(backend, **apart)
    finally:
        for name, value in learnt.items():
            setattr(pgo, name, value)
        eval_frame.cached_backends.pop(id(backend), None)
        for code in _seen():
            _forget(code, backend, id(code) not in before)


def _seen() -> list[CodeType]:
    """Every code object that Dynamo has looked at."""
    from torch._dynamo.convert_frame import input_codes  # noqa: PLC0415 - as above

    return [code for ref in input_codes.seen if (code := ref()) is not None]


def _entries(code: CodeType) -> Sequence[Any]:
    """What was compiled of a code object, for any backend."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list  # noqa: PLC0415 - as above

    return _debug_get_cache_entry_list(code)


def _forget(code: CodeType, backend: Backend, new: bool) -> None:
    """Remove what `backend` compiled of a code object; all that is known of it where nobody else compiled any."""
    from torch._C._dynamo.eval_frame import reset_code  # noqa: PLC0415 - as above
    from torch._dynamo.guards import DeletedGuardManagerWrapper  # noqa: PLC0415 - as above

    entries = [e for e in _entries(code) if e.code is not None]
    own = [e for e in entries if getattr(e.backend, "_torchdynamo_orig_backend", e.backend) is backend]
    if len(own) == len(entries) and (own or new):
        reset_code(code)
        return
    for entry in own:
        guards = entry.guard_manager
        guards.extra_state.invalidate(guards.cache_entry, DeletedGuardManagerWrapper("it was compiled to be explained"))
