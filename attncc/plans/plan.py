"""The plan: what a file of one holds, read and written whole.

A plan is data. Nothing in it is executed: forms are named, with numbers, and are read by the parser of passes. A file
is bounded in size, and one with unknown fields, wrong types or another schema is refused.
"""

from __future__ import annotations

import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Literal, cast

import msgspec

from attncc.errors import PlanError
from attncc.passes.pipeline import parse_pipeline
from attncc.passes.policies.hiding import Form, Policy

SCHEMA = 1
#: A plan of 200 layers with 128 heads each, every head alone in its form, is a tenth of this.
MOST_BYTES = 64 << 20
Phase = Literal["prefill", "decode"]
#: A site: the module's path, the number of the attention there, and the phase.
Key = tuple[str, int, str]


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One form and the query heads that take it. `density` is the share of the visible keys that it keeps, `error` the
    predicted divergence that these heads add by it."""

    form: str
    heads: tuple[int, ...]
    density: float
    error: float


class SitePlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the heads of one attention do. `path` is its module, `place` its number among the attentions of that module
    in one graph, `what` the attention in one line, `keys` the least and largest number of keys that this was profiled
    for. Heads in no rule are exact. Times are milliseconds a call on the profiling machine. `bound` is how far the
    output may be off the exact one, relative, before a guarded call runs exact; None where that was not measured."""

    path: str
    place: int
    phase: Phase
    what: str
    heads: int
    keys: tuple[int, int]
    rules: tuple[Rule, ...]
    exact_ms: float
    ms: float
    bound: float | None = None

    @property
    def key(self) -> Key:
        return self.path, self.place, self.phase

    @property
    def error(self) -> float:
        return sum(r.error for r in self.rules)

    @property
    def sparse(self) -> bool:
        return any(r.heads for r in self.rules)

    def forms(self) -> tuple[Form, ...]:
        """The forms, for `attncc.passes.policies.hiding.hide`."""
        return tuple(Form(policy_of(r.form), r.heads) for r in self.rules if r.heads)


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was asked for: the loss of a sample is at most `limit`, for a share `share` of all inputs like the data; or
    where `speed` is given, the least error at that speed of attention against exact."""

    metric: str
    limit: float | None
    share: float
    speed: float | None = None


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`failures` of `samples` unseen ones had a loss above the limit: with confidence 1 - delta, at most a share
    1 - share of inputs like these do. `tested` plans were tried, safest first."""

    samples: int
    failures: int
    delta: float
    tested: int
    mean: float
    worst: float
    data: str


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`weights` are fingerprints of the model's parameters. `lengths` are the least and largest number of keys that the
    certificate speaks of, `kappa` the measured loss over the sum of predicted ones, `predicted` their product. `curve`
    has (summed error, milliseconds) of every plan that was found, from exact to fastest."""

    schema: int
    versions: dict[str, str]
    machine: str
    weights: tuple[str, ...]
    sites: tuple[SitePlan, ...]
    budget: Budget
    certificate: Certificate | None
    lengths: tuple[int, int]
    kappa: float
    predicted: float
    curve: tuple[tuple[float, float], ...]
    seed: int

    @property
    def certified(self) -> bool:
        return self.certificate is not None

    def speed(self) -> float:
        """The time of all attention of the profiled sites, exact over planned."""
        own = sum(s.ms for s in self.sites)
        return sum(s.exact_ms for s in self.sites) / own if own else 1.0

    def summary(self) -> list[str]:
        """What holds for the whole plan: its size and speed, what was asked for, its certificate and its lengths."""
        b, c = self.budget, self.certificate
        sparse = sum(len(r.heads) for s in self.sites for r in s.rules)
        heads = sum(s.heads for s in self.sites)
        limit = "" if b.limit is None else f"<={b.limit:.3g}"
        budget = f"{b.metric}{limit} for {b.share:.0%} of inputs"
        asked = f"attention {b.speed:.3g} times as fast" if b.speed else budget
        lines = [
            f"{sparse} of {heads} heads approximate; attention {self.speed():.2f} times as fast as exact, on "
            f"{self.machine}",
            f"asked for: {asked}; predicted {b.metric} {self.predicted:.2e} (kappa {self.kappa:.2f})",
        ]
        if c is None:
            lines.append("NOT CERTIFIED: its error on unseen inputs is not known")
        else:
            lines.append(
                f"certified: {c.failures} of {c.samples} unseen samples above {b.metric}{limit} (mean {c.mean:.2e}, "
                f"worst {c.worst:.2e}): with confidence {1 - c.delta:.0%}, at most {1 - b.share:.0%} of inputs like "
                "them are above"
            )
        lines.append(f"holds for {self.lengths[0]} to {self.lengths[1]} keys; elsewhere the model runs exact")
        return lines

    def __str__(self) -> str:
        return "\n".join(self.summary())

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all. Raises PlanError."""
        path = Path(path)
        text = msgspec.json.format(msgspec.json.encode(self), indent=1)
        part: str | None = None
        try:
            descriptor, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            with os.fdopen(descriptor, "wb") as file:
                file.write(text)
            Path(part).chmod(0o644)
            Path(part).replace(path)
        except OSError as error:
            if part is not None:
                Path(part).unlink(missing_ok=True)
            raise PlanError(f"{path}: the plan cannot be written ({error.strerror or error})") from error


