"""The store stays bounded and waits for nobody for ever: locks of stuck owners, failures that are shared, leftovers of
killed builds, and what pruning costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from compilers.faulty import faulty
from cpp_kernels.cases import case

from attncc.ir import print_attention
from attncc.kernels import build
from attncc.kernels.build import built, find_toolchain
from attncc.runtime import compilers, store_pruning, store_temporary
from attncc.runtime.store import BuildError, Store, key
from attncc.runtime.store_pruning import Pruning

KEY = key({"ir": "attention", "target": "avx2"})

OWNER = """
import os, sys, time
from pathlib import Path
from attncc.runtime.store import Store
def build(folder):
    (folder / "kernel.c").write_text("slow")
    print("building", flush=True)
    while not Path(sys.argv[2]).exists():
        time.sleep(0.01)
entry = Store(Path(sys.argv[1])).get_or_build("{key}", "k", build)
print((entry / "kernel.c").read_text(), flush=True)
""".replace("{key}", KEY)


def writes(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "kernel.c").write_text(text) and None


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
def test_the_lock_of_a_stuck_owner_is_taken_over(tmp_path: Path) -> None:
    """The owner builds until it is told to end, however long the machine takes for the rest."""
    end = tmp_path / "end"
    command = [sys.executable, "-c", OWNER, str(tmp_path / "store"), str(end)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None and owner.stdout.readline() == "building\n"
        owner.send_signal(signal.SIGSTOP)
        os.waitpid(owner.pid, os.WUNTRACED)  # a signal is not yet a process that stands still
        entry = Store(tmp_path / "store").get_or_build(KEY, "k", writes("quick"), patience_s=0.2)
        assert list((entry.parent / ".locks").iterdir()) == []
        end.touch()
        owner.send_signal(signal.SIGCONT)
        assert owner.stdout.readline() == "quick\n"
    finally:
        owner.kill()
        owner.wait()


def test_who_waited_for_a_build_that_failed_does_not_try_it_again(tmp_path: Path) -> None:
    tries: list[int] = []

    def failing(folder: Path) -> None:
        tries.append(1)
        time.sleep(1.0)
        raise BuildError("the compiler hangs")

    said: list[str] = []
    assert Store(tmp_path).find(KEY, "k") is None  # the folder is there: who makes it first is not what is tested
    together = threading.Barrier(5)

    def run() -> None:
        together.wait()
        try:
            Store(tmp_path).get_or_build(KEY, "k", failing)
        except BuildError as error:
            said.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(tries) == 1 and said == ["the compiler hangs"] * 5
    with pytest.raises(BuildError):  # who comes later tries it himself
        Store(tmp_path).get_or_build(KEY, "k", failing)
    assert len(tries) == 2
    assert Store(tmp_path).get_or_build(KEY, "k", writes("x"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("hangs", "did not finish within 0.5 s"), ("hangs always", "did not finish within 0.5 s"),
        ("truncates", "is cut short"), ("renames the entry", "has no attncc_run"),
    ],
)  # fmt: skip
def test_a_compiler_that_fails_costs_the_kernel_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, says: str
) -> None:
    if find_toolchain() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("ATTNCC_CXX", str(faulty(tmp_path, fault)))
    if "finish" in says:
        monkeypatch.setenv("ATTNCC_COMPILE_TIMEOUT", "0.5")
    build._built.cache_clear()
    compilers.forget()
    start = time.monotonic()
    try:
        made = [built(print_attention(case("sigmoid", "f32", groups=n)), "cpu") for n in (1, 2)]
    finally:
        build._built.cache_clear()
    assert all(x.language == "torch" for x in made) and says in made[0].reason, made[0].reason
    if "finish" in says:
        assert time.monotonic() - start < 5
    store = build.default_store()
    assert store.entries() == [] and list((store.root / ".building").iterdir()) == []


@pytest.mark.slow
def test_an_interrupt_while_kernels_are_built_is_heard_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was being built is built the next time."""
    if find_toolchain() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("ATTNCC_CXX", str(faulty(tmp_path, "hangs")))
    build._built.cache_clear()
    specs = [print_attention(case("relu", "f32", groups=n)) for n in (1, 2)]
    before = set(compilers._running)  # another test's threads may build yet

    def interrupt() -> None:
        until = time.monotonic() + 30
        while len(compilers._running - before) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        build.build_all([(spec, "cpu") for spec in specs])
    thread.join()
    assert time.monotonic() - start < 20
    assert build._built.cache_info().currsize == 0 and compilers._running <= before
    assert list((build.default_store().root / ".building").iterdir()) == []


