"""Random calls of the operators that compute element by element: by their schemas, but for a few arguments."""

from __future__ import annotations

from random import Random

import torch
from torch._ops import OpOverload

from reading.arguments import Arguments, Own, accepted, base_name, by_schema
from reading.asked import Sample

_DIVISIONS = frozenset({"div", "divide", "true_divide", "floor_divide", "remainder", "addcdiv", "reciprocal"})
_SHIFTS = ("__rshift__", "__lshift__", "bitwise_right_shift", "bitwise_left_shift")
#: Operators whose rules read these types and no others.
_READ = {
    "pow": torch.float32, **dict.fromkeys(("floor_divide", "remainder"), torch.int64),
    **dict.fromkeys(("bitwise_not", "__xor__"), torch.bool), **dict.fromkeys(_SHIFTS, torch.int64),
    **dict.fromkeys(("bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__"), torch.bool),
}
_TRIANGLES = frozenset({"tril", "triu"})
#: Not tried on infinities: `lerp` is read as a form that is linear in both ends, and what eager's gelu of infinity is
#: depends on the machine.
_FINITE = frozenset({"lerp", "gelu"})
_OWN: dict[str, Own] = {
    "masked_fill": {"mask": lambda a: a.tensor(dtype=torch.bool)},
    "where": {"condition": lambda a: a.tensor(dtype=torch.bool)},
    "dropout": {"p": lambda a: a.random.choice((0.0, 0.3)), "train": lambda a: False},
    **{
        name: {"self": lambda a: a.tensor(dtype=torch.int64), "other": lambda a: a.random.randrange(5)}
        for name in _SHIFTS
    },
    "prelu": {"weight": lambda a: a.tensor((1,), a.dtype)},
    "gelu": {"approximate": lambda a: a.random.choice(("none", "tanh"))},
    "tril": {"self": lambda a: a.tensor(a.shape), "diagonal": lambda a: a.random.randrange(-3, 4)},
    "triu": {"self": lambda a: a.tensor(a.shape), "diagonal": lambda a: a.random.randrange(-3, 4)},
    "to": {"dtype": lambda a: a.some_dtype(), "device": lambda a: torch.device("cpu")},
    "_to_copy": {"dtype": lambda a: a.some_dtype()},
    **{name: {"rounding_mode": lambda a: a.random.choice((None, "floor", "trunc"))} for name in ("div", "divide")},
    **{name: {"alpha": lambda a: a.random.choice((1, 1, 2, -1, 0.5))} for name in ("add", "sub", "subtract", "rsub")},
}
#: The numbers that these overloads take as tensors have no dimensions.
_OF_OVERLOAD: dict[str, Own] = {
    f"aten.{name}.Tensor": {"value": lambda a: a.tensor(())}
    for name in ("masked_fill", "masked_fill_", "fill", "fill_")
}


def samples(target: OpOverload, count: int, seed: int = 0) -> list[Sample]:
    """Calls of an operator that torch accepts."""
    name = base_name(target)

    def make(trial: int) -> Sample:
        random = Random(f"{target} {seed} {trial}")
        special = random.random() < 0.25 and name not in _FINITE
        alike = (None, _READ.get(name, torch.int64), _READ.get(name, torch.float32))[trial % 3]
        rank = 2 if name in _TRIANGLES else 1
        a = Arguments(random, special=special, nonzero=name in _DIVISIONS, rank=rank, dtype=alike)
        return by_schema(target, a, {**_OWN.get(name, {}), **_OF_OVERLOAD.get(str(target), {})})

    return accepted(make, count)
