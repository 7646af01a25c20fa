"""Records of the kernel store: plain values under a key, whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from stores.disk import KEY, full, leftovers

from attncc.runtime.store import Store


def test_records(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.recall(KEY) is None
    record = {"winner": "cpp", "us": {"cpp": 12.5, "sdpa": 20.0}, "shapes": [1, 2], "tied": False, "why": None}
    assert store.remember(KEY, record)
    assert Store(tmp_path).recall(KEY) == record
    assert store.remember(KEY, {"winner": "sdpa"}) and store.recall(KEY) == {"winner": "sdpa"}
    with pytest.raises(TypeError, match=r"record\.t"):
        store.remember(KEY, {"t": object()})
    assert leftovers(store) == []


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"record": {"winner": "cpp"}}'])
def test_damaged_records_are_no_records(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    store.remember(KEY, {"winner": "sdpa"})
    (store.root / ".records" / f"{KEY}.json").write_text(damage)
    assert store.recall(KEY) is None


def test_a_record_changed_by_one_byte_is_no_record(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.remember(KEY, {"winner": "sdpa"})
    path = store.root / ".records" / f"{KEY}.json"
    path.write_text(path.read_text().replace("sdpa", "sdpb"))
    assert store.recall(KEY) is None


def test_a_full_disk_keeps_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.remember(KEY, {"winner": "sdpa"})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        assert not store.remember(KEY, {"winner": "cpp"})
    assert store.recall(KEY) == {"winner": "sdpa"} and leftovers(store) == []
