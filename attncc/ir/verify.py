"""The verifier: what every attention must satisfy before it is emitted."""

from __future__ import annotations

from keyword import iskeyword

from attncc.ir.attention import DTYPES, EMPTIES, NORMALIZERS, OUTPUTS, Access, Attention, Axis, Tensor, W
from attncc.ir.expr import Const, Expr, Index, Load, Op, Size, Var, free, walk


class VerifyError(ValueError):
    """The attention is malformed; the message says where and how."""


def verify(a: Attention) -> Attention:
    """`a` itself if it is well formed. Raises VerifyError otherwise."""
    tensors = check_declarations(a.axes, a.sizes, a.tensors, ("s", "w"))
    require(a.normalizer in NORMALIZERS, f"normalizer {a.normalizer!r}")
    require(a.empty in EMPTIES, f"empty {a.empty!r}")
    require(a.slope == 0 or (a.empty == "mean" and 0 < a.slope <= 1), f"slope {a.slope} with empty {a.empty!r}")
    each_once = len(set(a.outputs)) == len(a.outputs) > 0
    require(each_once and set(a.outputs) <= set(OUTPUTS), f"outputs {a.outputs}")
    require(a.drop is None or a.normalizer == "softmax", "weights that a kernel may drop are those of a softmax")
    require(a.dtype in DTYPES and DTYPES[a.dtype][0] == "float", f"dtype {a.dtype} is no float type")
    layout = sorted(x.name for x in a.out_axes)
    require(not a.layout or sorted(a.layout) == layout, f"layout is a permutation of {layout}")
    _check_expressions(a, tensors, frozenset(a.sizes))
    return a


def check_declarations(
    axes: tuple[Axis, ...], sizes: tuple[Size, ...], tensors: tuple[Tensor, ...], variables: tuple[str, ...]
) -> dict[str, Tensor]:
    """The tensors by name, if names, shapes and extents are well formed. Raises VerifyError otherwise."""
    names = [x.name for x in axes] + [s.name for s in sizes] + [t.name for t in tensors] + list(variables)
    names = [n for n in names if n not in ("q", "k", "v")]  # these tensors share a line word, never a scalar name
    require(len(set(names)) == len(names), f"a name is declared twice: {sorted(names)}")
    for name in (*names, *(t.name for t in tensors)):
        fine = name.isidentifier() and not iskeyword(name) and name not in ("inf", "nan")
        require(fine, f"{name!r} cannot be a name")
    by_name = {t.name: t for t in tensors}
    require(len(by_name) == len(tensors), "a tensor is declared twice")
    known = frozenset[Expr](sizes)
    for tensor in tensors:
        require(tensor.dtype in DTYPES, f"tensor {tensor.name} has unknown dtype {tensor.dtype}")
        for n in tensor.shape:
            require(n.kind == "int" and free(n) <= known, f"the shape of {tensor.name} is integers over sizes")
    for axis in axes:
        if isinstance(axis.extent, Const):
            n = axis.extent.value
            require(type(n) is int and n >= 0, f"axis {axis.name} has the extent {n}")
        else:
            require(axis.extent in known, f"axis {axis.name} has an undeclared extent")
    return by_name


def _check_expressions(a: Attention, tensors: dict[str, Tensor], sizes: frozenset[Expr]) -> None:
    batch: frozenset[Expr] = frozenset(x.index for x in a.batch)
    i, j = frozenset[Expr]([a.i.index]), frozenset[Expr]([a.j.index])
    d, e = frozenset[Expr]([a.d.index]), frozenset[Expr]([a.e.index])
    s, w = frozenset[Expr]([Var("s")]), frozenset[Expr]([W])
    for name, access, allowed in (("q", a.q, i | d), ("k", a.k, j | d), ("v", a.v, j | e)):
        check_access(name, access, tensors, batch | allowed | sizes)
    for name, x, kind, allowed in (
        ("score", a.score, "float", batch | i | j | s),
        ("mask", a.mask, "bool", batch | i | j),
        ("sink", a.sink, "float", batch | i),
        ("drop", a.drop, "float", batch | i),
        ("weight", a.weight, "float", batch | i | j | s | w),
    ):
        if x is not None:
            require(x.kind == kind, f"{name} is a {x.kind}, not a {kind}")
            check_scope(name, x, tensors, allowed | sizes)


def check_access(name: str, access: Access, tensors: dict[str, Tensor], allowed: frozenset[Expr]) -> None:
    tensor = tensors.get(access.tensor)
    if tensor is None:
        raise VerifyError(f"{name} reads {access.tensor}, which is not declared")
    require(tensor.kind == "float", f"{name} reads {tensor.dtype}; operands are floats")
    require(len(access.index) == len(tensor.shape), f"{name} indexes {len(access.index)} of {len(tensor.shape)} dims")
    for x in access.index:
        require(x.kind == "int", f"an index of {name} is a {x.kind}")
        check_scope(name, x, tensors, allowed)


def check_scope(name: str, root: Expr, tensors: dict[str, Tensor], allowed: frozenset[Expr]) -> None:
    for x in walk(root):
        if isinstance(x, Index | Size | Var):
            require(x in allowed, f"{name} mentions {x!r}, which it may not")
        elif isinstance(x, Load):
            tensor = tensors.get(x.tensor)
            if tensor is None:
                raise VerifyError(f"{name} loads {x.tensor}, which is not declared")
            require(tensor.kind == x.kind, f"{name} loads {x.tensor} as {x.kind}")
            require(len(x.index) == len(tensor.shape), f"{name} indexes {x.tensor} with {len(x.index)} indices")
            for c in x.index:
                require(c.kind == "int", f"{name} indexes {x.tensor} with a {c.kind}")
        else:
            require(isinstance(x, Const | Op), f"{name} holds a {type(x).__name__}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise VerifyError(message)
