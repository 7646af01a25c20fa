"""Attention on distributed tensors: fused, cut along batch, heads or rows as q is, exact, with gradients; layers under
tensor parallelism and FSDP2. Processes talk by gloo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes.spawned import run

from attncc.ir import interpret, parse_attention
from attncc.runtime.sharding import Rows, cut_of, local_call

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

PROCESSES = [2, pytest.param(4, marks=pytest.mark.full)]


@pytest.mark.slow
@pytest.mark.parametrize("world", PROCESSES)
def test_forms(world: int, tmp_path: Path) -> None:
    found = run("sharded_programs", "forms", world, tmp_path)
    assert len(found) == (5 if world == 2 else 12)
    for (name, place), (statuses, kept, error) in found.items():
        assert statuses == ["fused"], (name, place)
        assert error < 2e-5, (name, place)
        if (name, place) != ("grouped", "S(2)"):  # whose rows DTensor gathers when it splits the heads
            assert kept == place, name


@pytest.mark.slow
@pytest.mark.parametrize("world", PROCESSES)
def test_layers(world: int, tmp_path: Path) -> None:
    found = run("sharded_programs", "layers", world, tmp_path)
    assert set(found) == {"tensor parallel", "FSDP2"}
    assert all(error < 2e-5 for error in found.values()), found


@pytest.mark.slow
@pytest.mark.full
def test_steps(tmp_path: Path) -> None:
    found = run("sharded_programs", "steps", 2, tmp_path)
    assert set(found) == {"DDP", "FSDP2"}
    for how, (statuses, error, moved) in found.items():
        assert statuses and set(statuses) == {"fused"}, (how, statuses)
        assert error < 2e-5 < 1e-3 < moved, how


TEXT = """attention
size   n, m
batch  b = 2, h = 8
axis   i = n, j = m, d = 4, e = 4
tensor q: f32[2, 8, n, 4]
tensor k: f32[2, 2, m, 4]
tensor v: f32[2, 2, m, 4]
tensor t: f32[8, n, m]
q      q[b, h, i, d]
k      k[b, h // 4, j, d]
v      v[b, h // 4, j, e]
score  s * 0.5 + t[h, i, j]
mask   j <= i
norm   softmax
empty  zero
weight w
give   out, lse
dtype  f32
"""


@pytest.mark.parametrize(
    ("dims", "counts", "cut"),
    [((1,), (2,), ["h"]), ((0,), (2,), ["b"]), ((1,), (4,), [None]), ((0, 1), (2, 2), ["b", "h"]),
     ((1, 1), (2, 1), ["h", "h"]), ((1, 1), (2, 2), ["h", None]), ((None,), (2,), [None]), ((0,), (3,), [None]),
     ((2,), (4,), [None]), ((2,), (3,), ["i"]), ((0, 2), (2, 3), ["b", "i"]), ((2, 2), (3, 1), ["i", None])],
)  # fmt: skip
def test_parts_of_the_batch_are_what_the_whole_gives_there(
    dims: tuple[int | None, ...], counts: tuple[int, ...], cut: list[str | None]
) -> None:
    """Eight heads on two of keys can be halved, not quartered; six rows go in three parts, once."""
    a = parse_attention(TEXT)
    found = cut_of(a, [6, 6], dims, counts)
    assert [None if s is None else "i" if isinstance(s, Rows) else s.axis.name for s in found.shards] == cut
    last = [n - 1 for n in counts]
    own, sizes = local_call(a, [6, 6], found, last)
    g = torch.Generator().manual_seed(0)
    whole = {t.name: torch.randn([6 if not hasattr(n, "value") else n.value for n in t.shape], generator=g)
             for t in a.tensors}  # fmt: skip
    wanted = interpret(a, whole, [6, 6])
    got = interpret(own, _part(whole, found.dims, counts), sizes)
    for name, x in wanted.items():
        part = _part({name: x}, lambda _: found.places(a), counts)[name]
        torch.testing.assert_close(got[name], part)


def _part(
    tensors: dict[str, torch.Tensor], dims: Callable[[str], list[int | None]], counts: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """The part of the last process."""
    found = dict(tensors)
    for name in found:
        for dim, count in zip(dims(name), counts, strict=True):
            found[name] = found[name] if dim is None else found[name].chunk(count, dim)[-1]
    return found
