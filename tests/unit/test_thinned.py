"""Which combinations of parameters run on every change."""

from __future__ import annotations

from parameters.thinned import thinned


def test_each_value_stands_on_the_diagonal() -> None:
    axes = (["a", "b", "c", "d", "e"], [1, 2], ["x", "y", "z"])
    found = thinned(*axes)
    assert [tuple(p.values) for p in found] == [(a, n, x) for a in axes[0] for n in axes[1] for x in axes[2]]
    quick = [p.values for p in found if not p.marks]
    assert len(quick) == 5
    assert all({values[n] for values in quick} == set(axis) for n, axis in enumerate(axes))
    assert len({values[1:] for values in quick}) > 3
    assert all(p.marks[0].name == "full" for p in found if p.marks)
