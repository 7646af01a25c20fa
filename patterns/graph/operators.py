"""What a node's operator says of itself, and the few parts of torch without public API that reading a graph needs."""

from __future__ import annotations

import string
from typing import Any, cast

import torch
from torch import fx
from torch._ops import OpOverload

#: Where a node says what memory its value lies in, if that is not its value's own.
MEMORY = "memory"
#: In-place ops that change what a tensor looks like and not what it holds.
_METADATA = {"detach_", "squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "requires_grad_"}


def op_name(n: fx.Node) -> str:
    """The name of a node's operator without its overload, with the underscore of an in-place one."""
    target: Any = n.target
    return str(getattr(target, "_opname", getattr(target, "__name__", ""))) if n.op == "call_function" else ""


def is_operator(n: fx.Node) -> bool:
    return n.op == "call_function" and isinstance(n.target, OpOverload)


def takes_tensors(target: Any) -> bool:
    """Whether an overload is one for tensors; some are for plain numbers."""
    return any(str(arg.type) in ("Tensor", "Optional[Tensor]") for arg in target._schema.arguments)


def has_argument(n: fx.Node, name: str) -> bool:
    return any(arg.name == name for arg in _arguments(n))


def argument(n: fx.Node, name: str) -> Any:
    """A node's argument by its schema name, defaults included."""
    for at, arg in enumerate(_arguments(n)):
        if arg.name == name:
            return n.args[at] if at < len(n.args) else n.kwargs.get(name, arg.default_value)
    raise KeyError(f"{n.target} has no argument {name}")


def dim_argument(n: fx.Node, rank: int) -> int:
    """The argument `dim`, counted from the front."""
    dim: int = argument(n, "dim")
    return dim % rank


def scaled_by(n: fx.Node) -> float | None:
    """The number that a node multiplies its one input with."""
    number = n.args[1] if len(n.args) == 2 and len(n.all_input_nodes) == 1 and not n.kwargs else None
    if not isinstance(number, int | float) or isinstance(number, bool):
        return None
    return {"mul": float(number), "div": 1.0 / number if number else None}.get(op_name(n))


def written_args(n: fx.Node) -> list[fx.Node]:
    """The arguments whose contents a node's schema says it writes to."""
    if not is_operator(n) or op_name(n) in _METADATA:
        return []
    found: list[fx.Node] = []
    for at, arg in enumerate(_arguments(n)):
        if arg.alias_info is None or not arg.alias_info.is_write:
            continue
        value = n.args[at] if at < len(n.args) else n.kwargs.get(arg.name)
        items = value if isinstance(value, list | tuple) else [value]
        found += [x for x in items if isinstance(x, fx.Node)]
    return found


def _arguments(n: fx.Node) -> list[Any]:
    return list(cast(Any, n.target)._schema.arguments)


def spelled_out(equation: str, *ranks: int) -> tuple[str, ...]:
    """The letters of each factor and of the result of an einsum, implicit results and ellipses written out."""
    equation = equation.replace(" ", "")
    left, _, out = equation.partition("->")
    factors = left.split(",")
    if "->" not in equation:
        letters = [c for c in left if c.isalpha()]
        out = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    unused = [c for c in string.ascii_letters if c not in equation]
    hidden = [rank - len(t) + 3 for t, rank in zip(factors, ranks, strict=True) if "..." in t]
    most = unused[: max(hidden, default=0)]
    written = [
        t.replace("...", "".join(most[len(most) - (rank - len(t) + 3) :])) if "..." in t else t
        for t, rank in zip(factors, ranks, strict=True)
    ]
    return (*written, out.replace("...", "".join(most)))


def formula(s: torch.SymInt | torch.SymFloat) -> Any:
    """The sympy expression that a symbolic number stands for."""
    return cast(Any, s).node.expr


def hint(s: int | torch.SymInt) -> int | None:
    """The size that the example had, None where a symbol has none."""
    if isinstance(s, int):
        return s
    node = cast(Any, s).node
    return int(node.hint) if node.has_hint() else None


def transform_of(value: object) -> str | None:
    """The transform of `torch.func` whose tensor a value is: "vmap" or "grad"."""
    inside: Any = cast(Any, torch)._C._functorch
    if not isinstance(value, torch.Tensor):
        return None
    return "vmap" if inside.is_batchedtensor(value) else "grad" if inside.is_gradtrackingtensor(value) else None


def storage_id(value: object) -> int | None:
    """What tensors that share memory have in common; None for what has no memory of its own to speak of."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    try:
        return cast(Any, value.untyped_storage())._cdata
    except NotImplementedError:  # a tensor inside vmap has none
        return None
