"""The file of a plan: read and written whole, refused where it is anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from planned.keyed import Keyed
from planned.made import plan, site

from attncc.errors import PlanError
from attncc.plans.plan import MOST_BYTES, load, read


def rule(form: str, heads: list[int], density: float) -> dict[str, Any]:
    return {"form": form, "heads": heads, "density": density, "error": 0.0}


@pytest.fixture(scope="module")
def fields() -> dict[str, Any]:
    import msgspec  # noqa: PLC0415 - beside its only use

    return json.loads(msgspec.json.encode(plan(Keyed())))


def test_a_plan_round_trips(tmp_path: Path) -> None:
    known = plan(Keyed(), site(), site("blocks.1", ()))
    known.save(tmp_path / "model.plan")
    assert load(tmp_path / "model.plan") == known
    assert [p.name for p in tmp_path.iterdir()] == ["model.plan"]
    assert known.speed() == pytest.approx(20 / 13)
    assert [s.sparse for s in known.sites] == [True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "its schema is 99; this version of attncc reads schema 1"),
        ({"schema": "one"}, "Expected `int`, got `str`"),
        ({"unknown": 1}, "unknown field `unknown`"),
        ({"sites": {}}, "Expected `array`, got `object`"),
        ({"kappa": "__import__('os')"}, "Expected `float`"),
        ({"lengths": [512, 64]}, "from a smaller one to a larger one"),
        ({"lengths": [1, 2, 3]}, "length 2"),
        ({"budget": {"metric": "kl", "limit": 0.1, "share": 1.5}}, "a share between 0 and 1 of inputs, not 1.5"),
    ],
    ids=str,
)
def test_what_is_no_plan_is_refused_in_one_line(fields: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=r"^the plan: ") as raised:
        read(json.dumps({**fields, **change}).encode())
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rules": [rule("streaming", [0, 2], 0.3)]}, "has 2 heads, its rules speak of others"),
        ({"rules": [rule("streaming", [0], 0.3)] * 2}, "a head takes two forms"),
        ({"rules": [rule("no-such{a=1}", [0], 0.3)]}, "no pass 'no-such{a=1}'"),
        ({"rules": [rule("drop-rounding", [0], 0.3)]}, "not a single policy"),
        ({"rules": [rule("streaming,chunks", [0], 0.3)]}, "not a single policy"),
        ({"rules": [rule("streaming", [0], 3)]}, "a share between 0 and 1"),
        ({"keys": [0, 5]}, "no range of keys"),
        ({"phase": "sometimes"}, "Invalid enum value"),
    ],
    ids=str,
)
def test_sites_that_mean_nothing_are_refused(fields: dict[str, Any], change: dict[str, Any], message: str) -> None:
    sites = [{**fields["sites"][0], **change}]
    with pytest.raises(PlanError) as raised:
        read(json.dumps({**fields, "sites": sites}).encode())
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_site_is_planned_once(fields: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"site blocks\.0 is planned twice"):
        read(json.dumps({**fields, "sites": fields["sites"] * 2}).encode())


@pytest.mark.parametrize(
    "raw", [b"", b"\xff\xfe", b"[1, 2]", b"{", b"[" * 200_000, b'{"schema": 1}', b"null", b'{"schema": 1e400}'], ids=str
)
def test_hostile_files(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.plan").write_bytes(raw)
    with pytest.raises(PlanError, match=r"x\.plan: ") as raised:
        load(tmp_path / "x.plan")
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        load(tmp_path / "missing.plan")
    with pytest.raises(PlanError, match="cannot be read"):
        load(tmp_path)
    with (tmp_path / "large.plan").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(PlanError, match="over 64 MiB"):
        load(tmp_path / "large.plan")
    with pytest.raises(PlanError, match="cannot be written"):
        plan(Keyed()).save(tmp_path / "no folder" / "x.plan")
