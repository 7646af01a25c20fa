"""What others may have written into the store is not used: open folders, planted files, exchanged libraries, and
whatever lies in the place of a file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from attncc.runtime import store_files, store_seals
from attncc.runtime.store import Store, StoreError, key
from attncc.runtime.store_files import way_is_safe

pytestmark = pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX permissions")

KEY = key({"ir": "attention", "target": "avx2"})
RECORD = {"winner": "cpp", "us": {"cpp": 1.5}}


def writes(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "kernel.so").write_text(text) and None


def filled(tmp_path: Path) -> tuple[Store, Path]:
    store = Store(tmp_path)
    entry = store.get_or_build(KEY, "k", writes("right"))
    assert store.remember(KEY, RECORD)
    return store, entry


def planted_record(root: Path) -> None:
    """A record as anyone can write it: without the secret, but with every digest that can be worked out."""
    record = {"winner": "evil"}
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    text = json.dumps({"key": KEY, "record": record, "digest": digest, "seal": digest})
    (root / ".records" / f"{KEY}.json").write_text(text)


def planted_entry(root: Path) -> None:
    entry = root / f"k-{KEY[:16]}"
    entry.mkdir(exist_ok=True)
    (entry / "kernel.so").write_text("evil")
    files = {"kernel.so": hashlib.sha256(b"evil").hexdigest()}
    manifest = {"key": KEY, "name": "k", "files": files}
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (entry / "manifest.json").write_text(json.dumps({**manifest, "seal": seal}))


def another_store(root: Path) -> None:
    """A whole store that is in order, from elsewhere, but for its secret."""
    other = Store(root.parent / "other")
    other.get_or_build(KEY, "k", writes("evil"))
    other.remember(KEY, {"winner": "evil"})
    shutil.copytree(other.root, root, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".key"))


PLANTS = [planted_record, planted_entry, another_store]


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o707])
@pytest.mark.parametrize("seen", ["while open", "once closed again", "by a process that runs"])
def test_what_was_planted_while_a_folder_was_open_is_not_used(
    tmp_path: Path, plant: Callable[[Path], None], mode: int, seen: str
) -> None:
    store, _ = filled(tmp_path)
    store.root.chmod(mode)
    plant(store.root)
    if seen == "once closed again":
        store.root.chmod(0o700)
    if seen != "by a process that runs":
        store = Store(tmp_path)
    entry = store.get_or_build(KEY, "k", writes("right"))
    assert store.read(entry, "kernel.so") == b"right"
    assert (store.recall(KEY) or RECORD) == RECORD
    assert stat.S_IMODE(store.root.stat().st_mode) == 0o700


@pytest.mark.parametrize("name", [".", ".records", ".building", ".locks", ".quarantine"])
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_is_open_is_emptied(tmp_path: Path, name: str, mode: int) -> None:
    store, entry = filled(tmp_path)
    (store.root / name).chmod(mode)
    after = Store(tmp_path)
    assert after.note is not None and f"others could write to {(store.root / name).resolve()}" in after.note
    assert after.find(KEY, "k") is None and after.recall(KEY) is None and not entry.exists()
    assert all(stat.S_IMODE((after.root / x).stat().st_mode) == 0o700 for x in (".", ".records", ".building"))
    assert Store(tmp_path).note is None
    assert [x.name for x in tmp_path.iterdir()] == ["store-2"]


@pytest.mark.parametrize("name", ["manifest.json", "kernel.so", ""])
def test_an_entry_that_is_open_is_built_again(tmp_path: Path, name: str) -> None:
    _, entry = filled(tmp_path)
    (entry / name).chmod(0o777)
    store = Store(tmp_path)
    assert store.find(KEY, "k") is None
    assert store.read(store.get_or_build(KEY, "k", writes("again")), "kernel.so") == b"again"


def test_a_record_that_is_open_is_no_record(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    (store.root / ".records" / f"{KEY}.json").chmod(0o666)
    assert store.recall(KEY) is None


@pytest.mark.parametrize("change", ["shorter", "readable", "open", "gone", "another"])
def test_a_secret_that_others_may_know_is_replaced(tmp_path: Path, change: str) -> None:
    store, _ = filled(tmp_path)
    secret = store.root / ".key"
    if change == "shorter":
        secret.write_bytes(secret.read_bytes()[:8])
    elif change == "gone":
        secret.unlink()
    elif change == "another":
        secret.write_bytes(os.urandom(32))
    else:
        secret.chmod(0o644 if change == "readable" else 0o666)
    after = Store(tmp_path)
    assert after.find(KEY, "k") is None and after.recall(KEY) is None
    assert stat.S_IMODE((after.root / ".key").stat().st_mode) == 0o600
    assert after.get_or_build(KEY, "k", writes("right")) == Store(tmp_path).find(KEY, "k")


def test_a_process_that_runs_follows_a_new_secret(tmp_path: Path) -> None:
    """Else two processes would put each other's entries aside for ever."""
    old, _ = filled(tmp_path)
    old.root.chmod(0o777)
    new = Store(tmp_path)
    entry = new.get_or_build(KEY, "k", writes("new"))
    assert old.find(KEY, "k") == entry and old.read(entry, "kernel.so") == b"new"
    old.remember(KEY, RECORD)
    assert new.recall(KEY) == RECORD


