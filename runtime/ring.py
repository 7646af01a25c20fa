"""Context parallelism in steps: each process works out its rows over the keys of one process after another.

    out, lse = merge over b of attention(rows, keys and values of process b)         (`attncc.ir.merge`)

In step t a process works over the keys of the one t places before it, while those of the next step are on their way.
Keys that no row of a process sees are not sent to it, and no more than two runs of keys are held at a time. Rows may be
worked out elsewhere than where they lie (`ring_plan`); they are sent there and back.

    ring(Tensor[] tensors, SymInt[] sizes, str spec, str group) -> Tensor[]

`spec` and `sizes` are those of the whole attention; of the tensors, those of queries, keys and values are this
process's parts, others whole. `group` names the processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch

from attncc.ir import Attention, print_attention
from attncc.ir.interpret import extent, size_table
from attncc.ir.merge import interpret_merge
from attncc.runtime.outputs import signature_of
from attncc.runtime.ring_plan import Places, Plan, branch_of, chunks_of, merge_over, places_of, plan_of
from attncc.torch_private.distributed import Messages, group_of

Tensor = torch.Tensor
Named = dict[str, torch.Tensor]
#: (attention, tensors, sizes, chunks, runs) -> pairs that each chunk of rows sees of each run of keys.
Seen = Callable[[Attention, Sequence[Tensor], Sequence[int], int, int], Sequence[Sequence[int]]]
#: From here on the sum of a row does not say what its weights are (`attncc.codegen.torch_backward`).
_ROUGH = 1e3
#: The first tag of gradients of keys, which are on their way beside keys.
_GRADIENTS = 8


def _unknown(*_: object) -> Any:
    raise RuntimeError("`import attncc` installs what attncc::ring needs")


_seen: Seen = _unknown


def install(seen: Seen) -> None:
    """Say how it is found out what rows see."""
    global _seen
    _seen = seen


@dataclass(frozen=True)
class _Site:
    """What is read of a spec once: the attention, and the specs of its branches: over some keys, with and without the
    sink, which counts once; and over all keys."""

    attention: Attention
    places: Places
    first: str
    later: str
    rows: str

    def names(self, *names: str) -> list[int]:
        return [at for at, t in enumerate(self.attention.tensors) if t.name in names]


@lru_cache(maxsize=256)
def _site(spec: str) -> _Site:
    a = signature_of(spec).attention
    places = places_of(a)
    assert places is not None  # who calls the operator has asked
    specs = [print_attention(branch_of(a, places, keys=True, sink=sink)) for sink in (True, False)]
    return _Site(a, places, specs[0], specs[1], print_attention(branch_of(a, places, keys=False)))


class _Call:
    """One call on this process."""

    def __init__(self, tensors: Sequence[Tensor], sizes: Sequence[int], spec: str, group: str) -> None:
        self.site = _site(spec)
        a = self.site.attention
        self.tensors, self.sizes, self.group = list(tensors), list(sizes), group_of(group)
        self.rank, self.count = self.group.rank, self.group.count
        table = size_table(a, sizes)
        self.n, self.m = extent(a.i.extent, table), extent(a.j.extent, table)
        self.own_keys = self.site.names(*self.site.places.keys)
        (self.own_rows,) = self.site.names(self.site.places.q)
        chunks = chunks_of(self.n, self.count)
        self.plan: Plan = plan_of(a, _seen(a, tensors, sizes, chunks, self.count), self.count)
        self.length, self.run = self.n // len(self.plan.owner), self.m // self.count
        self.mine = self.plan.owned(self.rank)

    def given(self, q: Tensor, keys: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of a branch."""
        found = list(self.tensors)
        found[self.own_rows] = q
        for at, x in zip(self.own_keys, keys, strict=True):
            found[at] = x
        return found

    def numbers(self, chunk: int, source: int) -> list[int]:
        """The sizes of a branch."""
        return [*self.sizes, chunk * self.length, self.length, source * self.run, self.run]

    def moved(self, x: Tensor, dim: int) -> dict[int, Tensor]:
        """The chunks of rows that this process works out, of a tensor whose rows lie along `dim`."""
        parts = {n: x.narrow(dim, at * self.length, self.length) for at, n in enumerate(self._lying)}
        shape = [self.length if d == dim else n for d, n in enumerate(x.shape)]
        return self._sent(parts, self.plan.home, lambda chunk: self.plan.owner[chunk], lambda: x.new_empty(shape))

    def back(self, parts: dict[int, Tensor], dim: int) -> Tensor:
        """The rows that lie on this process, of chunks that were worked out by whom `moved` gave them to."""
        like = next(iter(parts.values()))
        owner = self.plan.owner
        found = self._sent(parts, lambda chunk: owner[chunk], self.plan.home, lambda: torch.empty_like(like))
        return torch.cat([found[chunk] for chunk in self._lying], dim)

    @property
    def _lying(self) -> range:
        return range(self.rank * self.plan.per_process, (self.rank + 1) * self.plan.per_process)

    def _sent(
        self, parts: dict[int, Tensor], source: Callable[[int], int], target: Callable[[int], int],
        room: Callable[[], Tensor],
    ) -> dict[int, Tensor]:  # fmt: skip
        messages, found = Messages(self.group), dict[int, Tensor]()
        for chunk in range(len(self.plan.owner)):
            if source(chunk) == target(chunk) == self.rank:
                found[chunk] = parts[chunk]
            elif source(chunk) == self.rank:
                messages.send(parts[chunk].contiguous(), target(chunk), chunk)
            elif target(chunk) == self.rank:
                found[chunk] = messages.receive(room(), source(chunk), chunk)
        messages.wait()
        return found

    def over_keys(self, work: Callable[[int, list[Tensor]], None], after: Callable[[int], None] | None = None) -> None:
        """`work(source, keys)` for the keys of each process that some row here sees; `after(source)` for all. Meanwhile
        those of the next step arrive."""
        own = [self.tensors[at].contiguous() for at in self.own_keys]
        keys = own
        for t in range(self.count):
            source = (self.rank - t) % self.count
            later = self._coming(own, t + 1)
            if self.plan.wants(self.rank, source):
                work(source, keys)
            if after is not None:
                after(source)
            later.wait()
            keys = later.received

    def _coming(self, own: Sequence[Tensor], t: int) -> Messages:
        """This process's keys on their way to the one t places on, and those of the one t places before."""
        messages = Messages(self.group)
        if 0 < t < self.count:
            to, source = (self.rank + t) % self.count, (self.rank - t) % self.count
            if self.plan.wants(to, self.rank):
                for tag, x in enumerate(own):
                    messages.send(x, to, tag)
            if self.plan.wants(self.rank, source):
                for tag, x in enumerate(own):
                    messages.receive(torch.empty_like(x), source, tag)
        return messages.start()


