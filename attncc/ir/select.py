"""Select: which blocks of keys each block of rows attends to, decided from summaries of queries and keys.

    s[b.., I, J]   = summary of block I of q, against that of block J of k        (mean, box or antidiagonal)
    p[b.., I, .]   = norm_J( score(s) where open(b.., I, J) )                     (softmax, or the score itself)
    p              = merged over the axes of `share` (max, sum or mean)
    map[b.., I, J] = open and ( J is taken by p[b.., I, .]  or  always )

Rows of a block are `i // rows`, keys `j // keys`; the last blocks may be short. Blocks are taken in the order of p, the
lower block first where it is equal, so that two runs and two tilings agree. The summaries and ways of taking are those
of block-sparse attention as published: block means (MInference's block-sparse head; Jiang et al., 2024, arXiv
2407.02490), boxes (Quest; Tang et al., 2024, arXiv 2406.10774), strided antidiagonals and cumulative mass (XAttention;
Xu et al., 2025, arXiv 2503.16428).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from attncc.ir.attention import Access, Axis, S, Tensor
from attncc.ir.build import FALSE, TRUE, add, const, floordiv
from attncc.ir.evaluate import Evaluator
from attncc.ir.expr import Const, Expr, Index, Load, Size
from attncc.ir.interpret import Result, extent, index_grid, size_table
from attncc.ir.lines import Lines, Writer, declared_lines, tensor_lines
from attncc.ir.text import ParseError
from attncc.ir.verify import check_access, check_declarations, check_scope, require

Summary = Literal["mean", "box", "antidiagonal"]
Share = Literal["max", "sum", "mean"]
Take = Literal["count", "fraction", "mass", "least"]
Life = Literal["call", "step", "prefill", "plan"]
SUMMARIES: tuple[str, ...] = get_args(Summary)
SHARES: tuple[str, ...] = get_args(Share)
TAKES: tuple[str, ...] = get_args(Take)
LIVES: tuple[str, ...] = get_args(Life)
NORMS = ("softmax", "none")
#: A block of rows and a block of keys, in `open` and `always`.
ROWS, KEYS = Index("I"), Index("J")


@dataclass(frozen=True)
class Select:
    """Shapes: `map` is bool[*batch, ceil(i / rows), ceil(j / keys)].

    `stride` is that of the antidiagonals. `share` are names of batch axes over which all points decide alike, merged by
    `shared_by`. `amount` is a number of blocks (count), a share of the open ones (fraction), the mass that those taken
    hold, the one that crosses it included (mass), or the smallest p (least). `life` says for how long a map holds: one
    call, a step of a sampler, a prefill, or a whole plan; whoever reuses it sees to it."""

    sizes: tuple[Size, ...]
    batch: tuple[Axis, ...]
    i: Axis
    j: Axis
    d: Axis
    tensors: tuple[Tensor, ...]
    q: Access
    k: Access
    rows: int
    keys: int
    summary: Summary = "mean"
    stride: int = 1
    score: Expr = S
    norm: Literal["softmax", "none"] = "softmax"
    open: Expr = TRUE
    share: tuple[str, ...] = ()
    shared_by: Share = "max"
    take: Take = "count"
    amount: float = 1.0
    always: Expr = FALSE
    life: Life = "call"

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (*self.batch, self.i, self.j, self.d)

    @property
    def gives(self) -> tuple[Tensor, ...]:
        blocks = (blocks_of(self.i.extent, self.rows), blocks_of(self.j.extent, self.keys))
        return (Tensor("map", "bool", (*(x.extent for x in self.batch), *blocks)),)

    def expressions(self) -> Iterator[Expr]:
        for access in (self.q, self.k):
            yield from access.index
        yield from (self.score, self.open, self.always)


def blocks_of(n: Expr, block: int) -> Expr:
    """How many blocks hold n elements."""
    return floordiv(add(n, const(block - 1)), const(block))


def verify_select(a: Select) -> Select:
    """`a` itself if it is well formed. Raises VerifyError otherwise."""
    tensors = check_declarations(a.axes, a.sizes, a.tensors, ("s", "I", "J"))
    sizes, batch = frozenset[Expr](a.sizes), frozenset[Expr](x.index for x in a.batch)
    check_access("q", a.q, tensors, batch | sizes | {a.i.index, a.d.index})
    check_access("k", a.k, tensors, batch | sizes | {a.j.index, a.d.index})
    for name, x, kind, allowed in (
        ("score", a.score, "float", batch | {S}), ("open", a.open, "bool", batch | {ROWS, KEYS}),
        ("always", a.always, "bool", batch | {ROWS, KEYS}),
    ):  # fmt: skip
        require(x.kind == kind, f"{name} is a {x.kind}, not a {kind}")
        check_scope(name, x, tensors, allowed | sizes)
    require(a.rows >= 1 and a.keys >= 1, "a block holds rows and keys")
    require(a.summary in SUMMARIES and a.take in TAKES and a.shared_by in SHARES, "an unknown summary, take or share")
    require(a.norm in NORMS and a.life in LIVES, "an unknown norm or life")
    require({*a.share} <= {x.name for x in a.batch}, "it is shared over axes of the batch")
    fits = a.stride >= 1 and a.rows % a.stride == a.keys % a.stride == 0
    require(fits and (a.stride == 1 or a.summary == "antidiagonal"), "antidiagonals have a stride that divides a block")
    whole = {"count": a.amount == int(a.amount) and a.amount >= 1, "least": True}.get(a.take, 0 < a.amount <= 1)
    require(a.take != "mass" or a.norm == "softmax", "mass is a share of a softmax")
    require(whole, f"{a.take} takes a {'whole number' if a.take == 'count' else 'share above 0, at most 1'}")
    return a


def interpret_select(
    a: Select, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int] = (), *, compute: torch.dtype | None = None
) -> Result:
    """The `map`. Summaries and scores are computed in `compute`, float32 where it is not given."""
    table = size_table(a, sizes)
    wide = compute or torch.float32
    device = next(iter(tensors.values())).device
    q = _operand(a, a.q, a.i, tensors, table, wide, device)
    k = _operand(a, a.k, a.j, tensors, table, wide, device)
    s = _SUMMARISE[a.summary](a, _in_blocks(q, a.rows), _in_blocks(k, a.keys))
    axes = (*a.batch, Axis("I", Const(s.shape[-2])), Axis("J", Const(s.shape[-1])))
    ev = Evaluator(index_grid(axes, table, device), tensors, wide, checked=True)
    ev.known[S] = s
    score = ev(a.score).expand(s.shape)
    seen, always = ev(a.open).expand(s.shape), ev(a.always).expand(s.shape)
    p = score.masked_fill(~seen, float("-inf"))
    if a.norm == "softmax":
        p = torch.softmax(p, -1).masked_fill(~seen, 0.0)
    for name in a.share:
        at = [x.name for x in a.batch].index(name)
        p = _SHARED[a.shared_by](p, at).expand(s.shape)
    p = p.masked_fill(~seen, float("-inf"))
    return {"map": seen & (_taken(a, p, seen) | always)}


def _operand(
    a: Select, access: Access, row: Axis, tensors: Mapping[str, torch.Tensor], table: Mapping[Expr, int],
    compute: torch.dtype, device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """(*batch, row, d) of an operand."""
    axes = (*a.batch, row, a.d)
    ev = Evaluator(index_grid(axes, table, device), tensors, compute, checked=True)
    return ev(Load(access.tensor, access.index, "float")).expand([extent(x.extent, table) for x in axes])


#: Rows in blocks, (*batch, blocks, block, d), and which of the rows there are, (blocks, block, 1).
Blocks = tuple[torch.Tensor, torch.Tensor]


def _in_blocks(x: torch.Tensor, block: int) -> Blocks:
    count = x.shape[-2]
    short = -count % block
    there = torch.arange(count + short, device=x.device).reshape(-1, block, 1) < count
    padded = torch.nn.functional.pad(x, (0, 0, 0, short))
    return padded.reshape(*x.shape[:-2], -1, block, x.shape[-1]), there


def _mean(a: Select, q: Blocks, k: Blocks) -> torch.Tensor:
    """The product of the means."""
    (x, rows), (y, keys) = q, k
    return (x.sum(-2) / rows.sum(-2)) @ (y.sum(-2) / keys.sum(-2)).transpose(-1, -2)


def _box(a: Select, q: Blocks, k: Blocks) -> torch.Tensor:
    """The largest product that the mean of the rows may have with a key of the block, by the least and the largest
    value of each component."""
    (x, rows), (y, keys) = q, k
    mean = (x.sum(-2) / rows.sum(-2)).unsqueeze(-2)
    low = y.masked_fill(~keys, float("inf")).amin(-2).unsqueeze(-3)
    high = y.masked_fill(~keys, float("-inf")).amax(-2).unsqueeze(-3)
    return torch.maximum(mean * low, mean * high).sum(-1)


def _antidiagonal(a: Select, q: Blocks, k: Blocks) -> torch.Tensor:
    """The sum of the products on every `stride`-th antidiagonal: rows by their remainder n, keys by stride - 1 - n."""
    (x, _), (y, _) = q, k
    folded_q = x.reshape(*x.shape[:-2], -1, a.stride, x.shape[-1]).sum(-3)
    folded_k = y.reshape(*y.shape[:-2], -1, a.stride, y.shape[-1]).sum(-3).flip(-2)
    return folded_q.flatten(-2) @ folded_k.flatten(-2).transpose(-1, -2)


_SUMMARISE: dict[str, Callable[[Select, Blocks, Blocks], torch.Tensor]] = {
    "mean": _mean, "box": _box, "antidiagonal": _antidiagonal,
}  # fmt: skip
_SHARED: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "max": lambda x, at: x.amax(at, keepdim=True),
    "sum": lambda x, at: x.sum(at, keepdim=True),
    "mean": lambda x, at: x.mean(at, keepdim=True),
}


def _taken(a: Select, p: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Which blocks are taken, by p (-inf where a block is not open)."""
    if a.take == "least":
        return p >= a.amount
    order = torch.sort(p, dim=-1, descending=True, stable=True)
    rank = torch.argsort(order.indices, -1)
    if a.take == "count":
        return rank < int(a.amount)
    if a.take == "fraction":
        return rank < torch.ceil(seen.sum(-1, keepdim=True) * a.amount)
    share = order.values.masked_fill(order.values == float("-inf"), 0.0)
    share = share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
    before = share.cumsum(-1) - share
    return torch.gather(before < a.amount, -1, rank)


