"""Lifting: every softmax-like site of a graph, as an `Attention` or with the reason why it is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import fx

from attncc.errors import unforeseen
from attncc.ir.reasons import Reason, because
from attncc.ir.verify import VerifyError
from attncc.patterns.linear import Recognised, chunked, linear_attentions, recurrences
from attncc.patterns.refusals import (
    compares,
    dropping,
    gates,
    meets,
    of_quotient,
    of_use,
    under_transform,
    unknown_weights,
)
from attncc.patterns.site import (
    Contraction,
    Data,
    Facts,
    Frame,
    Lifted,
    Unreadable,
    agrees,
    contraction,
    hint,
    is_operator,
)
from attncc.patterns.softmax import (
    FLEX,
    Anchor,
    Late,
    Uses,
    Weights,
    calls_attention,
    in_pieces,
    lift_flex,
    lift_sdpa,
    lift_softmax,
    lift_unnormalised,
    normalisers,
    uses,
    vector_quotients,
    weighs_components,
    weighted_by_scores,
)


@dataclass(frozen=True)
class Refusal:
    """A softmax-like site that is left alone, and why. `kept`: what it is is known, and there is nothing to fuse."""

    reason: Reason
    node: fx.Node
    anchor: fx.Node
    kept: bool = False


#: What operations that hold a whole attention have in their names, or in those of their libraries.
_WHOLE = ("attention", "attn", "transformer_encoder_layer")


def _is_whole(target: str) -> bool:
    """Whether an operator, by its name, computes a whole attention; our own are read."""
    return not target.startswith("attncc.") and any(x in target for x in _WHOLE)


def lift_all(f: Facts) -> list[Lifted | Refusal | Recognised]:
    """Every attention-like site of the graph, in order."""
    whole = list(chunked(f))
    inside = {n for x in whole for n in x.nodes}
    linear = [x for x in linear_attentions(f) if x.node not in inside]
    scans: list[Refusal] = []
    reads: set[fx.Node] = set()
    every = [x for x in _with_gradients(f, _quadratic(f)) if inside.isdisjoint({x.node, x.anchor})]
    attended = {x.node for x in every if isinstance(x, Lifted)}
    for chain in recurrences(f):
        if chain.writes & attended or chain.node in inside:  # a residual stream that attention adds to
            continue
        reads |= chain.reads
        if isinstance(chain.found, Recognised):
            linear.append(chain.found)
        else:
            scans.append(Refusal(chain.found, chain.node, chain.first))
    covered = {n for site in linear for n in site.covered}
    quadratic = [x for x in every if x.node not in reads and (isinstance(x, Lifted) or x.anchor not in covered)]
    taken = {site.node for site in quadratic} | reads
    apart = (site for site in linear if taken.isdisjoint({site.node, site.anchor}))
    found = [*quadratic, *scans, *(x.site for x in whole), *apart]
    taken |= {n for site in found for n in (site.node, site.anchor)} | covered | inside
    data = Data(f)
    for reason, at, product in unknown_weights(f, data):
        if taken.isdisjoint({at, product}) and not any(n in taken for n in product.users):
            found.append(Refusal(because("no-softmax", reason), at, product))
            taken |= {at, product}
    found += [Refusal(why, at, n, kept=True) for why, at, n in gates(f, data) if taken.isdisjoint({at, n})]
    return sorted(found, key=lambda site: f.order[site.anchor])


def _with_gradients(f: Facts, found: list[Lifted | Refusal]) -> list[Lifted | Refusal]:
    """The sites, less those of which a tensor would get gradients that the model stops, or lose some."""
    places: dict[fx.Node, list[Lifted]] = {}
    for x in found:
        if isinstance(x, Lifted) and x.anchor.target is not FLEX:  # whose score function is a graph of its own
            places.setdefault(x.node, []).append(x)
    wrong: set[fx.Node] = set()
    for node, sites in places.items():
        tensors = [n for site in sites for n in site.tensors]
        moving = [n for site in sites for n in site.tensors if n not in site.stopped]
        if not agrees(f, node, tensors, moving):
            wrong.add(node)
    reason = because("stopped-inside")
    return [Refusal(reason, x.node, x.anchor) if isinstance(x, Lifted) and x.node in wrong else x for x in found]


def _quadratic(f: Facts) -> list[Lifted | Refusal]:
    """Every site that weighs each key for each query."""
    spelled = list(normalisers(f))
    found, weighed = _lifted(f, [x for x in spelled if isinstance(x, Anchor)])
    for n in f.graph.nodes:
        called = calls_attention(n)
        transform = under_transform(f, n) if called or n.target is FLEX else None
        if transform is not None:
            found.append(Refusal(transform, n, n))
        elif called or n.target is FLEX:
            try:
                site = lift_sdpa(f, n) if called else lift_flex(f, n)
                found += [] if site is None else [site]
            except Exception as error:
                found.append(Refusal(*_reason(error, n), n))
        elif n in f.live and is_operator(n) and _is_whole(str(n.target).lower()):
            found.append(Refusal(because("one-operation", str(n.target)), n, n))
    for late in (x for x in spelled if isinstance(x, Late)):
        sites = _divided(late)
        found += sites
        weighed |= {late.frame.product.node for _ in sites}
    taken = {site.node for site in found} | weighed
    for n in f.graph.nodes:
        weighted = weighted_by_scores(f, n) if n not in taken and n in f.live else None
        if weighted is not None:
            found += _without_softmax(f, n, *weighted)
    taken = {n for site in found for n in (site.node, site.anchor)}
    found += [Refusal(why, at, total) for why, at, total in vector_quotients(f) if taken.isdisjoint({at, total})]
    for n in (x for x in spelled if isinstance(x, fx.Node)):
        used = [user for user in n.users if contraction(f, user) is not None]
        if {n, *used}.isdisjoint({site.node for site in found} | {site.anchor for site in found}):
            found.append(Refusal(of_quotient(f, n), used[0] if used else n, n))
    return found


def _reason(error: Exception, at: fx.Node) -> tuple[Reason, fx.Node]:
    """Why a site was not lifted, and where. One site that fails unforeseen must not cost the others of its graph."""
    if isinstance(error, Unreadable):
        return error.reason, error.node
    if isinstance(error, VerifyError):
        return because("not-expressible", str(error)), at
    return because("reading-failed", unforeseen("reading a site", error)), at


def _without_softmax(f: Facts, n: fx.Node, product: Contraction, left: bool) -> list[Lifted | Refusal]:
    try:
        site = lift_unnormalised(f, product, left)
    except Exception as error:
        reason, _ = _reason(error, n)
        return [Refusal(because("no-softmax", reason), n, n)]
    return [] if site is None else [site]


def _lifted(f: Facts, found: list[Anchor]) -> tuple[list[Lifted | Refusal], set[fx.Node]]:
    """What becomes of each softmax: the attentions that it is, or why it is none; and the products that they weigh."""
    weights = Weights({a.node.name: a for a in found})
    sites: list[Lifted | Refusal] = []
    products: dict[tuple[fx.Node, fx.Node], list[Lifted | Refusal]] = {}  # by what they weigh with, too
    done: set[fx.Node] = set()  # a product is one attention, whichever of its factors holds the weights
    for anchor in sorted(found, key=lambda a: -_elements(f, a.node)):  # of two in one product, what has a row a query
        if anchor.node not in f.live:
            transform = under_transform(f, anchor.scores)
            sites += [] if transform is None else [Refusal(transform, anchor.node, anchor.node)]
            continue
        used = uses(f, anchor, weights)
        pieces = _in_pieces(anchor, used, weights)
        if pieces:
            sites += pieces
            done |= {x.node for x in pieces}
            continue
        for frame in used.products:
            key = frame.node, frame.weights
            if key not in products and frame.node not in done:
                products[key] = _of_product(frame, weights)
                done |= {x.node for x in products[key] if isinstance(x, Lifted)}
        held = [x for frame in used.products for x in products.get((frame.node, frame.weights), ())]
        own = [x for x in held if x.anchor is anchor.node]
        lifted = [x for x in own if isinstance(x, Lifted)]
        failed = [frame.node for frame in used.products if frame.node not in {x.node for x in lifted}]
        other_users = (*used.other_users, *failed)
        taken = [x.node for x in used.products if x.node in done]
        other = [Refusal(because("values-of-another"), n, anchor.node) for n in taken[:1]] or [_unused(f, anchor, used)]
        sites += [replace(x, other_users=other_users) for x in lifted] or own[:1] or other
    return sites, done | {node for node, _ in products}


def _elements(f: Facts, n: fx.Node) -> int:
    return prod(hint(s) or 1 for s in f.value(n).shape)


def _in_pieces(anchor: Anchor, used: Uses, weights: Weights) -> Sequence[Lifted | Refusal]:
    """The attentions that several products make of one softmax, or why they make none; nothing if they do not."""
    try:
        return [replace(x, other_users=used.other_users) for x in in_pieces(anchor, used.products, weights) or ()]
    except Exception as error:
        return [Refusal(*_reason(error, anchor.node), anchor.node)]


def _of_product(frame: Frame, weights: Weights) -> list[Lifted | Refusal]:
    """The softmaxes whose weights a product sums with: all of them attention, or none."""
    try:
        return [lift_softmax(frame, term) for term in weights.of(frame)]
    except Exception as error:
        reason, at = _reason(error, frame.node)
    return [Refusal(reason, at, a.node) for a in weights.anchors.values() if _reaches(frame, a)]


def _divided(late: Late) -> list[Lifted | Refusal]:
    """A softmax whose sum divides the product with the values; nothing if other weights than exponentials are none."""
    frame, term, node = late.frame, late.term, late.term.anchor.node
    used = uses(frame.facts, term.anchor, Weights({node.name: term.anchor}))
    others = [x.node for x in used.products if x.node is not frame.product.node]
    other_users = tuple(x for x in (*used.other_users, *others) if x is not late.total)
    try:
        return [replace(lift_softmax(frame, term), other_users=other_users)]
    except Exception as error:
        reason, _ = _reason(error, frame.node)
        if not late.powers:
            return []
        return [Refusal(because("late-division", reason), frame.node, node)]


def _reaches(frame: Frame, anchor: Anchor) -> bool:
    """Whether the weights of a product are computed from a softmax."""
    seen: set[fx.Node] = set()
    stack = [frame.weights]
    while stack:
        n = stack.pop()
        if n is anchor.node:
            return True
        if n not in seen and n.op == "call_function":
            seen.add(n)
            stack += [x for x in n.all_input_nodes if frame.facts.order[x] >= frame.facts.order[anchor.node]]
    return False


def _unused(f: Facts, anchor: Anchor, used: Uses) -> Refusal:
    if used.alone:
        return Refusal(because("single-key"), used.others[0], anchor.node)
    if used.others:
        (product, *_) = used.others
        dropped = dropping(f, product)
        reason = because("other-axis") if dropped is None else because("dropout")
        if dropped is None and compares(f, anchor.scores) and meets(f, product):
            reason = because("weights-mixed")
        return Refusal(reason, dropped or product, anchor.node)
    at = used.other_users[0] if used.other_users else anchor.node
    if (used.each and not used.products) or weighs_components(f, anchor.node, anchor.dim, at):
        return Refusal(because("vector-attention"), at, anchor.node)
    return Refusal(of_use(f, anchor.scores, anchor.node, at), at, anchor.node)