def _run(tensors: list[Tensor], sizes: list[int], spec: str, group: str) -> list[Tensor]:
    call = _Call(tensors, sizes, spec, group)
    site, rows = call.site, call.moved(tensors[call.own_rows], call.site.places.row)
    found: dict[int, Named] = {}
    done = dict.fromkeys(call.mine, 0)

    def work(source: int, keys: list[Tensor]) -> None:
        for chunk in call.mine:
            if call.plan.needs[chunk][source]:
                branch = site.later if done[chunk] else site.first
                made = _attention(call.given(rows[chunk], keys), call.numbers(chunk, source), branch)
                part: Named = dict(zip(signature_of(branch).attention.outputs, made, strict=True))
                found[chunk] = _merged(site.attention, found[chunk], part, done[chunk]) if done[chunk] else part
                done[chunk] += 1

    call.over_keys(work)
    outputs = _fake(tensors, sizes, spec, group)
    for out, name in zip(outputs, site.attention.outputs, strict=True):
        if name not in ("out", "lse") or (name == "lse" and site.attention.normalizer != "softmax"):
            out.zero_()
        else:
            out.copy_(call.back({chunk: x[name] for chunk, x in found.items()}, len(site.attention.batch)))
    return outputs


def _merged(a: Attention, before: Named, part: Named, branches: int) -> Named:
    given = {f"{name}{n}": x for n, made in enumerate((before, part)) for name, x in made.items()}
    if a.normalizer == "softmax":
        blind = [made["lse"] == float("-inf") for made in (before, part)]
        for n in (0, 1):  # NaN for scores of -inf alone, in one branch and not in the other, counts for nothing
            given[f"out{n}"] = given[f"out{n}"].masked_fill((blind[n] & ~blind[1 - n])[..., None], 0.0)
    return interpret_merge(merge_over(a, branches), given)


