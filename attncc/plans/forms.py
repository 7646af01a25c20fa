"""The forms that profiling tries where the user names none."""

from __future__ import annotations

from collections.abc import Iterable

from attncc.errors import PlanError
from attncc.passes.policies.parts import is_effect
from attncc.plans.plan import policy_of

#: From little to much: what a head needs lies between its last keys and all of them.
STANDARD = (
    "streaming{sinks=16,window=64}",
    "streaming{sinks=64,window=128}",
    "streaming{sinks=64,window=256}",
    "streaming{sinks=64,window=512}",
    "streaming{sinks=64,window=1024}",
    "spans{alpha=0,beta=0.25,block=64}",
    "spans{alpha=0,beta=0.5,block=64}",
    "strides{block=64,local=2,stride=8}",
    "strides{block=64,local=4,stride=4}",
    "block-means{rows=64,keys=64,take=fraction,amount=0.125}",
    "block-means{rows=64,keys=64,take=fraction,amount=0.25}",
    "block-means{rows=64,keys=64,take=fraction,amount=0.5}",
    "certified-skip{eps=0.05}",
)


def chosen(forms: Iterable[str] | None) -> tuple[str, ...]:
    """The forms to try, each named once. Raises PlanError for one that there is not, and where there is none."""
    found = STANDARD if forms is None else tuple(dict.fromkeys(forms))
    if not found:
        raise PlanError("name a form to try")
    for text in found:
        try:
            if is_effect(policy_of(text)):
                raise PlanError(f"{text} is an effect, not an approximation: it has no error that a budget could hold")
        except PlanError as error:
            raise PlanError(str(error).removeprefix("a plan names ")) from None
    return found