def test_a_library_that_is_exchanged_under_a_process(tmp_path: Path) -> None:
    store, entry = filled(tmp_path)
    assert store.read(entry, "kernel.so") == b"right"
    (entry / "kernel.so").write_text("wrong")
    with pytest.raises(StoreError, match=r"kernel\.so: it is not what was built"):
        store.read(entry, "kernel.so")
    assert store.find(KEY, "k") is None
    assert store.read(store.get_or_build(KEY, "k", writes("right")), "kernel.so") == b"right"


def test_what_was_discarded_does_not_come_back(tmp_path: Path) -> None:
    store, entry = filled(tmp_path)
    store.discard(entry)
    (aside,) = (store.root / ".quarantine").iterdir()
    aside.rename(entry)
    assert Store(tmp_path).find(KEY, "k") is None and store.find(KEY, "k") is None


def test_files_of_someone_else_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "file").chmod(0o600)
    assert store_files.read(tmp_path / "file") == b"x"
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    with pytest.raises(PermissionError, match="belongs to someone else"):
        store_files.read(tmp_path / "file")


def test_a_way_that_others_can_change(tmp_path: Path) -> None:
    cache = tmp_path / "open" / "cache"
    cache.mkdir(parents=True)
    assert way_is_safe(cache.resolve()) is None
    (tmp_path / "open").chmod(0o777)
    store = Store(cache)
    assert store.note is not None and f"others can write to {(tmp_path / 'open').resolve()}" in store.note
    assert tmp_path not in store.root.parents
    (tmp_path / "open").chmod(0o1777)
    assert Store(cache).note is None


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("x")


def nested(path: Path) -> None:
    path.write_text('{"key": ' * 100_000)


def nested_lists(path: Path) -> None:
    path.write_text("[" * 200_000 + "]" * 200_000)


def link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def nothing(path: Path) -> None:
    path.write_text("")


def noise(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 8)


def unreadable(path: Path) -> None:
    path.write_text("x")
    path.chmod(0)


def empty_manifest(path: Path) -> None:
    path.write_text(json.dumps({"key": KEY, "name": "k", "files": {}}))


JUNK = [pipe, folder, nested, nested_lists, link, loop, huge, nothing, noise, unreadable, empty_manifest]
PLACES = [
    "k-{key}", "k-{key}/manifest.json", "k-{key}/kernel.so", ".records/{whole}.json", ".locks/{key}.lock", ".key",
    ".records", ".building", ".locks", ".quarantine", ".looked-at", "",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("junk", JUNK)
def test_whatever_lies_in_the_place_of_a_file_is_healed(
    tmp_path: Path, junk: Callable[[Path], None], place: str
) -> None:
    store, _ = filled(tmp_path)
    path = store.root / place.format(key=KEY[:16], whole=KEY)
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    junk(path)
    for after in (store, Store(tmp_path)):
        entry = after.get_or_build(KEY, "k", writes("right"))
        assert after.read(entry, "kernel.so") == b"right"
        after.prune()
        assert after.remember(KEY, RECORD) and after.recall(KEY) == RECORD
        assert [x.name for x in after.entries()] == ["k"]
    healed = Store(tmp_path)
    assert healed.find(KEY, "k") is not None and healed.recall(KEY) == RECORD and healed.note is None
    assert healed.clear() == 1 and healed.entries() == []


@pytest.mark.parametrize("place", ["", ".records", ".locks"])
def test_a_folder_that_another_makes_meanwhile_is_kept(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a look at a place, where nothing was, and the next thing that is done there."""
    root = tmp_path / "store-2"
    watched = root / place
    looks = {"lexists": os.path.lexists, "is_folder": store_files.is_folder}

    def after(name: str) -> Callable[[Path], bool]:
        def look(path: Path) -> bool:
            found = looks[name](path)
            if Path(path) == watched and not looks["lexists"](watched):
                watched.mkdir(mode=0o700, parents=True)
                (watched / "of another").write_text("kept")
            return found

        return look

    monkeypatch.setattr(store_seals, "is_folder", after("is_folder"))
    monkeypatch.setattr("attncc.runtime.store_seals.os.path.lexists", after("lexists"))
    opened = store_seals.Opened(root)
    assert opened.emptied is None
    assert (watched / "of another").read_text() == "kept"
