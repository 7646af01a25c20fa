"""Measuring: turns, ratios, who wins, what is remembered. Time is a made-up clock: nothing depends on the machine."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import chain, cycle, repeat
from pathlib import Path
from threading import Thread
from time import sleep

import pytest
import torch

from attncc.runtime import measure
from attncc.runtime.measure import Decision, Situation, Timings, bucket, choose, compare, decide, situation
from attncc.runtime.store import Store


class Clock:
    """Candidates whose calls take the seconds that an iterator gives, and the order in which they were called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def candidate(self, name: str, durations: Iterator[float]) -> Callable[[], None]:
        def call() -> None:
            self.order.append(name)
            self.now += next(durations)

        return call

    def sample(self, call: Callable[[], object], repeats: int) -> float:
        start = self.now
        for _ in range(repeats):
            call()
        return (self.now - start) / repeats


def test_medians_ignore_a_slow_first_call_and_outliers() -> None:
    clock = Clock()
    steady = clock.candidate("steady", repeat(1.2e-3))
    spiky = clock.candidate("spiky", chain([5.0], cycle([1e-3, 1e-3, 9e-3, 1e-3, 1e-3])))
    timings = compare({"steady": steady, "spiky": spiky}, 0.1, clock.sample)
    assert timings.winner == "spiky"
    assert list(timings.us) == ["spiky", "steady"]
    assert timings.us["spiky"] == pytest.approx(1000) and timings.us["steady"] == pytest.approx(1200)


def test_a_machine_that_slows_down_half_way_does_not_change_the_winner() -> None:
    clock = Clock()
    random.seed(1)

    def call(cost: float) -> Callable[[], None]:
        def run() -> None:
            clock.now += cost * (3 if clock.now > 0.05 else 1) * random.uniform(1, 1.2)

        return run

    timings = compare({"a": call(1.3e-3), "b": call(1e-3), "c": call(1.4e-3)}, 0.3, clock.sample)
    assert list(timings.us) == ["b", "a", "c"]


def test_candidates_take_turns() -> None:
    clock = Clock()
    calls = {n: clock.candidate(n, repeat(1e-3)) for n in "abc"}
    timings = compare(calls, 1.0, clock.sample)
    turns = clock.order[6:]
    assert timings.rounds == measure.MOST_ROUNDS and len(turns) == 3 * timings.rounds
    rounds = ["".join(turns[n : n + 3]) for n in range(0, len(turns), 3)]
    assert set(rounds) == {"abc", "bca", "cab"}


def test_the_budget_ends_it_after_three_rounds_at_least() -> None:
    clock = Clock()
    calls = {n: clock.candidate(n, repeat(0.25)) for n in "ab"}
    assert compare(calls, 0.01, clock.sample).rounds == 3
    assert compare(calls, 5.0, clock.sample).rounds == 10


def test_one_round_is_enough_of_what_takes_seconds() -> None:
    clock = Clock()
    calls = {n: clock.candidate(n, repeat(3.0)) for n in "ab"}
    assert compare(calls, 0.01, clock.sample).rounds == 1
    assert clock.order == ["a", "b", "a", "b"]  # the first of each is the warm-up


def test_short_calls_are_repeated_and_hopeless_ones_are_dropped() -> None:
    clock = Clock()
    calls = {
        "fast": clock.candidate("fast", repeat(1e-6)),
        "near": clock.candidate("near", repeat(1.5e-6)),
        "slow": clock.candidate("slow", repeat(1e-2)),
    }
    timings = compare(calls, 0.02, clock.sample)
    assert clock.order.count("slow") == 2 + measure.LEAST_ROUNDS
    assert clock.order.count("fast") == 2 + 100 * timings.rounds
    assert list(timings.us) == ["fast", "near", "slow"]


def test_a_candidate_that_raises_is_reported_and_left_out() -> None:
    clock = Clock()

    def broken() -> None:
        raise RuntimeError("no such kernel")

    timings = compare({"bad": broken, "good": clock.candidate("good", repeat(1e-3))}, 0.01, clock.sample)
    assert timings.failed == {"bad": "RuntimeError: no such kernel"} and timings.winner == "good"
    with pytest.raises(ValueError, match="no candidate ran: bad: RuntimeError: no such kernel"):
        _ = compare({"bad": broken}, 0.01, clock.sample).winner


def timings(**us: float) -> Timings:
    return Timings(dict(sorted(us.items(), key=lambda x: x[1])), 5, {})


