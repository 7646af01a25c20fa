"""Dropout of attention weights, spelled so that a kernel can make the same mask again.

    F.dropout(w, p)           ->  words = randint(*rows, 2);  attncc::dropped(w, words, p)
    SDPA(.., dropout_p=p)     ->  words = randint(*rows, 2);  attncc::dropped_attention(.., words, p)

Two words a row come from torch's generator, in the place of one number a pair: `torch.manual_seed` makes a run
repeatable, what saves the generator's state (checkpointing) repeats its mask, and forward and backward read the same
words. It is another stream than eager's. What no kernel takes in the end is put back as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from attncc.driver.graph_edits import GraphEdits, copied
from attncc.runtime.dropout import dropped, dropped_attention

#: What a report says where dropouts became parts of kernels.
OWN_STREAM = (
    "{} dropout(s) of attention weights are part of kernels: their masks are drawn from torch's generator, as a stream"
    " of their own that is not eager's"
)
_ORIGINAL = "attncc_dropout"
_SDPA: Any = functional.scaled_dot_product_attention
_SOFTMAX = ("softmax", "_softmax", "special_softmax", "masked_fill", "nan_to_num", "where", "to", "type_as", "float")


def spell_out(gm: fx.GraphModule, edits: GraphEdits) -> int:
    """Give dropouts of attention weights the spelling above, in a copy that takes the place of the graph; how many."""
    if not any(_weights_of(n) is not None for n in gm.graph.nodes):
        return 0
    graph, _ = copied(gm.graph)
    sizes = [n for n in graph.nodes if n.op == "placeholder" and isinstance(_value(n), torch.SymInt)]
    count = 0
    for n in list(graph.nodes):
        shape = _weights_of(n)
        known = None if shape is None else _as_nodes(shape, sizes)
        if known is not None:
            _spelled(graph, n, known, shape or ())
            count += 1
    if count:
        graph.lint()
        edits.replace(gm, graph)
    return count


def put_back(graph: fx.Graph) -> int:
    """Give those that are left in a graph their own spelling back; how many there were."""
    found = 0
    for n in list(graph.nodes):
        if _ORIGINAL not in n.meta or n.target not in (dropped, dropped_attention):
            continue
        found += 1
        target, kwargs = n.meta.pop(_ORIGINAL)
        own = dict(zip(_NAMES[n.target], n.args, strict=False))
        words = own.pop("words")
        with graph.inserting_before(n):
            args = (own["weights"],) if n.target is dropped else tuple(own[x] for x in ("query", "key", "value"))
            more = {} if n.target is dropped else {"attn_mask": own["attn_mask"]}
            call = graph.call_function(target, args, {**kwargs, **more})
        call.meta = dict(n.meta)
        n.replace_all_uses_with(call)
        graph.erase_node(n)
        if not words.users:
            graph.erase_node(words)
    return found


_NAMES: dict[object, tuple[str, ...]] = {
    dropped: ("weights", "words", "p"),
    dropped_attention: ("query", "key", "value", "words", "attn_mask", "dropout_p", "is_causal"),
}


def _value(n: fx.Node) -> Any:
    return n.meta.get("example_value")


def _as_nodes(shape: Sequence[Any], sizes: Sequence[fx.Node]) -> list[Any] | None:
    """A shape with the inputs of the graph that its symbols are; None where it is computed from them."""
    found: list[Any] = []
    for x in shape:
        same = [n for n in sizes if isinstance(x, torch.SymInt) and _value(n).node.expr == x.node.expr]
        if isinstance(x, torch.SymInt) and not same:
            return None
        found.append(same[0] if same else int(x))
    return found


def _weights_of(n: fx.Node) -> tuple[Any, ...] | None:
    """The shape of the weights that a call drops from, None where it is no such call."""
    if n.op != "call_function":
        return None
    if n.target in _FROM_WEIGHTS:
        given = _given(n)
        weights = given.get("input")
        if not isinstance(weights, fx.Node) or not _drops(given.get("p", 0.5)) or not given.get("training", True):
            return None
        value = _value(weights)
        if given.get("inplace") or not isinstance(value, torch.Tensor) or not _is_softmax(weights):
            return None
        return tuple(value.shape)
    if n.target is _SDPA:
        given = dict(zip(_SDPA_NAMES, n.args, strict=False)) | n.kwargs
        query, key = (given.get(x) for x in ("query", "key"))
        if not isinstance(query, fx.Node) or not isinstance(key, fx.Node) or not _drops(given.get("dropout_p", 0.0)):
            return None
        values, out = [_value(x) for x in (query, key)], _value(n)
        if not all(isinstance(x, torch.Tensor) for x in (*values, out)) or out.device.type != "cpu":
            return None  # elsewhere torch's own kernel drops inside of it, and nothing of ours is measured against that
        return (*out.shape[:-1], values[1].shape[-2])
    return None


_SDPA_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


#: What drops from weights, and what it calls training.
_FROM_WEIGHTS: dict[Any, str] = {functional.dropout: "training", torch.dropout: "train"}


def _given(n: fx.Node) -> dict[str, Any]:
    """The arguments of a call that drops from weights, by the names that `F.dropout` has for them."""
    given = dict(zip(("input", "p", "training", "inplace"), n.args, strict=False)) | n.kwargs
    return {"training" if name == "train" else name: x for name, x in given.items()}


def _drops(p: Any) -> bool:
    return isinstance(p, float) and 0.0 < p < 1.0


def _is_softmax(n: fx.Node) -> bool:
    """Whether a node is a softmax, or one whose dtype or masked places were changed."""
    for _ in range(6):
        name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
        if name in ("softmax", "_softmax"):
            return True
        if name not in _SOFTMAX:
            return False
        before = [x for x in n.args if isinstance(x, fx.Node)]
        if not before:
            return False
        n = before[-2] if name == "where" and len(before) > 1 else before[0]
    return False


def _spelled(graph: fx.Graph, n: fx.Node, nodes: list[Any], shape: Sequence[Any]) -> None:
    value = _value(n)
    with graph.inserting_before(n):
        size = (*nodes[:-1], 2)
        words = graph.call_function(
            torch.randint, (-(2**31), 2**31, size), {"dtype": torch.int32, "device": value.device}
        )
        if n.target in _FROM_WEIGHTS:
            given = _given(n)
            p = given.get("p", 0.5)
            call = graph.call_function(dropped, (given["input"], words, p))
            kwargs: dict[str, Any] = {"p": p, _FROM_WEIGHTS[n.target]: True}
        else:
            given = dict(zip(_SDPA_NAMES, n.args, strict=False)) | n.kwargs
            operands = (given["query"], given["key"], given["value"])
            kwargs = {x: given[x] for x in ("dropout_p", "is_causal", "scale", "enable_gqa") if x in given}
            more = {x: given[x] for x in ("scale", "enable_gqa") if x in given}
            own = (words, given.get("attn_mask"), given["dropout_p"], given.get("is_causal", False))
            call = graph.call_function(dropped_attention, (*operands, *own), more)
    call.meta = {**n.meta, _ORIGINAL: (n.target, kwargs)}
    words.meta = {k: v for k, v in n.meta.items() if k in ("nn_module_stack", "stack_trace")}
    words.meta["example_value"] = _fake_words(value, (*shape[:-1], 2))
    n.replace_all_uses_with(call)
    graph.erase_node(n)


def _fake_words(like: torch.Tensor, size: tuple[Any, ...]) -> torch.Tensor:
    mode = getattr(like, "fake_mode", None)
    if mode is None:
        return torch.empty(size, dtype=torch.int32, device=like.device)
    with mode:
        return torch.empty(size, dtype=torch.int32, device=like.device)
