"""What to say of a softmax that is no attention: where its scores come from, or where it goes."""

from __future__ import annotations

from typing import Any

from torch import fx

from attncc.ir.build import ONE
from attncc.ir.reasons import Reason, because
from attncc.patterns.reader import (
    ELEMENTS,
    SUMS_AND_MEANS,
    VIEW_OPS,
    Facts,
    argument,
    contraction,
    has_argument,
    mixture,
    one_dim,
    op_name,
    scattered,
    transform_of,
    unexpanded,
    written_out,
)
from attncc.patterns.refusals.hindrances import before_softmax, before_values

_STEPS = 40
_LAYERS = {"linear", "addmm", "conv1d", "conv2d", "conv3d", "convolution", "embedding"}
_INNER = ("getitem", "unbind", "stack", "index_put", "amax", "max", "logsumexp")
_CHOSEN = {"topk", "sort", "argsort", "gather", "index", "scatter"}
#: What masks are made of, beside scores.
_MASKS = {
    "ones", "ones_like", "new_ones", "zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full", "arange",
    "eye",
}  # fmt: skip
_SPREADS = ("pad", "constant_pad_nd", "as_strided")


def of_scores(f: Facts, scores: fx.Node) -> Reason:
    """Why scores that hold no product of queries and keys are none."""
    sources = _sources(f, scores)
    names = dict.fromkeys(name for x in sources if (name := _name(x)) not in _MASKS)
    if f.parameters.issuperset(sources):
        return because("scores-learned")
    picked = _picked(f, scores)
    if picked is not None:
        return picked
    hindered = before_softmax(f, scores)
    if hindered is not None:
        return hindered
    layers = [x for x in sources if _name(x) in _LAYERS or any(a in f.parameters for a in x.all_input_nodes)]
    if "cdist" in names or "_cdist_forward" in names:
        return because("scores-distances")
    if "sum" in names:
        inside = (y for x in sources if _name(x) == "sum" for y in made_of(f, x, ("sum",)))
        if not any(_name(y) in ("add", "sub", "mul", "div", "cat") and broadcast_both_ways(f, y) for y in inside):
            return because("scores-of-each-token")
        return because("scores-additive")
    if "linalg_vector_norm" in names:
        return because("scores-lengths")
    for x in sources:
        product = contraction(f, x) if x not in layers else None
        if product is not None and any(_times_pairs(f, side) for side in (product.lhs, product.rhs)):
            return because("scores-of-edges")
        summing = x in layers or contraction(f, x) is not None
        if summing and any(pairs(f, y) for y in made_of(f, x, (_name(x), "cat"))):
            return because("scores-layer-over-pairs")
        if x in layers and _name(x).startswith("conv") and compares(f, x.all_input_nodes[0]):
            return because("scores-layer-over-scores", _name(x))
    if layers and _name(layers[0]) in _LAYERS:
        return because("scores-layer", _name(layers[0]))
    if layers:
        return because("scores-learned-product", _name(layers[0]))
    chosen = next((x for x in names if x in _CHOSEN), None)
    if chosen is not None:
        return because("scores-chosen", chosen)
    if names and all(x == "an input" for x in names):
        return because("scores-from-outside")
    first = next((x for x in names if x != "an input"), None)
    return because("no-scores") if first is None else because("scores-from", first)


def _picked(f: Facts, scores: fx.Node) -> Reason | None:
    """Why scores are none of which only the largest are taken out."""
    for x in made_of(f, scores, ("getitem", "scatter")):
        if _name(x) in ("topk", "sort") and compares(f, x.all_input_nodes[0]):
            return because("scores-chosen", _name(x))
    return None


def made_of(f: Facts, n: fx.Node, names: tuple[str, ...]) -> list[fx.Node]:
    """`n` and what it is made of by moves, element by element and by operations of some names."""
    found, seen, stack = list[fx.Node](), {n}, [n]
    while stack and len(found) < _STEPS:
        x = stack.pop(0)
        found.append(x)
        if x.op != "call_function" or not (x.target in VIEW_OPS or x.target in ELEMENTS or _name(x) in names):
            continue
        fresh = [a for a in x.all_input_nodes if a not in seen and (f.is_tensor(a) or _name(x) == "getitem")]
        seen.update(fresh)
        stack += fresh
    return found