def print_select(a: Select) -> str:
    """The canonical text of `a`: `parse_select(print_select(a)) == a`."""
    writer = Writer((*(x.name for x in (*a.axes, *a.sizes, *a.tensors)), "I", "J"), a.expressions())
    lines = ["select", *declared_lines(a.sizes, a.batch, (a.i, a.j, a.d)), *tensor_lines(a.tensors)]
    lines += [f"q      {writer.access(a.q)}", f"k      {writer.access(a.k)}", *writer.lets]
    lines += [f"block  {a.rows}, {a.keys}", f"by     {a.summary}"]
    lines += [f"stride {a.stride}"] if a.summary == "antidiagonal" else []
    lines += [f"score  {writer.show(a.score)}", f"norm   {a.norm}", f"open   {writer.show(a.open)}"]
    lines += [f"share  {', '.join(a.share)}", f"merge  {a.shared_by}"] if a.share else []
    lines += [f"take   {a.take}", f"amount {a.amount!r}", f"always {writer.show(a.always)}", f"life   {a.life}"]
    return "\n".join(lines) + "\n"


def parse_select(text: str) -> Select:
    """The node that `text` describes. Raises ParseError on anything that is not canonical."""
    lines = Lines(text, "select", (S,), axes="ijd")
    lines.names |= {"I": ROWS, "J": KEYS}
    i, j, d = lines.axes["axis"]
    rows, keys = _numbers(lines.words("block"), 2)
    stride = _numbers(lines.words("stride") or ("1",), 1)[0]
    try:
        amount = float(lines.take("amount"))
    except ValueError as error:
        raise ParseError("the amount is a number") from error
    share = lines.words("share")
    result = Select(
        lines.sizes, lines.axes["batch"], i, j, d, tuple(lines.tensors), lines.access("q"), lines.access("k"), rows,
        keys, lines.one_of("by", SUMMARIES), stride, lines.expr(lines.take("score")), lines.one_of("norm", NORMS),
        lines.expr(lines.take("open")), share, lines.one_of("merge", SHARES) if share else "max",
        lines.one_of("take", TAKES), amount, lines.expr(lines.take("always")), lines.one_of("life", LIVES),
    )  # fmt: skip
    lines.finish()
    return result


def _numbers(words: Sequence[str], count: int) -> list[int]:
    if len(words) != count or not all(w.isdecimal() for w in words):
        raise ParseError(f"{count} whole numbers are wanted, not {', '.join(words)!r}")
    return [int(w) for w in words]
