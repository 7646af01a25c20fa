"""What forms cost, in milliseconds on this machine and the model's own tensors, selection included; what they keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from attncc.driver.planning import is_closed
from attncc.driver.running import compiled, run
from attncc.errors import log
from attncc.ir import Attention, Program
from attncc.ir.evaluate import int_value
from attncc.ir.reasons import Reason
from attncc.passes.bounds.area import mask_at
from attncc.passes.policies.hiding import Form
from attncc.plans.plan import Key, policy_of
from attncc.plans.tapping import Seen, in_forms
from attncc.progress import step
from attncc.runtime.measure import compare, sampler_for

#: Seconds that the forms of one attention are timed for.
BUDGET_S = 0.3
#: Rows of an attention that its density is counted on.
_ROWS = 64

#: The forms of an attention's heads.
Forms = tuple[Form, ...]


@dataclass
class Costs:
    """A `Watcher` of one exact run without gradients. `ms` and `density` are by site and form (by its text), the exact
    form under `""`; forms that cannot run, or mean nothing, are left out."""

    forms: Sequence[str]
    ms: dict[Key, dict[str, float]] = field(default_factory=dict)
    density: dict[Key, dict[str, float]] = field(default_factory=dict)
    _closed: dict[object, dict[str, float]] = field(default_factory=dict)
    _made: dict[object, Call] = field(default_factory=dict)

    def form(self, seen: Seen) -> Program | None:
        if seen.key not in self.ms:
            forms: dict[str, Forms] = {text: (Form(policy_of(text)),) for text in self.forms}
            closed = {text: each for text, each in forms.items() if is_closed(each[0].policy)}
            alike = kind_of_call(seen), in_forms(seen.program, ())
            if alike not in self._closed:  # forms that go by positions alone cost every layer the same
                self._closed[alike] = timed(seen, {"": (), **closed}, self._made)
            ms = self._closed[alike]
            selected = {text: each for text, each in forms.items() if text not in closed}
            if selected:
                found = timed(seen, {"": (), **selected}, self._made)
                ms = ms | {text: t * ms[""] / found[""] for text, t in found.items() if text}
            self.ms[seen.key] = ms
            self.density[seen.key] = {text: density(seen, forms[text]) for text in ms if text}
        return None

    def gave(self, seen: Seen, out: torch.Tensor) -> None:
        pass

    def backward(self, seen: Seen, out: torch.Tensor, gradient: torch.Tensor) -> None:
        pass


#: A program that is compiled, to be called with tensors by name.
Call = Callable[[Mapping[str, torch.Tensor]], object]


def kind_of_call(seen: Seen) -> object:
    """What the tensors and sizes of a call have in common with those of other layers."""
    tensors = sorted((name, tuple(x.shape), str(x.dtype), x.stride()) for name, x in seen.values.items())
    return tuple(tensors), tuple(sorted((repr(s), n) for s, n in seen.sizes.items()))


def timed(seen: Seen, forms: Mapping[str, Forms], made: dict[object, Call]) -> dict[str, float]:
    """Milliseconds of a call in each of some forms; those that mean nothing, or do not compile, are left out. `made`
    remembers what was compiled."""
    calls: dict[str, Callable[[], object]] = {}
    for name, each in forms.items():
        p = in_forms(seen.program, each)
        if isinstance(p, Reason):
            continue
        caches = _caches(seen)
        key = p, kind_of_call(seen), caches
        if key not in made:
            step(f"compiling {name or 'the exact form'} of {seen.site.path or 'the attention'}")
            try:
                made[key] = compiled(p, seen.values, seen.sizes, caches)
            except Exception as error:  # a form that Inductor cannot compile is no candidate
                log.warning("the form %s does not compile: %s", name, error)
                continue
        calls[name] = partial(made[key], seen.values)
    step(f"measuring {seen.site.path or 'the attention'}")
    device = next(iter(seen.values.values())).device
    return {name: us / 1e3 for name, us in compare(calls, BUDGET_S, sampler_for(device)).us.items()}


def _caches(seen: Seen) -> tuple[str, ...]:
    """The input of a program that its attention's keys are, where boxes can be kept beside those."""
    step = next(s for s in seen.program.steps if isinstance(s.node, Attention))
    a = step.node
    assert isinstance(a, Attention)
    name = step.arguments[[t.name for t in a.tensors].index(a.k.tensor)]
    return (name,) if seen.site.cached and name in {t.name for t in seen.program.inputs} else ()


def density(seen: Seen, forms: Forms) -> float:
    """The share of the visible keys that forms keep, over some rows of all heads."""
    made = in_forms(seen.program, forms)
    if isinstance(made, Reason):
        return float("nan")
    kept, visible = _counted(made, seen), _counted(seen.program, seen)
    return kept / visible if visible else 1.0


def _counted(p: Program, seen: Seen) -> int:
    """How many pairs the mask of a program's attention lets through, on some rows."""
    at = next(n for n, step in enumerate(p.steps) if isinstance(step.node, Attention))
    last = p.steps[at]
    a = last.node
    assert isinstance(a, Attention)
    before = replace(p, steps=p.steps[:at], outputs=tuple(dict.fromkeys(last.arguments)))
    values = dict(zip(before.outputs, run(before, seen.values, seen.sizes), strict=True))
    tensors = {t.name: values[name] for t, name in zip(a.tensors, last.arguments, strict=True)}
    table = dict(zip(a.sizes, (int_value(x, seen.sizes) for x in last.sizes), strict=True))
    device = next(iter(tensors.values())).device
    rows, keys = (int_value(x.extent, {**table}) for x in (a.i, a.j))
    some = torch.linspace(0, rows - 1, min(rows, _ROWS), device=device).long()
    counts = [int_value(x.extent, {**table}) for x in a.batch]
    every = torch.arange(keys, device=device)
    return int(mask_at(a, a.mask, {**table}, tensors, a.batch, counts, some, every).sum())
