"""Numbers that Dynamo made inputs of a graph: which of them are fixed, and which it is to have as numbers after all."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_scalar


def known_number(n: fx.Node) -> float | int | bool | None:
    """The number that Dynamo wrapped in a tensor, where this node unwraps one that is fixed: an integer, or a float
    whose value is guarded on already."""
    if n.target != "item" or not isinstance(n.args[0], fx.Node) or n.args[0].op != "placeholder":
        return None
    value: Any = n.meta.get("example_value")
    if not isinstance(value, torch.SymFloat | torch.SymInt | torch.SymBool) or not value.node.has_hint():
        return None
    if isinstance(value, torch.SymFloat) and not value.node.expr.is_number:
        return None
    return guard_scalar(value)


def ask_for_known_floats(gm: fx.GraphModule) -> None:
    """Have Dynamo trace again with the floats as numbers that it made inputs of a graph and that are fixed all the
    same, if there are any: those that an operation takes as numbers only, and those that `dynamic=True` made inputs and
    nobody has seen to change, as the attributes of modules are. The others stay inputs.

    Inductor asks for the first kind too: after this graph was read, edited and traced in vain."""
    unknown: set[str] = set()
    for n in gm.graph.nodes:
        if n.target == "item" and isinstance(n.args[0], fx.Node) and n.args[0].op == "placeholder":
            value: Any = n.meta.get("example_value")
            symbol = value.node._expr if isinstance(value, torch.SymFloat) and value.node.has_hint() else None
            if symbol is None or not symbol.is_symbol or any(user.target != "item" for user in n.args[0].users):
                continue
            if value.node.expr.is_number or not seen_to_change(n.args[0]):
                unknown.add(symbol.name)
    if not unknown:
        return
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis  # noqa: PLC0415 - Dynamo takes a second to import
    from torch._dynamo.symbolic_convert import TensorifyState  # noqa: PLC0415 - as above

    asked = {name for name in unknown if not TensorifyState.should_specialize(name)}
    for name in asked:
        TensorifyState.specialize(name)
    if asked:
        raise TensorifyScalarRestartAnalysis


def forget_asked_floats() -> None:
    """Forget which floats a compilation that is done was to have as numbers. Dynamo goes by the names of symbols, which
    are the same in the next compilation, and would have the same floats as numbers there, whatever asks for them."""
    from torch._dynamo.symbolic_convert import TensorifyState  # noqa: PLC0415 - Dynamo takes a second to import

    TensorifyState.clear()


def seen_to_change(placeholder: fx.Node) -> bool:
    """Whether an input that holds a number had another value when Dynamo compiled the same code before."""
    if torch._dynamo.config.assume_static_by_default:
        return True  # or it would be no input
    from torch._dynamo.pgo import CodeId, auto_dynamic, get_code_state  # noqa: PLC0415 - as above
    from torch._dynamo.symbolic_convert import InstructionTranslator  # noqa: PLC0415 - as above

    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", None)
    try:
        tx: Any = InstructionTranslator.current_tx()
        state = get_code_state()[CodeId.make(tx.f_code, tx.closure)].automatic_dynamic
    except AttributeError:  # nothing is being compiled
        return True
    return not isinstance(name, str) or name not in state or state[name].scalar is auto_dynamic
