"""What the systems suite shows: a line a row, and a page of Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from attncc.bench.systems.system import System
from attncc.runtime.measure import device_name

_PEERS = ("eager", "inductor", "flex")


def made_of(row: dict[str, Any]) -> str:
    """`2 fused, 1 kept: slower`"""
    counts = Counter((status, "" if status == "fused" else code) for status, code, *_ in row["sites"])
    parts = [f"{n} {status}" + (f": `{code}`" if code else "") for (status, code), n in counts.items()]
    return ", ".join(parts) or "untouched"


def ratio(row: dict[str, Any], peer: str, own: str = "attncc") -> float | None:
    """The time of a peer over ours."""
    ms = row["ms"]
    return ms[peer] / ms[own] if peer in ms and ms.get(own) else None


def line(system: System, row: dict[str, Any]) -> str:
    times = ", ".join(f"{peer} {ms:.3g} ms" for peer, ms in row["ms"].items())
    absent = "".join(f"; {peer}: {why}" for peer, why in row["absent"].items())
    error = row["errors"].get("attncc")
    shown = "failed" if error is None else f"error {error:.1e}"
    return f"{system.title}: {made_of(row)}; {shown} (eager's {row['errors']['eager']:.1e}); {times}{absent}"


def document(rows: Sequence[tuple[System, dict[str, Any]]], missing: Sequence[System] = ()) -> str:
    """The page, docs/systems.md. `missing` were not measured."""
    ordered = sorted(rows, key=lambda x: x[0].number)
    head = [
        "# The systems",
        "",
        "Forty-six papers on attention, one row each: a layer or block that uses the mechanism, written from its",
        "specification (`attncc/bench/systems`), compiled, compared with float64, and timed. Made by",
        "",
        "    attncc bench --suite systems --table docs/systems.md",
        "",
        f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} thread, torch {torch.__version__}, "
        f"{datetime.now(UTC):%Y-%m-%d}; float32, inference,",
        "times of the thread (other programs ran on the machine),",
        "medians of calls that take turns. A ratio is the time of the other over that of attncc: above 1, attncc is",
        "faster. Memory is what a call adds at most, of Inductor's over attncc's. `kept` is understood and left to",
        "Inductor, with the code of the reason; `refused` is no attention. Gradients of the rows that train are",
        "compared with float64 by `tests/systems`. Where all is kept, both run the same graph, and the ratio is noise.",
        "",
        "| row | kind | what attncc made of it | error (eager's) | ms | eager | Inductor | Flex | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(_line(*x) for x in ordered), "", *_claims(ordered), *_missing(missing), ""])


def _missing(systems: Sequence[System]) -> list[str]:
    """What each row that was not measured is read as, which `tests/systems` holds."""
    if not systems:
        return []
    lines = ["", "## Read and not measured", "", "`tests/systems` reads these; no run has timed them yet.", ""]
    lines += ["| row | kind | attentions | left alone, and why |", "|---|---|---|---|"]
    for s in systems:
        left = ", ".join(f"`{code}`" for code in s.left)
        lines.append(f"| {s.title} | {s.kind} | {s.attentions} | {left} |")
    return lines


def _line(system: System, row: dict[str, Any]) -> str:
    found = row["errors"].get("attncc")
    error = "-" if found is None else f"{found:.0e} ({row['errors']['eager']:.0e})"
    ms = f"{row['ms']['attncc']:.3g}" if "attncc" in row["ms"] else "-"
    cells = [system.title, system.kind, made_of(row), error, ms, *(_ratio(row, p) for p in _PEERS), _memory(row)]
    return "| " + " | ".join(cells) + " |"


def _ratio(row: dict[str, Any], peer: str) -> str:
    found = ratio(row, peer)
    return "" if found is None else f"{found:.2f}"


def _memory(row: dict[str, Any]) -> str:
    ours, theirs = row["bytes"].get("attncc"), row["bytes"].get("inductor")
    return f"{theirs / ours:.1f}" if ours and theirs else ""


def _claims(rows: Sequence[tuple[System, dict[str, Any]]]) -> list[str]:
    """What authors measured beside what was measured here, and what is not the same."""
    lines = ["## Beside the authors' figures", "", "| row | authors | here | what is not the same |"]
    lines.append("|---|---|---|---|")
    for system, row in rows:
        best = min((row["ms"][p] for p in ("eager", "inductor") if p in row["ms"]), default=None)
        there = best and "attncc" in row["ms"]
        here = f"{best / row['ms']['attncc']:.2f}x the better of eager and Inductor" if there else "-"
        if system.form:
            own = ratio(row, "attncc", "planned")
            error = row["errors"].get("planned")
            here = (f"planned `{system.form}`: {own:.2f}x exact attncc, error {error:.0e}" if own is not None
                    else f"planned: {row['absent'].get('planned', 'not run')}")  # fmt: skip
        if system.claim or system.gap:
            lines.append(f"| {system.title} | {system.claim or '-'} | {here} | {system.gap or '-'} |")
    return lines
