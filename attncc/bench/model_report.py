"""What a report of the models suite looks like: a line a row, a Markdown table, a plot."""

from __future__ import annotations

import math
from typing import Any
from xml.sax.saxutils import escape

Done = dict[str, Any]


def _goal(done: Done) -> str:
    if not done["least"]:
        return "-"
    reached = done["ratio"]["inductor"]
    met = "met" if reached >= done["least"] else f"missed by {1 - reached / done['least']:.0%}"
    return f"{done['least']:g} {met}"


def _all(values: dict[str, float | None] | None, form: str, backends: tuple[str, ...]) -> str:
    found = [(values or {}).get(n) for n in backends]
    return " / ".join("-" if x is None else format(x, form) for x in found)


def line(done: Done) -> str:
    """One row as text."""
    start = f"{done['row']:26} {done['dtype']:5}{done['threads']}"
    if "failed" in done:
        return f"{start} failed: {done['failed']}"
    fused, sites = done["sites"]
    return (f"{start} {done['ms']['attncc']:9.2f} ms  eager {done['ratio']['eager']:.2f}x  Inductor "
            f"{done['ratio']['inductor']:.2f}x [{_goal(done)}]  {fused} of {sites} sites  memory "
            f"{_all(done['memory'], '.0f', ('eager', 'inductor', 'attncc'))} MB  first call cold "
            f"{_all(done['cold first call'], '.1f', ('inductor', 'attncc'))} s, warm "
            f"{_all(done['warm first call'], '.1f', ('inductor', 'attncc'))} s")  # fmt: skip


def _title(report: Done) -> str:
    machine = report["machine"]
    return f"{machine['processor']}, {machine['isa']}, torch {machine['torch']}"


def markdown(report: Done) -> str:
    """A table for each dtype and number of threads, of one machine."""
    out = [f"Measured on {_title(report)}.", ""]
    kinds = dict.fromkeys((r["dtype"], r["threads"]) for r in report["rows"])
    for dtype, threads in sorted(kinds):
        out += [f"### {dtype}, {threads} thread{'s' if threads > 1 else ''}", "",
                "| | attncc, ms | eager x | Inductor x | goal | samples apart | sites "
                "| memory of a call, MB: eager / Inductor / attncc | first call cold, s: Inductor / attncc | warm |",
                "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for r in (r for r in report["rows"] if (r["dtype"], r["threads"]) == (dtype, threads)):
            name = r["row"] + (" (two layers)" if r["quick"] else "")
            if "failed" in r:
                out.append(f"| {name} | {r['failed'].replace('|', '/')} | | | | | | | | |")
                continue
            cells = [f"{r['ms']['attncc']:.3g}", f"{r['ratio']['eager']:.2f}", f"{r['ratio']['inductor']:.2f}",
                     _goal(r), f"{max(r['spread'].values(), default=math.nan):.0%}", "{} of {}".format(*r["sites"]),
                     _all(r["memory"], ".0f", ("eager", "inductor", "attncc")),
                     _all(r["cold first call"], ".1f", ("inductor", "attncc")),
                     _all(r["warm first call"], ".1f", ("inductor", "attncc"))]  # fmt: skip
            out.append(f"| {name} | " + " | ".join(cells) + " |")
        out.append("")
    return "\n".join(out)


def plot(report: Done) -> str:
    """Bars of Inductor's time over ours, with the goals as ticks: an SVG file."""
    part = [r for r in report["rows"] if "failed" not in r]
    left, wide, high = 290, 440, 24
    most = max([1.2, *(max(r["ratio"]["inductor"], r["least"] or 1) for r in part)]) * 1.1

    def x(ratio: float) -> float:
        return left + wide * (ratio / most)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + wide + 60}" height="{50 + high * len(part)}" '
           'font-family="sans-serif" font-size="11">', '<rect width="100%" height="100%" fill="white"/>',
           f'<text x="10" y="14">Inductor\'s time over attncc\'s, ticks are goals; {escape(_title(report))}</text>',
           f'<line x1="{x(1):.1f}" x2="{x(1):.1f}" y1="24" y2="{44 + high * len(part)}" stroke="#555"/>']  # fmt: skip
    for n, r in enumerate(part):
        top, ratio = 30 + high * n, r["ratio"]["inductor"]
        name = f"{r['row']}, {r['dtype']}, {r['threads']} threads"
        out.append(f'<text x="{left - 6}" y="{top + 13}" text-anchor="end">{escape(name)}</text>')
        out.append(f'<rect x="{left}" y="{top}" width="{x(ratio) - left:.1f}" height="18" fill="#3b6fb6"/>')
        out.append(f'<text x="{x(ratio) + 4:.1f}" y="{top + 13}">{ratio:.2f}</text>')
        if r["least"]:
            goal = x(r["least"])
            out.append(f'<line x1="{goal:.1f}" x2="{goal:.1f}" y1="{top - 2}" y2="{top + 20}" stroke="black" '
                       'stroke-width="2"/>')  # fmt: skip
    return "\n".join([*out, "</svg>", ""])
