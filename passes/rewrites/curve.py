"""A curve that fills a grid of two or three sides: the generalised Hilbert curve, for sides of any length.

A box that is spanned by three vectors, the curve along the first, is cut into boxes of the same kind whose curves
follow each other (J. Cerveny, "gilbert", 2018). Neighbours on the curve are neighbours in the grid, but for a
diagonal step where sides are odd.
"""

from __future__ import annotations

from collections.abc import Iterator

Vector = tuple[int, int, int]


def curve(grid: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The points of a grid of two or three sides along the curve, each as its places on the sides of the grid."""
    sides = (1,) * (3 - len(grid)) + grid
    order = sorted(range(3), key=lambda n: -sides[n])  # the longest side leads
    a, b, c = (_unit(n, sides[n]) for n in order)
    for point in _box((0, 0, 0), a, b, c):
        yield point[3 - len(grid) :]


def _unit(side: int, length: int) -> Vector:
    return tuple(length if n == side else 0 for n in range(3))  # type: ignore[return-value]


def _box(p: Vector, a: Vector, b: Vector, c: Vector) -> Iterator[Vector]:
    """The points of the box at `p` spanned by a, b and c: from the corner at p to the one at the end of a."""
    w, h, d = map(_length, (a, b, c))
    for v, others in ((a, (h, d)), (b, (w, d)), (c, (w, h))):
        if others == (1, 1):
            yield from _line(p, v)
            return
    da, db, dc = map(_step, (a, b, c))
    a2, b2, c2 = _half(a, w), _half(b, h), _half(c, d)
    last = _add(a, _less(da))
    if 2 * w > 3 * h and 2 * w > 3 * d:  # long: two halves along it
        yield from _box(p, a2, b, c)
        yield from _box(_add(p, a2), _minus(a, a2), b, c)
    elif 3 * h > 4 * d:  # flat: out along b, over, and back
        yield from _box(p, b2, c, a2)
        yield from _box(_add(p, b2), a, _minus(b, b2), c)
        yield from _box(_add(p, last, b2, _less(db)), _less(b2), c, _less(_minus(a, a2)))
    elif 3 * d > 4 * h:  # the same along c
        yield from _box(p, c2, a2, b)
        yield from _box(_add(p, c2), a, b, _minus(c, c2))
        yield from _box(_add(p, last, c2, _less(dc)), _less(c2), _less(_minus(a, a2)), b)
    else:  # like a cube: five boxes
        end = _add(c, _less(dc))
        yield from _box(p, b2, c2, a2)
        yield from _box(_add(p, b2), c, a2, _minus(b, b2))
        yield from _box(_add(p, b2, _less(db), end), a, _less(b2), _less(_minus(c, c2)))
        yield from _box(_add(p, last, b2, end), _less(c), _less(_minus(a, a2)), _minus(b, b2))
        yield from _box(_add(p, last, b2, _less(db)), _less(b2), c2, _less(_minus(a, a2)))


def _line(p: Vector, v: Vector) -> Iterator[Vector]:
    for _ in range(_length(v)):
        yield p
        p = _add(p, _step(v))


def _half(v: Vector, length: int) -> Vector:
    """Half of a vector; an even length where there is a choice, so that the curve ends where the next box begins."""
    half = length // 2
    half += half % 2 if length > 2 else 0
    return tuple(half * x for x in _step(v))  # type: ignore[return-value]


def _length(v: Vector) -> int:
    return abs(sum(v))


def _step(v: Vector) -> Vector:
    return tuple((x > 0) - (x < 0) for x in v)  # type: ignore[return-value]


def _add(*vs: Vector) -> Vector:
    return tuple(map(sum, zip(*vs, strict=True)))  # type: ignore[return-value]


def _less(v: Vector) -> Vector:
    return tuple(-x for x in v)  # type: ignore[return-value]


def _minus(v: Vector, w: Vector) -> Vector:
    return _add(v, _less(w))
