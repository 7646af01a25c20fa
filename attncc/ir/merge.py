"""Merge: the outputs of several branches become one.

    softmax   lse[r] = log sum_k exp(lse_k[r])      share_k[r] = exp(lse_k[r] - lse[r])     out = sum_k share_k out_k
    sum       out = sum_k out_k
    gated     out = sum_k gate_k[r] out_k

The first is one softmax whose keys the branches have between them, the merge of online softmax (Milakov and Gimelshein,
2018, arXiv 1805.02867). A branch that a row is not routed to has the gate zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, get_args

import torch

from attncc.ir.attention import DTYPES, Axis, Tensor
from attncc.ir.evaluate import DTYPE_OF
from attncc.ir.expr import Size
from attncc.ir.interpret import Result
from attncc.ir.lines import Lines, declared_lines, split, tensor_lines
from attncc.ir.text import ParseError
from attncc.ir.verify import check_declarations, require

How = Literal["softmax", "sum", "gated"]
MergeOutput = Literal["out", "lse", "share"]
HOWS: tuple[str, ...] = get_args(How)
MERGE_OUTPUTS: tuple[str, ...] = get_args(MergeOutput)
#: What a branch is weighed by; the tensors of branch k are the weigher, where there is one, and the output `out{k}`.
WEIGHERS: dict[str, str] = {"softmax": "lse", "gated": "gate"}


@dataclass(frozen=True)
class Merge:
    """Shapes: `lse{k}` and `gate{k}` are (*rows), `out{k}` (*rows, *columns); `out` is like the latter, `lse` like the
    former. `share` stands for one output (*rows) per branch, `share0` and on. `empty` is what each branch counts for in
    a row that sees no key in any branch; NaN where it is empty."""

    sizes: tuple[Size, ...]
    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    tensors: tuple[Tensor, ...]
    branches: int
    how: How = "softmax"
    outputs: tuple[MergeOutput, ...] = ("out",)
    empty: tuple[float, ...] = ()
    dtype: str = "f32"

    @property
    def gives(self) -> tuple[Tensor, ...]:
        rows = tuple(x.extent for x in self.rows)
        summed = self.tensors[0].dtype
        table = {
            "out": [Tensor("out", self.dtype, (*rows, *(x.extent for x in self.columns)))],
            "lse": [Tensor("lse", summed, rows)],
            "share": [Tensor(f"share{k}", summed, rows) for k in range(self.branches)],
        }
        return tuple(t for name in self.outputs for t in table[name])

    @property
    def wanted(self) -> tuple[str, ...]:
        """The names of the tensors, in order."""
        weigher = WEIGHERS.get(self.how)
        names = [] if weigher is None else [f"{weigher}{k}" for k in range(self.branches)]
        return (*names, *(f"out{k}" for k in range(self.branches) if "out" in self.outputs))


def merge_of(
    sizes: tuple[Size, ...], rows: tuple[Axis, ...], columns: tuple[Axis, ...], branches: int, *,
    how: How = "softmax", outputs: tuple[MergeOutput, ...] = ("out",), empty: tuple[float, ...] = (),
    dtype: str = "f32", weigher: str = "f32",
) -> Merge:  # fmt: skip
    """A merge with its tensors declared: outputs of branches in `dtype`, what weighs them in `weigher`."""
    bare = Merge(sizes, rows, columns, (), branches, how, outputs, empty, dtype)
    across = tuple(x.extent for x in rows)
    tensors = tuple(
        Tensor(n, dtype, (*across, *(x.extent for x in columns))) if n.startswith("out") else Tensor(n, weigher, across)
        for n in bare.wanted
    )
    return Merge(sizes, rows, columns, tensors, branches, how, outputs, empty, dtype)


def verify_merge(a: Merge) -> Merge:
    """`a` itself if it is well formed. Raises VerifyError otherwise."""
    check_declarations((*a.rows, *a.columns), a.sizes, a.tensors, ())
    require(a.how in HOWS, f"a merge is one of {', '.join(HOWS)}, not {a.how!r}")
    require(a.branches >= 1, "a merge has branches")
    require(len(set(a.outputs)) == len(a.outputs) > 0 and {*a.outputs} <= {*MERGE_OUTPUTS}, f"outputs {a.outputs}")
    require(a.how == "softmax" or a.outputs == ("out",), f"a merge by {a.how} gives `out` alone")
    require(not a.empty or (a.how == "softmax" and len(a.empty) == a.branches), "`empty` is a number per branch")
    require(tuple(t.name for t in a.tensors) == a.wanted, f"the tensors are {', '.join(a.wanted)}")
    rows, columns = tuple(x.extent for x in a.rows), tuple(x.extent for x in a.columns)
    for t in a.tensors:
        want = (*rows, *columns) if t.name.startswith("out") else rows
        require(t.shape == want and DTYPES[t.dtype][0] == "float", f"{t.name} is {list(want)} of floats")
    require(len({t.dtype for t in a.tensors if not t.name.startswith("out")}) <= 1, "branches are weighed in one dtype")
    require(a.dtype in DTYPES and DTYPES[a.dtype][0] == "float", f"dtype {a.dtype} is no float type")
    return a


def interpret_merge(
    a: Merge, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int] = (), *, compute: torch.dtype | None = None
) -> Result:
    """Outputs of `a` by name; in `compute` where it is given, else each in its own dtype."""
    dtype = compute or DTYPE_OF[a.dtype]
    weighers: list[torch.Tensor] = []
    found: Result = {}
    if a.how != "sum":
        weighers = [tensors[f"{WEIGHERS[a.how]}{k}"] for k in range(a.branches)]
    if a.how == "softmax":
        whole = torch.logsumexp(torch.stack(weighers), 0)
        weighers = [torch.exp(x - whole) for x in weighers]
        if a.empty:
            seen = whole != -math.inf
            weighers = [torch.where(seen, x, share) for x, share in zip(weighers, a.empty, strict=True)]
        found["lse"] = whole
        found |= {f"share{k}": x for k, x in enumerate(weighers)}
    if "out" in a.outputs:
        parts = [tensors[f"out{k}"] for k in range(a.branches)]
        for _ in a.columns:
            weighers = [x.unsqueeze(-1) for x in weighers]
        if weighers:
            parts = [x * w for x, w in zip(parts, weighers, strict=True)]
        found["out"] = reduce(lambda x, y: x + y, parts).to(dtype)
    return {t.name: found[t.name] for t in a.gives}


def print_merge(a: Merge) -> str:
    """The canonical text of `a`: `parse_merge(print_merge(a)) == a`."""
    lines = ["merge", *declared_lines(a.sizes, a.rows, a.columns), *tensor_lines(a.tensors)]
    lines += [f"over   {a.branches}", f"how    {a.how}"]
    if a.empty:
        lines.append(f"empty  {', '.join(map(repr, a.empty))}")
    return "\n".join([*lines, f"give   {', '.join(a.outputs)}", f"dtype  {a.dtype}"]) + "\n"


def parse_merge(text: str) -> Merge:
    """The merge that `text` describes. Raises ParseError on anything that is not canonical."""
    lines = Lines(text, "merge")
    branches = lines.take("over")
    if not branches.isdecimal():
        raise ParseError(f"a merge is over a number of branches, not {branches!r}")
    try:
        empty = tuple(float(x) for x in split(lines.field.pop("empty", "")))
    except ValueError as error:
        raise ParseError("`empty` is a number per branch") from error
    result = Merge(
        lines.sizes, lines.axes["batch"], lines.axes.get("axis", ()), tuple(lines.tensors), int(branches),
        lines.one_of("how", HOWS), tuple(lines.each_of("give", MERGE_OUTPUTS)), empty,
        lines.one_of("dtype", tuple(DTYPES)),
    )  # fmt: skip
    lines.finish()
    return result
