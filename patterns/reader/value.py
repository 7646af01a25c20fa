"""`value_at(node, index)`: what a tensor *is* at an index, as an expression.

Descends from a node through ops that move, compute element by element, or create values, and stops at everything else:
there the result is a `Load` from a tensor that must exist anyway. Loads are named by node; a product of two tensors is
a load named `dot:<node>` so that a caller can recognise it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx

from attncc.ir.affine import linear_in, simplify
from attncc.ir.attention import DTYPES
from attncc.ir.build import FALSE, ONE, ZERO, cast, not_, op, where
from attncc.ir.expr import Const, Expr, Index, Load, Op, Size, free, loads, rewrite, substitute, walk
from attncc.ir.reasons import Reason, because
from attncc.patterns.reader.assumptions import Context, Reach
from attncc.patterns.reader.contractions import DOT, ROUNDED, Contraction, contraction
from attncc.patterns.reader.creation import SOURCES
from attncc.patterns.reader.pointwise import element_rule
from attncc.patterns.reader.ranges import wraps
from attncc.patterns.reader.relative import by_distance
from attncc.patterns.reader.rules import Facts, Gradients, Point, hint, reduction, skip_casts, written_args
from attncc.patterns.reader.stopped import without_stopped
from attncc.patterns.reader.view_ops import move
from attncc.patterns.reader.writes import Place, place

#: Deeper than this an expression is a computation of its own, not a score: it is loaded instead.
_MAX_NODES = 400
#: A formula of more nodes than this is a computation of its own; a table of more elements than this is no small one.
_LONG, _TABLE = 24, 1 << 22
#: What gives a tensor whose elements nobody has set: they may be taken for anything.
_UNSET = {
    getattr(torch.ops.aten, name).default for name in ("new_empty", "empty_like", "new_empty_strided", "empty_strided")
} | {torch.ops.aten.empty.memory_format}
#: Operations of places: shifted, reversed, taken apart and put together.
_PLACES = frozenset({"add", "sub", "mul", "neg", "floordiv", "mod"})
_COSTLY = frozenset({"exp", "log", "log1p", "tanh", "sigmoid", "pow", "erf", "sqrt", "rsqrt", "sin", "cos"})


@dataclass
class Reader:
    """Reads values for one attention, whose fused kernel will run at position `use` of the graph.

    `extents` bounds every index; `leaves` are nodes to stop at (a softmax, when its consumer is read). `given` says
    what some nodes are: the arguments of a graph of scalars, in which nothing else can be loaded from outside.
    `lost` is the first formula that was not read because an input of it is gone. With `reach`, values are read where
    the conditions of `context` hold, and loads may lie outside of their tensors elsewhere."""

    facts: Facts
    use: int
    extents: dict[Expr, Expr]
    leaves: frozenset[fx.Node] = frozenset()
    pair: frozenset[Expr] = frozenset()
    given: Mapping[fx.Node, Expr] = field(default_factory=dict[fx.Node, Expr])
    lost: Unreadable | None = None
    reach: Reach | None = None
    context: Context = ()
    _memo: dict[tuple[fx.Node, Point, int, Context], Expr] = field(
        default_factory=dict[tuple[fx.Node, Point, int, Context], Expr]
    )

    def value_at(self, n: fx.Node, at: Point, reader: int | None = None) -> Expr:
        """The value of `n` at `at`, as the op at position `reader` of the graph saw it."""
        when = self.use if reader is None else reader
        if self.reach is not None:
            at = tuple(self.reach.simplified(x, self.context) for x in at)
        key = (n, at, when, self.context)
        found = self._memo.get(key)
        if found is None:
            found = self._shared(n, at, when)
            self._memo[key] = found = found if self.reach is None else self.reach.branch(found, self.context)
        return found

    def _shared(self, n: fx.Node, at: Point, when: int) -> Expr:
        """What any reader with the same extents finds, so that layers that share a mask read it once."""
        f = self.facts
        alone = bool(self.given) or self.reach is not None or n not in f.unwritten
        if alone or any(f.order[leaf] <= f.order[n] for leaf in self.leaves):
            return self._read(n, at, when)
        key = (n, at, self.pair, tuple(self.extents.items()), self.gradients is None)
        found = f.shared.get(key)
        if found is None:
            found = f.shared[key] = self._read(n, at, when)
        return found

    def load(self, n: fx.Node, at: Point) -> Load:
        name = self.facts.dtype_name(n)
        if name is None:
            raise Unreadable(n, because("dtype", str(self.facts.dtype(n))))
        return Load(n.name, at, DTYPES[name][0])

    @cached_property
    def gradients(self) -> Gradients | None:
        """What autograd sees of the graph, where gradients are wanted of what the kernel gives."""
        return self.facts.gradients if self.given or self.facts.wants_grad(self.use) else None

    def followed(self, n: fx.Node) -> bool:
        """Whether gradients flow into what an operation gives."""
        return self.gradients is not None and self.gradients.follows(n, self.facts.order[n] + 1)

    def _read(self, n: fx.Node, at: Point, when: int) -> Expr:
        value, g = self._value(n, at, when), self.gradients
        return value if g is None else without_stopped(self, g, n, value, at, when)

    def _value(self, n: fx.Node, at: Point, when: int) -> Expr:
        writes = self.facts.writes(n, self.facts.order[n], when)
        last = writes[-1] if writes else n
        if self.gradients is not None and self.gradients.unseen(n, last):
            raise Unreadable(last, because("written-unseen"))
        if writes:
            return self._after_write(writes[-1], n, at, when)
        if n in self.leaves:
            return self.load(n, at)
        if n in self.given:
            return self.given[n]
        try:
            value = self._compute(n, at, when)
        except Unreadable as error:
            value = None  # an input is gone by then, but this result may still be there
            self.lost = self.lost or error
        if value is None:
            return self.load_later(n, at, when)
        if not self.given and self.reach is None and (self._better_loaded(value) or self._worth_a_table(n, value)):
            table = by_distance(self.facts, n, value, at, self.pair, self.extents)
            return self.load_later(n, at, when) if table is None else table
        return value

    def reduced(self, x: Expr, key: Expr, op: str = "") -> Expr | None:
        """What an element reduces along a dimension, at a key; None where it does not, or by another operation. Of a
        maximum that is asked for by name, copies without its gradients are passed over."""
        n = self.facts.by_name.get(x.tensor.removeprefix(DOT)) if isinstance(x, Load) else None
        bare = skip_casts(n) if op == "max" else n
        same = n is None or bare is None or self.facts.dtype(n) == self.facts.dtype(bare)
        how = reduction(self.facts, bare if same else n)
        if how is None or not isinstance(x, Load) or how.op != (op or how.op):
            return None
        return self.value_at(how.source, how.inside(x.index, key), self.facts.order[how.node])

    def load_later(self, n: fx.Node, at: Point, when: int) -> Expr:
        """A load at `use` of what was read at `when`; a write at `when` itself happened after that read."""
        if self.facts.writes(n, when - 1, self.use):
            raise Unreadable(n, because("written-before"))
        return self.load(n, at)

    def _after_write(self, write: fx.Node, n: fx.Node, at: Point, when: int) -> Expr:
        """The value of a tensor that `write` changed in place: the write's own formula if it covers all of it."""
        target = written_args(write)[0]
        same = target is n or (
            self.facts.value(target).shape == self.facts.value(n).shape
            and self.facts.value(target).stride() == self.facts.value(n).stride()
            and self.facts.value(target).storage_offset() == self.facts.value(n).storage_offset()
        )
        if same and self.facts.is_tensor(write):
            return self.value_at(write, at, self.facts.order[write] + 1)
        paired = bool(self.pair) and self.pair <= frozenset[Expr]().union(*map(free, at))
        value = self._written(write, target, n, at, when) if paired else None
        if value is not None:
            return value
        if any(self.facts.aliases(n, leaf) for leaf in self.leaves):
            raise Unreadable(write, because("weights-written"))
        return self.load_later(n, at, self.facts.order[write] + 1)

    def _written(self, write: fx.Node, target: fx.Node, n: fx.Node, at: Point, when: int) -> Expr | None:
        """The same where the write changed a part, if scores or weights are in it, or it holds an element a pair of
        query and key: what was written there, and what was before elsewhere. None for others, which are loaded."""
        f = self.facts
        moved = move(f, n, at, self.extents, crossing=True)
        try:
            if moved is not None and f.aliases(n, moved[0]):
                value = self.value_at(*moved, when)
            else:
                part = place(f, n, target, at, self.extents) if f.is_tensor(write) else None
                value = None if part is None else self._of_part(write, part, n, at)
        except Unreadable:
            return None
        if value is None or any(self.is_own(x) for x in loads(value)):
            return value
        return value if len(self.pair) > 1 and not isinstance(value, Load) and _is_short(value) else None

    def _of_part(self, write: fx.Node, part: Place, n: fx.Node, at: Point) -> Expr:
        f = self.facts
        when = f.order[write]
        unset = n.target in _UNSET and not f.writes(n, f.order[n], when)
        kind = DTYPES[f.dtype_name(n) or "f32"][0]

        def before() -> Expr:
            return cast(ZERO, kind) if unset else self.value_at(n, at, when)

        def new() -> Expr:
            value = self.value_at(write, part.at, when + 1)
            if self.reach is None and not all(self.is_own(x) for x in loads(value)):
                kept = part.kept(f.shape(write), self.extents)
                value = self._own_unkept(self.value_at(write, kept, when + 1), dict(zip(kept, part.at, strict=True)))
            return cast(value, kind)

        return before() if part.inside is FALSE else self.selected(part.inside, new, before)

    def _own_unkept(self, x: Expr, table: Mapping[Expr, Expr]) -> Expr:
        """An expression whose loads of scores and weights are where they are read without the bounds that `table`
        takes away, so that a product stays one wherever parts of it are written to."""
        table = {kept: at for kept, at in table.items() if kept is not at}

        def own(y: Expr) -> Expr | None:
            if not isinstance(y, Load) or not self.is_own(y):
                return None
            return Load(y.tensor, tuple(simplify(substitute(i, table), self.extents) for i in y.index), y.kind)

        return rewrite(x, own) if table else x

    def selected(self, c: Expr, yes: Callable[[], Expr], no: Callable[[], Expr]) -> Expr:
        """One value where a condition holds, another elsewhere, each read where it is."""
        if self.reach is None:
            return where(c, yes(), no())
        known = self.context
        found: list[Expr] = []
        try:
            for condition, value in ((c, yes), (not_(c), no)):
                self.context = (*known, condition)
                if self.reach.possible(self.context):
                    found.append(value())
        finally:
            self.context = known
        return found[0] if len(found) == 1 or found[0] is found[1] else where(self.reach.needed(c, known), *found)

    def is_own(self, x: Load) -> bool:
        """Whether a load is one of scores or weights, which will not be loaded."""
        return x.tensor.startswith(DOT) or x.tensor in self._leaf_names

    def _compute(self, n: fx.Node, at: Point, when: int) -> Expr | None:
        """The value by the op's rule, None where there is none or it must not be applied."""
        f = self.facts
        if n.op == "get_attr":
            return _constant(f, n)
        if n.op != "call_function" or f.dtype_name(n) is None:
            return None
        moved = move(f, n, at, self.extents, crossing=True)
        if moved is not None:
            source, index = moved
            # A view is read when its own reader runs; a copy was read when it was made.
            view = f.aliases(n, source)
            value = self.value_at(source, index, when if view else f.order[n])
            return None if not view and self._lies_better(value, at) else value
        inputs = [f.dtype(a) for a in n.all_input_nodes if f.is_tensor(a) and f.dtype(a) != torch.bool]
        if f.dtype(n) == torch.float64 and any(dtype != torch.float64 for dtype in inputs):
            return None
        product = contraction(f, n)
        if product is not None:
            spread = self._spread(product, at)
            return product.value(self, at) if spread is None else self._typed(n, spread)
        rule = element_rule(n.target) or SOURCES.get(n.target)
        result = None if rule is None else rule(self, n, at)
        if result is None or not wraps(self, n, result, at):
            return None if result is None else self._typed(n, result)
        if self.given:
            self.lost = self.lost or Unreadable(n, because("score-wraps", str(f.dtype(n))))
        return None

    def _spread(self, product: Contraction, at: Point) -> Expr | None:
        """The other factor of a product of one term a sum whose one factor is all ones: that is how some models bring
        a mask of the keys into the shape of their scores."""
        if product.extent is not ONE or product.bias is not None or product.alpha != 1.0 or self.given:
            return None
        when, one = self.facts.order[product.node], Const(1.0)
        sides = list(zip((product.lhs, product.rhs), product.maps(at, ZERO), strict=True))
        values = [self.value_at(n, x, when) for n, x in sides]
        return values[1] if values[0] is one else values[0] if values[1] is one else None

    def _typed(self, n: fx.Node, x: Expr) -> Expr:
        """`x` as the node's dtype holds it: kinds cast, narrow floats rounded where an op computed something."""
        name = self.facts.dtype_name(n)
        assert name is not None
        x = cast(x, DTYPES[name][0])
        rounding = ROUNDED.get(self.facts.dtype(n))
        if rounding is None or not isinstance(x, Op | Const) or (isinstance(x, Op) and x.name in ("where", rounding)):
            return x
        return round_constant(x, rounding) if isinstance(x, Const) else op(rounding, x)

    def _lies_better(self, value: Expr, at: Point) -> bool:
        """Whether a copy is the better one to read: its last dimension is the last index, its computed source's is not.
        Of scores and weights there is nothing else to read."""
        if not isinstance(value, Load) or self.is_own(value) or not value.index or not at:
            return False
        source = self.facts.by_name[value.tensor]
        computed = source.op == "call_function" and source not in self.facts.made  # a table was made to be read
        if not computed or not isinstance(at[-1], Index):
            return False
        line = linear_in(value.index[-1], at[-1])
        return line is None or line[0] != {(): 1}

    def _better_loaded(self, value: Expr) -> bool:
        """Whether to stop here: the value is small and costs something, so it is computed once and not per pair, or it
        is looked up at a costly index (logarithmic buckets), or at any that data or a choice gives where operators take
        a bias as a whole."""
        if isinstance(value, Load):
            return self._looked_up(value)
        if isinstance(value, Const | Index | Size):
            return False
        count = 0
        costly = floats = False
        indices: set[Expr] = set()
        for x in walk(value):
            count += 1
            if isinstance(x, Index):
                indices.add(x)
            elif isinstance(x, Op) and x.name in _COSTLY:
                costly = True
            elif isinstance(x, Load) and x.kind == "float":
                floats = True
                if self._looked_up(x):
                    return True
        if count > _MAX_NODES:
            return True
        return value.kind == "float" and (costly or floats) and not self.pair <= indices

    def _looked_up(self, x: Load) -> bool:
        """Whether a load is at a costly index, or a chosen one where what is read has to be a tensor as a whole."""
        whole = not self.facts.tables and x.kind == "float"
        return any((isinstance(y, Op) and y.name in _COSTLY) or (whole and _chosen(y)) for y in walk(*x.index))

    def _worth_a_table(self, n: fx.Node, value: Expr) -> bool:
        """Whether to stop at a small tensor that several heads or batches share, because each element is a lookup
        through another tensor or a long formula: the model computes it once, a kernel would for each of them."""
        if value.kind != "float" or isinstance(value, Const) or _is_mask(value):
            return False
        nodes = list(walk(value))
        held = [x for x in nodes if isinstance(x, Load)]
        if any(self.is_own(x) for x in held):
            return False
        indirect = any(isinstance(y, Load) for x in held for y in walk(*x.index))
        shared = any(x not in nodes and size is not ONE for x, size in self.extents.items())
        return shared and (indirect or len(nodes) > _LONG) and self._is_small(n)

    @property
    def _leaf_names(self) -> set[str]:
        return {n.name for n in self.leaves}

    def _is_small(self, n: fx.Node) -> bool:
        count = 1
        for s in self.facts.value(n).shape:
            size = hint(s)
            if size is None:
                return False
            count *= size
        return count <= _TABLE


