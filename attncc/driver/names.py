"""The names that a model's own graph has for the tensors of an attention: what Dynamo called a node after the user's
variable, or an input by its place. Reports use them; the text of an attention, by which kernels are kept, does not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from torch import fx

from attncc.driver.capture import Reading
from attncc.ir import Attention, Expr, Linear
from attncc.ir.build import ONE, ZERO, add, le
from attncc.ir.rewrite import rewrite
from attncc.ir.terms import OPS, Const, Load, Op
from attncc.patterns.linear.linear import Recognised
from attncc.patterns.site.assemble import Lifted

_Node = TypeVar("_Node", Attention, Linear)
_WORD = re.compile(r"[A-Za-z_]\w*")
#: The way to a variable of a function's closure: the function's name and a number say more.
_CLOSURE = re.compile(r"\.__closure__\[(\d+)\]\.cell_contents")
#: Significant digits of a number in a report: 1 / sqrt(80) is 0.1118.
_DIGITS = 4


def names_of(site: Lifted | Recognised, reading: Reading) -> dict[str, str]:
    """For each tensor of a site's attention, beside queries, keys and values, the name that the graph has for it."""
    a = site.attention if isinstance(site, Lifted) else site.linear
    own = {a.q.tensor, a.k.tensor, a.v.tensor}
    taken = {*own, "s", "w", "x", "z", "S", "f", "g", "inf", "nan", *(x.name for x in (*a.axes, *a.sizes)), *OPS}
    found: dict[str, str] = {}
    for tensor, node in zip(a.tensors, site.tensors, strict=True):
        if tensor.name in own:
            continue
        origin = reading.origin.get(node) or reading.owner.get(node)
        name = graph_name(origin) if origin is not None else ""
        bare = re.sub(r"_\d+$", "", name)
        name = next((x for x in (bare, name) if x and x not in taken), tensor.name)
        taken.add(name)
        found[tensor.name] = name
    return found


def graph_name(n: fx.Node) -> str:
    """What a node of a Dynamo graph is called: `attention_mask`, of the input `L['kwargs']['attention_mask']`."""
    source = getattr(n.meta.get("grapharg"), "source", None)
    if n.op == "placeholder" and source is not None:
        written = str(source.name() if callable(source.name) else source.name)
        function, *cells = _CLOSURE.split(written)  # then the number of each cell, and what is taken from it
        words = _WORD.findall(cells[-1] if cells else function)
        if cells and not words:
            words = [f"{x}_{cells[-2]}" for x in _WORD.findall(function)]
        return words[-1] if words else n.name
    return n.name


def readable(a: _Node, names: Mapping[str, str]) -> _Node:
    """`a` with its expressions over the graph's names and its numbers rounded: to be read, not run."""

    def shown(y: Expr) -> Expr | None:
        if isinstance(y, Load) and y.tensor in names:
            return Load(names[y.tensor], tuple(map(_as_written, y.index)), y.kind)
        if isinstance(y, Const) and isinstance(y.value, float):
            return Const(float(f"{y.value:.{_DIGITS}g}"))
        return None

    if isinstance(a, Linear):
        over = None if a.over is None else rewrite(a.over, shown)
        phi_q, phi_k, decay, rate = (rewrite(x, shown) for x in (a.phi_q, a.phi_k, a.decay, a.rate))
        return replace(a, phi_q=phi_q, phi_k=phi_k, decay=decay, rate=rate, over=over)
    sink = None if a.sink is None else rewrite(a.sink, shown)
    score, mask, weight = (rewrite(x, shown) for x in (a.score, a.mask, a.weight))
    return replace(a, score=score, mask=mask, weight=weight, sink=sink)


def _as_written(place: Expr) -> Expr:
    """`where(x + 1 <= 0, x + n, x)`, by which a place that may count from the end is read, as `x`, as written."""
    if not isinstance(place, Op) or place.name != "where":
        return place
    below, _, x = place.args
    return x if below is le(add(x, ONE), ZERO) else place
