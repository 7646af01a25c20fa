"""The kernel store: keys, atomic entries, corruption, concurrency, kills, full disks, permissions, pruning."""

from __future__ import annotations

import enum
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from stores.disk import KEY, full, leftovers

from attncc.runtime import store as store_module
from attncc.runtime.store import Store, StoreError, key
from attncc.runtime.store_seals import Opened


def writes(text: str, count: list[int] | None = None) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        if count is not None:
            count.append(1)
        (folder / "kernel.c").write_text(text)
        (folder / "objects").mkdir()
        (folder / "objects" / "kernel.so").write_bytes(b"\x7fELF" + text.encode())

    return build


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_keys_tell_values_and_types_apart() -> None:
    parts: list[dict[str, object]] = [
        {"a": 1}, {"a": 1.0}, {"a": True}, {"a": "1"}, {"a": None}, {"a": "None"}, {"b": 1}, {"a": 1, "b": 1},
        {"a": [1, 2]}, {"a": [12]}, {"a": {"b": 1}}, {"a": ["b", 1]}, {"a": ""}, {"a": []},
    ]  # fmt: skip
    assert len({key(p) for p in parts}) == len(parts)
    assert key({"a": 1, "b": (2, "x")}) == key({"b": [2, "x"], "a": 1})


@pytest.mark.slow
def test_keys_are_the_same_in_every_process() -> None:
    program = "from attncc.runtime.store import key; print(key({'ir': 'é', 'flags': ['-O3', 1, 0.1, None, True]}))"
    for seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert done.stdout.strip() == key({"ir": "é", "flags": ["-O3", 1, 0.1, None, True]})


class Level(int, enum.Enum):
    HIGH = 1


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, b"x", float("nan"), float("inf"), Level.HIGH, numpy.float64(1.0), lambda: 0, {1: 2}]
)
def test_what_has_no_stable_key_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match=r"key\.flags\[1\]"):
        key({"flags": [1, value]})


def test_built_once_and_found_again(tmp_path: Path) -> None:
    count: list[int] = []
    first = Store(tmp_path).get_or_build(KEY, "causal-bf16-d64", writes("x", count))
    second = Store(tmp_path).get_or_build(KEY, "causal-bf16-d64", writes("y", count))
    assert first == second and len(count) == 1
    assert first.name == f"causal-bf16-d64-{KEY[:16]}"
    assert (first / "kernel.c").read_text() == "x"
    assert files(first) == {"kernel.c", "objects/kernel.so", "manifest.json"}
    assert Store(tmp_path).note is None


def test_names_are_made_safe(tmp_path: Path) -> None:
    store = Store(tmp_path)
    entry = store.get_or_build(KEY, "../../evil name/é" + "x" * 200, writes("x"))
    assert entry.parent == store.root and len(entry.name) < 100
    assert not entry.name.startswith(".")
    assert store.get_or_build(key({"b": 1}), "...", writes("x")).name.startswith("entry-")


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX permissions")
def test_everything_is_the_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = Store(tmp_path / "cache")
        store.get_or_build(KEY, "k", writes("x"))
        store.remember(KEY, {"a": 1})
    finally:
        os.umask(before)
    for path in (store.root, *store.root.rglob("*")):
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX permissions")
def test_a_folder_that_is_seen_by_others_is_closed_and_the_users_own_is_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    entry = Store(tmp_path).get_or_build(KEY, "k", writes("x"))
    entry.parent.chmod(0o755)
    store = Store(tmp_path)
    assert stat.S_IMODE(store.root.stat().st_mode) == 0o700
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert store.find(KEY, "k") == entry and store.note is None


def test_a_folder_of_someone_else_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Store(tmp_path).root
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    with pytest.raises(PermissionError, match="belongs to someone else"):
        Opened(root)


def damaged(entry: Path) -> list[Callable[[], object]]:
    library = entry / "objects" / "kernel.so"
    manifest = entry / "manifest.json"
    return [
        lambda: library.write_bytes(library.read_bytes()[:-1] + b"?"),
        lambda: library.write_bytes(b""),
        library.unlink,
        manifest.unlink,
        lambda: manifest.write_text("{"),
        lambda: manifest.write_text("[]"),
        lambda: manifest.write_text(manifest.read_text().replace(KEY, "0" * 64)),
    ]


