"""The body of a `Scan` that is one step of a linear attention: identified, and shown to be one by its values.

    S = exp(g) S + k (beta (v - (exp(g) S)^T k))^T,  o = c S^T q          g, beta and the difference only in some rules

The body is a function of the state and of what it reads in a turn, composed of analytic operations alone; and so is the
step. Two such functions are equal everywhere if they are at one point drawn at random, but for points of measure zero
(Schwartz, 1980). So the body runs once on random numbers, and the steps that its inputs may be are compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import TYPE_CHECKING, Any

import torch

from attncc.frontends.onnx.control import graphs_of
from attncc.frontends.onnx.running import Running, of_data
from attncc.frontends.onnx.values import DTYPES, Unsupported, of_constant, tensor
from attncc.frontends.targets import TargetError
from attncc.patterns.graph.operators import hint

if TYPE_CHECKING:
    import onnx_ir as ir

    from attncc.convert.onnx_inlining import Turn

#: Operators that are analytic in their tensors.
_ANALYTIC = frozenset({
    "Add", "Cast", "CastLike", "Constant", "Div", "Einsum", "Exp", "Expand", "Gemm", "Identity", "MatMul", "Mul", "Neg",
    "ReduceSum", "Reshape", "Squeeze", "Sub", "Transpose", "Unsqueeze",
})  # fmt: skip
#: How far a body, in the precision of its types, may lie from the step, as a part of the largest number.
_NEAR = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Step:
    """Which inputs of a turn are what (numbers of scanned inputs), the `scale` of what is read, whether the state has
    its value channels before those of the keys, and the types of state and result. Heads of queries share those of
    keys in groups."""

    q: int
    k: int
    v: int
    decay: int | None
    rate: int | None
    delta: bool
    turned: bool
    scale: float = 1.0
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)

    @property
    def equation(self) -> str:
        decayed = "S" if self.decay is None else "exp(g) S"
        change = f"(v - ({decayed})^T k)" if self.delta else "v"
        rate = "" if self.rate is None else "rate * "
        scale = "" if self.scale == 1.0 else f"{self.scale:.6g} "
        change = change.replace("(S)", "S")
        return f"S = {decayed} + k {rate}{change}, out = {scale}q S"

    @property
    def rule(self) -> str:
        return {(False, False): "linear", (True, False): "gated", (False, True): "delta", (True, True): "gated_delta"}[
            self.decay is not None, self.delta
        ]


def step_of(node: ir.Node, turn: Turn, opset: int) -> Step | str:
    """The step that a body is, or why it is none, in a few words."""
    body = graphs_of(node)["body"]
    state, along = turn.states[0] if len(turn.states) == 1 else None, turn.along
    if state is None or len(body.outputs) != 2 or not 3 <= len(along) <= 5:
        return "it carries on, or gives, more than a state and a result"
    if turn.backwards:
        return "it goes backwards"
    strange = sorted({n.op_type for n in body} - _ANALYTIC)
    casts = [n.attributes["to"].as_int() for n in body if n.op_type == "Cast"]
    if strange or not all(DTYPES.get(x, torch.bool).is_floating_point for x in casts):
        return f"it holds {', '.join(strange[:3]) or 'a Cast to integers'}"
    if any(isinstance(x, torch.Tensor) and x.numel() > 1 for x in turn.around.values()):
        return "it reads a tensor that does not change from turn to turn"
    shapes = [_known(x.shape) for x in (state, *along)]
    if any(x is None for x in shapes) or not all(x.is_floating_point() for x in (state, *along)):
        return "its sizes, or their types, are not known"
    g = torch.Generator().manual_seed(0)
    drawn = [
        (torch.randn(n or [], generator=g) / 2).to(x.dtype) for n, x in zip(shapes, (state, *along), strict=True)
    ]  # fmt: skip
    try:
        new, read = _run(body, drawn, turn, opset)
    except (TargetError, Unsupported) as error:
        return str(error)
    drawn = [drawn[0], *(x.unsqueeze(-1) if x.ndim == 2 else x for x in drawn[1:])]  # one number for each head
    for step in _candidates([list(x.shape) for x in drawn]):
        found = _agrees(step, drawn, new, read, [float(x) for x in turn.around.values() if isinstance(x, float)])
        if found is not None:
            return found
    return "no step of a linear attention gives what it gives"


def _known(shape: Sequence[Any]) -> list[int] | None:
    sizes = [hint(n) for n in shape]
    return None if None in sizes else [int(n) for n in sizes if n is not None]


def _run(body: ir.Graph, drawn: Sequence[torch.Tensor], turn: Turn, opset: int) -> list[torch.Tensor]:
    data = {
        str(name): of_constant(of_data(v.const_value)) for name, v in body.initializers.items()
        if v.const_value is not None
    }  # fmt: skip
    around = {v: _plain(x) for v, x in turn.around.items()}
    return [tensor(x) for x in Running(opset, data).graph(body, drawn, around)]


def _plain(x: Any) -> Any:
    """A size, or sizes, as the numbers that the trace has for them."""
    if isinstance(x, list):
        return [_plain(n) for n in x]
    return hint(x) if isinstance(x, torch.SymInt) else x


def _candidates(shapes: Sequence[Sequence[int]]) -> Iterator[Step]:
    """The steps that states and inputs of these shapes may be: (b, h, d, e) or (b, h, e, d); (b, h, channels)."""
    state, along = shapes[0], shapes[1:]
    if len(state) != 4 or any(len(x) != 3 for x in along):
        return
    for turned, delta, order in product((False, True), (False, True), permutations(range(len(along)))):
        d, e = state[3:1:-1] if turned else state[2:]
        (q, k, v), more = order[:3], order[3:]
        roles: list[tuple[int | None, int | None]] = [(None, None)]
        if more:
            roles = [(more[0], None), (None, more[0])] if len(more) == 1 else [(more[0], more[1])]
        for decay, rate in roles:
            fits = delta == (rate is not None) and (
                along[k] == [*state[:2], d] and along[v] == [*state[:2], e] and along[q][::2] == [state[0], d]
                and along[q][1] % state[1] == 0 and (along[rate][2] == 1 if rate is not None else True)
                and (decay is None or along[decay][2] in (1, d))
            )  # fmt: skip
            if fits:
                yield Step(q, k, v, decay, rate, delta, turned)


def _agrees(
    step: Step, drawn: Sequence[torch.Tensor], new: torch.Tensor, read: torch.Tensor, numbers: Sequence[float]
) -> Step | None:
    """The step with its scale, where it gives the new state and what was read. `numbers` are those that the body reads:
    the scale is one of them, or the usual one, where rounding hides the difference."""
    state, *along = (x.double() for x in drawn)
    state = state.transpose(-1, -2) if step.turned else state
    q, k, v = along[step.q], along[step.k], along[step.v]
    state = state if step.decay is None else state * along[step.decay].exp().unsqueeze(-1)
    change = v - (k.unsqueeze(-2) @ state).squeeze(-2) if step.delta else v
    change = change if step.rate is None else change * along[step.rate]
    state = state + k.unsqueeze(-1) * change.unsqueeze(-2)
    out = (q.unsqueeze(-2) @ state.repeat_interleave(q.shape[1] // state.shape[1], 1)).squeeze(-2)
    wanted = state.transpose(-1, -2) if step.turned else state
    if wanted.shape != new.shape or out.shape != read.shape or not _near(wanted, new):
        return None
    scale = float((out * read.double()).sum() / (out * out).sum())
    usual = [1.0, q.shape[-1] ** -0.5, *numbers, *(1 / x for x in numbers if x)]
    nearest = min(usual, key=lambda x: abs(x - scale))
    scale = nearest if abs(nearest - scale) <= 0.1 * _NEAR[read.dtype] * abs(scale) else scale
    if not _near(out * scale, read):
        return None
    return replace(step, scale=scale, dtypes=(new.dtype, read.dtype))


def _near(wanted: torch.Tensor, found: torch.Tensor) -> bool:
    apart = (wanted - found.double()).abs().max() / wanted.abs().max()
    return bool(apart <= _NEAR.get(found.dtype, 0.0))
