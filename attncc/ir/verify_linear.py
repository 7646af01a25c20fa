"""What every linear attention must satisfy."""

from __future__ import annotations

from attncc.ir.attention import DTYPES
from attncc.ir.expr import Expr
from attncc.ir.linear import LINEAR_OUTPUTS, RULES, SEES, UNIT, Linear, X, Z
from attncc.ir.verify import check_access, check_declarations, check_scope, require


def verify_linear(a: Linear) -> Linear:
    """`a` itself if it is well formed. Raises VerifyError otherwise."""
    tensors = check_declarations(a.axes, a.sizes, a.tensors, ("x", "z"))
    sizes = frozenset[Expr](a.sizes)
    batch = frozenset[Expr](x.index for x in a.batch)
    i, j, d, e = (frozenset[Expr]([x.index]) for x in (a.i, a.j, a.d, a.e))
    for name, access in a.accesses():
        check_access(name, access, tensors, batch | sizes | {"q": i | d, "k": j | d, "v": j | e, "state": d | e}[name])
    for name, x, allowed in (
        ("phi_q", a.phi_q, batch | i | d | {X}), ("phi_k", a.phi_k, batch | j | d | {X}),
        ("decay", a.decay, batch | j | d | e), ("rate", a.rate, batch | j | d | e), ("over", a.over, batch | {Z}),
    ):  # fmt: skip
        if x is not None:
            require(x.kind == "float", f"{name} is a {x.kind}, not a float")
            check_scope(name, x, tensors, allowed | sizes)
    require(a.rule in RULES, f"rule {a.rule!r}")
    require(a.sees in SEES, f"sees {a.sees!r}")
    require(a.sees == "all" or a.i.extent == a.j.extent, "a query that sees the past needs as many rows as keys")
    plain = a.rule == "add" and a.decay is UNIT and a.state is None
    require(a.over is None or plain, "what the output is divided by is a sum of weights without decay or state")
    each_once = len(set(a.outputs)) == len(a.outputs) > 0
    require(each_once and set(a.outputs) <= set(LINEAR_OUTPUTS), f"outputs {a.outputs}")
    require(a.dtype in DTYPES and DTYPES[a.dtype][0] == "float", f"dtype {a.dtype} is no float type")
    return a
