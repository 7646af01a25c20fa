"""`flex_attention` says what it is: its score and its mask are graphs of scalars, read by the same rules.

    score_mod(q_i . k_j * scale, b, h, i, j) where mask_mod(b, h, i, j), over the keys, times v

A row that sees nothing gives zeros. The tensors of the block mask are read where it has no function (`noop_mask`): what
is compiled sees the blocks that they list, whatever eager `flex_attention` makes of them.
Where it has one they are not: they say again, block by block, what `mask_mod` says, and eager `flex_attention` does not
look at them either. Where the blocks may say more than the function does, the site is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attncc.ir.affine import divide, poly
from attncc.ir.attention import S
from attncc.ir.build import FALSE, ONE, TRUE, ZERO, add, cast, const, floordiv, mul, or_
from attncc.ir.expr import Const, Expr, Index, Load, rewrite
from attncc.ir.reasons import because
from attncc.patterns.site import (
    Facts,
    Lifted,
    Lse,
    Parts,
    Point,
    Reader,
    Source,
    Unreadable,
    assembled,
    fitted,
    number,
    operand,
    stored,
)

aten = torch.ops.aten
FLEX = torch.ops.higher_order.flex_attention
#: A block of this size or more is the whole of any tensor: what a call without a block mask is given.
WHOLE = 1 << 30


def lift_flex(f: Facts, n: fx.Node) -> Lifted | None:
    """The attention of a flex_attention node; None where nothing uses it. Raises Unreadable with the reason."""
    arguments: Any = n.args
    q, k, v, score_mod, blocks, scale, _, score_extra, mask_extra = arguments
    results = _results(f, n)
    if 2 in results:
        raise Unreadable(n, because("largest-score"))
    if 0 not in results:
        return None
    node = results[0]
    shape = f.shape(node)
    b, h, i, e = out = tuple(ZERO if s is ONE else Index(f"o{d}") for d, s in enumerate(shape))
    j, d = Index("c"), Index("d")
    use = f.order[n]
    extents: dict[Expr, Expr] = {x: s for x, s in zip(out, shape, strict=True) if x is not ZERO}
    extents |= {j: f.shape(k)[-2], d: f.shape(q)[-1]}
    reader = Reader(f, use, extents, pair=frozenset({i, j}))

    def source(x: Any, *own: Expr) -> Source:
        return operand(f, x, (*_heads(f, n, x, (b, h), extents), *own), extents, read=use, use=use)

    factor = number(f, scale, node)
    if factor is None:
        raise Unreadable(n, because("unknown-scale"))
    scaled = mul(S, cast(factor, "float"))
    score = _scalar(reader, n, score_mod, (scaled, b, h, i, j), score_extra, "score_mod")
    mask = cast(_scalar(reader, n, blocks[-1], (b, h, i, j), mask_extra, "mask_mod"), "bool")
    shown = _check_blocks(f, n, mask, blocks)
    if shown is not None:
        found = _of_blocks(f, blocks, (b, h, i, j), extents[j], use)
        if found is None:
            raise shown
        mask = found
    parts = Parts(
        facts=f, out=out, out_shape=shape, i=None if i is ZERO else i, j=j, d=d, e=None if e is ZERO else e,
        extents=extents, q=source(q, i, d), k=source(k, j, d), v=source(v, j, e), score=cast(score, "float"),
        product_dtype=f.dtype(node), dtype=f.dtype(node), half=False, empty="zero", mask=mask,
        outputs=("out", "lse") if 1 in results else ("out",),
    )  # fmt: skip
    return assembled(parts, node, n, lse=Lse(results[1], base_two=True) if 1 in results else None)


def _results(f: Facts, n: fx.Node) -> dict[int, fx.Node]:
    """The results that the model uses: 0 the output, 1 the logarithm (base two) of the sums, 2 the largest scores."""
    found: dict[int, fx.Node] = {}
    for user in n.users:
        which = user.args[1] if getattr(user.target, "__name__", "") == "getitem" else None
        if user in f.live and isinstance(which, int):
            found[which] = user
    return found


def _heads(f: Facts, n: fx.Node, x: fx.Node, batch: Point, extents: dict[Expr, Expr]) -> Point:
    """Batch indices of a factor: a batch of one is shared, and so are the heads of a group."""
    *_, heads = own = f.shape(x)[:2]
    at = fitted(own, batch)
    if batch[1] is ZERO or heads is ONE or heads is extents[batch[1]]:
        return at
    all_heads = extents[batch[1]]
    if not isinstance(all_heads, Const) or not isinstance(heads, Const):
        raise Unreadable(n, because("unknown-groups"))
    return (at[0], divide(batch[1], const(int(all_heads.value) // int(heads.value)), extents)[0])


def _scalar(r: Reader, n: fx.Node, function: Any, given: tuple[Expr, ...], extra: Any, name: str) -> Expr:
    """What a graph of scalars gives for its first arguments `given` and the tensors `extra` that it captured."""
    module: Any = getattr(r.facts.graph.owning_module, str(function.target))
    scalars = [x for x in module.graph.nodes if x.op == "placeholder"]
    floats = frozenset(x for x in scalars if r.gradients is not None and x.meta["val"].is_floating_point())
    inner = Facts(module.graph, graded=floats)
    inner.symbols = r.facts.symbols
    captured = {x.name: held for x, held in zip(scalars[len(given) :], extra, strict=True)}
    (result,) = inner.graph.output_node().all_input_nodes or (None,)
    if result is None:  # a constant
        raise Unreadable(n, because("flex-constant", name))
    reader = Reader(inner, len(inner.order), r.extents, given=dict(zip(scalars, given, strict=False)))
    value = reader.value_at(result, ())

    def outside(x: Expr) -> Expr | None:
        """A captured tensor as the graph around sees it."""
        if not isinstance(x, Load) or x in given:
            return None
        held = captured.get(x.tensor)
        if held is None:
            raise reader.lost or Unreadable(n, because("flex-no-rule", name, _spelled(inner, x)))
        return r.value_at(held, x.index, r.use)

    return rewrite(rewrite(value, outside), lambda x: stored(r.facts, x, r.use, r.extents))


def _spelled(f: Facts, x: Load) -> str:
    node = f.by_name.get(x.tensor)
    return x.tensor if node is None else str(node.target).removesuffix(".default").removeprefix("aten.")


def _check_blocks(f: Facts, n: fx.Node, mask: Expr, blocks: Any) -> Unreadable | None:
    """Raises where the block mask may hide more than its function does. A reason where it has no function, and is to
    be read of its tables."""
    *_, rows, columns, _ = blocks
    if isinstance(rows, int) and isinstance(columns, int) and min(rows, columns) >= WHOLE:
        return None
    if mask is TRUE:
        return Unreadable(n, because("flex-no-mask-function"))
    tables = [x for x in blocks[2:] if isinstance(x, fx.Node) and f.is_tensor(x)]
    if any(_computed(f, x) for x in tables):
        raise Unreadable(n, because("flex-computed-blocks"))
    return None


def _of_blocks(f: Facts, blocks: Any, at: Point, keys: Expr, use: int) -> Expr | None:
    """Which keys the blocks of a node show at (b, h, i, j), for one whose mask has no function; None where their tables
    do not list every block of keys, or their sizes are not known.

    The first `kv_num_blocks[b, h, i // R]` of `kv_indices[b, h, i // R]` are the blocks of keys that a block of R rows
    sees. The kernel reads a table of truth values, one for each pair of blocks."""
    *_, rows, columns, _ = blocks
    if not isinstance(rows, int) or not isinstance(columns, int):
        return None
    count = floordiv(add(keys, const(columns - 1)), const(columns))
    seen: Expr = FALSE
    for numbers, indices in ((blocks[2], blocks[3]), (blocks[4], blocks[5])):
        if numbers is None or indices is None:
            continue
        if not (f.is_tensor(numbers) and f.is_tensor(indices)) or f.rank(indices) != 4 or f.rank(numbers) != 3:
            return None
        if poly(f.shape(indices)[-1]) != poly(count):
            return None
        table = f.make_once(("blocks", numbers, indices), lambda a=numbers, b=indices: _shown(f, a, b, use))
        batch = fitted(f.shape(table)[:2], at[:2])
        place = (*batch, *(floordiv(x, const(size)) for x, size in zip(at[2:], (rows, columns), strict=True)))
        place = tuple(ZERO if s is ONE else x for x, s in zip(place, f.shape(table), strict=True))
        seen = or_(seen, Load(table.name, place, "bool"))
    return seen


def _shown(f: Facts, number: fx.Node, indices: fx.Node, use: int) -> fx.Node:
    """A truth value for each pair of blocks: (batch, heads, blocks of queries, blocks of keys)."""
    every = f.make(aten.ones_like.default, (indices,), use)
    place = f.make(aten.cumsum.default, (every, -1), use)
    listed = f.make(aten.le.Tensor, (place, f.make(aten.unsqueeze.default, (number, -1), use)), use)
    listed = f.make(aten.to.dtype, (listed, torch.int32), use)
    where = f.make(aten.to.dtype, (indices, torch.int64), use)
    none = f.make(aten.zeros_like.default, (listed,), use)
    shown = f.make(aten.scatter_reduce.two, (none, -1, where, listed, "amax"), use)
    return f.make(aten.to.dtype, (shown, torch.bool), use)


def _computed(f: Facts, n: fx.Node) -> bool:
    """Whether a block table comes of the model's values. `create_block_mask` in the graph runs its function under vmap;
    what that reads is the function's own (a trace of torch 2.13 does not see into it, one of 2.11 does)."""
    seen: set[fx.Node] = set()
    stack = [n]
    inputs = False
    if n.op != "call_function":
        return False
    while stack:
        x = stack.pop()
        if x not in seen and getattr(x.target, "__name__", "") != "_remove_batch_dim":
            seen.add(x)
            inputs |= x.op == "placeholder" and f.is_tensor(x)
            stack += x.all_input_nodes
    return inputs
