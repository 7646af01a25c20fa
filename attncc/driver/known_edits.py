"""Edits of graphs, remembered across processes: what became of a graph is done again without reading it.

A record holds the edited graph as its difference from the one that Dynamo handed over, and what is reported of its
sites. It is found by the digest of everything that was looked at to make it (`attncc.driver.known_graphs`), lies in the
kernel store under its seal, and is made use of only where each of its kernels is there, and the graph that it gives is,
to the letter, the one that was compiled then. In any other case the graph is read. `ATTNCC_EDITS=off` reads all.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attncc.driver.collected import Collected, collecting
from attncc.driver.garbage import no_collection
from attncc.driver.graph_edits import GraphEdits, copy_node, emptied, kept
from attncc.driver.known_graphs import UnknownError, digest, name_of, target_named
from attncc.errors import unforeseen
from attncc.kernels.build import built, default_store
from attncc.progress import step
from attncc.report.site import Site
from attncc.runtime.measure import REMEASURE
from attncc.runtime.store import key
from attncc.torch_private.examples import give_examples

VARIABLE = "ATTNCC_EDITS"
_ORIGINS = ("nn_module_stack", "stack_trace", "source_fn_stack")
#: Of a site's record, what is found again by other means, and what is there in a recording alone.
_LEFT_OUT = {"kernel", "backward_kernel", "picture", "program", "stages", "graph", "fused_graph", "cells", "forms"}


#: What a record that does not fit this graph, or this machine, leads to.
_OF_ANOTHER_KIND = (UnknownError, LookupError, TypeError, ValueError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class Known:
    """A graph that can be recognised: its digest, and the graph as Dynamo handed it over."""

    digest: str
    graph: fx.Graph

    @property
    def key(self) -> str:
        return key({"kind": "edit", "digest": self.digest})


def known(gm: fx.GraphModule, inputs: Sequence[Any], *, measure: bool) -> Known | None:
    """The identity of a graph; None where there is none, or where what is found is to be shown, or found anew."""
    if os.environ.get(VARIABLE) == "off" or os.environ.get(REMEASURE) or collecting.get() is not None:
        return None
    step("reading the graph")
    try:
        with no_collection():
            found = digest(gm, inputs, measure=measure)
    except Exception as error:
        unforeseen("recognising a graph", error)
        return None
    return None if found is None else Known(found, gm.graph)


def edit_again(gm: fx.GraphModule, graph: Known, found: Collected, edits: GraphEdits) -> bool:
    """Do to a graph what was done to it before. Whether that is so; if not, it is as it was."""
    try:
        record = default_store().recall(graph.key)
        if record is None:
            return False
        step("editing the graph")
        sites = [_site(x) for x in record["sites"]]
        if record["nodes"] is not None:
            with no_collection():
                edits.replace(gm, _graph(graph.graph, record["nodes"]))
            if _text(gm.graph) != record["text"]:
                raise UnknownError("another graph")
    except Exception as error:
        if not isinstance(error, _OF_ANOTHER_KIND):
            unforeseen("editing a graph as before", error)
        edits.undo()
        return False
    found.sites += sites
    return True


def remember(gm: fx.GraphModule, graph: Known, found: Collected, edits: GraphEdits) -> None:
    """Keep what became of a graph, if it came to it without anything unusual."""
    if found.notes or found.planned or not edits.at_most(gm, graph.graph):
        return
    try:
        nodes = None if gm.graph is graph.graph else _difference(graph.graph, gm.graph)
        sites = [_plain(site) for site in found.sites]
        default_store().remember(graph.key, {"nodes": nodes, "text": _text(gm.graph), "sites": sites})
    except UnknownError:
        return
    except Exception as error:
        unforeseen("remembering what became of a graph", error)


def _text(graph: fx.Graph) -> str:
    """A digest of all operations and their arguments. Generating the graph's code takes ten times as long."""
    nodes = [
        (n.op, n.name, name_of(n.target) if n.op.startswith("call") else str(n.target), n.args, n.kwargs)
        for n in graph.nodes
    ]
    return hashlib.sha256(repr(nodes).encode()).hexdigest()


# --- sites -----------------------------------------------------------------------------------------------------------


def _plain(site: Site) -> dict[str, Any]:
    """A site's record as plain values. Raises UnknownError for one that a kernel alone does not make again."""
    if site.trains or site.forms or (site.kernel is not None and site.language != "cpp") or "failed" in site.code:
        raise UnknownError(site.code)
    if site.kernel is not None and built(str(site.ir), "cpu").source != site.kernel:
        raise UnknownError("kernel")
    names = [f for f in site.__dataclass_fields__ if f not in _LEFT_OUT]
    values = {name: getattr(site, name) for name in names} | {"compiled": site.kernel is not None}
    return values | {"shapes": {k: list(x) for k, x in site.shapes.items()}}


