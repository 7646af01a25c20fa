"""Context parallelism: rows and keys cut over processes, keys taken in turns or gathered; forward and backward against
float64 in one process, and which keys are sent at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from processes.spawned import run

from attncc.ir import parse_attention, print_attention
from attncc.ir.build import TRUE
from attncc.kernels.visibility import seen
from attncc.runtime.ring_plan import chunks_of, plan_of
from attncc.runtime.sharding import in_turns

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "world"),
    [("forms", 2), pytest.param("every_form", 2, marks=pytest.mark.full),
     pytest.param("every_form", 4, marks=pytest.mark.full)],
)  # fmt: skip
def test_forms(program: str, world: int, tmp_path: Path) -> None:
    found = run("context_programs", program, world, tmp_path)
    for (name, how, rank), (error, _) in found.items():
        assert error < (3e-4 if name == "large" else 2e-5), (name, how, rank, error)  # scores of 1e3, in float32
    received = {name: sum(n for (x, how, _), (_, n) in found.items() if (x, how) == (name, "ring"))
                for name in ("dense", "window")}  # fmt: skip
    assert received == {"dense": world * (world - 1), "window": world - 1}
    assert all(n == 0 for (_, how, _), (_, n) in found.items() if how == "gather")


@pytest.mark.slow
@pytest.mark.full
def test_heads_and_rows_at_once(tmp_path: Path) -> None:
    found = run("context_programs", "two_ways", 4, tmp_path)
    assert len(found) == 8 and all(error < 2e-5 for error, _ in found.values()), found


@pytest.mark.slow
def test_a_compiled_function(tmp_path: Path) -> None:
    found = run("context_programs", "compiled", 2, tmp_path)
    assert set(found) == {0, 1}
    for error, placements, taken in found.values():
        assert error < 1e-5 and "Shard(dim=2)" in placements and taken


CAUSAL = parse_attention("""attention
size   n
batch  b = 1
axis   i = n, j = n, d = 4, e = 4
tensor q: f32[1, n, 4]
tensor k: f32[1, n, 4]
tensor v: f32[1, n, 4]
q      q[b, i, d]
k      k[b, j, d]
v      v[b, j, e]
score  s
mask   j <= i
norm   softmax
empty  zero
weight w
give   out
dtype  f32
""")


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_head_and_tail_go_together_under_a_causal_mask(count: int) -> None:
    n = 64 * count
    counts = seen(CAUSAL, [], [n], chunks_of(n, count), count)
    plan = plan_of(CAUSAL, counts, count)
    pairs = [plan.owned(p) for p in range(count)]
    assert sorted(map(sorted, pairs)) == [[x, 2 * count - 1 - x] for x in range(count)]
    work = [sum(sum(counts[x]) for x in pair) for pair in pairs]
    assert max(work) - min(work) <= 0.05 * max(work)
    assert [[plan.needs[x][y] for y in range(count)] for x in range(2 * count)] == [
        [y <= x // 2 for y in range(count)] for x in range(2 * count)
    ]


def test_rows_stay_where_they_lie_where_that_is_even() -> None:
    window = parse_attention(print_attention(CAUSAL).replace("j <= i", "j <= i and i < j + 9"))
    plan = plan_of(window, seen(window, [], [256], 8, 4), 4)
    assert plan.owner == (0, 1, 2, 3)
    assert plan.needs == tuple(tuple(y in (x - 1, x) for y in range(4)) for x in range(4))


def test_which_of_the_two_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule of what all processes know: sizes and the mask."""
    monkeypatch.delenv("ATTNCC_CONTEXT", raising=False)
    dense = replace(CAUSAL, mask=TRUE)
    assert [in_turns(a, [n], 4) for a in (CAUSAL, dense) for n in (64, 4096, 1 << 24)] == [
        False, True, True, False, False, True
    ]  # fmt: skip
    assert not in_turns(CAUSAL, [4098], 4)  # keys in uneven parts
    monkeypatch.setenv("ATTNCC_CONTEXT", "ring")
    assert in_turns(dense, [64], 4)
    monkeypatch.setenv("ATTNCC_CONTEXT", "gather")
    assert not in_turns(CAUSAL, [4096], 4)
    monkeypatch.setenv("ATTNCC_CONTEXT", "rings")
    with pytest.raises(ValueError, match="auto, ring or gather"):
        in_turns(CAUSAL, [4096], 4)
