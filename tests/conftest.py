"""What all tests share: golden files, the markers of the long ones, and the share of those that a day runs.

A test is long if it is marked `full`, or if it once took more processor time than `COSTLY` by `costs.json`, which
`--update-costs` writes; of each file the cheapest test runs on every change in any case. Time of a processor, that of
the compilers and processes it starts with it, says the same on a machine that does other things too.
"""

import argparse
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from zlib import crc32

import pytest

GOLDEN = Path(__file__).parent / "golden"
COSTS = Path(__file__).parent / "costs.json"
#: Seconds of processor time from which on a test is long, and those from which on `costs.json` names it.
COSTLY, NAMED = 1.0, 0.8
MARKERS = (
    "full: too long for every change; deselected unless --full, --shard or -m asks for it",
    "slow: compiles or starts processes; left out of `make quick`",
    "always: runs on every change, whatever it costs",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing")
    parser.addoption("--update-costs", action="store_true", help="write what the tests cost that this run ran")
    parser.addoption("--full", action="store_true", help="run the tests marked `full` too")
    parser.addoption(
        "--shard", type=shard, metavar="N/M",
        help="run also the N-th of M parts of the tests marked `full`; a test is in the same part on every machine",
    )  # fmt: skip
    parser.addoption("--part", type=shard, metavar="N/M", help="run only the N-th of M parts of the tests")


def shard(text: str) -> tuple[int, int]:
    """(N, M) of "N/M". Raises ArgumentTypeError where that names no part."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text} is no part: give N/M with N from 1 to M")
    return int(found[1]), int(found[2])


def part(nodeid: str, parts: int) -> int:
    """Which of some parts a test is in, from 1."""
    return crc32(nodeid.encode()) % parts + 1


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of what a shell runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("ATTNCC_STRICT", "1")  # an error that nobody foresaw fails the test that meets it
    os.environ.setdefault("ATTNCC_EDITS", "off")  # graphs are read, whatever an earlier run knows of them
    for line in MARKERS:
        config.addinivalue_line("markers", line)


#: The files that take longest, which start first: nothing is left to do beside one that starts last.
LONGEST = (
    "zoo/test_zoo.py", "differential/test_failures.py", "differential/test_cpp_forms.py", "differential/test_triton.py",
    "distributed/test_sharded.py", "differential/test_lift_random.py", "differential/test_driver.py",
    "unit/test_triton_compile.py", "differential/test_cpp_decode.py", "differential/test_cpp_levels.py",
    "differential/test_tile_order.py", "zoo/test_memory.py",
)  # fmt: skip


def too_long(items: Sequence[pytest.Item], known: Mapping[str, float]) -> list[pytest.Item]:
    """The tests that cost too much for every change, by what is `known`; of each file the cheapest one stays."""
    found: list[pytest.Item] = []
    by_file: dict[Path, list[pytest.Item]] = {}
    for item in items:
        if not item.get_closest_marker("full"):
            by_file.setdefault(item.path, []).append(item)
    for tests in by_file.values():
        least = min(known.get(x.nodeid, 0) for x in tests)
        limit = max(COSTLY, least)
        found += [x for x in tests if known.get(x.nodeid, 0) > limit and not x.get_closest_marker("always")]
    return found


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known: dict[str, float] = json.loads(COSTS.read_text(encoding="utf-8")) if COSTS.is_file() else {}
    for item in too_long(items, known):
        item.add_marker(pytest.mark.full)
    places = {str(Path(__file__).parent / name): at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(str(item.path), len(LONGEST)))
    if config.option.part is not None:
        n, parts = config.option.part
        items[:] = [item for item in items if part(item.nodeid, parts) == n]
    if config.option.full or "full" in config.option.markexpr:
        return
    wanted: tuple[int, int] | None = config.option.shard
    left_out = [
        item for item in items
        if item.get_closest_marker("full") and (wanted is None or part(item.nodeid, wanted[1]) != wanted[0])
    ]  # fmt: skip
    if left_out:
        dropped = set(left_out)
        items[:] = [item for item in items if item not in dropped]
        config.hook.pytest_deselected(items=left_out)


def processor_s() -> float:
    """Seconds of processor time that this process and those that it waited for took so far."""
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    item.user_properties.append(("before", processor_s()))
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    if call.when == "teardown":
        item.user_properties.append(("after", processor_s()))


#: What the tests of this run cost, by name; where several processes run them, in the one that hears of all.
_spent: dict[str, float] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    told = dict(report.user_properties)
    if "before" in told and "after" in told:
        _spent[report.nodeid] = float(told["after"]) - float(told["before"])


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.option.update_costs and not hasattr(session.config, "workerinput"):
        known = json.loads(COSTS.read_text(encoding="utf-8")) if COSTS.is_file() else {}
        whole = {name: round(cost, 1) for name, cost in {**known, **_spent}.items() if cost >= NAMED}
        COSTS.write_text(json.dumps(whole, indent=0, sort_keys=True) + "\n", encoding="utf-8")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.option.shard:
        n, of = config.option.shard
        terminalreporter.write_line(f"of the tests marked `full` these were part {n} of {of}: --shard {n}/{of}")


@pytest.fixture(autouse=True)
def _long_tests_have_kernels_as_users_have(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others compile theirs in half the time; see cpp_kernels/build.py."""
    if request.node.get_closest_marker("full"):
        monkeypatch.setenv("ATTNCC_TESTS_OPTIMISED", "1")


@pytest.fixture(autouse=True)
def _no_notices_of_others() -> None:
    """What a kernel of another test left to be said is not said in this one's report."""
    module = sys.modules.get("attncc.runtime.notices")
    if module is not None:
        module.taken()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)`: `text` is what the file tests/golden/`name` holds, to the byte."""
    update: bool = request.config.getoption("--update-golden")

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.is_file():
            pytest.fail(f"no golden file {name}; run with --update-golden and read what it writes")
        else:
            assert text == path.read_text(encoding="utf-8"), f"{name} differs; --update-golden accepts the new text"

    return check


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that make attncc fail on purpose: what nobody foresaw costs the fused graph, not the model."""
    monkeypatch.setenv("ATTNCC_STRICT", "0")
