"""Random arguments for ATen operators: tensors that broadcast to each other, numbers, and what a schema asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode

from reading.asked import Sample, writes

Q = torch.Tensor
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_SPECIAL = (float("inf"), -float("inf"), float("nan"), 0.0)
#: What an argument is made of, where its schema does not say enough: a function of the choices that gives its value.
Own = Mapping[str, Callable[["Arguments"], Any]]


def base_name(target: OpOverload) -> str:
    """The name of an operator without its overload, the underscore of an in-place one, and the prefix `special_`."""
    name = target._schema.name.removeprefix("aten::").removeprefix("special_")
    return name if name.startswith("__") else name.rstrip("_")


class Arguments:
    """Choices for one call: a shape that every tensor broadcasts to, and a dtype that most of them have, or all of them
    and the numbers too where it is given."""

    def __init__(
        self, random: Random, *, special: bool = False, nonzero: bool = False, rank: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.random, self.special, self.nonzero, self.alike = random, special, nonzero, dtype is not None
        self.shape = [random.choice((1, 2, 3, 4)) for _ in range(random.randrange(rank, 4))]
        self.dtype = dtype or random.choice((*FLOATS, torch.float32, *WHOLE, torch.int64, torch.bool, torch.bool))

    def tensor(self, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Q:
        """Numbers that every dtype holds; with `special`, infinities and NaN among those of floats."""
        shape, dtype = self.fitting() if shape is None else list(shape), dtype or self.some_dtype()
        by = torch.Generator().manual_seed(self.random.randrange(1 << 30))
        if dtype == torch.bool:
            return torch.rand(shape, generator=by) < 0.5
        if not dtype.is_floating_point:
            lowest = 0 if dtype == torch.uint8 else -5
            x = torch.randint(lowest, 6, shape, generator=by)
            return (torch.where(x == 0, 3, x) if self.nonzero else x).to(dtype)
        x = (torch.randn(shape, generator=by) * 16).round() / 8
        if self.special:
            other = torch.tensor(_SPECIAL)[torch.randint(len(_SPECIAL), shape, generator=by)]
            x = torch.where(torch.rand(shape, generator=by) < 0.3, other, x)
        return x.to(dtype)

    def whole(self, low: int, high: int, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> Q:
        """Integers from `low` to below `high`."""
        by = torch.Generator().manual_seed(self.random.randrange(1 << 30))
        return torch.randint(low, high, list(shape), generator=by).to(dtype)

    def fitting(self) -> list[int]:
        """A shape that broadcasts to the common one."""
        shape = [1 if self.random.random() < 0.25 else n for n in self.shape]
        return shape[self.random.randrange(len(shape)) if self.random.random() < 0.3 else 0 :]

    def some_dtype(self) -> torch.dtype:
        common = self.alike or self.random.random() < 0.7
        return self.dtype if common else self.random.choice((*FLOATS, *WHOLE, torch.bool))

    def number(self) -> bool | int | float:
        r = self.random
        if self.alike and not self.dtype.is_floating_point:
            return r.random() < 0.5 if self.dtype == torch.bool else r.choice((1, 2, 3, 5))
        found = r.choice((r.randrange(-4, 5), r.randrange(-16, 17) / 8, r.randrange(1, 5), r.random() < 0.5))
        return 2 if self.nonzero and not found else found

    def dim(self, rank: int | None = None) -> int:
        rank = len(self.shape) if rank is None else rank
        return self.random.randrange(-rank, rank) if rank else 0


def by_schema(target: OpOverload, a: Arguments, own: Own) -> Sample:
    """A call with arguments of the types that the schema names; `own` are those of this operator."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for place, wanted in enumerate(target._schema.arguments):
        made = own.get(wanted.name)
        if made is not None:
            value = made(a)
        elif place == 0 and writes(target):
            value = a.tensor(a.shape)
        else:
            value = _of_type(str(wanted.type), a, wanted)
        if not wanted.kwarg_only:
            args.append(value)
        elif value != wanted.default_value:
            kwargs[wanted.name] = value
    return Sample(target, tuple(args), kwargs)


def _of_type(kind: str, a: Arguments, wanted: Any) -> Any:
    optional = kind.startswith("Optional")
    if optional and a.random.random() < 0.3:
        return None
    kind = kind.removeprefix("Optional[").removesuffix("]")
    if kind == "Tensor":
        return a.tensor()
    if kind in ("number", "float"):
        if wanted.has_default_value() and not optional and a.random.random() < 0.4:
            return wanted.default_value
        return a.number() if kind == "number" else float(a.number())
    if wanted.has_default_value():
        return wanted.default_value
    if kind == "int":
        return a.random.randrange(-2, 3)
    raise NotImplementedError(f"an argument of type {wanted.type} named {wanted.name}: give it by hand")


def _defined(sample: Sample, result: Q) -> bool:
    """Whether a result is one that does not depend on the machine, as infinities turned into integers do."""
    whole = not result.dtype.is_floating_point and result.dtype != torch.bool
    return not (whole and any(not x.isfinite().all() for x in sample.inputs))


def accepted(make: Callable[[int], Sample], count: int) -> list[Sample]:
    """The first samples of many that torch itself can run."""
    found: list[Sample] = []
    for seed in range(20 * count):
        if len(found) == count:
            break
        sample = make(seed)
        try:
            result = sample.call([x.clone() for x in sample.inputs])
            if sample.writes:  # a trace is more particular about what may be written to what
                with FakeTensorMode() as mode:
                    sample.call([mode.from_tensor(x) for x in sample.inputs])
        except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError, ZeroDivisionError):
            continue
        if isinstance(result, Q) and result.numel() and _defined(sample, result):
            found.append(sample)
    return found