def _site(record: Mapping[str, Any]) -> Site:
    """The site of a record, its kernel found. Raises UnknownError where there is none now."""
    values = {k: x for k, x in record.items() if k != "compiled"}
    values["shapes"] = {k: tuple(x) for k, x in record["shapes"].items()}
    values["sizes"] = None if record["sizes"] is None else tuple(record["sizes"])
    if record["compiled"]:
        made = built(record["ir"], "cpu")
        if made.language != record["language"]:
            raise UnknownError(made.reason)
        values["kernel"] = made.source
    return Site(**values)


# --- graphs ----------------------------------------------------------------------------------------------------------


def _difference(before: fx.Graph, after: fx.Graph) -> list[Any]:
    """The nodes of `after` in order: of those that are as they were the number in `before`, of others all there is."""
    old = list(before.nodes)
    numbers = {n.name: at for at, n in enumerate(old)}
    values = {id(n.meta["example_value"]): at for at, n in enumerate(old) if n.meta.get("example_value") is not None}
    origins = {_origin(n): at for at, n in enumerate(old)}
    found: list[Any] = []
    for n in after.nodes:
        at = numbers.get(n.name)
        shown = {"args": _shown(n.args), "kwargs": _shown(dict(n.kwargs))}
        own = None if at is None else old[at]
        same = own is not None and (own.op, own.target) == (n.op, n.target)
        if own is not None and same and shown == {"args": _shown(own.args), "kwargs": _shown(dict(own.kwargs))}:
            found.append(at)
        elif same:
            found.append({"of": at, **shown})
        elif n.op in ("call_function", "call_method"):
            value = n.meta.get("example_value")
            found.append({"name": n.name, "target": name_of(n.target), **shown, "value": values.get(id(value)),
                          "origin": origins.get(_origin(n))})  # fmt: skip
        else:
            raise UnknownError(n.op)
    return found


def _origin(n: fx.Node) -> object:
    return n.meta.get("stack_trace"), id(n.meta.get("nn_module_stack"))


def _graph(before: fx.Graph, nodes: Sequence[Any]) -> fx.Graph:
    """The graph that `_difference` described."""
    old = list(before.nodes)
    made, known = emptied(before), dict[str, fx.Node]()
    for x in nodes:
        if isinstance(x, dict) and "of" not in x:
            target = target_named(x["target"])
            op = "call_method" if isinstance(target, str) else "call_function"
            new = made.create_node(op, target, _meant(x["args"], known), _meant(x["kwargs"], known), x["name"])
            if x["value"] is not None:
                new.meta["example_value"] = old[x["value"]].meta["example_value"]
            if x["origin"] is not None:
                meta = old[x["origin"]].meta
                new.meta.update({k: meta[k] for k in _ORIGINS if k in meta})
        else:
            own = old[x if isinstance(x, int) else x["of"]]
            if isinstance(x, int):
                new = copy_node(made, own, lambda n: known[n.name])
            else:
                args, kwargs = _meant(x["args"], known), _meant(x["kwargs"], known)
                new = kept(made.create_node(own.op, own.target, args, kwargs, own.name, own.type), own)
        known[new.name] = new
    made.lint()
    give_examples(made)
    return made


def _shown(x: Any) -> Any:
    """An argument of a node as values of JSON. Raises UnknownError for one that does not come back from them."""
    if isinstance(x, fx.Node):
        return {"node": x.name}
    if isinstance(x, torch.Size) or type(x).__name__ not in _SHOWN:
        raise UnknownError(type(x).__name__)
    if isinstance(x, list):
        return [_shown(y) for y in x]
    if isinstance(x, tuple):
        return {"tuple": [_shown(y) for y in x]}
    if isinstance(x, dict):
        return {"dict": {str(k): _shown(y) for k, y in x.items()}}
    if isinstance(x, slice):
        return {"slice": [_shown(y) for y in (x.start, x.stop, x.step)]}
    if isinstance(x, float):
        return {"float": repr(x)}
    if isinstance(x, torch.dtype | torch.layout | torch.memory_format):
        return {"torch": str(x).removeprefix("torch.")}
    if isinstance(x, torch.device):
        return {"device": str(x)}
    return {"ellipsis": True} if x is ... else x


_SHOWN = {
    "NoneType", "bool", "int", "str", "float", "list", "tuple", "dict", "slice", "immutable_list", "immutable_dict",
    "dtype", "layout", "memory_format", "device", "ellipsis",
}  # fmt: skip


def _meant(x: Any, known: Mapping[str, fx.Node]) -> Any:
    """What `_shown` showed."""
    if isinstance(x, list):
        return [_meant(y, known) for y in x]
    if not isinstance(x, dict):
        return x
    ((kind, held),) = x.items()
    if kind == "node":
        return known[held]
    if kind in ("tuple", "slice"):
        parts = [_meant(y, known) for y in held]
        return tuple(parts) if kind == "tuple" else slice(*parts)
    if kind == "dict":
        return {k: _meant(y, known) for k, y in held.items()}
    if kind == "float":
        return float(held)
    if kind == "torch":
        return getattr(torch, held)
    return torch.device(held) if kind == "device" else ...
