"""A mapping that keeps what came last."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from attncc.runtime.recent import Recent


def test_the_oldest_go_first() -> None:
    kept = Recent[int, str](3)
    for n in range(5):
        kept[n] = str(n)
    assert kept == {2: "2", 3: "3", 4: "4"} and kept.get(0) is None
    kept[2] = "again"
    assert kept.setdefault(5, "5") == "5" and kept.setdefault(3, "other") == "3"
    assert kept == {3: "3", 4: "4", 5: "5"}


def test_threads_add_and_remove() -> None:
    kept = Recent[int, int](4)

    def run(seed: int) -> None:
        for n in range(3000):
            key = (n * 7 + seed) % 23
            assert kept.setdefault(key, key) == key
            kept[key] = key
            assert kept.get(key, key) == key

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(16)))
    assert len(kept) <= 4
