"""Pictures of a plan: error against speed, and the form of each head, as layer by head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attncc.errors import PlanError
from attncc.plans.plan import Plan

#: Files of each picture.
KINDS = ("svg", "png")


def draw(plan: Plan, folder: Path) -> list[Path]:
    """Draw a plan into a folder, each picture as SVG and PNG; the files. Raises PlanError."""
    try:
        import matplotlib  # noqa: PLC0415 an optional extra
    except ImportError as error:
        raise PlanError("pictures need matplotlib: pip install 'attncc[plots]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415 as above

    files: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in (("speed", _speed(plan, pyplot)), ("heads", _heads(plan, pyplot))):
            for kind in KINDS:
                files.append(folder / f"{name}.{kind}")
                figure.savefig(files[-1], dpi=160, bbox_inches="tight")
            pyplot.close(figure)
    except OSError as error:
        raise PlanError(f"{folder}: pictures cannot be written ({error.strerror or error})") from error
    return files


def _speed(plan: Plan, pyplot: Any) -> Any:
    """The ladder: how much faster attention is for what predicted loss, and where this plan stands."""
    figure, axes = pyplot.subplots(figsize=(6, 4))
    exact = sum(s.exact_ms for s in plan.sites)
    points = [(exact / ms, plan.kappa * error) for error, ms in plan.curve if ms and error > 0]
    axes.plot(*zip(*points, strict=True), color="0.5", marker=".", label="plans of these forms") if points else None
    axes.scatter([plan.speed()], [max(plan.predicted, 1e-12)], color="C3", zorder=3, label="this plan")
    if plan.certificate is not None:
        axes.scatter([plan.speed()], [plan.certificate.mean], color="C0", marker="x", zorder=3, label="unseen, mean")
    if plan.budget.limit is not None:
        axes.axhline(plan.budget.limit, color="C3", linestyle=":", label=f"limit of {plan.budget.share:.0%} of inputs")
    axes.set(xlabel="speed of attention against exact", ylabel=f"{plan.budget.metric}, predicted", yscale="log")
    axes.legend()
    return figure


def _heads(plan: Plan, pyplot: Any) -> Any:
    """A row an attention, a column a head, a colour a form."""
    forms = ["exact", *dict.fromkeys(r.form for s in plan.sites for r in s.rules)]
    most = max(s.heads for s in plan.sites)
    rows: list[Sequence[float]] = []
    for site in plan.sites:
        row = [0.0] * site.heads + [float("nan")] * (most - site.heads)
        for rule in site.rules:
            for h in rule.heads:
                row[h] = float(forms.index(rule.form))
        rows.append(row)
    figure, axes = pyplot.subplots(figsize=(2 + 0.3 * most, 1.5 + 0.18 * len(rows)))
    colours = pyplot.get_cmap("viridis", len(forms))
    shown = axes.imshow(rows, cmap=colours, vmin=-0.5, vmax=len(forms) - 0.5, aspect="auto", interpolation="nearest")
    axes.set(xlabel="head", ylabel="attention", xticks=range(most))
    bar = figure.colorbar(shown, ticks=range(len(forms)))
    bar.ax.set_yticklabels(forms)
    return figure
