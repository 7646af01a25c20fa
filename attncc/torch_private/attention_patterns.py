"""Inductor's patterns of attention, kept from what they do not compute.

Inductor looks for attention with patterns that were traced once, and in which every number is left open: the axis of a
softmax, the order of a permutation, the value of masked scores. A match is to be checked by tracing the pattern again
at the shapes at hand; for patterns that were traced beforehand that check is empty, and `bmm(q, k^T).softmax(1)` turns
into a softmax over the last axis. Here that check is made. Where it fails the softmax gets a second user, which no
pattern allows, until Inductor has looked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._guards import tracing
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from attncc.torch_private import scatters

aten = torch.ops.aten
_WHOLE = {aten._softmax.default, aten._safe_softmax.default}
_SOFTMAXES = {aten.amax.default, *_WHOLE}
_MARK = "attncc_no_attention"


def guarded(config: dict[str, Any]) -> dict[str, Any]:
    """Inductor's configuration with its patterns of attention checked, beside the passes that it names already."""
    from torch._inductor import config as defaults  # noqa: PLC0415 - Inductor takes a second to import

    joined = dict(config)
    for name, own in zip(("joint_custom_pre_pass", "joint_custom_post_pass"), _passes(), strict=True):
        given = config.get(name, getattr(defaults, name))
        joined[name] = own if given is None else [*(given if isinstance(given, list | tuple) else [given]), own]
    return joined


@cache
def _passes() -> tuple[Any, Any]:
    from torch._inductor.custom_graph_pass import CustomGraphPass  # noqa: PLC0415 - as above

    class Own(CustomGraphPass):
        """A pass by its name: what Inductor keeps on disk is of one version of what changes it."""

        def __init__(self, run: Callable[[fx.Graph], None]) -> None:
            self.run = run

        def __call__(self, graph: fx.Graph) -> None:
            self.run(graph)

        def uuid(self) -> str:
            return f"{self.run.__name__} {_version()}"

    return Own(protect), Own(release)


@cache
def _version() -> str:
    files = (Path(__file__), Path(scatters.__file__))
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()


def protect(graph: fx.Graph) -> None:
    """Mark each softmax of a joint graph that Inductor would take for another attention than it belongs to."""
    present = {n.target for n in graph.nodes}
    if not (present & _SOFTMAXES and aten.bmm.default in present):
        return
    _prepare(graph)
    patterns = _patterns()
    for n in list(graph.nodes):
        for pattern, checked in patterns.get(n.target, ()):
            match = pattern.match(n)
            if match and not checked(match):
                _mark(graph, match)


def release(graph: fx.Graph) -> None:
    """Take the marks away."""
    for n in graph.nodes:
        if _MARK in n.meta:
            graph.erase_node(n)


def _mark(graph: fx.Graph, match: Any) -> None:
    inner = [n for n in match.nodes if n not in match.output_nodes()]
    softmax = next(n for n in reversed(inner) if n.target in _SOFTMAXES)
    if any(_MARK in user.meta for user in softmax.users):
        return
    with graph.inserting_after(softmax):
        mark = graph.call_function(aten.neg.default, (softmax,))
    mark.meta.update(softmax.meta, **{_MARK: True})


def _prepare(graph: fx.Graph) -> None:
    """What Inductor does to a graph before it looks for patterns; and axes named from the end, as patterns do."""
    from torch._inductor import config  # noqa: PLC0415 - as above
    from torch._inductor.fx_passes import joint_graph, post_grad  # noqa: PLC0415 - as above

    post_grad.remove_noop_ops(graph)
    if config.joint_graph_constant_folding and graph.owning_module is not None:
        joint_graph.constant_fold_uniform_value(graph.owning_module)
    if config.pattern_matcher:
        joint_graph.early_patterns.apply(graph)
    for n in graph.nodes:
        if n.target in (aten.amax.default, aten.sum.dim_IntList) and n.args[1] == [n.args[0].meta["val"].dim() - 1]:
            n.args = (n.args[0], [-1], *n.args[2:])
        if n.target in _WHOLE and n.args[1] == n.args[0].meta["val"].dim() - 1:
            n.args = (n.args[0], -1, *n.args[2:])


@cache
def _patterns() -> dict[Any, list[tuple[Any, Callable[[Any], bool]]]]:
    """Each pattern of attention by the operations that it ends in, and whether a match of it is right."""
    from torch._inductor import pattern_matcher  # noqa: PLC0415 - as above
    from torch._inductor.fx_passes.joint_graph import patterns  # noqa: PLC0415 - as above

    known: dict[int, Any] = {id(pattern): rest for *rest, pattern in pattern_matcher._known_precompiled_patterns}
    found: dict[Any, list[tuple[Any, Callable[[Any], bool]]]] = {}
    for (_, target), entries in patterns.patterns.items():
        for entry in entries:
            traced = known.get(id(entry.pattern))
            if traced is not None and "sfdp" in traced[0].__name__:
                found.setdefault(target, []).append((entry.pattern, _Checked(*traced)))
    return found


class _Checked:
    """Whether a match is what the function computes that its pattern was traced from."""

    def __init__(self, function: Any, example: Any, trace: Any, numbers: Any) -> None:
        self.function, self.example, self.trace, self.numbers = function, example, trace, numbers
        self.check: Callable[[Any], bool] | None = None

    def __call__(self, match: Any) -> bool:
        if self.check is None:
            self.check = self._registered()
        return self.check(match)

    def _registered(self) -> Callable[[Any], bool]:
        """The check of the pattern as Inductor registers one that was not traced beforehand."""
        from torch._inductor.pattern_matcher import PatternMatcherPass, register_replacement  # noqa: PLC0415 - as above

        own: Any = PatternMatcherPass()
        modes = (x.fake_mode for x in tree_leaves(self.example) if isinstance(x, FakeTensor))
        with tracing(None), unset_fake_temporarily(), next(modes, nullcontext()):
            register_replacement(
                self.function, self.function, self.example, self.trace, own, scalar_workaround=self.numbers
            )
        ((entry,),) = own.patterns.values()
        return entry.extra_check
