"""Hiding keys: the mask of an attention and what policies keep, one policy for all heads or one for each set of them.

    mask  ->  mask and keep(i, j)                                                      one policy for all heads
    mask  ->  mask and (form(h) = 0  or  form(h) = 1 and keep_1(h, i, j)  or ...)      one for each set; form 0 is exact
    drop  ->  eps_1 where form(h) = 1, ..                                   shares of the weights that a kernel chooses
    out   ->  merged with what stands beside the keys, and changed, for the heads of forms that say so        (parts.py)

`form` is read from a table, so that layers whose heads differ in their forms alone run one kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

from attncc.ir import Attention, Axis, Const, Expr, Load, Node, Program, Size, Step, Table, Tensor, kind_of
from attncc.ir.affine import expr, poly
from attncc.ir.attention import fresh_name
from attncc.ir.build import FALSE, TRUE, and_, const, eq, or_, where
from attncc.ir.expr import loads, substitute
from attncc.ir.reasons import Reason, because
from attncc.passes.policies.parts import Parts, joined, under
from attncc.passes.policies.places import Places, ends_of, head_count, heads_of, places
from attncc.passes.protocol import Legality


class Hiding:
    """One attention whose keys are being hidden: `attention` as it grows by what the rules read, `at` the positions of
    its rows and keys, `before` the steps that make what it reads."""

    def __init__(self, step: Step, a: Attention, taken: set[str]) -> None:
        self.step, self.attention = step, a
        self.before: list[Step] = []
        self._own = len(a.tensors)
        self._counts: dict[Size, Expr] = {}
        self._arguments = dict(zip((t.name for t in a.tensors), step.arguments, strict=True))
        self._taken = taken
        self.ends = {name: self.made(node, name) for name, node in ends_of(a).items()}
        self.at: Places | None = places(a, *self.ends.values())

    @property
    def positions(self) -> Places:
        """`at`, for rules that apply only where there are positions."""
        assert self.at is not None  # or the policy does not apply
        return self.at

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Those that a node made before the attention may declare."""
        return (*self.attention.sizes, *self._counts)

    def axis(self, name: str, extent: Expr) -> Axis:
        """An axis for a node made before the attention; an extent that has to be worked out becomes a size."""
        a = self.attention
        taken = {x.name for x in (*a.axes, *a.sizes, *a.tensors, *self._counts)}
        extent = expr(poly(extent))
        if not isinstance(extent, Const | Size):
            known = {value: size for size, value in self._counts.items()}
            if extent not in known:
                known[extent] = Size(fresh_name(f"{name}_count", taken))
                self._counts[known[extent]] = extent
            extent = known[extent]
        return Axis(fresh_name(name, taken), extent)

    def made(self, node: Node, name: str) -> Load:
        """A value of the step's own, made before the attention by a node whose tensors are the attention's, by name:
        as the attention reads it, over the axes of the node that are the attention's as well.

        The first tensor that the node gives counts, and has one dimension per axis of `node.axes`."""
        return self.load(self.step_of(node, name), tuple(x.index for x in getattr(node, "axes", ())))

    def step_of(self, node: Node, name: str) -> str:
        """Adds a step before the attention, whose first result the attention reads; the name that it has there."""
        a = self.attention
        (first, *_) = kind_of(node).gives(node)
        result = fresh_name(name, self._taken)
        self._taken.add(result)
        self.before.append(self.passed_on(node, (result,), {}))
        own = fresh_name(name, {x.name for x in (*a.axes, *a.sizes, *a.tensors, *self._counts)})
        shape = tuple(substitute(n, {**self._counts}) for n in first.shape)
        self.attention = replace(a, tensors=(*a.tensors, replace(first, name=own, shape=shape)))
        self._arguments[own] = result
        return own

    def load(self, name: str, index: tuple[Expr, ...]) -> Load:
        """A load from a tensor that the attention reads."""
        return Load(name, index, self.attention.tensor(name).kind)

    def finish(self, *parts: Parts) -> list[Step]:
        """The steps: what is read, and the attention with the rest of its keys hidden, a share of its weights to be
        left out by its kernel, what stands beside its keys, and its output changed. Only the first of `parts` hides."""
        first, a = parts[0], self.attention
        node = replace(a, mask=and_(a.mask, first.keep), drop=a.drop if first.drop is None else first.drop)
        besides = [x.beside for x in parts if x.beside is not None]
        afters = [x.after for x in parts if x.after is not None]
        made = joined(self, node, besides, afters, self._taken)
        return [*_needed(self.before, [x for step in made for x in step.arguments]), *made]

    def passed_on(self, node: Node, results: tuple[str, ...], given: Mapping[str, str]) -> Step:
        """A step of a node whose tensors are the attention's, or by their names values that are `given`."""
        table: dict[Expr, Expr] = dict(zip(self.attention.sizes, self.step.sizes, strict=True))
        passed = table | {size: substitute(count, table) for size, count in self._counts.items()}
        arguments = tuple(given.get(t.name) or self._arguments[t.name] for t in node.tensors)
        return Step(results, node, arguments, tuple(passed[s] for s in node.sizes))

    def read_by(self, node: Attention) -> tuple[Tensor, ...]:
        """The tensors that an attention made of this one needs: its operands and what its expressions load; of those
        that the model gave all, where it is the attention itself."""
        names = {x.tensor for x in loads(*node.expressions())} | {x.tensor for x in (node.q, node.k, node.v)}
        if (node.k, node.v) == (self.attention.k, self.attention.v):
            names |= {t.name for t in self.attention.tensors[: self._own]}
        return tuple(t for t in self.attention.tensors if t.name in names)


