"""Which rows of a suite are measured: those whose names hold a word that was asked for."""

from __future__ import annotations

from collections.abc import Iterable

from attncc.frontends.targets import TargetError

#: What measures nothing: the rows that a file holds are printed.
NONE = "none"


def chosen(names: Iterable[str], only: str) -> list[str]:
    """The names that hold one of the words of `only`, which are separated by commas (so that no name holds one); all
    where there are none. Raises TargetError where a word is in no name."""
    known = list(names)
    words = [w.strip() for w in only.split(",") if w.strip()]
    if words == [NONE]:
        return []
    strange = [w for w in words if not any(w in name for name in known)]
    if strange:
        raise TargetError(f"bench: no row is called {', '.join(map(repr, strange))}; rows are {_listed(known)}")
    return [name for name in known if not words or any(w in name for w in words)]


def _listed(names: list[str]) -> str:
    most = 40
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
