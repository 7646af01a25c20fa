"""Row 3, Faster Neighborhood Attention (arXiv 2403.04690): neighbourhoods of one, two and three dimensions, trained."""

from __future__ import annotations

from attncc.bench.systems.gna import Neighbourhood, flex
from attncc.bench.systems.system import Made, System, drawn, settled


def _line(full: bool) -> Made:
    length, window, dim, heads = (4096, 129, 256, 4) if full else (40, 7, 8, 2)
    return settled(Neighbourhood((length,), (window,), (1,), (1,), (False,), dim, heads), *drawn((1, length, dim)))


def _image(full: bool) -> Made:
    side, window, dim, heads = (56, 13, 128, 4) if full else (7, 3, 8, 2)
    model = Neighbourhood((side, side), (window, window), (1, 1), (1, 1), (False, False), dim, heads)
    return settled(model, *drawn((1, side * side, dim)))


def _video(full: bool) -> Made:
    grid, window, dim, heads = ((8, 16, 16), (3, 7, 7), 128, 4) if full else ((3, 4, 5), (2, 3, 3), 8, 2)
    model = Neighbourhood(grid, window, (1, 1, 1), (1, 1, 1), (False,) * 3, dim, heads, eager=True)
    return settled(model, *drawn((1, grid[0] * grid[1] * grid[2], dim)))


_CLAIM = "1607% (1-D) and 581% (2-D) over naive kernels in half precision"
SYSTEMS = (
    System(3, "FNA", "one dimension", "exact", _line, 1, trains=True, flex=flex, claim=_CLAIM),
    System(3, "FNA", "two dimensions", "exact", _image, 1, trains=True, flex=flex, claim=_CLAIM),
    System(3, "FNA", "three dimensions", "exact", _video, 1, trains=True, flex=flex, claim=_CLAIM),
)