def test_a_kernel_is_chosen_only_if_it_is_not_slower() -> None:
    assert decide(timings(ours=10.0, sdpa=15.0), ["ours"]).winner == "ours"
    assert decide(timings(ours=10.2, sdpa=10.0), ["ours"]).winner == "ours"  # a tie
    lost = decide(timings(ours=10.5, sdpa=10.0, other=12.0), ["ours"])
    assert lost.winner == "sdpa"
    assert lost.reason == "the kernel is 1.05 times slower: ours 10.5 us, sdpa 10.0 us"
    won = decide(timings(wide=8.0, narrow=9.0, sdpa=16.0), ["narrow", "wide"])
    assert won.winner == "wide" and won.reason == "2.00 times as fast: wide 8.0 us, sdpa 16.0 us"


def test_deciding_without_a_rival_or_without_a_kernel() -> None:
    assert decide(timings(ours=1.0), ["ours"]).winner == "ours"
    failed = Timings({"sdpa": 3.0}, 3, {"ours": "OSError: no compiler"})
    assert decide(failed, ["ours"]) == Decision("sdpa", "no kernel ran (ours: OSError: no compiler)", {"sdpa": 3.0})
    with pytest.raises(ValueError, match="no candidate ran"):
        decide(Timings({}, 0, {"ours": "OSError: x"}), ["ours"])


def test_buckets() -> None:
    assert bucket(range(0, 10)) == (0, 1, 2, 3, 4, 6, 6, 8, 8, 12)
    assert bucket([1000, 1024, 1025, 1536, 1537]) == (1024, 1024, 1536, 1536, 2048)
    for n in range(1, 5000):
        (up,) = bucket([n])
        assert n <= up < 1.51 * n + 1 and bucket([up]) == (up,)


CPU = torch.device("cpu")


def test_situations_differ_by_all_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    base = situation("attention\n", [4, 1000], CPU, ["b", "a"])
    assert base.key == situation("attention\n", [4, 1024], CPU, ["a", "b"]).key
    others = [
        situation("attention\nx", [4, 1000], CPU, ["a", "b"]),
        situation("attention\n", [4, 1025], CPU, ["a", "b"]),
        situation("attention\n", [4, 1000], CPU, ["a", "c"]),
        situation("attention\n", [4, 1000], torch.device("meta"), ["a", "b"]),
        situation("attention\n", [4, 1000], CPU, ["a", "b"], ["q"]),
        situation("attention\n", [4, 1000], CPU, ["a", "b"], ["q", "v"]),
    ]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    others.append(situation("attention\n", [4, 1000], CPU, ["a", "b"]))
    monkeypatch.setattr(torch, "__version__", "9.9")
    others.append(situation("attention\n", [4, 1000], CPU, ["a", "b"]))
    assert len({x.key for x in (base, *others)}) == 1 + len(others)


def where() -> Situation:
    return situation("attention\n", [4, 1000], CPU, ["kernel-1"])


def test_a_decision_is_measured_once_and_remembered(tmp_path: Path) -> None:
    clock = Clock()
    calls = {n: clock.candidate(n, repeat(t)) for n, t in (("ours", 1e-3), ("sdpa", 2e-3))}
    first = choose(Store(tmp_path), where(), calls, ["ours"], 0.01, clock.sample)
    ran = len(clock.order)
    again = choose(Store(tmp_path), where(), calls, ["ours"], 0.01, clock.sample)
    assert first.winner == "ours" and again == first and len(clock.order) == ran > 0


