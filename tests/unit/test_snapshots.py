"""What is kept of tensors: told by their bytes alone, whatever they lie in, and never more than a process may keep."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import attncc.kernels.snapshots
from attncc.kernels.snapshots import Kept, Snapshot

PLAIN = torch.rand(40, 24, generator=torch.Generator().manual_seed(0))
LAYOUTS = {
    "dense": lambda x: x,
    "transposed": lambda x: x.T,
    "part of a buffer": lambda x: x[3:31, 5:21],
    "few columns": lambda x: x[:, 4:8],
    "one column": lambda x: x[:, 4],
    "every fifth": lambda x: x[::5, 1::5],
    "expanded": lambda x: x[:1].expand(7, 24),
    "one": lambda x: x[2, 2],
    "none": lambda x: x[:0],
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float32, torch.int64, torch.uint8])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parallel", [False, True])
def test_every_byte_counts(layout: str, dtype: torch.dtype, parallel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if parallel:
        monkeypatch.setattr(attncc.kernels.snapshots, "_THREADS", 1)
        monkeypatch.setattr(attncc.kernels.snapshots, "_BYTES", 8)
    whole = (PLAIN * 2).to(dtype)
    x = LAYOUTS[layout](whole)
    snapshot = Snapshot.of([x])
    assert snapshot.holds([x]) and torch.equal(snapshot.tensors[0], x)
    for at in {0, x.numel() // 3, x.numel() - 1} if x.numel() else ():
        place = x.flatten()[at : at + 1] if x.is_contiguous() else x[tuple(_index(x, at))]
        before = place.clone()
        place.data.copy_(~before if dtype == torch.bool else before + 1)
        assert not snapshot.holds([x]), at
        place.data.copy_(before)
        assert snapshot.holds([x]), at


def _index(x: torch.Tensor, at: int) -> list[int]:
    return [int(n) for n in torch.unravel_index(torch.tensor(at), x.shape)]


def test_others_that_hold_the_same() -> None:
    snapshot = Snapshot.of([PLAIN])
    assert snapshot.holds([PLAIN.clone()])
    assert not snapshot.holds([PLAIN.double()]) and not snapshot.holds([PLAIN[:39]]) and not snapshot.holds([])
    assert not snapshot.holds([PLAIN.view(torch.int32)])
    assert Snapshot.of([PLAIN / 0 * 0]).holds([PLAIN / 0 * 0])  # a NaN is what it is
    zero = Snapshot.of([torch.zeros(4)])
    assert not zero.holds([-torch.zeros(4)])


def test_of_what_leaves_out_most_only_its_own_is_copied() -> None:
    assert Snapshot.of([PLAIN[:, 3]]).nbytes == 40 * 4
    assert Snapshot.of([PLAIN[:, :20]]).nbytes == (39 * 24 + 20) * 4


def test_kept_by_bytes() -> None:
    """The longest unused go first; what is larger than all there may be is not kept."""
    kept = Kept(1000)
    tensors = [torch.full((100,), n, dtype=torch.uint8) for n in range(20)]
    made = {"table": torch.zeros(150, dtype=torch.uint8)}
    for n, x in enumerate(tensors):
        kept.keep(n, Snapshot.of([x]), [1], made)
        assert kept.nbytes <= 1000 and kept.nbytes == 250 * len(kept)
        assert kept.find(0, [tensors[0]], [1]) is made
    assert len(kept) == 4 and 0 in kept and 19 in kept and 16 not in kept
    kept.keep("large", Snapshot.of([torch.zeros(900, dtype=torch.uint8)]), [1], made)
    assert "large" not in kept and len(kept) == 4
    assert kept.find(0, [tensors[0]], [2]) is None and 0 not in kept
    assert kept.find(19, [tensors[18]], [1]) is None and 19 not in kept
    assert kept.nbytes == 250 * len(kept) == 500
    kept.keep(17, Snapshot.of([tensors[0]]), [1], {})
    assert kept.nbytes == 350


def test_kept_by_threads() -> None:
    kept = Kept(5000)

    def run(seed: int) -> None:
        for n in range(300):
            key = (n * (seed + 1)) % 7
            x = torch.full((200,), (n + seed) % 3, dtype=torch.uint8)
            found = kept.find(key, [x], [])
            assert found is None or int(found["value"]) == int(x[0])
            if found is None:
                kept.keep(key, Snapshot.of([x]), [], {"value": x[0].clone()})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(16)))
    assert kept.nbytes == sum(x.nbytes for x in kept._entries.values()) <= 5000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_forked_while_the_lock_is_held() -> None:
    with attncc.kernels.snapshots.kept._lock:
        child = os.fork()
        if child == 0:
            x = torch.zeros(3)
            attncc.kernels.snapshots.kept.keep("x", Snapshot.of([x]), [], {})
            os._exit(0 if attncc.kernels.snapshots.kept.find("x", [x], []) == {} else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
