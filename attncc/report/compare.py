"""What changed between two reports, as `attncc inspect --json` writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attncc.report.model import SCHEMA
from attncc.report.words import duration, together

#: Two times of one kernel that differ by less are no change: another day, another neighbour.
SAME_TIME = 0.1
#: What a site is compared by, in the order in which it is told.
_FIELDS = (
    "status", "code", "equation", "mask", "shapes", "became", "isa", "visible", "visited", "total", "forms", "trains",
)  # fmt: skip

Json = Mapping[str, Any]


class SchemaError(ValueError):
    """What was read is no report, or one of another version. The message is one line."""


@dataclass(frozen=True)
class Change:
    """`where` is a site, by its path and its number among those of that path, or a part of the report; `what` the
    field; `before` and `after` are text, empty where there was nothing."""

    where: str
    what: str
    before: str
    after: str


def reports_of(read: object) -> dict[str, Json]:
    """The reports in what was read: one, or those of inference and of training. Raises SchemaError."""
    if not isinstance(read, dict):
        raise SchemaError("it holds no report")
    several = {name: each for name, each in read.items() if name in ("inference", "training")}
    found: dict[str, Json] = several or {"": read}
    for each in found.values():
        schema = each.get("schema") if isinstance(each, dict) else None
        if schema != SCHEMA:
            raise SchemaError(f"its schema is {schema!r}, this version of attncc reads {SCHEMA!r}")
        if not all(isinstance(each.get(part), kind) for part, kind in (("sites", list), ("kernels", dict))):
            raise SchemaError("it lacks its sites or its kernels")
    return found


def changes(before: Json, after: Json) -> list[Change]:
    """Everything that differs: versions, machine, sites and notes. Two reports of one model by one version of attncc
    on one machine give none."""
    found: list[Change] = []
    for part in ("versions", "machine"):
        found += _of_fields(part, before.get(part, {}), after.get(part, {}))
    same_machine = before.get("machine") == after.get("machine")
    old, new = _by_place(before["sites"]), _by_place(after["sites"])
    for where in dict.fromkeys((*old, *new)):
        if where not in new:
            found.append(Change(where, "site", old[where].get("status", ""), ""))
        elif where not in old:
            found.append(Change(where, "site", "", new[where].get("status", "")))
        else:
            found += _of_site(where, old[where], new[where], times=same_machine)
    notes = before.get("notes", []), after.get("notes", [])
    found += [Change("notes", "note", note, "") for note in notes[0] if note not in notes[1]]
    found += [Change("notes", "note", "", note) for note in notes[1] if note not in notes[0]]
    return found


def _by_place(sites: Sequence[Json]) -> dict[str, Json]:
    """Sites by their path and, of several with one path, their number among them: the index moves with every other
    site."""
    counts: dict[str, int] = {}
    found: dict[str, Json] = {}
    for site in sites:
        path = str(site.get("path") or "(top level)")
        n = counts[path] = counts.get(path, 0) + 1
        found[path if n == 1 else f"{path} #{n}"] = site
    return found


def _of_site(where: str, old: Json, new: Json, *, times: bool) -> Iterator[Change]:
    told = [Change(where, name, _text(old.get(name)), _text(new.get(name)))
            for name in _FIELDS if old.get(name) != new.get(name)]  # fmt: skip
    yield from told
    if not told and old.get("kernel") != new.get("kernel"):
        yield Change(where, "kernel", _text(old.get("kernel")), _text(new.get("kernel")))
    before, after = old.get("timings") or {}, new.get("timings") or {}
    for name in before if times else ():
        if name in after and not 1 / (1 + SAME_TIME) <= after[name] / before[name] <= 1 + SAME_TIME:
            yield Change(where, f"time of {name}", duration(before[name]), duration(after[name]))


def _of_fields(where: str, old: Json, new: Json) -> Iterator[Change]:
    for name in dict.fromkeys((*old, *new)):
        if old.get(name) != new.get(name):
            yield Change(where, name, _text(old.get(name)), _text(new.get(name)))


def _text(value: object) -> str:
    if isinstance(value, dict) and value and all(isinstance(x, list) for x in value.values()):
        return together({name: tuple(x) for name, x in value.items()})
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(x)}" for name, x in value.items())
    if isinstance(value, list):
        return "(" + ", ".join(map(_text, value)) + ")"
    return "" if value is None else str(value)
