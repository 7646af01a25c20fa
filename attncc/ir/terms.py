"""Scalar expressions: what one score, one mask bit or one index *is*.

An expression has a kind (`int`, `bool` or `float`) and nothing else: float arithmetic happens in the compute type of
the attention (float32, or float64 for float64 operands), and a place where the model rounds to a narrower type is an
explicit unary op (`bf16(x)`, `f16(x)`, `f32(x)`). Expressions are interned: equal ones are the same object, so
equality and hashing are by identity and a shared mask is analysed once. The text of an expression is Python's own
expression syntax, parenthesised only where precedence needs it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import ClassVar, Literal, TypeVar, cast
from weakref import WeakValueDictionary

Kind = Literal["int", "bool", "float"]
Scalar = bool | int | float

_interned: WeakValueDictionary[tuple[object, ...], Expr] = WeakValueDictionary()
_interning = Lock()
if hasattr(os, "register_at_fork"):  # a child must not begin in the middle of another thread's addition
    os.register_at_fork(
        before=_interning.acquire, after_in_parent=_interning.release, after_in_child=_interning.release
    )
E = TypeVar("E", bound="Expr")


def _intern(cls: type[E], **fields: object) -> E:
    # The type of a field is part of the key because 1 == 1.0 == True, and -0.0 == 0.0.
    key = (cls, *((type(f), repr(f) if isinstance(f, float) else f) for f in fields.values()))
    with _interning:
        found = _interned.get(key)
        if found is None:
            found = object.__new__(cls)
            for name, value in fields.items():
                object.__setattr__(found, name, value)
            _interned[key] = found
    return cast(E, found)


#: How tightly a text binds: a part that binds less tightly than its place asks for is put in parentheses.
PRECEDENCE = {
    "or": 1, "and": 2, "not": 3, "lt": 4, "le": 4, "eq": 4, "ne": 4, "add": 5, "sub": 5, "mul": 6, "div": 6,
    "floordiv": 6, "mod": 6, "neg": 7,
}  # fmt: skip
ATOM = 9


class Expr:
    """Base of all expressions. Immutable and interned; build through the functions of `attncc.ir.build`."""

    __slots__ = ("__weakref__", "_repr")
    __match_args__: ClassVar[tuple[str, ...]] = ()
    _repr: str

    @property
    def kind(self) -> Kind:
        raise NotImplementedError

    @property
    def children(self) -> tuple[Expr, ...]:
        return ()

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"expressions are immutable; cannot set {name}")

    def __copy__(self) -> Expr:
        return self

    def __deepcopy__(self, memo: object) -> Expr:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), tuple(getattr(self, f) for f in self.__match_args__)

    def text(self, names: Mapping[Expr, str]) -> tuple[str, int]:
        """Canonical text, and how tightly it binds. Subexpressions in `names` are written as their name."""
        return (names[self], ATOM) if self in names else self._text(names)

    def _text(self, names: Mapping[Expr, str]) -> tuple[str, int]:
        raise NotImplementedError

    def __repr__(self) -> str:
        found = getattr(self, "_repr", None)
        if found is None:
            found = self.text({})[0]
            if len(found) <= _SHORT:  # what is sorted by its text is asked for it again and again
                object.__setattr__(self, "_repr", found)
        return found


#: Characters of a text that is kept: those of nested expressions hold each other's.
_SHORT = 256


class Index(Expr):
    """A loop index of the attention (`b`, `h`, `i`, `j`, `d`, `e`), an integer from 0 to the axis size - 1."""

    __slots__ = ("name",)
    __match_args__ = ("name",)
    name: str

    def __new__(cls, name: str) -> Index:
        return _intern(cls, name=name)

    @property
    def kind(self) -> Kind:
        return "int"

    def _text(self, names: Mapping[Expr, str]) -> tuple[str, int]:
        return self.name, ATOM


class Size(Expr):
    """An integer known at the call: an extent, a cache length."""

    __slots__ = ("name",)
    __match_args__ = ("name",)
    name: str

    def __new__(cls, name: str) -> Size:
        return _intern(cls, name=name)

    @property
    def kind(self) -> Kind:
        return "int"

    def _text(self, names: Mapping[Expr, str]) -> tuple[str, int]:
        return self.name, ATOM


class Var(Expr):
    """A float the kernel computes: `s`, the product q_i . k_j, or `w`, the normalised weight."""

    __slots__ = ("name",)
    __match_args__ = ("name",)
    name: str

    def __new__(cls, name: str) -> Var:
        return _intern(cls, name=name)

    @property
    def kind(self) -> Kind:
        return "float"

    def _text(self, names: Mapping[Expr, str]) -> tuple[str, int]:
        return self.name, ATOM


class Const(Expr):
    """A literal. A `bool`, an `int` and a `float` of the same value are three different constants."""

    __slots__ = ("value",)
    __match_args__ = ("value",)
    value: Scalar

    def __new__(cls, value: Scalar) -> Const:
        if type(value) not in (bool, int, float):
            raise TypeError(f"a constant is a Python bool, int or float, not {type(value).__name__}")
        return _intern(cls, value=value)

    @property
    def kind(self) -> Kind:
        return "bool" if isinstance(self.value, bool) else "int" if isinstance(self.value, int) else "float"

    def _text(self, names: Mapping[Expr, str]) -> tuple[str, int]:
        value = self.value
        text = repr(value)
        if isinstance(value, float) and not math.isfinite(value):
            text = "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
        return text, PRECEDENCE["neg"] if text.startswith("-") else ATOM


class Load(Expr):
    """One element of a tensor. Every index must be in range at every point of the iteration space: whoever builds a
    load that could leave its tensor clamps the index and selects around it."""

    __slots__ = ("_kind", "index", "tensor")
    __match_args__ = ("tensor", "index", "_kind")
    tensor: str
    index: tuple[Expr, ...]
    _kind: Kind

    def __new__(cls, tensor: str, index: tuple[Expr, ...], kind: Kind) -> Load:
        return _intern(cls, tensor=tensor, index=index, _kind=kind)

    @property
    def kind(self) -> Kind:
        return self._kind

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.index

    def _text(self, names: Mapping[Expr, str]) -> tuple[str, int]:
        return f"{self.tensor}[{', '.join(c.text(names)[0] for c in self.index) or '()'}]", ATOM


class Op(Expr):
    """An operation of `OPS` on arguments of the kinds it asks for."""

    __slots__ = ("_kind", "args", "name")
    __match_args__ = ("name", "args")
    name: str
    args: tuple[Expr, ...]

    _kind: Kind

    def __new__(cls, name: str, args: tuple[Expr, ...]) -> Op:
        return _intern(cls, name=name, args=args, _kind=_result_kind(name, args))

    @property
    def kind(self) -> Kind:
        return self._kind

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.args

    def _text(self, names: Mapping[Expr, str]) -> tuple[str, int]:
        level, rule = PRECEDENCE.get(self.name, ATOM), OPS[self.name]

        def part(x: Expr, least: int) -> str:
            text, own = x.text(names)
            return text if own >= least else f"({text})"

        if rule.infix:
            left = level if rule.gives != "b" or rule.takes == "bb" else level + 1  # comparisons do not chain
            return f"{part(self.args[0], left)} {rule.infix} {part(self.args[1], level + 1)}", level
        if self.name == "not":
            return f"not {part(self.args[0], level)}", level
        if self.name == "neg":
            return f"-{part(self.args[0], ATOM)}", level
        return f"{self.name}({', '.join(a.text(names)[0] for a in self.args)})", ATOM


@dataclass(frozen=True)
class OpRule:
    """Kinds an op accepts (one letter an argument: n = int or float and all alike, i, b, f, a = anything) and gives
    (`n`: as its arguments; `a`: as its last argument)."""

    takes: str
    gives: str
    infix: str = ""


#: Every operation an expression may hold. `floordiv` and `mod` floor as Python's do; `truncdiv` and `int` truncate.
#: `minfirst` and `maxfirst` are `min` and `max` whose gradient at a tie is all the first argument's (there, it is half
#: each argument's); `stop(x)` is x, and no gradient flows into it. `mix(a, b, j)` is
#: 31 random bits of counter j under the key (a, b), see `attncc.ir.streams`.
OPS: dict[str, OpRule] = {
    "add": OpRule("nn", "n", "+"),
    "sub": OpRule("nn", "n", "-"),
    "mul": OpRule("nn", "n", "*"),
    "div": OpRule("ff", "f", "/"),
    "floordiv": OpRule("ii", "i", "//"),
    "mod": OpRule("ii", "i", "%"),
    "truncdiv": OpRule("ii", "i"),
    "neg": OpRule("n", "n"),
    "abs": OpRule("n", "n"),
    "min": OpRule("nn", "n"),
    "max": OpRule("nn", "n"),
    "minfirst": OpRule("ff", "f"),
    "maxfirst": OpRule("ff", "f"),
    "lt": OpRule("nn", "b", "<"),
    "le": OpRule("nn", "b", "<="),
    "eq": OpRule("nn", "b", "=="),
    "ne": OpRule("nn", "b", "!="),
    "and": OpRule("bb", "b", "and"),
    "or": OpRule("bb", "b", "or"),
    "not": OpRule("b", "b"),
    "where": OpRule("baa", "a"),
    "float": OpRule("a", "f"),
    "int": OpRule("a", "i"),
    "bf16": OpRule("f", "f"),
    "f16": OpRule("f", "f"),
    "f32": OpRule("f", "f"),
    "exp": OpRule("f", "f"),
    "log": OpRule("f", "f"),
    "log1p": OpRule("f", "f"),
    "tanh": OpRule("f", "f"),
    "sigmoid": OpRule("f", "f"),
    "sqrt": OpRule("f", "f"),
    "rsqrt": OpRule("f", "f"),
    "erf": OpRule("f", "f"),
    "floor": OpRule("f", "f"),
    "ceil": OpRule("f", "f"),
    "round": OpRule("f", "f"),
    "pow": OpRule("ff", "f"),
    "isnan": OpRule("f", "b"),
    "sin": OpRule("f", "f"),
    "cos": OpRule("f", "f"),
    "stop": OpRule("f", "f"),
    "mix": OpRule("iii", "i"),
}

ROUNDINGS = ("bf16", "f16", "f32")
_LETTER: dict[Kind, str] = {"int": "i", "bool": "b", "float": "f"}
_KIND: dict[str, Kind] = {"i": "int", "b": "bool", "f": "float"}


class KindError(TypeError):
    """An operation got arguments of kinds it does not take."""


def _result_kind(name: str, args: tuple[Expr, ...]) -> Kind:
    rule = OPS.get(name)
    if rule is None:
        raise KindError(f"no operation {name!r}")
    if len(args) != len(rule.takes):
        raise KindError(f"{name} takes {len(rule.takes)} arguments, got {len(args)}")
    for wanted, arg in zip(rule.takes, args, strict=True):
        letter = _LETTER[arg.kind]
        if not (wanted == "a" or wanted == letter or (wanted == "n" and letter in "if")):
            raise KindError(f"{name} cannot take a {arg.kind}")
    alike = [a.kind for w, a in zip(rule.takes, args, strict=True) if w == "n" or (w == "a" and name == "where")]
    if len(set(alike)) > 1:
        raise KindError(f"{name} takes arguments of one kind, got {', '.join(alike)}")
    return args[-1].kind if rule.gives in "na" else _KIND[rule.gives]


def walk(*roots: Expr, beyond: Iterable[Expr] = ()) -> Iterator[Expr]:
    """Every distinct subexpression once, children before parents; those of `beyond`, and what only they hold, not."""
    seen: set[Expr] = set(beyond)
    stack: list[tuple[Expr, bool]] = [(r, False) for r in reversed(roots)]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((c, False) for c in reversed(node.children) if c not in seen)


def free(*roots: Expr) -> frozenset[Expr]:
    """The indices, sizes and variables that occur in the roots."""
    return frozenset(n for n in walk(*roots) if isinstance(n, Index | Size | Var))


def mentions(root: Expr, *parts: Expr) -> bool:
    """Whether one of `parts` occurs in `root`."""
    return any(n in parts for n in walk(root))


def loads(*roots: Expr) -> tuple[Load, ...]:
    return tuple(n for n in walk(*roots) if isinstance(n, Load))
