"""What to say of a softmax that is no attention: where its scores come from, or where it goes."""

from __future__ import annotations

from torch import fx

from attncc.ir.build import ONE
from attncc.patterns.reader import (
    ELEMENTS,
    VIEW_OPS,
    SUMS_AND_MEANS,
    Facts,
    argument,
    contraction,
    mixture,
    op_name,
    scattered,
    transform_of,
    unexpanded,
    written_out,
)
from attncc.patterns.refusals.hindrances import before_softmax, before_values

_STEPS = 40
_LAYERS = {"linear", "addmm", "conv1d", "conv2d", "conv3d", "convolution", "embedding"}
_INNER = ("getitem", "unbind", "index_put", "amax", "max")
_CHOSEN = {"topk", "sort", "argsort", "gather", "index", "scatter"}
#: What masks are made of, beside scores.
_MASKS = {
    "ones", "ones_like", "new_ones", "zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full", "arange",
    "eye",
}  # fmt: skip
_PICKED = "its scores were picked out of others"
DROPS = "dropout is on"
_SPREADS = ("pad", "constant_pad_nd", "as_strided")
_NONE = "the softmax's input is no product of queries and keys"


def of_scores(f: Facts, scores: fx.Node) -> str:
    """Why scores that hold no product of queries and keys are none."""
    sources = _sources(f, scores)
    names = dict.fromkeys(name for x in sources if (name := _name(x)) not in _MASKS)
    if f.parameters.issuperset(sources):
        return f"{_NONE}: its scores are learned themselves and depend on no token"
    picked = _picked(f, scores)
    if picked is not None:
        return picked
    hindered = before_softmax(f, scores)
    if hindered is not None:
        return hindered
    layers = [x for x in sources if _name(x) in _LAYERS or any(a in f.parameters for a in x.all_input_nodes)]
    if "cdist" in names or "_cdist_forward" in names:
        return f"{_NONE}: its scores are distances (cdist)"
    if "sum" in names:
        inside = (y for x in sources if _name(x) == "sum" for y in made_of(f, x, ("sum",)))
        if not any(_name(y) in ("add", "sub", "mul", "div", "cat") and broadcast_both_ways(f, y) for y in inside):
            return f"{_NONE}: its scores are sums of elements of each token alone"
        return f"{_NONE}: its scores are sums over pairs of elements that are no product of two (additive attention)"
    if "linalg_vector_norm" in names:
        return f"{_NONE}: its scores are lengths of differences (linalg_vector_norm)"
    for x in sources:
        product = contraction(f, x) if x not in layers else None
        if product is not None and any(_times_pairs(f, side) for side in (product.lhs, product.rhs)):
            return f"{_NONE}: its scores weigh the elements of each pair's product by numbers of its own (edges)"
        summing = x in layers or contraction(f, x) is not None
        if summing and any(pairs(f, y) for y in made_of(f, x, (_name(x), "cat"))):
            return f"{_NONE}: its scores come from a layer over pairs of tokens (additive attention)"
        if x in layers and _name(x).startswith("conv") and compares(f, x.all_input_nodes[0]):
            return f"{_NONE}: its scores come from a layer over other scores ({_name(x)})"
    if layers and _name(layers[0]) in _LAYERS:
        return f"{_NONE}: its scores come from a layer ({_name(layers[0])})"
    if layers:
        return f"{_NONE}: its scores come out of a product with learned weights ({_name(layers[0])})"
    chosen = next((x for x in names if x in _CHOSEN), None)
    if chosen is not None:
        return f"{_NONE}: {_PICKED} ({chosen})"
    if names and all(x == "an input" for x in names):
        return f"{_NONE}: its scores come into this graph from outside, as after a graph break"
    first = next((x for x in names if x != "an input"), None)
    return _NONE if first is None else f"{_NONE}: its scores come from {first}"


def _picked(f: Facts, scores: fx.Node) -> str | None:
    """Why scores are none of which only the largest are taken out."""
    for x in made_of(f, scores, ("getitem", "scatter")):
        if _name(x) in ("topk", "sort") and compares(f, x.all_input_nodes[0]):
            return f"{_NONE}: {_PICKED} ({_name(x)})"
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


def of_quotient(f: Facts, n: fx.Node) -> str:
    """Why exponentials that a sum of exponentials divides are no attention."""
    if scattered(n.all_input_nodes[-1]) is not None:
        return "a softmax over groups that are numbered in a tensor (edges of a graph): each row has keys of its own"
    (top, *_) = n.all_input_nodes
    g, at = f.gradients, f.order[n]
    if g is not None and f.wants_grad(at) and any(g.stopped(x, at) for x in n.all_input_nodes):
        return "a quotient of exponentials and their sum of which the model stops the gradients of one"
    if compares(f, top):
        return "a quotient by a sum that is not that of the same exponentials over the keys"
    return of_scores(f, top)


def under_transform(f: Facts, scores: fx.Node) -> str | None:
    """Why scores are not read that are made of the tensors of a transform, which a trace holds as constants."""
    behind = _behind(scores)
    held = (getattr(f.graph.owning_module, str(x.target), None) for x in behind if x.op == "get_attr")
    kind = next((x for x in map(transform_of, held) if x is not None), None)
    kind = "jvp" if kind is None and any(_name(x) == "_make_dual" for x in behind) else kind
    return None if kind is None else f"under torch.func.{kind}, whose tensors a trace does not show"


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
    products = (contraction(f, x) for x in found)
    sides = ((p.lhs, p.rhs) for p in products if p is not None)
    if any(f.parameters.isdisjoint((a, b)) and not each_pair(f, a) and not each_pair(f, b) for a, b in sides):
        return True
    return any(_name(x) == "cdist" or (x.target in SUMS_AND_MEANS and written_out(f, x) is not None) for x in found)


_GOES = {
    "topk": "it goes to topk, as a router's does",
    "sort": "it goes to sort, as a router's does",
    "sum": "it is added up once more (sum), as what is normalised twice is",
    "mean": "it is averaged first (mean)",
    "layer_norm": "it is normalised once more (layer_norm)",
    "the output": "it goes to the output",
}
_NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm")
_WEIGHS = {
    "sum": "what it weighs is summed element by element, as branches, levels and sampling points are",
    "the output": "it scales a tensor element by element and nothing is summed, as a gate does",
}


def of_use(f: Facts, scores: fx.Node, weights: fx.Node, at: fx.Node) -> str:
    """Why the softmax of `scores`, whose first user that sums nothing is `at`, weighs no values."""
    picked = _picked(f, scores)
    if picked is not None:
        return picked
    hindered = before_values(f, at) if compares(f, scores) else None
    if hindered is not None:
        return hindered
    name = "the output" if at.op == "output" else op_name(at) or at.name
    if name in ("topk", "sort") and compares(f, scores):
        return f"only the largest of its weights are kept ({name}), and which they are no score says alone"
    if name in ("sum", "mean") and contraction(f, at) is not None:  # weighed and summed, by one number each
        return f"{of_scores(f, scores)}; {_WEIGHS['sum']}"
    scaled = _WEIGHS.get(name, _WEIGHS["the output"] if name in _NORMS else None) if _scales(f, weights, at) else None
    goes = scaled or _GOES.get(name, f"it goes to {name}")
    return f"the softmax is not multiplied with values: {goes}"


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
