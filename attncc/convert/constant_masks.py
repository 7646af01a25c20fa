"""Masks and distances that a file holds as data, where they follow a rule: the rule takes the place of the data in what
is read.

    low <= j - i <= high, in booleans or in two numbers        a * i + b * j + c, in integers
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def spelled(x: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """What makes a tensor of (.., rows, keys) that follows one of the rules; None where it does not."""
    rows, keys = x.shape[-2:]
    flat = x.reshape(-1, rows, keys)
    if x.is_complex() or not torch.equal(flat, flat[:1].expand_as(flat)):
        return None
    shape, dtype = x.shape, x.dtype
    rule = _band(flat[0]) or (None if x.is_floating_point() or dtype == torch.bool else _linear(flat[0]))
    return None if rule is None else lambda: rule().to(dtype).expand(shape)


def _band(x: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """One value where low <= j - i <= high, another elsewhere. Where the band ends at a corner it is left open."""
    rows, keys = x.shape
    far = torch.arange(keys) - torch.arange(rows)[:, None]
    one = x[0, 0]
    other = x[x != one]
    if not other.numel() or one != one or not bool((other == other[0]).all()):
        return None
    ends = [_ends(far, x == one), _ends(far, x != one)]
    if ends == [None, None]:
        return None
    (low, high), inside, outside = (ends[0], one, other[0]) if ends[0] else (ends[1] or (0, 0), other[0], one)
    bounded = low > 1 - rows, high < keys - 1
    if all(bounded) and low > 0:  # a band beside the diagonal is a list of keys, more than a rule
        return None
    kind, values = x.dtype, (inside.item(), outside.item())

    def make() -> torch.Tensor:
        at, row = torch.arange(keys), torch.arange(rows)[:, None]
        seen = at <= row + high if bounded[1] else None
        if bounded[0]:
            near = row - at <= -low
            seen = near if seen is None else seen & near
        assert seen is not None
        if kind == torch.bool:
            return seen if values[0] else ~seen
        return torch.where(seen, *(torch.full((), v, dtype=kind) for v in values))

    return make


def _ends(far: torch.Tensor, seen: torch.Tensor) -> tuple[int, int] | None:
    """(low, high) where `seen` is low <= far <= high."""
    low, high = int(far[seen].min()), int(far[seen].max())
    return (low, high) if torch.equal(seen, (far >= low) & (far <= high)) else None


def _linear(x: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """Integers of a * i + b * j + c."""
    rows, keys = x.shape
    c = int(x[0, 0])
    a, b = int(x[1, 0]) - c if rows > 1 else 0, int(x[0, 1]) - c if keys > 1 else 0
    if not a or not b or not torch.equal(x.long(), a * torch.arange(rows)[:, None] + b * torch.arange(keys) + c):
        return None
    return lambda: a * torch.arange(rows)[:, None] + b * torch.arange(keys) + c
