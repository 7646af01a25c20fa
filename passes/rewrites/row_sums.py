"""Attentions whose gradients are wanted keep the sums of their rows.

    o = attention(..)  ->  o, lse = attention(..)            where the backward begins with them

so that backward computes no statistics of the softmax again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat

from attncc.ir import Attention, Program


def with_sums(p: Program, wanted: Sequence[bool]) -> Program:
    """`p` with `lse` among the outputs of those of its attentions, in order, that are `wanted` and have a softmax. An
    attention of which a plan made several is wanted in all of them."""
    flags = iter(wanted if len(wanted) > 1 else repeat(any(wanted)))
    steps = list(p.steps)
    for at, step in enumerate(steps):
        a = step.node
        if isinstance(a, Attention) and next(flags) and a.normalizer == "softmax" and "lse" not in a.outputs:
            node = replace(a, outputs=(*a.outputs, "lse"))
            steps[at] = replace(step, node=node, results=(*step.results, f"{step.results[0]}_sums"))
    return replace(p, steps=tuple(steps))
