"""What a form does beside hiding keys: it gives rows keys of another kind, in the same softmax, or changes the output.

    out  =  after( merge of attention(q, k, v | keep) and attention(q, k', v' | mask') )       by the sums of rows

A policy that hides keys has a method `keep`; one that does more has `parts` as well, which says all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from attncc.ir import Access, Attention, Axis, Correct, Expr, Load, Node, Size, Step, Tensor
from attncc.ir.attention import W, fresh_name
from attncc.ir.build import and_, where
from attncc.ir.expr import free, loads
from attncc.ir.merge import merge_of
from attncc.ir.reasons import Reason, because

#: The output at (batch, i, e), as it is without the change, to what it becomes.
After = Callable[[Expr], Expr]


@dataclass(frozen=True)
class Beside:
    """Keys of another kind, `j` of them: `k` and `v` are read over the batch, `j` and the components of the attention,
    `score` and `mask` over the batch, i and `j`."""

    j: Axis
    k: Access
    v: Access
    score: Expr
    mask: Expr


@dataclass(frozen=True)
class Parts:
    """All of a form: the keys that it keeps, the share of the weights that its kernel may leave out, what it puts
    beside the keys, and what it makes of the output."""

    keep: Expr
    drop: Expr | None = None
    beside: Beside | None = None
    after: After | None = None


class Site(Protocol):
    """The attention that a form is made for, as it grows by what forms read."""

    step: Step
    attention: Attention

    @property
    def sizes(self) -> tuple[Size, ...]: ...

    def passed_on(self, node: Node, results: tuple[str, ...], given: Mapping[str, str]) -> Step:
        """A step of a node whose tensors are the attention's, or by their names values that are `given`."""
        ...

    def read_by(self, node: Attention) -> tuple[Tensor, ...]:
        """The tensors that an attention made of this one needs."""
        ...


def no_joining(a: Attention) -> Reason | None:
    """Why an attention cannot be put together of two, or its output be changed; or None."""
    if a.normalizer != "softmax" or a.weight is not W:
        return because("policy-no-softmax")
    return because("policy-sums-asked") if a.outputs != ("out",) else None


def is_effect(policy: object) -> bool:
    """Whether a policy changes the output on purpose, so that it has no error."""
    return getattr(policy, "intent", "") == "change"


def under(own: Expr, x: Parts) -> Parts:
    """A form for those heads alone of which `own` is true, as far as it is not a matter of keys."""
    beside = None if x.beside is None else replace(x.beside, mask=and_(own, x.beside.mask))
    return replace(x, beside=beside, after=None if x.after is None else _where(own, x.after))


def _where(own: Expr, after: After) -> After:
    return lambda out: where(own, after(out), out)


def joined(
    site: Site, node: Attention, besides: Sequence[Beside], afters: Sequence[After], taken: set[str]
) -> list[Step]:  # fmt: skip
    """`node` and the attentions beside it as one, and the output changed, under the names that the results had. `taken`
    are the names of the program's values, which grow."""

    def name(text: str) -> str:
        made = fresh_name(text, taken)
        taken.add(made)
        return made

    node = replace(node, tensors=site.read_by(node))
    if not besides and not afters:
        return [replace(site.passed_on(node, site.step.results, {}), sizes=site.step.sizes)]
    (result,) = site.step.results  # or the policy does not apply
    steps: list[Step] = []
    out = name(f"{result}_part")
    if besides:
        outs, sums = [out], [name(f"{result}_sums")]
        steps.append(site.passed_on(replace(node, outputs=("out", "lse"), drop=None), (out, sums[0]), {}))
        for beside in besides:
            outs.append(name(f"{result}_part"))
            sums.append(name(f"{result}_sums"))
            steps.append(site.passed_on(_attention(site, node, beside), (outs[-1], sums[-1]), {}))
        out = name(f"{result}_merged") if afters else result
        rows, columns = (*node.batch, node.i), (node.e,)
        merge = merge_of(
            _used(x.extent for x in (*rows, *columns)), rows, columns, len(outs),
            empty=(1.0, *(0.0 for _ in besides)), dtype=node.dtype, weigher=node.compute_dtype,
        )  # fmt: skip
        given = dict(zip((t.name for t in merge.tensors), (*sums, *outs), strict=True))
        steps.append(site.passed_on(merge, (out,), given))
    else:
        steps.append(site.passed_on(node, (out,), {}))
    return [*steps, _changed(site, afters, out, result)] if afters else steps


def _attention(site: Site, node: Attention, beside: Beside) -> Attention:
    """The attention over the keys beside, of the rows of another."""
    made = replace(
        node, j=beside.j, k=beside.k, v=beside.v, score=beside.score, mask=beside.mask, empty="zero", sink=None,
        drop=None, outputs=("out", "lse"), slope=0.0,
    )  # fmt: skip
    tensors = site.read_by(made)
    extents = (*(x.extent for x in made.axes), *(n for t in tensors for n in t.shape))
    used = {s for x in (*made.expressions(), *extents) for s in free(x) if isinstance(s, Size)}
    return replace(made, tensors=tensors, sizes=tuple(s for s in site.sizes if s in used))


def _changed(site: Site, afters: Sequence[After], out: str, result: str) -> Step:
    a = site.attention
    own = fresh_name("x", {x.name for x in (*a.axes, *site.sizes, *a.tensors)})
    value: Expr = Load(own, tuple(x.index for x in a.out_axes), "float")
    for after in afters:
        value = after(value)
    x = Tensor(own, a.dtype, tuple(n.extent for n in a.out_axes))
    names = {n.tensor for n in loads(value)}
    tensors = tuple(t for t in (x, *a.tensors) if t.name in names)
    sizes = _used((*(n.extent for n in a.out_axes), *(n for t in tensors for n in t.shape), value))
    return site.passed_on(Correct(sizes, a.out_axes, tensors, value, a.dtype), (result,), {own: out})


def _used(extents: Iterable[Expr]) -> tuple[Size, ...]:
    found = {s for x in extents for s in free(x) if isinstance(s, Size)}
    return tuple(sorted(found, key=lambda s: s.name))