@lru_cache(maxsize=1024)
def policy_of(form: str) -> Policy:
    """The policy that a form names. Raises PlanError."""
    try:
        found = parse_pipeline(form)
    except ValueError as error:
        raise PlanError(f"a plan names the form {form!r}: {error}") from error
    if len(found) != 1 or not hasattr(found[0], "keep"):
        raise PlanError(f"a plan names the form {form!r}, which is not a single policy")
    return cast(Policy, found[0])


def load(path: str | Path) -> Plan:
    """The plan in a file. Raises PlanError in one line that names the file and what is wrong with it."""
    path = Path(path)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise PlanError(f"{path}: over {MOST_BYTES >> 20} MiB, too large for a plan of attncc")
        raw = path.read_bytes()
    except OSError as error:
        raise PlanError(f"{path}: the plan cannot be read ({error.strerror or error})") from error
    return read(raw, str(path))


def read(raw: bytes, name: str = "the plan") -> Plan:
    """The plan that some bytes hold. Raises PlanError."""
    try:
        schema = msgspec.json.decode(raw, type=_Head).schema
        if schema != SCHEMA:
            raise PlanError(f"{name}: its schema is {schema}; this version of attncc reads schema {SCHEMA}")
        return verify_plan(msgspec.json.decode(raw, type=Plan), name)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise PlanError(f"{name}: not a plan of attncc ({str(error).splitlines()[0]})") from error


class _Head(msgspec.Struct):
    schema: int


def verify_plan(plan: Plan, name: str = "the plan") -> Plan:
    """`plan` itself if it means something. Raises PlanError."""

    def require(true: bool, message: str) -> None:
        if not true:
            raise PlanError(f"{name}: {message}")

    seen: set[Key] = set()
    require(0 < plan.lengths[0] <= plan.lengths[1], "its lengths are not from a smaller one to a larger one")
    require(0 < plan.budget.share < 1, f"a budget holds for a share between 0 and 1 of inputs, not {plan.budget.share}")
    for s in plan.sites:
        where = f"site {s.path or '(top level)'}"
        require(s.key not in seen, f"{where} is planned twice")
        seen.add(s.key)
        require(s.bound is None or s.bound > 0, f"{where}: the bound of its guard is above 0")
        require(0 < s.keys[0] <= s.keys[1] and s.heads > 0, f"{where} has no heads, or no range of keys")
        taken = [h for r in s.rules for h in r.heads]
        require(len({*taken}) == len(taken), f"{where}: a head takes two forms")
        require(all(0 <= h < s.heads for h in taken), f"{where} has {s.heads} heads, its rules speak of others")
        for r in s.rules:
            require(0 <= r.density <= 1, f"{where}: {r.form} keeps a share between 0 and 1 of the keys")
            try:
                policy_of(r.form)
            except PlanError as error:
                raise PlanError(f"{name}: {where}: {error}") from error
    return plan