@pytest.mark.slow
def test_a_killed_compilation_leaves_what_is_swept(tmp_path: Path) -> None:
    path = faulty(tmp_path, 'echo $$ > "$0.pid"\nsleep 600')
    (tmp_path / "tmp").mkdir()
    program = (
        "import sys\nfrom pathlib import Path\nfrom attncc.runtime.cpp import CppToolchain\n"
        "from attncc.runtime.store import Store\n"
        "def build(folder):\n    print('building', flush=True)\n"
        "    CppToolchain(sys.argv[1]).compile('', 'avx2', folder / 'kernel.so')\n"
        f"Store(Path(sys.argv[2])).get_or_build('{KEY}', 'k', build)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path), str(tmp_path / "cache")], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "building\n"
    building = tmp_path / "cache" / "store-2" / ".building"
    until = time.monotonic() + 20
    while not Path(f"{path}.pid").is_file() and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.wait()
    os.killpg(int(Path(f"{path}.pid").read_text()), signal.SIGKILL)
    assert list((tmp_path / "tmp").iterdir()) == [] and list(building.glob("*/compiling-*/kernel.cpp"))
    (left,) = building.iterdir()
    store = Store(tmp_path / "cache")
    store.prune()
    assert left.exists()  # it may be at work
    for path in (left, *(store.root / ".locks").iterdir()):
        os.utime(path, (0, 0))
    store.prune()
    assert not left.exists() and list((store.root / ".locks").iterdir()) == []


def test_lock_files_do_not_pile_up(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for n in range(20):
        store.get_or_build(key({"n": n}), "k", writes("x"))
    assert list((store.root / ".locks").iterdir()) == []


def test_records_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_pruning, "MOST_RECORDS", 20)
    store = Store(tmp_path)
    keys = [key({"n": n}) for n in range(30)]
    for n, k in enumerate(keys):
        store.remember(k, {"n": n})
        os.utime(store.root / ".records" / f"{k}.json", (n, n))
    store.prune()
    assert [store.recall(k) for k in keys] == [None] * 15 + [{"n": n} for n in range(15, 30)]


def test_what_was_put_aside_does_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_pruning, "MOST_ASIDE", 3)
    store = Store(tmp_path)
    for n in range(6):
        store.discard(store.get_or_build(key({"n": n}), "k", writes("x")))
    store.prune()
    assert len(list((store.root / ".quarantine").iterdir())) == 3


def test_builds_look_at_everything_once_an_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    everything = Pruning.all
    monkeypatch.setattr(Pruning, "all", lambda self: looks.append(1) or everything(self))
    for n in range(10):
        Store(tmp_path).get_or_build(key({"n": n}), "k", writes("x"))
    assert len(looks) == 1
    store = Store(tmp_path)
    os.utime(store.root / ".looked-at", (0, 0))
    for n in range(10, 20):
        store.get_or_build(key({"n": n}), "k", writes("x"))
    assert len(looks) == 2


def test_builds_look_at_everything_after_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a store could grow far beyond its limit within the hour."""
    store = Store(tmp_path, limit=40_000)
    monkeypatch.setattr(store_pruning, "RECENT_S", 0.0)
    for n in range(40):
        store.get_or_build(key({"n": n}), f"k{n}", writes("x" * 2000))
    assert sum(x.size for x in store.entries()) < 40_000 * 9 / 8 + 2500


def test_a_mark_from_the_future_does_not_put_pruning_off(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.get_or_build(KEY, "k", writes("x"))
    os.utime(store.root / ".looked-at", (time.time() + 10**6,) * 2)
    store.get_or_build(key({"b": 1}), "k", writes("x"))
    assert (store.root / ".looked-at").stat().st_mtime < time.time() + 60


@pytest.mark.slow
def test_a_store_of_a_killed_process_is_swept_and_one_of_a_living_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    program = (
        "import sys\nfrom pathlib import Path\nfrom attncc.runtime.store import Store\n"
        "print(Store(Path(sys.argv[1])).root, flush=True)\nsys.stdin.read()\n"
    )

    def start() -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "file")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
        )  # fmt: skip
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip()).parent

    (killed, first), (living, second) = start(), start()
    killed.kill()
    killed.wait()
    assert first.exists() and second.exists()
    monkeypatch.setattr(store_temporary.tempfile, "gettempdir", lambda: str(tmp_path))
    store_temporary._sweep()
    assert not first.exists() and second.exists()
    living.communicate("", timeout=30)
    assert not second.exists()
