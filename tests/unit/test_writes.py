"""Which elements of a tensor a view of it covers, against the elements themselves."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from reading.asked import Sample
from reading.view_ops import samples
from torch import fx
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from attncc.ir import Const, Expr, Index
from attncc.ir.evaluate import Evaluator
from attncc.patterns.graph.facts import Facts
from attncc.patterns.reader.writes import _UNDO, place


def value(x: Expr, at: tuple[int, ...]) -> int:
    return int(Evaluator({Index(f"x{d}"): torch.tensor(n) for d, n in enumerate(at)}, {}, torch.float64)(x))


def view(x: torch.Tensor, choose: random.Random) -> torch.Tensor:
    for _ in range(choose.choice([1, 2, 3])):
        d = choose.randrange(x.ndim) if x.ndim else 0
        kind = choose.choice(["slice", "slice", "select", "transpose", "flat", "unsqueeze", "squeeze"])
        if kind == "slice" and x.ndim:
            start = choose.randrange(-x.shape[d], x.shape[d])
            stop = choose.randrange(start % x.shape[d], x.shape[d]) + 1
            x = torch.ops.aten.slice.Tensor(x, d, start, stop, choose.choice([1, 1, 2]))
        elif kind == "select" and x.ndim:
            x = x.select(d, choose.randrange(-x.shape[d], x.shape[d]))
        elif kind == "transpose" and x.ndim > 1:
            x = x.transpose(0, -1)
        elif kind == "flat" and x.is_contiguous():
            x = x.view(-1)
        elif kind == "unsqueeze":
            x = x.unsqueeze(d)
        elif kind == "squeeze":
            x = x.squeeze()
    return x


def traced(x: torch.Tensor, seed: int) -> fx.Graph:
    """The graph of a random view, whose last node it is."""
    with FakeTensorMode() as mode:
        return make_fx(lambda y: view(y, random.Random(seed)).detach(), pre_dispatch=True)(mode.from_tensor(x)).graph


def covers(graph: fx.Graph, whole: torch.Tensor, part: torch.Tensor) -> bool:
    """Whether it was told what the last node of a graph, `part`, holds of its input; asserts that it was told right."""
    facts = Facts(graph)
    root, *_, last = (n for n in graph.nodes if n.op != "output")
    assert isinstance(last, fx.Node)
    extents: dict[Expr, Expr] = {Index(f"x{d}"): Const(n) for d, n in enumerate(whole.shape)}
    found = place(facts, root, last, tuple(extents), extents)
    if found is None:
        return False
    held = set(part.flatten().tolist())
    kept = found.kept(facts.shape(last), extents)
    for at in itertools.product(*(range(n) for n in whole.shape)):
        element = int(whole[at])
        clamped = tuple(value(x, at) for x in kept)
        assert bool(value(found.inside, at)) == (element in held)
        assert all(0 <= n < length for n, length in zip(clamped, part.shape, strict=True))
        if element in held:
            assert int(part[clamped]) == element
            assert tuple(value(x, at) for x in found.at) == clamped
    return True


def test_views_cover_what_they_hold() -> None:
    choose, told = random.Random(0), 0
    for seed in range(150):
        shape = [choose.choice([1, 2, 3, 5]) for _ in range(choose.choice([1, 2, 3]))]
        whole = torch.arange(torch.Size(shape).numel()).view(shape)
        told += covers(traced(whole, seed), whole, view(whole, random.Random(seed)))
    assert told > 100


def called(sample: Sample, x: torch.Tensor) -> torch.Tensor:
    return sample.call([x])


@pytest.mark.parametrize("target", [pytest.param(t, id=str(t).removeprefix("aten.")) for t in _UNDO])
def test_each_view_that_is_undone_covers_what_it_holds(target: OpOverload) -> None:
    told = 0
    for sample in samples(target, 8):
        whole = torch.arange(sample.args[0].numel()).view(sample.args[0].shape)
        same = replace(sample, args=(whole, *sample.args[1:]))
        graph = make_fx(partial(called, same), tracing_mode="fake", pre_dispatch=True)(whole).graph
        told += covers(graph, whole, same.call([whole]))
    assert told, "no call was undone"
