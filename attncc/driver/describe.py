"""From what lifting found to what a report says: where a site is in the user's code, and what it computes."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import torch
from torch import fx

from attncc.driver.baseline import Untimeable, hint
from attncc.ir import Attention, Linear, print_expr
from attncc.ir.build import TRUE
from attncc.ir.expr import Const, Expr, Size, Var, loads, substitute
from attncc.ir.linear import UNIT, X
from attncc.passes.bounds.area import Area, area
from attncc.passes.bounds.area import picture as draw
from attncc.passes.bounds.bounds import loop_bounds
from attncc.patterns.graph.facts import Facts
from attncc.patterns.linear.linear import Recognised
from attncc.patterns.site.assemble import Lifted

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
#: Folders that libraries are installed into.
_LIBRARIES = ("site-packages", "dist-packages")
#: Where the operators of ONNX files run: no line of anybody's model.
_FRONTENDS = str(Path(__file__).parents[1] / "frontends")
#: Characters of a feature map that is written out in an equation.
_LONGEST_MAP = 16
_MODULE_PREFIX = re.compile(r"^L\['[^']*'\]\.?|^self\.?")


def module_path(n: fx.Node) -> str:
    """The path of the innermost module that a node of a Dynamo graph belongs to, as the user would write it."""
    stack = n.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    path = _MODULE_PREFIX.sub("", path)
    path = re.sub(r"\._modules\['([^']+)'\]", r".\1", "." + path if path else "")
    path = re.sub(r"\['?([^'\]]+)'?\]", r".\1", path)
    return path.strip(".").replace("..", ".")


def user_line(n: fx.Node) -> str:
    """`file.py:12` of the innermost line of the user's code (or of the model library's) that made a node."""
    frames = list(_FRAME.finditer(n.meta.get("stack_trace") or ""))
    homes = (str(Path(torch.__file__).parent), _FRONTENDS)
    own = [f for f in frames if not f["file"].startswith(homes)]
    if not own and frames and not any(f["file"].startswith(_FRONTENDS) for f in frames):
        own = frames
    if not own:
        return ""
    return f"{short_path(own[-1]['file'])}:{own[-1]['line']}"


def short_path(name: str) -> Path:
    """A file's path from where libraries are, or from the current directory; else as it is."""
    file = Path(name)
    at = max((n for n, part in enumerate(file.parts) if part in _LIBRARIES), default=None)
    if at is not None:
        return Path(*file.parts[at + 1 :])
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


def equation(a: Attention) -> str:
    """One line of mathematics: `softmax(s * 0.125) v`, s being q_i . k_j."""
    score = print_expr(a.score)
    normalised = {"none": score}.get(a.normalizer, f"{a.normalizer}({score})")
    sink = "" if a.sink is None else f" with sink {print_expr(a.sink)}"
    weight = print_expr(a.weight)
    return f"{normalised if weight == 'w' else weight.replace('w', normalised, 1)} v{sink}"


def linear_equation(a: Linear) -> str:
    """One line of mathematics: `relu(q) (relu(k)^T v) / z, z the sum of weights`. A long feature map has a name."""
    shown: list[str] = []
    named: list[str] = []
    for phi, operand, name in ((a.phi_q, "q", "f"), (a.phi_k, "k", "f" if a.phi_k is a.phi_q else "g")):
        text = print_expr(substitute(phi, {X: Var(operand)}))
        if len(text) > _LONGEST_MAP:
            named.append(f"{name}(x) = {print_expr(phi)}")
            text = f"{name}({operand})"
        shown.append(text if text == operand or text.endswith(")") else f"({text})")
    q, k = shown
    divided = "" if a.over is None else f" / {z}" if (z := print_expr(a.over)) == "z" else f" / ({z})"
    said = [*dict.fromkeys(named), *(["z the sum of weights"] if a.over is not None else [])]
    if a.sees == "all":
        return ", ".join([f"{q} ({k}^T v){divided}", *said])
    decay = "" if a.decay is UNIT else f"{_factor(a.decay)} * "
    change = "v" if a.rule == "add" else f"(v - ({decay}S)^T {k})"
    rate = "" if a.rate is UNIT else f"{_factor(a.rate)} * "
    return ", ".join([f"S = {decay}S + {k} {rate}{change}", f"out = {q} S{divided}", *said])


def _factor(x: Expr) -> str:
    """As a factor of a product."""
    text = print_expr(x)
    return f"({text})" if " + " in text or " - " in text else text


def linear_mask(a: Linear) -> str:
    """Which keys a row sees."""
    return "all" if a.sees == "all" else "j <= i"


def mask(a: Attention) -> str:
    return "all" if a.mask is TRUE else print_expr(a.mask)


def sizes_of(site: Lifted | Recognised, facts: Facts) -> tuple[int, ...] | None:
    """The sizes that the graph was captured with; None where they are known only from data."""
    try:
        return tuple(hint(x, facts) for x in site.sizes)
    except Untimeable:
        return None


@lru_cache(maxsize=256)
def extent_of(a: Attention, sizes: tuple[int, ...]) -> tuple[Area | None, str | None]:
    """How much of the scores the mask leaves, and a picture of it. No area where the bounds read data."""
    bounds = loop_bounds(a)
    read = bool(loads(*bounds.expressions)) or any(x.bits for x in bounds.visit)
    found = None if read else area(a, bounds, sizes)
    return found, None if a.mask is TRUE else draw(a, sizes)


def shapes(site: Lifted | Recognised) -> dict[str, tuple[int | str, ...]]:
    """Dimensions of q, k and v, and of a state that comes in, as the model sees them; symbols as text."""
    a = site.attention if isinstance(site, Lifted) else site.linear
    origin = dict(zip(a.sizes, site.sizes, strict=True))

    def extent(x: Const | Size) -> int | str:
        value: Expr = origin.get(x, x) if isinstance(x, Size) else x
        return int(value.value) if isinstance(value, Const) else print_expr(value)

    batch = tuple(extent(x.extent) for x in a.batch)
    found = {
        "q": (*batch, extent(a.i.extent), extent(a.d.extent)),
        "k": (*batch, extent(a.j.extent), extent(a.d.extent)),
        "v": (*batch, extent(a.j.extent), extent(a.e.extent)),
    }
    state = isinstance(a, Linear) and a.state is not None
    return found | ({"state": (*batch, extent(a.d.extent), extent(a.e.extent))} if state else {})