def dropping(f: Facts, product: fx.Node) -> fx.Node | None:
    """The dropout that a factor of a product went through."""
    return next((x for a in product.all_input_nodes for x in made_of(f, a, _SPREADS) if drops(x)), None)


def drops(n: fx.Node) -> bool:
    return _name(n) == "dropout" and argument(n, "train") and argument(n, "p") != 0.0


def pairs(f: Facts, n: fx.Node) -> bool:
    """Whether an operation adds two tensors, or lays them side by side, of which each is repeated along a dimension
    that the other has."""
    return _name(n) in ("add", "sub", "cat") and broadcast_both_ways(f, n)


def broadcast_both_ways(f: Facts, n: fx.Node) -> bool:
    """Whether each of two tensors is repeated along a dimension that the other has."""
    held = [x for x in n.all_input_nodes if f.is_tensor(x) and f.rank(x) == f.rank(n)]
    if len(held) != 2:
        return False
    a, b = ({d for d, s in enumerate(f.shape(unexpanded(f, x))) if s is ONE} for x in held)
    wide = {d for d, s in enumerate(f.shape(n)) if s is not ONE}
    return bool((a - b) & wide and (b - a) & wide)


def each_pair(f: Facts, n: fx.Node) -> bool:
    """Whether a tensor has a row for each pair of rows of two others, joined element by element."""
    return any(broadcast_both_ways(f, x) for x in made_of(f, n, ()))


def _times_pairs(f: Facts, n: fx.Node) -> bool:
    """Whether a tensor holds the products of each pair of rows, element by element."""
    return any(_name(x) == "mul" and broadcast_both_ways(f, x) for x in made_of(f, n, ()))


def of_quotient(f: Facts, n: fx.Node) -> Reason:
    """Why exponentials that a sum of exponentials divides are no attention."""
    if scattered(n.all_input_nodes[-1]) is not None:
        return because("edge-softmax")
    (top, *_) = n.all_input_nodes
    g, at = f.gradients, f.order[n]
    if g is not None and f.wants_grad(at) and any(g.stopped(x, at) for x in n.all_input_nodes):
        return because("stopped-quotient")
    if compares(f, top):
        return because("other-sum")
    return of_scores(f, top)


def under_transform(f: Facts, scores: fx.Node) -> Reason | None:
    """Why scores are not read that are made of the tensors of a transform, which a trace holds as constants."""
    behind = _behind(scores)
    held = (getattr(f.graph.owning_module, str(x.target), None) for x in behind if x.op == "get_attr")
    kind = next((x for x in map(transform_of, held) if x is not None), None)
    kind = "jvp" if kind is None and any(_name(x) == "_make_dual" for x in behind) else kind
    return None if kind is None else because("transform", kind)


def _behind(n: fx.Node) -> set[fx.Node]:
    seen, stack = {n}, [n]
    while stack and len(seen) < _STEPS:
        fresh = [a for a in stack.pop().all_input_nodes if a not in seen]
        seen.update(fresh)
        stack += fresh
    return seen


def compares(f: Facts, scores: fx.Node) -> bool:
    """Whether scores hold a product of two tensors of which none is learned, or their distances; heads may be mixed."""
    found = _sources(f, scores)
    mixed = (mixture(f, x) for x in found)
    if any(mix is not None and compares(f, mix.lhs) for mix in mixed):
        return True
    products = (contraction(f, x) for x in found if x.target not in SUMS_AND_MEANS)
    sides = ((p.lhs, p.rhs) for p in products if p is not None)
    if any(f.parameters.isdisjoint((a, b)) and not each_pair(f, a) and not each_pair(f, b) for a, b in sides):
        return True
    return any(_name(x) == "cdist" or (x.target in SUMS_AND_MEANS and _compares_written_out(f, x)) for x in found)


def _compares_written_out(f: Facts, n: fx.Node) -> bool:
    """Whether a sum of products is one of queries and keys: of levels that a softmax weighs it is none."""
    product = written_out(f, n)
    if product is None:
        return False
    return not any(_name(y) == "softmax" for x in product.factors for y in made_of(f, x.node, ()))


