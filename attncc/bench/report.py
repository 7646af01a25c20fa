"""What a report of the CPU suite looks like: a line a row, Markdown tables, a plot."""

from __future__ import annotations

import math
from typing import Any
from xml.sax.saxutils import escape

from attncc.bench.cpu_rows import EVERY, rows

Done = dict[str, Any]
_COLUMNS = ("sdpa", "sdpa gqa", "inductor", "flex", "flex + mask")


def reached(done: Done, goal: Done) -> float | None:
    """What the row has of a goal, in the goal's terms; None where its rival is absent."""
    than = "plain" if goal["than"] == "area" else goal["than"]
    ratio = done["ratio"].get(than)
    if ratio is None:
        return None
    if goal["than"] == "area":
        return 1 / ratio / done["density"]
    return {"sdpa": ratio, "read": ratio, "plain": 1 / ratio}[than]


def verdict(done: Done, goal: Done) -> str:
    """`goal: value, met` or by how much it was missed."""
    value = reached(done, goal)
    if value is None:
        return ""
    at_most = goal["than"] in ("plain", "area")
    met = value <= goal["least"] if at_most else value >= goal["least"]
    by = value / goal["least"] - 1
    names = {"sdpa": "SDPA x", "read": "of reading ", "plain": "plain kernel x ", "area": "area x "}
    sign = "<=" if at_most else ">="
    return f"{names[goal['than']]}{value:.2f} ({sign} {goal['least']:g}) {'met' if met else f'missed by {abs(by):.0%}'}"


def _speed(done: Done) -> str:
    return f"{done['gb_per_s']:.1f} GB/s" if done["decode"] else f"{done['gflops']:.0f} GF/s"


def line(done: Done) -> str:
    """One row as text, with the reasons of absent rivals."""
    noise = f" +-{done['spread']['attncc'] / 2:.0%}" if "attncc" in done.get("spread", {}) else ""
    own = f"{done['ms']['attncc']:9.3f} ms{noise}"
    start = f"{done['row']:30} {done['dtype']:5}{done['threads']} {own} {_speed(done):>11}"
    ratios = "  ".join(f"{n} {r:.2f}x" for n, r in done["ratio"].items())
    goals = "; ".join(filter(None, (verdict(done, g) for g in done["goals"])))
    return f"{start}  {ratios}" + (f"  [{goals}]" if goals else "")


def _ordered(report: Done) -> list[Done]:
    names = [r.row.name for r in (*rows(quick=False), *rows(quick=True))]
    place = {n: names.index(n) for n in names}
    return sorted(report["rows"], key=lambda r: (EVERY.index(r["dtype"]), r["threads"], place.get(r["row"], 99)))


def markdown(report: Done) -> str:
    """A table for each dtype and number of threads; below it, why a rival is absent."""
    out: list[str] = []
    done = _ordered(report)
    for dtype in EVERY:
        for threads in sorted({r["threads"] for r in done}):
            part = [r for r in done if (r["dtype"], r["threads"]) == (dtype, threads)]
            if part:
                out += _table(part, f"### {dtype}, {threads} thread{'s' if threads > 1 else ''}")
    return "\n".join(out)


def _table(part: list[Done], title: str) -> list[str]:
    columns = [c for c in _COLUMNS if any(c in r["ratio"] for r in part)]
    out = [title, "", f"| | ms | speed | of `torch.mm` | {' | '.join(columns)} | goals |",
           f"|---|---|---|---|{'---|' * len(columns)}---|"]  # fmt: skip
    notes: dict[str, list[str]] = {}
    for r in part:
        cells = [f"{r['ratio'][c]:.2f}" if c in r["ratio"] else "-" for c in columns]
        goals = "; ".join(filter(None, (verdict(r, g) for g in r["goals"])))
        rate = "-" if r["decode"] else f"{r['gflops'] / r['mm_gflops']:.0%}"
        out.append(f"| {r['row']} | {r['ms']['attncc']:.3g} | {_speed(r)} | {rate} | {' | '.join(cells)} | {goals} |")
        for name, why in r["absent"].items():
            if name in columns and why not in ("no grouped heads", "no mask to build"):
                notes.setdefault(f"{name}: {why}", []).append(r["row"])
    spreads = sorted(x for r in part for x in r.get("spread", {}).values())
    out.append("")
    if spreads:
        usual, noisy = spreads[len(spreads) // 2], spreads[-1 - len(spreads) // 10]
        out.append(f"- the middle half of a rival's samples lies {usual:.0%} of their median apart (median over rivals "
                   f"and rows), {noisy:.0%} in the noisiest tenth")  # fmt: skip
    out += [*(f"- {why} ({', '.join(where)})" for why, where in notes.items()), ""]
    return out


_COLOUR = {"f32": "#3b6fb6", "bf16": "#d1662f", "f16": "#5a9a4b"}


def plot(report: Done) -> str:
    """Bars of SDPA's time over ours, logarithmic, with the goals as ticks: an SVG file."""
    part = [r for r in _ordered(report) if "sdpa" in r["ratio"] and r["threads"] == 1]
    names = list(dict.fromkeys(r["row"] for r in sorted(part, key=_ordered(report).index)))
    kinds = [d for d in EVERY if any(r["dtype"] == d for r in part)]
    most = max([r["ratio"]["sdpa"] for r in part] + [2.0]) * 1.1
    left, wide, bar = 190, 560, 9
    block = bar * len(kinds) + 8
    high = 50 + block * len(names)

    def x(ratio: float) -> float:
        return left + wide * math.log(max(ratio, 0.5) / 0.5) / math.log(most / 0.5)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + wide + 60}" height="{high}" '
           'font-family="sans-serif" font-size="11">', '<rect width="100%" height="100%" fill="white"/>',
           f'<text x="{left}" y="14">SDPA\'s time over attncc\'s, one thread; ticks are goals</text>']  # fmt: skip
    for n, kind in enumerate(kinds):
        out.append(f'<text x="{left + 330 + 60 * n}" y="14" fill="{_COLOUR[kind]}">{kind}</text>')
    for mark in (m for m in (0.5, 1, 2, 5, 10, 20, 50, 100) if m <= most):
        colour = "#555" if mark == 1 else "#ddd"
        out.append(f'<line x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="32" y2="{high - 8}" stroke="{colour}"/>')
        out.append(f'<text x="{x(mark):.1f}" y="28" text-anchor="middle" fill="#555">{mark:g}</text>')
    for row, name in enumerate(names):
        top = 36 + row * block
        out.append(f'<text x="{left - 6}" y="{top + block / 2:.1f}" text-anchor="end">{escape(name)}</text>')
        for n, kind in enumerate(kinds):
            for r in (r for r in part if (r["row"], r["dtype"]) == (name, kind)):
                at, ratio = top + n * bar, r["ratio"]["sdpa"]
                low, end = sorted((x(1), x(ratio)))
                out.append(f'<rect x="{low:.1f}" y="{at}" width="{max(end - low, 1):.1f}" height="{bar - 1}" '
                           f'fill="{_COLOUR[kind]}"/>')  # fmt: skip
                out.append(f'<text x="{end + 4:.1f}" y="{at + bar - 1}" font-size="8">{ratio:.2f}</text>')
                out += [f'<line x1="{x(g["least"]):.1f}" x2="{x(g["least"]):.1f}" y1="{at - 1}" y2="{at + bar}" '
                        'stroke="black" stroke-width="2"/>' for g in r["goals"] if g["than"] == "sdpa"]  # fmt: skip
    return "\n".join([*out, "</svg>", ""])