def _needed(steps: Sequence[Step], values: Sequence[str]) -> list[Step]:
    """The steps without those whose results nobody reads."""
    needed, kept = {*values}, list[Step]()
    for step in reversed(steps):
        if needed & {*step.results}:
            kept.insert(0, step)
            needed |= {*step.arguments}
    return kept


class Policy(Protocol):
    """A rule which keys a row keeps of those that the model's own mask leaves it. A frozen dataclass, whose fields are
    its parameters."""

    name: ClassVar[str]
    legality: ClassVar[Legality]

    def applies(self, a: Attention) -> Reason | None:
        """Why the rule means nothing for an attention, or None."""
        ...

    def keep(self, site: Hiding) -> Expr:
        """What the rule keeps, a boolean over the batch, i and j; what it reads is made by `site`."""
        ...


@runtime_checkable
class Dropping(Protocol):
    """A policy that leaves the choice of keys to the kernel, within a share of each row's weights."""

    def drop(self, site: Hiding) -> Expr:
        """The share, a number over the batch."""
        ...


@runtime_checkable
class Composed(Protocol):
    """A policy that does more than to hide keys."""

    def parts(self, site: Hiding) -> Parts:
        """All that it does."""
        ...


@dataclass(frozen=True)
class Form:
    """What some heads of an attention do: `heads` by their numbers, or all where it is None."""

    policy: Policy
    heads: tuple[int, ...] | None = None


def hide(p: Program, *forms: Form) -> Program:
    """The program with keys hidden in each attention that the policies apply to; `p` itself where there is none."""
    if not forms:
        return p
    steps: list[Step] = []
    taken = set(p.values())
    for step in p.steps:
        a = step.node
        hidden = isinstance(a, Attention) and all(misfit(a, form) is None for form in forms)
        steps += _hidden(Hiding(step, a, taken), forms) if hidden and isinstance(a, Attention) else [step]
    return p if steps == list(p.steps) else replace(p, steps=tuple(steps))


def misfit(a: Attention, form: Form) -> Reason | None:
    """Why an attention cannot take a form, or None."""
    if form.heads is not None:
        if not heads_of(a):
            return because("policy-no-heads")
        if any(not 0 <= h < head_count(a) for h in form.heads):
            return because("policy-other-heads", str(head_count(a)), str(max(form.heads)))
    return form.policy.applies(a)


def _hidden(site: Hiding, forms: Sequence[Form]) -> list[Step]:
    if len(forms) == 1 and forms[0].heads is None:
        return site.finish(_parts(forms[0].policy, site))
    a = site.attention
    numbers = _numbers(forms, head_count(a))
    if 0 not in numbers and len(set(numbers)) == 1:
        return site.finish(_parts(forms[numbers[0] - 1].policy, site))
    form = site.made(Table(a.sizes, heads_of(a), a.tensors[:1], numbers), "form")
    kept = eq(form, Const(0)) if 0 in numbers else FALSE
    whole, dropped = True, None
    others: list[Parts] = []
    for number, each in enumerate(forms, 1):
        if number in numbers:
            parts = _parts(each.policy, site)
            own = eq(form, Const(number))
            whole &= parts.keep is TRUE
            kept = or_(kept, and_(own, parts.keep))
            others.append(under(own, parts))
            if parts.drop is not None:
                dropped = where(own, parts.drop, const(0.0) if dropped is None else dropped)
    return site.finish(Parts(TRUE if whole else kept, dropped), *others)


def _parts(policy: Policy, site: Hiding) -> Parts:
    if isinstance(policy, Composed):
        return policy.parts(site)
    return Parts(policy.keep(site), policy.drop(site) if isinstance(policy, Dropping) else None)


def _numbers(forms: Sequence[Form], count: int) -> tuple[int, ...]:
    """The number of the form of each head, from 1; 0 for heads of none."""
    numbers = [0] * count
    for number, form in enumerate(forms, 1):
        heads: Collection[int] = range(count) if form.heads is None else form.heads
        for h in heads:
            numbers[h] = number
    return tuple(numbers)
