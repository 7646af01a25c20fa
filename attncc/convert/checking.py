"""Whether a converted program computes what the one that was given does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten_with_path

from attncc.frontends.targets import one_line
from attncc.progress import step


class CheckError(Exception):
    """A converted program computes something else. The message is one line that says where, and by how much."""


#: How far two correct programs may lie apart, as a part of the largest number of the output.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Trial:
    """Arguments to run both programs on, made when they are needed, and what to call them."""

    name: str
    make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]


def check(
    before: Callable[..., Any], after: Callable[..., Any], inputs: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
) -> str:
    """`agree` on example inputs, and then on those of other sizes."""
    names = ["example inputs", *(f"inputs of sizes {_sizes(x)}" for x in inputs[1:])]
    return agree(before, after, [Trial(name, lambda x=x: x) for name, x in zip(names, inputs, strict=True)])


def agree(before: Callable[..., Any], after: Callable[..., Any], trials: Sequence[Trial]) -> str:
    """Run both on each trial; one line on the largest difference. Raises CheckError where they disagree, or where the
    model fails on the first."""
    worst, compared = 0.0, 0
    for at, trial in enumerate(trials):
        step(f"checking, inputs {at + 1} of {len(trials)}")
        args, kwargs = trial.make()
        with torch.no_grad():
            try:
                wanted = before(*args, **kwargs)
            except Exception as error:
                if at == 0:
                    raise CheckError(f"the model itself fails on {trial.name}: {one_line(error)}") from error
                continue  # sizes that the model does not take either
            try:
                found = after(*args, **kwargs)
            except Exception as error:
                raise CheckError(f"the converted program fails on {trial.name}: {one_line(error)}") from error
        worst = max(worst, compare(wanted, found, trial.name))
        compared += 1
    plural = "" if compared == 1 else "s"
    return f"checked on {compared} set{plural} of inputs: the largest difference is {worst:.1e} of the largest number"


def _sizes(inputs: Any) -> str:
    leaves = [x for _, x in tree_flatten_with_path(inputs)[0] if isinstance(x, torch.Tensor)]
    return ", ".join("x".join(map(str, x.shape)) for x in leaves[:4])


def compare(wanted: Any, found: Any, sizes: str) -> float:
    """The largest difference of two results, as a part of the largest number. Raises CheckError where it is more than
    rounding; the shapes, the dtypes and what is no number must be equal."""
    pairs = zip(_leaves(wanted), _leaves(found), strict=False)
    if len(_leaves(wanted)) != len(_leaves(found)):
        raise CheckError(f"on {sizes}: {len(_leaves(found))} outputs in place of {len(_leaves(wanted))}")
    worst = 0.0
    for (name, x), (_, y) in pairs:
        if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
            if x != y:
                raise CheckError(f"on {sizes}, output {name}: {y!r} in place of {x!r}")
            continue
        if x.shape != y.shape or x.dtype != y.dtype:
            there, here = (f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in (y, x))
            raise CheckError(f"on {sizes}, output {name}: {there} in place of {here}")
        if not x.numel():
            continue
        if not x.is_floating_point():
            if not torch.equal(x, y):
                raise CheckError(f"on {sizes}, output {name}: {int((x != y).sum())} of {x.numel()} elements differ")
            continue
        a, b = x.double(), y.double()
        special = ~a.isfinite() | ~b.isfinite()
        if not torch.equal(a.nan_to_num(0, 1, -1)[special], b.nan_to_num(0, 1, -1)[special]) or not torch.equal(
            a.isfinite(), b.isfinite()
        ):
            raise CheckError(f"on {sizes}, output {name}: NaN or infinity where the other has a number")
        difference = (a - b).abs().masked_fill(special, 0.0)
        scale = float(a.masked_fill(special, 0.0).abs().max())
        apart = float(difference.max()) / max(scale, 1e-6)
        if apart > TOLERANCE.get(x.dtype, 1e-4):
            place = [int(n) for n in torch.unravel_index(difference.argmax(), difference.shape)]
            raise CheckError(
                f"on {sizes}, output {name}: differs most at {place}, {float(y[tuple(place)]):.6g} in place of "
                f"{float(x[tuple(place)]):.6g} ({apart:.1e} of the largest number)"
            )
        worst = max(worst, apart)
    return worst


def _leaves(x: Any) -> list[tuple[str, Any]]:
    return [("".join(map(str, path)) or "0", leaf) for path, leaf in tree_flatten_with_path(x)[0]]
