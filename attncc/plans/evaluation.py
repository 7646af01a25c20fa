"""Running a model exact and under plans, on the same input: a plan is followed without compiling the model anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attncc.driver.guarding import measured
from attncc.errors import PlanError
from attncc.ir import Program
from attncc.ir.reasons import Reason
from attncc.plans.plan import Key, SitePlan
from attncc.plans.tapping import Seen, in_forms

#: What a plan says of each site.
Sites = Mapping[Key, SitePlan]


@dataclass
class UnderPlan:
    """A `Watcher` under which attentions take the forms of `sites`, where those mean something, as they will in a
    compiled model; exact while that is None. While `measuring`, `worst` is the largest error of each site's output, by
    the sites of the plan, as its guard would see it; `calls` decides which rows that looks at."""

    sites: Sites | None = None
    measuring: bool = False
    worst: dict[int, dict[Key, float]] = field(default_factory=dict)
    calls: int = 0

    def form(self, seen: Seen) -> Program | None:
        planned = None if self.sites is None else self.sites.get(seen.key)
        if planned is None or not planned.sparse:
            return None
        made = in_forms(seen.program, planned.forms())
        return None if isinstance(made, Reason) else made

    def gave(self, seen: Seen, out: torch.Tensor) -> None:
        exact = in_forms(seen.program, ())
        if not self.measuring or isinstance(exact, Reason):
            return
        self.calls += 1
        error = measured(exact, seen.values, seen.sizes, out, self.calls)
        if error is not None:
            own = self.worst.setdefault(id(self.sites), {})
            own[seen.key] = max(own.get(seen.key, 0.0), error)

    def backward(self, seen: Seen, out: torch.Tensor, gradient: torch.Tensor) -> None:
        pass


@dataclass
class Evaluator:
    """`run(inputs)` is the model under `watcher`; `loss(exact, planned, inputs)` compares two outputs."""

    run: Callable[[Any], torch.Tensor]
    loss: Callable[[torch.Tensor, torch.Tensor, Any], float]
    watcher: UnderPlan

    def losses(self, inputs: Any, plans: Sequence[Sites]) -> list[float]:
        """The loss of one sample under each of some plans. Raises PlanError for one that is no number."""
        found: list[float] = []
        with torch.no_grad():
            self.watcher.sites = None
            exact = self.run(inputs)
            for sites in plans:
                self.watcher.sites = sites
                try:
                    loss = self.loss(exact, self.run(inputs), inputs)
                finally:
                    self.watcher.sites = None
                if not loss == loss:
                    raise PlanError("the loss of a sample is not a number: the model gives NaN or infinity on it")
                found.append(loss)
        return found


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """The model on one element of the data: a mapping is keyword arguments, a tuple or list arguments, a tensor one."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)