_GOES = {
    "topk": because("goes-to-router", "topk"), "sort": because("goes-to-router", "sort"),
    "sum": because("goes-to-sum"), "mean": because("goes-to-mean"), "layer_norm": because("goes-to-norm"),
    "the output": because("goes-to-output"),
}  # fmt: skip
_NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm")
#: The same where a tensor is multiplied with the weights element by element on the way.
_SCALES = {"sum": because("sums-branches"), "the output": because("gates"), **dict.fromkeys(_NORMS, because("gates"))}


def of_use(f: Facts, scores: fx.Node, weights: fx.Node, at: fx.Node) -> Reason:
    """Why the softmax of `scores`, whose first user that sums nothing is `at`, weighs no values."""
    picked = _picked(f, scores)
    if picked is not None:
        return picked
    hindered = before_values(f, at) if compares(f, scores) else None
    if hindered is not None:
        return hindered
    name = "the output" if at.op == "output" else op_name(at) or at.name
    if name in ("topk", "sort") and compares(f, scores):
        return because("keeps-largest", name)
    if name in ("sum", "mean") and contraction(f, at) is not None:  # weighed and summed, by one number each
        return because("weights-whole-tensors", of_scores(f, scores))
    if name == "sum" and _sums_rows(f, weights, at):
        return because("goes-to-heads")
    scaled = _SCALES.get(name) if _scales(f, weights, at) else None
    return scaled or _GOES.get(name) or because("goes-to", name)


def _sums_rows(f: Facts, weights: fx.Node, at: fx.Node) -> bool:
    """Whether a sum is over another axis than that of the softmax: over heads, or over rows."""
    source: Any = at.args[0]
    over = one_dim(f, source, argument(at, "dim")) if has_argument(at, "dim") else None
    own = argument(weights, "dim") if "softmax" in _name(weights) else None
    if any(_name(u) in ("div", "reciprocal", "clamp", "clamp_min") for u in at.users):
        return False  # what they are divided by
    return isinstance(own, int) and f.shape(source) == f.shape(weights) and over not in (None, own % f.rank(source))


def _scales(f: Facts, weights: fx.Node, at: fx.Node) -> bool:
    """Whether something is multiplied element by element with the weights on their way to a node."""
    on_the_way, stack = {weights}, [weights]
    while stack:
        n = stack.pop()
        fresh = [u for u in n.users if u not in on_the_way and f.order[u] < f.order[at]]
        on_the_way.update(fresh)
        stack += fresh
    reached, stack = {at}, [at]
    while stack:
        n = stack.pop()
        fresh = [a for a in n.all_input_nodes if a in on_the_way and a not in reached]
        reached.update(fresh)
        stack += fresh
    products = (n for n in reached if _name(n) in ("mul", "multiply") and len(n.all_input_nodes) > 1)
    return any(a not in on_the_way and f.is_tensor(a) and f.rank(a) > 0 for n in products for a in n.all_input_nodes)


_FOLLOWED = 24


def used_by(f: Facts, n: fx.Node) -> str:
    """What a user of scores does with them: the first operation behind what only moves or changes their elements."""
    stack, seen = [n], {n}
    while stack and len(seen) < _FOLLOWED:
        x = stack.pop(0)
        if x.op == "output":
            return "the output"
        like = _name(x).endswith("_like") and not _name(x).startswith("rand")
        if x.op != "call_function" or not (x.target in VIEW_OPS or x.target in ELEMENTS or like):
            return _name(x) or x.name
        fresh = [u for u in x.users if u not in seen and u in f.live]
        seen.update(fresh)
        stack += fresh
    return _name(n) or n.name


def _sources(f: Facts, n: fx.Node) -> list[fx.Node]:
    """Where the values of a tensor come from, through what moves them or computes element by element."""
    found: list[fx.Node] = []
    stack, seen = [n], {n}
    for _ in range(_STEPS):
        if not stack:
            break
        n = stack.pop(0)
        name = _name(n)
        inner = n.op == "call_function" and (n.target in VIEW_OPS or n.target in ELEMENTS or name in _INNER)
        if not inner:
            found.append(n)
            continue
        held = [a for a in n.all_input_nodes if not f.is_number(a)]
        fresh = [a for a in held if a not in seen and a.op != "get_attr" and a not in f.parameters]
        seen.update(fresh)
        stack += fresh
    return found


def _name(n: fx.Node) -> str:
    if n.op == "placeholder":
        return "an input"
    return op_name(n).rstrip("_")
