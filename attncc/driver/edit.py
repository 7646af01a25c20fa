"""Editing the Dynamo graph: a fused node takes the place of the product with the values, and what it made idle goes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import fx

from attncc import torch_private
from attncc.driver.caches import Caches
from attncc.driver.capture import Reading
from attncc.driver.leftovers import Leftovers
from attncc.driver.lowering import lower
from attncc.driver.site_groups import sources
from attncc.driver.size_nodes import SizeNodes, example_of
from attncc.errors import EditError
from attncc.ir import Expr, Program
from attncc.ir.reasons import Reason, because
from attncc.patterns.graph.facts import Facts
from attncc.patterns.graph.operators import argument, written_args
from attncc.patterns.site.program import SiteProgram
from attncc.patterns.softmax.anchors import SDPA
from attncc.patterns.softmax.flex import FLEX
from attncc.torch_private.examples import give_examples
from attncc.torch_private.state import without_autocast

_COPIED = ("nn_module_stack", "stack_trace", "source_fn_stack")


class Editor:
    """Edits a copy of a Dynamo graph. Every change keeps it runnable; `finish` checks it."""

    def __init__(self, reading: Reading, facts: Facts, *, inner: bool = False) -> None:
        """`inner`: the graph is run by an operator of another, and not called with what it is given."""
        self.reading, self.facts = reading, facts
        self.graph = reading.graph
        self.order = {n: at for at, n in enumerate(self.graph.nodes)}
        self.copies: dict[fx.Node, fx.Node] = {}
        self.taken: dict[fx.Node, fx.Node] = {}  # what was replaced, by what
        self.sizes = SizeNodes(reading, facts, self.order)
        self.caches = Caches(facts, self.graph, self._node, inner)
        owner = reading.owner
        acts = [s for s in reading.shadow.graph.nodes if s in owner and _acts(s)]
        self.effects = {owner[s] for s in acts}
        self.writes = self.effects - {owner[s] for s in acts if written_args(s) != [*s.args[:1]] or _is_random(s)}
        self.idle = Leftovers(self.graph, self.effects, self.writes)

    def put(
        self, site: SiteProgram, final: Program, called: Callable[[fx.Node], object] = lambda n: None
    ) -> Reason | None:
        """Put a program in the place of the nodes whose values it gives; `final` is that of `site` after the passes.
        `called` sees each call of the operator. Returns why boxes of its keys are made anew in each call, where they
        are.

        Raises EditError where the graph cannot hold it."""
        placed = [self.place(n) for n in site.outputs]
        target = placed[0]
        given = sources(site.inputs, self.facts)
        if any(self._node(n)._erased for n in given):
            raise EditError(because("graph-taken"))
        if site.in_pieces:  # what is computed from the first products moves behind the last
            at = max(placed, key=self.position)
            self._move_behind(placed, at, because("graph-nested-product"))
        else:
            at = min(placed, key=self.position)
            if at is not target and any(self.position(self._node(n)) > self.position(at) for n in given):
                at = target  # what is computed from the sums of the rows moves behind it
                self._move_behind(placed, at, because("graph-sums-in-values"))
        with self.graph.inserting_before(at), self._as_given(self.facts.value(site.outputs[0]).device):
            every = zip(site.inputs, site.dtypes, site.stopped, strict=True)
            inputs = [self._cast(self._read(n, stopped=stopped), n, dtype) for n, dtype, stopped in every]
            sizes = [self.sizes.of(x, target) for x in site.sizes]
            examples = [example_of(x) for x in sizes]
            kept, reason = self.caches.beside(site, final)
            made = lower(final, self.graph, inputs, sizes, examples, partial(_called, target, called), kept)
        for n, old, new in zip(site.outputs, placed, made, strict=True):
            self.replace(old, self._own(n, new, at))
        return reason

    def _own(self, shadow: fx.Node, made: fx.Node, before: fx.Node) -> fx.Node:
        """A copy of a result that the model writes to, where its gradients need it as it was."""
        if self.facts.gradients is None or shadow in self.facts.unwritten:
            return made
        with self.graph.inserting_before(before):
            return self.graph.call_function(torch.ops.aten.clone.default, (made,))

    def put_nodes(
        self, results: Sequence[fx.Node], tensors: Sequence[fx.Node], sizes: Sequence[Expr],
        make: Callable[[list[fx.Node], list[int | fx.Node]], Sequence[fx.Node]],
    ) -> None:  # fmt: skip
        """Put what `make` makes of the nodes of some tensors and sizes in the place of `results`.

        Raises EditError where the graph cannot hold it."""
        placed = [self.place(n) for n in results]
        given = [self._node(n) for n in tensors]
        at = min(placed, key=self.position)
        if any(n._erased or self.position(n) >= self.position(at) for n in given):
            raise EditError(because("graph-taken"))
        with self.graph.inserting_before(at), self._as_given(self.facts.value(results[0]).device):
            made = make(given, [self.sizes.of(x, at) for x in sizes])
        for old, new in zip(placed, made, strict=True):
            self.replace(old, new)

    def _read(self, shadow: fx.Node, *, stopped: bool) -> fx.Node:
        """The node that a tensor is read from, detached where the model stops its gradients."""
        n = self._node(shadow)
        return self.graph.call_function(torch.ops.aten.detach.default, (n,)) if stopped else n

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Put `new` in the place of `old`, which goes with what only it used."""
        _marked(old, new)
        new.meta["example_value"] = old.meta.get("example_value")
        old.replace_all_uses_with(new)
        self.taken[old], self.order[new] = new, self.position(old)
        self.idle.remove(old)

    def position(self, n: fx.Node) -> int:
        return self.order.get(n, len(self.order))

    def _move_behind(self, targets: Sequence[fx.Node], last: fx.Node, cyclic: Reason) -> None:
        """Move what is computed from the products, or the sums of the rows, before the last of them behind it. Nothing
        may write in between, but to what moves itself: every view of that moves with it. `cyclic` is the reason where
        the last needs the first."""
        nodes = list(self.graph.nodes)
        between = nodes[nodes.index(min(targets, key=self.position)) : nodes.index(last)]
        moved: dict[fx.Node, None] = dict.fromkeys(n for n in targets if n is not last)
        for n in between:
            if n in self.effects and not (n in self.writes and n.args[0] in moved):
                raise EditError(because("graph-writes-between"))
            if n not in moved and any(a in moved for a in n.all_input_nodes):
                moved[n] = None
        if any(a in moved for a in last.all_input_nodes):
            raise EditError(cyclic)
        at = last
        for n in moved:
            if n not in targets:
                at.append(n)
                at = n

    def finish(self) -> fx.Graph:
        self.idle.drop_unread()
        self.idle.drop_empty_vmaps()
        self.graph.lint()
        give_examples(self.graph)
        return self.graph

    def place(self, shadow: fx.Node) -> fx.Node:
        """The Dynamo node for a shadow node, its composite owner expanded if need be."""
        node = self._node(shadow)
        if node._erased or node in self.taken.values():
            raise EditError(because("graph-place-taken"))
        return node

    def _node(self, shadow: fx.Node) -> fx.Node:
        """The node of the edited graph that holds a shadow node's value."""
        found = self.copies.get(shadow) or self.reading.origin.get(shadow)
        written = [x for x in written_args(shadow) if x is shadow.args[0]]
        if found is None and written:  # `x[at] = y` results in what it wrote to
            return self._node(written[0])
        if found is None and shadow in self.facts.made:
            found = self.copies[shadow] = self._made(shadow)
        if found is None:
            owner = self.reading.owner.get(shadow)
            if owner is None or shadow.op == "get_attr":
                raise EditError(because("graph-no-node", shadow.name))
            kept = self._written(shadow, owner)
            if kept is not None:
                return self._node(kept)
            self._expand(owner)
            found = self.copies.get(shadow)
        if found is None:
            raise EditError(because("graph-no-node", shadow.name))
        return self.taken.get(found, found)

    def _written(self, shadow: fx.Node, owner: fx.Node) -> fx.Node | None:
        """What an assignment (`x[i] = y`) wrote to: it has no result of its own, and its tensor is the trace's."""
        given = written_args(shadow)
        if owner.target is not operator.setitem or len(given) != 1:
            return None
        before, after = self.facts.value(given[0]), self.facts.value(shadow)
        same = before.shape == after.shape and before.stride() == after.stride()
        return given[0] if same and self.facts.aliases(given[0], shadow) else None

    def _made(self, shadow: fx.Node) -> fx.Node:
        """A node that the captured graph has not: behind its inputs where nothing writes to them, as several sites may
        read it."""
        inputs = [self._node(x) for x in shadow.all_input_nodes]
        value = self.facts.value(shadow)
        device = value.device if isinstance(value, torch.Tensor) else None
        if not all(x in self.facts.unwritten for x in sources([shadow], self.facts)):
            with self._as_given(device):
                return self.graph.node_copy(shadow, self._node)
        given = [n for n in self.graph.nodes if n.op == "placeholder"]
        place = max([*given[-1:], *inputs]).next
        wanted = self.facts.gradients is not None and not self._without_gradients(shadow)
        while wanted and place in self.reading.off:  # its gradients would be lost
            place = place.next
        with self.graph.inserting_before(place), self._as_given(device):
            return self.graph.node_copy(shadow, self._node)

    def _without_gradients(self, shadow: fx.Node) -> bool:
        """Whether a made node is for one site alone, which is itself where gradients are off."""
        use = self.facts.order[shadow]
        alone = use < len(self.facts.nodes) and not self.facts.is_shared(shadow)
        return alone and self.facts.nodes[use] in self.reading.off

    @contextmanager
    def _as_given(self, device: torch.device | None) -> Iterator[None]:
        """Nodes that are made inside compute in the dtypes that they are given, whether or not autocast is on there; a
        size has no device and no such dtype."""
        if device is None or not self.reading.autocasts:
            yield
            return
        kind, call = device.type, self.graph.call_function
        region = call(torch_private.ENTER_AUTOCAST, (kind, torch.get_autocast_dtype(kind), False, True))
        with without_autocast():
            yield
        call(torch_private.EXIT_AUTOCAST, (region,))

    def _held(self, shadow: fx.Node, before: fx.Node) -> int | fx.Node:
        """The same for tensors and sizes: a size that no node of Dynamo's holds is computed."""
        value = self.facts.value(shadow)
        if isinstance(value, torch.SymInt) and shadow not in self.copies and shadow not in self.reading.origin:
            return self.sizes.of(self.facts.size(value), before)
        return self._node(shadow)

    def _expand(self, owner: fx.Node) -> None:
        """Put the ATen ops of a composite call (multi_head_attention_forward) in its place."""
        parts = [n for n, o in self.reading.owner.items() if o is owner and n.op == "call_function"]
        results = self.reading.results.get(owner)
        if not parts or not self._writes_own(parts):
            raise EditError(because("graph-composite", owner.name))
        with self.graph.inserting_before(owner):
            for n in parts:
                self.copies[n] = self.graph.node_copy(n, lambda x: self._held(x, owner))  # type: ignore[arg-type]
                if n.target is torch.ops.aten.view.default:  # a fused part may lie otherwise than what it replaces
                    self.copies[n].target = torch.ops.aten.reshape.default
                self.copies[n].meta.update({k: owner.meta[k] for k in _COPIED if k in owner.meta})
                if written_args(n):
                    self.effects.add(self.copies[n])
                    self.writes.add(self.copies[n])
        if results is None:
            last = next(s for s, o in self.reading.origin.items() if o is owner)
            owner.replace_all_uses_with(self.copies[last])
        else:
            for user in list(owner.users):
                if user.target is not operator.getitem:
                    raise EditError(because("graph-used-whole", owner.name))
                part = results[user.args[1]]
                if part is not None:
                    made = self.copies[part] if part in self.copies else self._node(part)
                    user.replace_all_uses_with(made)
                    if self.reading.origin.get(part) is user:
                        self.reading.origin[part] = made
                if not user.users:
                    self.graph.erase_node(user)
        if not owner.users:
            self.graph.erase_node(owner)

    def _writes_own(self, parts: Sequence[fx.Node]) -> bool:
        """Whether nodes write to nothing but what they make themselves."""
        inside = set(parts)
        given = {self.facts.storage(a) for n in parts for a in n.all_input_nodes if a not in inside}
        return all(self.facts.storage(x) not in given | {None} for n in parts for x in written_args(n))

    def _cast(self, n: fx.Node, shadow: fx.Node, dtype: torch.dtype) -> fx.Node:
        return n if self.facts.dtype(shadow) == dtype else self.graph.call_function(torch.ops.aten.to.dtype, (n, dtype))


def _called(like: fx.Node, seen: Callable[[fx.Node], object], call: fx.Node) -> None:
    _marked(like, call)
    seen(call)


def _marked(like: fx.Node, call: fx.Node) -> None:
    """Let a call say that it comes from where another node does."""
    call.meta.update({k: like.meta[k] for k in _COPIED if k in like.meta})


def _acts(n: fx.Node) -> bool:
    target = n.target
    if not isinstance(target, torch._ops.OpOverload):
        return n.op == "call_function" and target is not FLEX and getattr(target, "__name__", "") != "getitem"
    if target is torch.ops.aten.dropout.default and (not argument(n, "train") or argument(n, "p") == 0.0):
        return False
    if target is SDPA and argument(n, "dropout_p") == 0.0:
        return False
    return bool(written_args(n)) or _is_random(n)


def _is_random(n: fx.Node) -> bool:
    return isinstance(n.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in n.target.tags


def source_text(graph: fx.Graph) -> str:
    """A graph as readable Python."""
    return graph.python_code("self").src.strip()