def test_a_remembered_winner_that_is_not_offered_is_measured_again(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(tmp_path)
    store.remember(where().key, {"winner": "gone", "reason": "", "us": {}})
    calls = {n: clock.candidate(n, repeat(t)) for n, t in (("ours", 3e-3), ("sdpa", 2e-3))}
    assert choose(store, where(), calls, ["ours"], 0.01, clock.sample).winner == "sdpa"
    store.remember(where().key, {"winner": "ours"})  # not a decision
    assert choose(store, where(), calls, ["ours"], 0.01, clock.sample).winner == "sdpa"


def test_a_candidate_may_measure_while_it_warms_up() -> None:
    clock, inner = Clock(), list[str]()

    def call() -> None:
        if not inner:  # as a kernel does that has two orders of its tokens to choose from
            parts = {n: clock.candidate(n, repeat(t)) for n, t in (("a", 2e-3), ("b", 1e-3))}
            inner.append(compare(parts, 0.01, clock.sample).winner)
        clock.now += 1e-3

    done: list[Timings] = []
    calls = {"ours": call, "sdpa": clock.candidate("sdpa", repeat(2e-3))}
    thread = Thread(target=lambda: done.append(compare(calls, 0.01, clock.sample)), daemon=True)
    thread.start()
    thread.join(20)
    assert done and done[0].winner == "ours" and inner == ["b"]


def test_the_real_clock_orders_what_is_far_apart() -> None:
    small, large = torch.ones(8), torch.ones(400, 400)
    timings = compare({"large": lambda: large @ large @ large, "small": lambda: small + small}, 0.05)
    assert timings.winner == "small" and all(t > 0 for t in timings.us.values())
    assert measure.device_name(CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_events() -> None:
    small, large = torch.ones(8, device="cuda"), torch.ones(4000, 4000, device="cuda")
    sample = measure.sampler_for(large.device)
    timings = compare({"large": lambda: large @ large, "small": lambda: small + small}, 0.05, sample)
    assert timings.winner == "small"


def test_what_other_programs_take_does_not_count_where_one_thread_computes() -> None:
    """A thread that waits for its turn has no time of its own."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert measure.on_cpu(lambda: sleep(0.05), 2) < 0.02
        torch.set_num_threads(2)
        assert measure.on_cpu(lambda: sleep(0.05), 2) > 0.04
    finally:
        torch.set_num_threads(threads)


def test_a_decision_within_its_noise_is_doubtful() -> None:
    assert not Decision("ours", "", {"ours": 1.0, "sdpa": 2.0}, 0.2).doubtful
    assert Decision("ours", "", {"ours": 1.0, "sdpa": 1.1}, 0.2).doubtful
    assert Decision("sdpa", "", {"sdpa": 1.0, "ours": 1.02}, 0.05).doubtful
    assert Decision("ours", "", {"ours": 1.0, "sdpa": 2.0}).doubtful  # nobody knows
    assert not Decision("ours", "", {"ours": 1.0}).doubtful  # nothing to doubt


def test_noise_is_what_ratios_within_a_turn_scatter_by() -> None:
    clock = Clock()
    load = cycle([1.0, 1.0, 3.0, 3.0])  # slows both alike

    def shared(cost: float, turns: Iterator[float]) -> Iterator[float]:
        return (cost * x for x in turns)

    calm = compare({"a": clock.candidate("a", repeat(1e-3)), "b": clock.candidate("b", repeat(1.5e-3))}, 0.05,
                   clock.sample)  # fmt: skip
    assert calm.noise == pytest.approx(0.0)
    wild = compare({"a": clock.candidate("a", shared(1e-3, load)), "b": clock.candidate("b", repeat(1.5e-3))}, 0.05,
                   clock.sample)  # fmt: skip
    assert wild.noise is not None and wild.noise > 0.5
    assert compare({"a": clock.candidate("a", repeat(1e-3))}, 0.05, clock.sample).noise is None


@pytest.mark.parametrize(("asked", "times", "again"), [
    ("", (1e-3, 1.01e-3), False), ("doubtful", (1e-3, 2e-3), False), ("doubtful", (1e-3, 1.03e-3), True),
    ("all", (1e-3, 2e-3), True),
])  # fmt: skip
def test_what_the_environment_asks_for_is_measured_again_once_in_a_process(
    asked: str, times: tuple[float, float], again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    scatter = chain([times[1]] * 2, cycle([times[1] * 0.98, times[1] * 1.02]))
    calls = {"ours": clock.candidate("ours", repeat(times[0])), "sdpa": clock.candidate("sdpa", scatter)}
    choose(Store(tmp_path), where(), calls, ["ours"], 0.05, clock.sample)
    measure._renewed.clear()  # as in a later process
    monkeypatch.setenv("ATTNCC_REMEASURE", asked)
    ran = len(clock.order)
    choose(Store(tmp_path), where(), calls, ["ours"], 0.05, clock.sample)
    assert (len(clock.order) > ran) is again
    ran = len(clock.order)
    choose(Store(tmp_path), where(), calls, ["ours"], 0.05, clock.sample)
    assert len(clock.order) == ran


def test_a_record_of_before_noise_was_kept_still_counts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.remember(where().key, {"winner": "ours", "reason": "", "us": {"ours": 1.0, "sdpa": 2.0}})
    known = measure.recalled(store, where())
    assert known is not None and known.noise is None
