"""attncc where Inductor is the only backend that can be asked for: the same rewrite, before Inductor's own passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from attncc.driver.backend import compile_graph
from attncc.driver.options import options_of
from attncc.driver.planning import Following
from attncc.torch_private.inductor_entry import enter


class Installed:
    """attncc in Inductor, until `undo` is called or the `with` block ends. What was compiled stays as it is."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def undo(self) -> None:
        """Inductor compiles as it did before; a second call does nothing."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def install_in_inductor(options: Mapping[str, Any] | None = None) -> Installed:
    """From now on, what is compiled with Inductor in this process goes through attncc first, as with
    `backend="attncc"`: for programs that ask for Inductor by name, or refuse other backends (transformers' Trainer,
    accelerate, `generate(compile_config=...)`, `compile_repeated_blocks`).

    `options` are attncc's own of `torch.compile`: `measure` and `plan`. What was compiled before stays as it is. Undone
    by `.undo()` of what is returned, or by using it in a `with` statement. Raises RuntimeError for an unknown option.
    """
    chosen = options_of(None, options)
    if not chosen.inductor:
        raise RuntimeError("attncc: install_in_inductor has no option 'inductor'")

    def instead(gm: fx.GraphModule, inputs: Sequence[Any], config: dict[str, Any]) -> Callable[..., Any]:
        own = options_of(None, {**(options or {}), **config})
        return compile_graph(gm, inputs, own, None if chosen.plan is None else Following(chosen.plan))

    return Installed(enter(instead))
