"""The verifier: what every attention must satisfy before it is emitted."""

from __future__ import annotations

from keyword import iskeyword

from attncc.ir.attention import DTYPES, EMPTIES, NORMALIZERS, OUTPUTS, Access, Attention, Tensor, W
from attncc.ir.expr import Const, Expr, Index, Load, Op, Size, Var, free, walk


class VerifyError(ValueError):
    """The attention is malformed; the message says where and how."""


def verify(a: Attention) -> Attention:
    """`a` itself if it is well formed. Raises VerifyError otherwise."""
    names = [x.name for x in a.axes] + [s.name for s in a.sizes] + [t.name for t in a.tensors] + ["s", "w"]
    names = [n for n in names if n not in ("q", "k", "v")]  # these tensors share a line word, never a scalar name
    _require(len(set(names)) == len(names), f"a name is declared twice: {sorted(names)}")
    for name in (*names, *(t.name for t in a.tensors)):
        fine = name.isidentifier() and not iskeyword(name) and name not in ("inf", "nan")
        _require(fine, f"{name!r} cannot be a name")
    tensors = {t.name: t for t in a.tensors}
    _require(len(tensors) == len(a.tensors), "a tensor is declared twice")
    sizes = frozenset[Expr](a.sizes)
    for tensor in a.tensors:
        _require(tensor.dtype in DTYPES, f"tensor {tensor.name} has unknown dtype {tensor.dtype}")
        for n in tensor.shape:
            _require(n.kind == "int" and free(n) <= sizes, f"the shape of {tensor.name} is integers over sizes")
    for axis in a.axes:
        if isinstance(axis.extent, Const):
            n = axis.extent.value
            _require(type(n) is int and n >= 0, f"axis {axis.name} has the extent {n}")
        else:
            _require(axis.extent in sizes, f"axis {axis.name} has an undeclared extent")
    _require(a.normalizer in NORMALIZERS, f"normalizer {a.normalizer!r}")
    _require(a.empty in EMPTIES, f"empty {a.empty!r}")
    each_once = len(set(a.outputs)) == len(a.outputs) > 0
    _require(each_once and set(a.outputs) <= set(OUTPUTS), f"outputs {a.outputs}")
    _require(a.dtype in DTYPES and DTYPES[a.dtype][0] == "float", f"dtype {a.dtype} is no float type")
    layout = sorted(x.name for x in a.out_axes)
    _require(not a.layout or sorted(a.layout) == layout, f"layout is a permutation of {layout}")
    _check_expressions(a, tensors, sizes)
    return a


def _check_expressions(a: Attention, tensors: dict[str, Tensor], sizes: frozenset[Expr]) -> None:
    batch: frozenset[Expr] = frozenset(x.index for x in a.batch)
    i, j = frozenset[Expr]([a.i.index]), frozenset[Expr]([a.j.index])
    d, e = frozenset[Expr]([a.d.index]), frozenset[Expr]([a.e.index])
    s, w = frozenset[Expr]([Var("s")]), frozenset[Expr]([W])
    for name, access, allowed in (("q", a.q, i | d), ("k", a.k, j | d), ("v", a.v, j | e)):
        _access(name, access, tensors, batch | allowed | sizes)
    for name, x, kind, allowed in (
        ("score", a.score, "float", batch | i | j | s),
        ("mask", a.mask, "bool", batch | i | j),
        ("sink", a.sink, "float", batch | i),
        ("weight", a.weight, "float", batch | i | j | s | w),
    ):
        if x is not None:
            _require(x.kind == kind, f"{name} is a {x.kind}, not a {kind}")
            _scope(name, x, tensors, allowed | sizes)


def _access(name: str, access: Access, tensors: dict[str, Tensor], allowed: frozenset[Expr]) -> None:
    tensor = tensors.get(access.tensor)
    if tensor is None:
        raise VerifyError(f"{name} reads {access.tensor}, which is not declared")
    _require(tensor.kind == "float", f"{name} reads {tensor.dtype}; operands are floats")
    _require(len(access.index) == len(tensor.shape), f"{name} indexes {len(access.index)} of {len(tensor.shape)} dims")
    for x in access.index:
        _require(x.kind == "int", f"an index of {name} is a {x.kind}")
        _scope(name, x, tensors, allowed)


def _scope(name: str, root: Expr, tensors: dict[str, Tensor], allowed: frozenset[Expr]) -> None:
    for x in walk(root):
        if isinstance(x, Index | Size | Var):
            _require(x in allowed, f"{name} mentions {x!r}, which it may not")
        elif isinstance(x, Load):
            tensor = tensors.get(x.tensor)
            if tensor is None:
                raise VerifyError(f"{name} loads {x.tensor}, which is not declared")
            _require(tensor.kind == x.kind, f"{name} loads {x.tensor} as {x.kind}")
            _require(len(x.index) == len(tensor.shape), f"{name} indexes {x.tensor} with {len(x.index)} indices")
            for c in x.index:
                _require(c.kind == "int", f"{name} indexes {x.tensor} with a {c.kind}")
        else:
            _require(isinstance(x, Const | Op), f"{name} holds a {type(x).__name__}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise VerifyError(message)