def _run_backward(
    grads: list[Tensor], tensors: list[Tensor], outputs: list[Tensor], kept: str, sizes: list[int], spec: str,
    wanted: list[bool], group: str,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the `wanted` ones of `tensors`: of parts those of the parts, of whole ones this process's share."""
    call = _Call(tensors, sizes, spec, group)
    site, along = call.site, len(call.site.attention.batch)
    given: Named = dict(zip(site.attention.outputs, grads, strict=True))
    saved = dict(zip(kept.split(","), outputs, strict=True)) if kept else {}
    if site.attention.normalizer == "softmax":
        lse = saved.pop("lse")
        rough = bool((lse.isnan() | (lse.abs() > _ROUGH) & (lse != float("-inf"))).any())
        saved = {"lse": lse, **_kept_for(site, rough=call.group.any(rough), out=saved["out"], given=given)}
    every = {f"grad {name}": x for name, x in given.items()} | saved
    rows = call.moved(tensors[call.own_rows], site.places.row)
    chunks = {name: call.moved(x, along) for name, x in every.items()}
    found = _Gradients(call, wanted)

    def work(source: int, keys: list[Tensor], *, whole: bool = False) -> None:
        for chunk in call.mine:
            if not whole and not call.plan.needs[chunk][source]:
                continue
            branch = site.rows if whole else site.first if source == found.first(chunk) else site.later
            names = signature_of(branch).attention.outputs
            seeds = [chunks[f"grad {name}"][chunk] for name in given if name in names]
            if "lse" in names and "lse" not in given:
                seeds.append(torch.zeros_like(chunks["lse"][chunk]))
            numbers = call.numbers(chunk, source)[: len(call.sizes) + (2 if whole else 4)]
            made = _gradients(
                seeds, call.given(rows[chunk], keys), [chunks[n][chunk] for n in saved], ",".join(saved), numbers,
                branch, wanted,
            )  # fmt: skip
            found.add(chunk, source, made)

    if "delta" in saved or not saved:
        call.over_keys(work, found.send)
        found.settle()
    else:
        keys = [call.group.gathered(tensors[at], site.places.keys[_name(site, at)]) for at in call.own_keys]
        work(call.rank, keys, whole=True)
        found.sum_up()
    return found.result(tensors)


def _name(site: _Site, at: int) -> str:
    return site.attention.tensors[at].name


def _kept_for(site: _Site, *, rough: bool, out: Tensor, given: Named) -> Named:
    """What backward begins with, beside the sums of the rows: what the weights' gradients sum to over all keys. With
    rough sums, a process must have all keys of its rows."""
    if rough:
        return {"out": out}
    delta = (out.to(given["out"].dtype) * given["out"]).sum(-1, dtype=_wide(out))
    return {"delta": delta - given["lse"] if "lse" in given else delta}


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _Gradients:
    """The gradients of one call as they grow: of chunks of rows, of runs of keys, and of tensors that all read."""

    def __init__(self, call: _Call, wanted: Sequence[bool]) -> None:
        self.call = call
        self.at = [n for n, w in enumerate(wanted) if w]
        self.rows: dict[int, Tensor] = {}
        self.keys: dict[int, dict[int, Tensor]] = {}
        self.others: dict[int, Tensor] = {}
        self.coming: Messages | None = None
        self.learned: list[int] = []

    def first(self, chunk: int) -> int:
        """The process whose keys come first for a chunk, and with them its sink."""
        order = [(self.call.rank - t) % self.call.count for t in range(self.call.count)]
        return next(source for source in order if self.call.plan.needs[chunk][source])

    def add(self, chunk: int, source: int, made: Sequence[Tensor]) -> None:
        for at, x in zip(self.at, made, strict=True):
            x = x.to(_wide(x)) if x.is_floating_point() else x
            if at == self.call.own_rows:
                self.rows[chunk] = self.rows[chunk] + x if chunk in self.rows else x
            else:
                into = self.keys.setdefault(source, {}) if at in self.call.own_keys else self.others
                into[at] = into[at] + x if at in into else x

    def send(self, source: int) -> None:
        """Send the gradients of another process's keys to it, and receive those that are for this one."""
        call = self.call
        after = (2 * call.rank - source) % call.count  # who had the keys of this process in this step
        learned = [at for at in call.own_keys if at in self.at]
        if source == call.rank or not learned:
            return
        messages = Messages(call.group)
        for tag, at in enumerate(learned, _GRADIENTS):
            if call.plan.wants(call.rank, source):
                messages.send(self.keys[source][at].contiguous(), source, tag)
            if call.plan.wants(after, call.rank):
                x = call.tensors[at]
                messages.receive(x.new_empty(x.shape, dtype=_wide(x)), after, tag)
        messages.start()
        self.settle()
        self.coming, self.learned = messages, learned
        self.keys.pop(source, None)

    def settle(self) -> None:
        """Add what came of the step before."""
        if self.coming is None:
            return
        self.coming.wait()
        own = self.keys.setdefault(self.call.rank, {})
        for at, x in zip(self.learned, self.coming.received, strict=False):
            own[at] = own[at] + x if at in own else x
        self.coming = None

    def sum_up(self) -> None:
        """Gradients of all keys become those of this process's."""
        own = self.keys.setdefault(self.call.rank, {})
        for at, x in own.items():
            dim = self.call.site.places.keys[_name(self.call.site, at)]
            own[at] = self.call.group.summed(x).narrow(dim, self.call.rank * self.call.run, self.call.run)

    def result(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        call, found = self.call, dict(self.others)
        if call.own_rows in self.at:
            found[call.own_rows] = call.back(self.rows, call.site.places.row)
        found |= self.keys.get(call.rank, {})
        return [
            torch.empty_like(tensors[at]).copy_(found[at]) if at in found else torch.zeros_like(tensors[at])
            for at in self.at
        ]


def _fake(tensors: Sequence[Tensor], sizes: Sequence[int], spec: str, group: str) -> list[Tensor]:
    site = _site(spec)
    rows = tensors[site.names(site.places.q)[0]].shape[site.places.row]
    return signature_of(site.rows).allocate(tensors, [*sizes, 0, rows])


def _fake_backward(
    grads: Sequence[Tensor], tensors: Sequence[Tensor], outputs: Sequence[Tensor], kept: str, sizes: Sequence[int],
    spec: str, wanted: Sequence[bool], group: str,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(t) for t, w in zip(tensors, wanted, strict=True) if w]


_torch_library = cast(Any, torch.library)  # whose functions have partial types
_library = _torch_library.Library("attncc", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_library.define("ring(Tensor[] tensors, SymInt[] sizes, str spec, str group) -> Tensor[]", tags=_TAGS)
_library.define(
    "ring_gradients(Tensor[] grads, Tensor[] tensors, Tensor[] outputs, str kept, SymInt[] sizes, str spec,"
    " bool[] wanted, str group) -> Tensor[]",
    tags=_TAGS,
)
ring: Any = torch.ops.attncc.ring.default
ring_gradients: Any = torch.ops.attncc.ring_gradients.default
_attention: Any = torch.ops.attncc.attention.default
_gradients: Any = torch.ops.attncc.attention_gradients.default
_library.impl("ring", _run, "CompositeExplicitAutograd")
_library.impl("ring_gradients", _run_backward, "CompositeExplicitAutograd")
_torch_library.register_fake(ring, _fake, lib=_library)
_torch_library.register_fake(ring_gradients, _fake_backward, lib=_library)
