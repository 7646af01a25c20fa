"""The options and the mode of `torch.compile(..., backend="attncc")`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attncc import torch_private

if TYPE_CHECKING:
    from attncc.plans.plan import Plan


@dataclass(frozen=True)
class Options:
    """Whether Inductor compiles the edited graph, whether kernels are measured, the plan to follow, Inductor's own
    configuration, and whether the plan's calls are guarded."""

    inductor: bool = True
    measure: bool = True
    plan: Plan | None = None
    config: dict[str, Any] = field(default_factory=dict)
    guard: bool = False


_FLAGS = ("inductor", "measure", "guard")
_OWN = (*_FLAGS, "plan")


def options_of(mode: str | None, options: Mapping[str, Any] | None) -> Options:
    """The options that a user gave. Raises RuntimeError, in one line that names the right ones, where there is no such
    mode or option."""
    given = {str(name).replace("-", "_"): value for name, value in (options or {}).items()}
    own = {name: given.pop(name) for name in _OWN if name in given}
    plan = _plan_of(own.pop("plan", None))
    for name, value in own.items():
        if not isinstance(value, bool):
            raise RuntimeError(f"attncc: the option {name!r} is True or False, not {value!r}")
    if own.get("guard") and plan is None:
        raise RuntimeError("attncc: the option 'guard' needs a plan, whose calls it looks at")
    known = [*_OWN, *torch_private.inductor_options()] if given else []
    for name in given:
        if name not in known:
            raise RuntimeError(
                f"attncc: there is no option {name!r}{_nearest(name, known)}; the options are {_listed(_OWN)} and the"
                " entries of torch._inductor.config"
            )
    return Options(**own, plan=plan, config={**_of_mode(mode), **given})


def _plan_of(value: object) -> Plan | None:
    """The plan that was given, or that lies in the file that was. Raises PlanError; RuntimeError for another value."""
    if value is None:
        return None
    from attncc.plans.plan import Plan, load  # noqa: PLC0415 msgspec is loaded where there is a plan

    if isinstance(value, Plan):
        return value
    if isinstance(value, str | Path):
        return load(value)
    raise RuntimeError(f"attncc: the option 'plan' is a plan or the path of a file, not {type(value).__name__}")


def _of_mode(mode: str | None) -> dict[str, Any]:
    if mode is None or mode == "default":
        return {}
    modes = torch_private.inductor_modes()
    if mode not in modes:
        raise RuntimeError(f"attncc: there is no mode {mode!r}{_nearest(mode, modes)}; the modes are {_listed(modes)}")
    return modes[mode]


def _nearest(name: object, known: Iterable[str]) -> str:
    found = get_close_matches(str(name), list(known), 1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
