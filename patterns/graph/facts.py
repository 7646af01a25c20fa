"""What is known of a normal-form graph's nodes: shapes as expressions, dtypes, aliasing, writes and their times."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, reduce, wraps
from typing import Any, TypeVar, cast

import sympy  # type: ignore[reportMissingTypeStubs]
import torch
from torch import fx

from attncc.ir.affine import divide
from attncc.ir.build import add, const, maximum, minimum, mod, mul
from attncc.ir.evaluate import NAME_OF
from attncc.ir.expr import Expr, Size
from attncc.patterns.graph.gradients import Gradients
from attncc.patterns.graph.operators import MEMORY, formula, hint, is_operator, op_name, storage_id, written_args

Answer = TypeVar("Answer")


class Facts:
    """Facts of one graph, which no question changes. `dtypes` overrides what a node's fake value says (a trace does not
    see autocast regions).

    `graded` are inputs that require gradients, `off` nodes computed while gradients are off; `gradients` is None where
    nobody wants any."""

    def __init__(
        self,
        graph: fx.Graph,
        dtypes: Mapping[fx.Node, torch.dtype] | None = None,
        parameters: frozenset[fx.Node] = frozenset(),
        graded: frozenset[fx.Node] = frozenset(),
        off: frozenset[fx.Node] = frozenset(),
    ) -> None:
        self.graph, self.parameters = graph, parameters
        self.dtypes = dict(dtypes or {})
        self.nodes = tuple(graph.nodes)
        self.order = {n: at for at, n in enumerate(self.nodes)}
        self.by_name = {n.name: n for n in graph.nodes}
        self.symbols: dict[Size, sympy.Expr] = {}
        self._shapes: dict[fx.Node, tuple[Expr, ...]] = {}
        self._hints: dict[Size, int | None] = {}
        self._writes: dict[int, list[tuple[int, fx.Node]]] = defaultdict(list)
        for n in graph.nodes:
            for written in written_args(n):
                storage = self.storage(written)
                if storage is not None:
                    self._writes[storage].append((self.order[n], n))
        self.gradients = Gradients(self.nodes, graded, off, self.storage) if graded else None
        self.live = self._live()
        self.shared: dict[object, Expr] = {}  # what readers found that others need not read again
        self.answers: dict[object, object] = {}  # to what `asked_once` was asked
        self.made: dict[fx.Node, int] = {}  # nodes beside the graph, numbered in the order in which they were made
        self._beside = fx.Graph()
        self.tables = True  # whether a reader may make tables beside the graph: some graphs cannot take what it makes
        self._once: dict[object, fx.Node] = {}  # made for all sites that read the same

    def _live(self) -> frozenset[fx.Node]:
        """Nodes that the output needs, or a write to what is an input or is read; a trace also keeps what the model
        computed and dropped."""
        given = {self.storage(n) for n in self.nodes if n.op in ("placeholder", "get_attr")} | {None}
        live: set[fx.Node] = set()
        stack = [n for n in self.nodes if n.op == "output" or _opaque(n)]
        unread = {s: [n for _, n in writes] for s, writes in self._writes.items()}
        for n in self.nodes:
            if any(self.storage(w) in given for w in written_args(n)):
                stack.append(n)
        while stack:
            n = stack.pop()
            if n not in live:
                live.add(n)
                stack += n.all_input_nodes
                storage = self.storage(n)
                stack += unread.pop(storage, []) if storage is not None else []
        return frozenset(live)

    @cached_property
    def unwritten(self) -> set[fx.Node]:
        """Nodes that are the same whenever they are read: nothing writes to them or to what they are computed from."""
        found: set[fx.Node] = set()
        for n in self.nodes:
            if self._unwritten(n, found):
                found.add(n)
        return found

    def _unwritten(self, n: fx.Node, known: set[fx.Node]) -> bool:
        return self.storage(n) not in self._writes and known.issuperset(n.all_input_nodes)

    def wants_grad(self, use: int) -> bool:
        """Whether gradients are wanted of what the node at a position gives."""
        g = self.gradients if use < len(self.nodes) else None
        return g is not None and g.follows(self.nodes[use], use + 1)

    def make(self, target: Any, args: tuple[Any, ...], at: int, **kwargs: Any) -> fx.Node:
        """A node beside the graph, to be computed just before position `at`: an operand that a kernel needs in another
        form than the model has it. It is no user of the graph's nodes until something is fused that reads it."""
        n = self._beside.create_node("call_function", target, args, kwargs, name=self._fresh_name(target))
        for given in n.all_input_nodes:
            if given not in self.made:
                del given.users[n]
        n.meta["val"] = target(*fx.map_arg(args, self.value), **kwargs)
        for given in n.all_input_nodes:  # a view
            if MEMORY in given.meta and storage_id(self.value(given)) == storage_id(n.meta["val"]):
                n.meta[MEMORY] = given.meta[MEMORY]
        self.order[n], self.by_name[n.name] = at, n
        self.made[n] = len(self.made)
        if self._unwritten(n, self.unwritten):
            self.unwritten.add(n)
        return n

    def make_once(self, key: object, make: Callable[[], fx.Node]) -> fx.Node:
        """The node that `make` made first for a key: all sites that need the same share it."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def is_shared(self, made: fx.Node) -> bool:
        """Whether a node beside the graph is, or is for, one that several sites may read."""
        return made in self._once.values() or any(user in self._once.values() for user in made.users)

    def _fresh_name(self, target: Any) -> str:
        """A name that no node has: loads go by it."""
        wanted = str(target.__name__).replace(".", "_").lower()
        count = 0
        while (name := f"{wanted}_{count}" if count else wanted) in self.by_name:
            count += 1
        return name

    def in_order(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """Nodes of the graph and made ones in an order in which they can be computed."""
        return sorted(nodes, key=lambda n: (self.order[n], n not in self.made, self.made.get(n, 0)))

    def clobbered(self, n: fx.Node, use: int) -> bool:
        """Whether a made node, computed at `use`, holds something else than at its own place: what it is made of is
        written to in between."""
        stack, seen = [n], {n}
        while stack:
            x = stack.pop()
            if x not in self.made and self.writes(x, self.order[n] - 1, use):
                return True
            fresh = [a for a in x.all_input_nodes if x in self.made and a not in seen]
            seen.update(fresh)
            stack += fresh
        return False

    def value(self, n: fx.Node) -> Any:
        return n.meta.get("val")

    def is_tensor(self, n: object) -> bool:
        return isinstance(n, fx.Node) and isinstance(self.value(n), torch.Tensor)

    def is_number(self, n: fx.Node) -> bool:
        """Whether a node holds a size or another number that is not a tensor."""
        return isinstance(self.value(n), torch.SymInt | torch.SymFloat | torch.SymBool)

    def shape(self, n: fx.Node) -> tuple[Expr, ...]:
        found = self._shapes.get(n)
        if found is None:
            found = self._shapes[n] = tuple(self.size(s) for s in self.value(n).shape)
        return found

    def rank(self, n: fx.Node) -> int:
        return self.value(n).dim()

    def dtype(self, n: fx.Node) -> torch.dtype:
        return self.dtypes[n] if n in self.dtypes else self.value(n).dtype

    def dtype_name(self, n: fx.Node) -> str | None:
        """The IR's name of the node's dtype, None where the IR has none (complex, quantised)."""
        return NAME_OF.get(self.dtype(n))

    def size(self, s: object) -> Expr:
        """An integer, a SymInt or a node that holds one, as an expression over sizes."""
        if isinstance(s, fx.Node):
            s = self.value(s)
        if isinstance(s, torch.SymInt):
            return self.integer(formula(s))
        if isinstance(s, bool) or not isinstance(s, int):
            raise TypeError(f"{s!r} is not an integer")
        return const(s)

    def hint(self, size: Size) -> int | None:
        """The value that a size had in the example; None where it had none."""
        if size not in self._hints:
            values = (self.value(n) for n in self.nodes)
            held = (s for v in values for s in (v.shape if isinstance(v, torch.Tensor) else (v,)))
            known = (hint(s) for s in held if isinstance(s, torch.SymInt) and self.size(s) is size)
            self._hints[size] = next((n for n in known if n is not None), None)
        return self._hints[size]

    def integer(self, x: sympy.Expr) -> Expr:
        """A formula over the graph's symbols that is an integer."""
        if x.is_Integer:
            return const(int(x))
        if isinstance(x, sympy.Symbol):
            self.symbols.setdefault(Size(x.name), x)
            return Size(x.name)
        args = [self.integer(a) for a in x.args if isinstance(a, sympy.Expr)]
        fold = {"Add": add, "Mul": mul, "Max": maximum, "Min": minimum}.get(type(x).__name__)
        if fold is not None:
            return reduce(fold, args)
        if type(x).__name__ in ("FloorDiv", "CleanDiv"):
            return divide(args[0], args[1], {})[0]
        if type(x).__name__ in ("Mod", "PythonMod"):
            return mod(*args)
        if isinstance(x, sympy.Pow) and isinstance(x.exp, sympy.Integer) and 0 < int(x.exp) <= 4:
            return reduce(mul, args[:1] * int(x.exp))
        opaque = Size(f"z{len(self.symbols)}")
        known = next((s for s, e in self.symbols.items() if e == x), opaque)
        self.symbols[known] = x
        return known

    def storage(self, n: fx.Node) -> int | None:
        """What nodes that share memory have in common; None for what has no memory of its own to speak of."""
        return n.meta[MEMORY] if MEMORY in n.meta else storage_id(self.value(n))

    def aliases(self, a: fx.Node, b: fx.Node) -> bool:
        found = self.storage(a)
        return found is not None and found == self.storage(b)

    def writes(self, n: fx.Node, after: int, before: int) -> list[fx.Node]:
        """The nodes that write to the storage of `n` strictly between two positions of the graph, in order."""
        storage = self.storage(n)
        return [] if storage is None else [w for at, w in self._writes.get(storage, ()) if after < at < before]


def asked_once(question: Callable[[Facts, fx.Node], Answer]) -> Callable[[Facts, fx.Node], Answer]:
    """A question about a node whose answer is kept with the facts."""

    @wraps(question)
    def answer(f: Facts, n: fx.Node) -> Answer:
        key = question, n
        if key not in f.answers:
            f.answers[key] = question(f, n)
        return cast(Answer, f.answers[key])

    return answer


def _opaque(n: fx.Node) -> bool:
    """Whether a node is no plain operator: it may do anything."""
    return n.op == "call_function" and not is_operator(n) and op_name(n) != "getitem"