def _is_short(x: Expr) -> bool:
    return sum(1 for _ in walk(x)) <= _MAX_NODES


def _is_mask(x: Expr) -> bool:
    return isinstance(x, Op) and x.name == "where" and all(isinstance(y, Const) for y in x.args[1:])


class Unreadable(Exception):
    """A value cannot be read where the attention needs it; carries the node and the reason."""

    def __init__(self, node: fx.Node, reason: Reason) -> None:
        super().__init__(str(reason))
        self.node, self.reason = node, reason


def round_constant(x: Const, rounding: str) -> Expr:
    dtype = torch.bfloat16 if rounding == "bf16" else torch.float16
    return Const(float(torch.tensor(x.value, dtype=torch.float64).to(dtype).item()))


def _constant(f: Facts, n: fx.Node) -> Expr | None:
    """A scalar constant that the graph carries; larger ones are tensors like any other."""
    module = f.graph.owning_module
    held = getattr(module, str(n.target), None) if module is not None else None
    value = held if isinstance(held, torch.Tensor) else None
    if value is None or value.numel() != 1 or type(value) not in (torch.Tensor, torch.nn.Parameter):
        return None
    if isinstance(value, torch.nn.Parameter) or f.dtype_name(n) is None:
        return None
    return Const(_shortest(value))


def _shortest(value: torch.Tensor) -> bool | int | float:
    """A scalar, by the fewest digits that its dtype rounds to it: `-1e30` of float32, as where a model writes it, not
    `-1.0000000150474662e+30`."""
    held = value.item()
    if not isinstance(held, float) or not math.isfinite(held):
        return held  # type: ignore[return-value] - a tensor of one of the IR's dtypes
    shorter = (float(f"{held:.{digits}g}") for digits in range(1, 17))
    return next((x for x in shorter if torch.tensor(x, dtype=value.dtype).item() == held), held)


def _chosen(x: Expr) -> bool:
    """Whether data or a choice has a part in an index."""
    return isinstance(x, Load) or (isinstance(x, Op) and x.name not in _PLACES)