@pytest.mark.parametrize("way", range(7))
def test_a_damaged_entry_is_put_aside_and_built_again(tmp_path: Path, way: int) -> None:
    count: list[int] = []
    entry = Store(tmp_path).get_or_build(KEY, "k", writes("x", count))
    damaged(entry)[way]()
    store = Store(tmp_path)
    assert store.find(KEY, "k") is None
    assert store.get_or_build(KEY, "k", writes("x", count)) == entry
    assert len(count) == 2 and (entry / "objects" / "kernel.so").read_bytes() == b"\x7fELFx"
    assert len(list((store.root / ".quarantine").iterdir())) == 1


def test_a_file_in_the_place_of_an_entry(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (store.root / f"k-{KEY[:16]}").write_text("not a folder")
    assert (store.get_or_build(KEY, "k", writes("x")) / "kernel.c").read_text() == "x"


def test_a_cache_emptied_by_hand_is_built_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.get_or_build(KEY, "k", writes("x"))
    store_module.shutil.rmtree(store.root)
    assert (store.get_or_build(KEY, "k", writes("y")) / "kernel.c").read_text() == "y"


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def failing(folder: Path) -> None:
        writes("half")(folder)
        raise ValueError("the compiler said no")

    with pytest.raises(ValueError, match="the compiler said no"):
        store.get_or_build(KEY, "k", failing)
    assert store.entries() == [] and leftovers(store) == []
    store.get_or_build(KEY, "k", writes("x"))


def test_links_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(StoreError, match="link"):
        store.get_or_build(KEY, "k", lambda folder: (folder / "a").symlink_to("/etc/passwd"))
    assert store.entries() == [] and leftovers(store) == []


@pytest.mark.parametrize("when", ["in the build", "in the manifest", "at the rename", "at the start"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    store = Store(tmp_path)

    def build(folder: Path) -> None:
        writes("x")(folder)
        if when == "in the build":
            full()

    with monkeypatch.context() as patch:
        if when == "in the manifest":
            patch.setattr(store_module.Store, "_manifest", full)
        elif when == "at the rename":
            patch.setattr(Path, "rename", full)
        elif when == "at the start":
            patch.setattr(store_module.tempfile, "mkdtemp", full)
        with pytest.raises(StoreError, match=r"no space left for .*ATTNCC_CACHE_DIR"):
            store.get_or_build(KEY, "k", build)
    assert store.entries() == [] and leftovers(store) == []
    assert (store.get_or_build(KEY, "k", writes("x")) / "kernel.c").read_text() == "x"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        with open("/dev/full", "w") as file:  # noqa: PTH123
            file.write("x" * 100_000)

    store = Store(tmp_path)
    with pytest.raises(StoreError, match="no space left"):
        store.get_or_build(KEY, "k", build)
    assert store.entries() == []


BUILDER = """
import os, sys, time
from pathlib import Path
from attncc.runtime.store import Store
root, log, pause = sys.argv[1:]
def build(folder):
    with open(log, "a") as file:
        file.write("built\\n")
    (folder / "kernel.c").write_text("x")
    time.sleep(float(pause))
    (folder / "other.c").write_text("y")
entry = Store(Path(root)).get_or_build("{key}", "k", build)
assert sorted(os.listdir(entry)) == ["kernel.c", "manifest.json", "other.c"], os.listdir(entry)
"""


def start(root: Path, log: Path, pause: float) -> subprocess.Popen[bytes]:
    program = BUILDER.replace("{key}", KEY)
    return subprocess.Popen([sys.executable, "-c", program, str(root), str(log), str(pause)])


@pytest.mark.slow
def test_many_processes_build_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [start(tmp_path / "cache", log, 0.3) for _ in range(5)]
    assert [p.wait(60) for p in processes] == [0] * 5
    assert log.read_text().splitlines() == ["built"]


def test_many_threads_build_once(tmp_path: Path) -> None:
    count: list[int] = []

    def slow(folder: Path) -> None:
        writes("x", count)(folder)
        time.sleep(0.1)

    store = Store(tmp_path)
    threads = [threading.Thread(target=lambda: store.get_or_build(KEY, "k", slow)) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(count) == 1


def test_keys_do_not_wait_for_each_other(tmp_path: Path) -> None:
    store = Store(tmp_path)
    inside, done = threading.Event(), threading.Event()

    def waits(folder: Path) -> None:
        inside.set()
        assert done.wait(30)

    other = threading.Thread(target=lambda: store.get_or_build(KEY, "k", waits))
    other.start()
    assert inside.wait(30)
    store.get_or_build(key({"another": 1}), "k", writes("x"))
    done.set()
    other.join()
    assert len(store.entries()) == 2


@pytest.mark.slow
def test_a_process_killed_in_the_middle_leaves_nothing_visible(tmp_path: Path) -> None:
    root, log = tmp_path / "cache", tmp_path / "log"
    victim = start(root, log, 60)
    until = time.time() + 60
    while not log.exists() and time.time() < until:
        time.sleep(0.02)
    waiting = start(root, log, 0)  # waits for the lock, which the kernel frees with the victim
    time.sleep(0.2)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    store = Store(root)
    assert waiting.wait(60) == 0
    assert log.read_text().splitlines() == ["built", "built"]
    entry = store.find(KEY, "k")
    assert entry is not None and files(entry) == {"kernel.c", "other.c", "manifest.json"}
    (half,) = leftovers(store)
    os.utime(half, (0, 0))
    store.prune()
    assert leftovers(store) == [] and store.find(KEY, "k") == entry


def test_who_waits_too_long_goes_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "PATIENCE_S", 0.05)
    store, count = Store(tmp_path), list[int]()

    def meanwhile(folder: Path) -> None:
        assert (Store(tmp_path).get_or_build(KEY, "k", writes("y", count)) / "kernel.c").read_text() == "y"
        writes("x", count)(folder)

    entry = store.get_or_build(KEY, "k", meanwhile)
    assert len(count) == 2 and (entry / "kernel.c").read_text() == "y"  # what others use already stays
    assert store.read(entry, "kernel.c") == b"y" and leftovers(store) == []


def test_an_unusable_folder_is_replaced_for_this_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / "file" / "cache")
    assert store.note is not None and "kernels of this process are kept apart" in store.note
    assert (store.get_or_build(KEY, "k", writes("x")) / "kernel.c").read_text() == "x"
    assert tmp_path not in store.root.parents


def test_the_replacement_goes_with_its_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    program = "import sys, pathlib, attncc.runtime.store as s; print(s.Store(pathlib.Path(sys.argv[1])).root)"
    command = [sys.executable, "-c", program, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() and not Path(done.stdout.strip()).exists()


def test_the_environment_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(tmp_path / "mine"))
    assert Store().root.parent == tmp_path / "mine"


def test_entries_and_clear(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.get_or_build(KEY, "k", writes("x"))
    store.get_or_build(key({"b": 1}), "a", writes("yy"))
    store.remember(KEY, {"a": 1})
    a, k = store.entries()
    assert (a.name, k.name) == ("a", "k") and k.key == KEY and 0 < k.size < a.size + 100
    assert store.clear() == 2
    assert store.entries() == [] and store.recall(KEY) is None and store.find(KEY, "k") is None


def test_pruning_takes_what_was_used_longest_ago(tmp_path: Path) -> None:
    store = Store(tmp_path, limit=10**9)
    keys = [key({"n": n}) for n in range(4)]
    paths = [store.get_or_build(k, f"k{n}", writes("x" * 1000)) for n, k in enumerate(keys)]
    size = store.entries()[0].size
    now = time.time()
    for hours, path in zip((9, 30, 20, 10), paths, strict=True):
        os.utime(path / "manifest.json", (now - hours * 3600,) * 2)
    Store(tmp_path).find(keys[1], "k1")  # used now
    assert Store(tmp_path, limit=2 * size + 10).prune() == 2
    assert [e.name for e in store.entries()] == ["k0", "k1"]
    assert store.find(keys[2], "k2") is None
    assert Store(tmp_path, limit=0).prune() == 1  # k1 was used within the hour
