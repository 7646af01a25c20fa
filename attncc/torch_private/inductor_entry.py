"""The function through which everybody reaches Inductor with a graph of Dynamo's: private torch API.

`torch.compile(model)`, with or without a mode, and all that calls it for others (Trainer, accelerate, `generate`) end
in `torch._inductor.compile_fx.compile_fx`, which each of them looks up when it compiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from torch import fx

#: (graph, inputs, Inductor's configuration entries) -> the compiled graph
Instead = Callable[[fx.GraphModule, Sequence[Any], dict[str, Any]], Callable[..., Any]]

#: Whether what compiles here is `Instead` itself, which reaches Inductor as it is.
_within: ContextVar[bool] = ContextVar("attncc_within_inductor", default=False)


class _Entry:
    """Stands for `compile_fx` while it is installed."""

    def __init__(self, own: Callable[..., Any], inner: object, instead: Instead) -> None:
        self.own, self.inner, self.instead = own, inner, instead
        self.__name__, self.__wrapped__ = own.__name__, own

    def __call__(self, model_: Any, example_inputs_: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._is_dynamos(model_, args, kwargs):
            return self.own(model_, example_inputs_, *args, **kwargs)
        token = _within.set(True)
        try:
            return self.instead(model_, example_inputs_, dict(kwargs.get("config_patches") or {}))
        finally:
            _within.reset(token)

    def _is_dynamos(self, graph: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a graph comes from Dynamo, to be compiled for this process. Ahead-of-time compilation has an inner
        compiler of its own."""
        known = {"config_patches", "compile_region_name", "inner_compile", "ignore_shape_env", "decompositions"}
        return (
            not _within.get() and not args and kwargs.keys() <= known and isinstance(graph, fx.GraphModule)
            and kwargs.get("inner_compile", self.inner) is self.inner
            and not kwargs.get("ignore_shape_env") and kwargs.get("decompositions") is None
            and any("example_value" in n.meta for n in graph.graph.nodes)
        )  # fmt: skip


def enter(instead: Instead) -> Callable[[], None]:
    """Let `instead` compile the graphs that Inductor is given. Returns what undoes it, in any order with others."""
    from torch._inductor import compile_fx as module  # noqa: PLC0415 - Inductor takes a second to import

    entry = _Entry(module.compile_fx, module.compile_fx_inner, instead)
    module.compile_fx = entry  # type: ignore[assignment]

    def undo() -> None:
        at: Any = module.compile_fx
        if at is entry:
            module.compile_fx = entry.own  # type: ignore[assignment]
            return
        while isinstance(at, _Entry):  # another one was installed on top
            if at.own is entry:
                at.own = entry.own
                return
            at = at.own

    return undo
