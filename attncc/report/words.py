"""What reports say of a site in words and numbers: one wording for terminals and for pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attncc.report.site import Site, ranges


def shapes(site: Site) -> str:
    """Those of a site's operands."""
    return together(site.shapes)


def together(shapes: Mapping[str, tuple[int | str, ...]]) -> str:
    """`q, v (2, 8, 256, 64)  k (2, 2, 256, 64)`: operands of one shape share it."""
    names: dict[tuple[int | str, ...], list[str]] = {}
    for name, shape in shapes.items():
        names.setdefault(tuple(shape), []).append(name)
    return "  ".join(f"{', '.join(same)} ({', '.join(map(str, shape))})" for shape, same in names.items())


def scores(site: Site) -> str:
    """How many scores there are, how many the kernel computes and how many are visible; empty where nothing is known.
    """
    if site.total is None:
        return ""
    parts = [f"{site.total:,}"]
    if site.status == "fused" and site.visited is not None:
        parts.append(f"{share(site.visited, site.total)} computed")
    if site.visible is not None:
        parts.append(f"{share(site.visible, site.total)} visible")
    elif site.status != "fused":
        parts.append("visible ones known only where the kernel runs")
    most = site.total / max(site.visible or site.total, 1)
    if most > 1.005:
        parts.append(f"at most {most:.3g} times as fast by leaving scores out")
    return ", ".join(parts)


def share(part: int, total: int) -> str:
    """`50%`; where rounding would say all or none of what is not, one more digit."""
    portion = part / total if total else 0.0
    whole = f"{portion:.0%}"
    return f"{portion:.1%}" if 0 < part < total and whole in ("0%", "100%") else whole


def measured(sites: Sequence[Site]) -> str:
    """`attncc 746.9 us, SDPA 1.81 ms: 2.42 times as fast`, for one site or for several that are alike."""
    timings = sites[0].timings
    gains = sorted(s.speedup for s in sites if s.speedup is not None)
    what = "forward and backward, " if sites[0].trains else ""
    gain = ""
    if gains:
        low, high = f"{gains[0]:.2f}", f"{gains[-1]:.2f}"
        gain = f"{low if low == high else f'{low} to {high}'} times as fast as the best alternative"
    shown = times(timings)
    forward, own = sites[0].forward_us, timings.get("attncc")
    if forward is not None and own is not None:
        apart = f"attncc's forward {duration(forward)}, its backward {duration(max(own - forward, 0.0))}"
        shown = f"{shown} ({apart})"
    return what + ": ".join(x for x in (shown, gain) if x) if shown or gain else ""


def times(timings: Mapping[str, float]) -> str:
    """Candidates, the fastest first: `attncc 746.9 us, SDPA 1.81 ms`."""
    return ", ".join(f"{name} {duration(us)}" for name, us in sorted(timings.items(), key=lambda x: x[1]))


def duration(us: float) -> str:
    """Microseconds in the unit that suits them, three or four digits."""
    if us < 1000:
        return f"{us:.1f} us"
    return f"{us / 1e3:.2f} ms" if us < 1e6 else f"{us / 1e6:.2f} s"


def plan(sites: Sequence[Site]) -> str:
    """`window{size=64} on heads 0-3 (12% of the keys, error 8.9e-05)`: what heads of sites that are alike do under a
    plan."""
    shown: list[str] = []
    for n, form in enumerate(sites[0].forms):
        error = f", error {error_of(sites, n)}" if any(s.forms[n].error for s in sites) else ""
        keys = "" if form.form == "exact" else f" ({form.density:.0%} of the keys{error})"
        shown.append(f"{form.form} on heads {ranges(form.heads)}{keys}")
    return "; ".join(shown)


def error_of(sites: Sequence[Site], n: int) -> str:
    """What form `n` of each of the sites adds: `5.9e-05 to 8.9e-05`."""
    errors = sorted(s.forms[n].error for s in sites)
    low, high = f"{errors[0]:.1e}", f"{errors[-1]:.1e}"
    return low if low == high else f"{low} to {high}"


def why(site: Site) -> str:
    """The reason and its code, where the times, or the forms of a plan, do not say it already."""
    if not site.reason or (site.timings and site.code in ("faster", "slower")):
        return ""
    if site.forms and site.code == "planned":
        return f"as the plan says: {site.reason.rpartition('; ')[2]} [planned]"  # its times; the forms are told already
    return f"{site.reason} [{site.code}]" if site.code else site.reason
