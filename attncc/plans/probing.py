"""The error of a form, to first order: what an attention's change does to the model's output, from one backward pass.

    a[s, h, r] = sum_i <g_i, O^r_i - O_i>            g = d<u, f(x)> / dO at site s, O^r the output of form r of head h
    D[s, h, r] = mean of a^2 / (2 T)                 language models: the mean divergence a token, of T tokens
    D[s, h, r] = mean of a^2 / |f(x)|^2              others: the square of the relative error

For language models u is the gradient of log p(y), y drawn from the model's own prediction, so that the mean of a^2 is
the Fisher norm of the change, twice the divergence of the predictions. A prediction that is nearly certain has nearly
no gradient, and would hide that a form destroys what it rests on: every second probe takes the predictions at a higher
temperature, and D is the sum of both divergences. For others u are random signs, of which the mean of <u, d>^2 is
|d|^2. Errors of heads add up, to first order. A head's dropped mass alone is no error: what counts is
the difference between what is kept and what is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attncc.driver.running import run
from attncc.ir import Program
from attncc.ir.reasons import Reason
from attncc.passes.policies.hiding import Form
from attncc.plans.plan import Key, policy_of
from attncc.plans.tapping import Seen, in_forms

#: At which predictions are drawn, in turn.
TEMPERATURES = (1.0, 4.0)


@dataclass
class Probe:
    """Sums of a^2 for each site, form and head, over `count` probes. A `Watcher` of the dense run."""

    forms: Sequence[str]
    squares: dict[Key, torch.Tensor] = field(default_factory=dict)
    misfits: dict[tuple[Key, str], Reason] = field(default_factory=dict)
    count: int = 0
    _now: dict[Key, torch.Tensor] = field(default_factory=dict)

    def form(self, seen: Seen) -> Program | None:
        return None

    def gave(self, seen: Seen, out: torch.Tensor) -> None:
        pass

    def backward(self, seen: Seen, out: torch.Tensor, gradient: torch.Tensor) -> None:
        g, exact = seen.by_head(gradient), seen.by_head(out)
        found = torch.full((len(self.forms), exact.shape[1]), float("nan"), dtype=torch.float64)
        for at, text in enumerate(self.forms):
            made = in_forms(seen.program, (Form(policy_of(text)),))
            if isinstance(made, Reason):
                self.misfits[seen.key, text] = made
                continue
            (other,) = run(made, seen.values, seen.sizes)
            change = seen.by_head(other.view(out.shape)) - exact
            found[at] = (change * g).sum((-1, -2), dtype=torch.float64).sum(0).cpu()
        self._now[seen.key] = self._now.get(seen.key, 0) + found  # a site that a pass meets twice changes both times

    def finish(self, scale: float) -> None:
        """Ends one probe: D gains a^2 times `scale`."""
        for key, a in self._now.items():
            self.squares[key] = self.squares.get(key, torch.zeros_like(a)) + a.square() * scale
        self._now.clear()
        self.count += 1

    def errors(self) -> dict[Key, torch.Tensor]:
        """D, (forms, heads) for each site; NaN where a form means nothing."""
        return {key: x / self.count for key, x in self.squares.items()}


def probe_language(
    logits: torch.Tensor, valid: torch.Tensor | None, generator: torch.Generator, number: int
) -> tuple[Any, float]:
    """(the loss to differentiate, the scale of a^2) for logits (.., vocabulary), `valid` bool (..) where not every
    token counts: y is drawn from the prediction of each token. Probes take turns by their `number`."""
    flat = logits.reshape(-1, logits.shape[-1])
    flat = flat if valid is None else flat[valid.reshape(-1)]
    logs = (flat.float() / TEMPERATURES[number % 2]).log_softmax(-1)
    with torch.no_grad():
        drawn = torch.multinomial(logs.exp(), 1, generator=generator)
    return logs.gather(1, drawn).sum(), 1.0 / max(len(flat), 1)  # half of a^2, for one of two kinds of probe


def probe_values(
    output: torch.Tensor, valid: torch.Tensor | None, generator: torch.Generator, number: int
) -> tuple[Any, float]:
    """The same for any output: random signs over its elements."""
    signs = torch.randint(0, 2, output.shape, generator=generator, device=output.device).to(output.dtype) * 2 - 1
    if valid is not None:
        signs = signs * valid.reshape(valid.shape + (1,) * (output.dim() - valid.dim()))
    norm = (output.detach().double() * signs.double().abs()).square().sum().item()
    return (output * signs).sum(), 1.0 / max(norm, 1e-300)
