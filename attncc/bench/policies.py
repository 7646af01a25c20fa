"""`attncc bench --suite policies`: what choosing keys costs beside attending to them, and what a chosen block costs.

A causal attention of 9 heads of queries on 3 of keys. For each policy: its selection as Inductor compiles it, the
kernel under what was selected, and the kernel of the whole mask. For maps of blocks drawn by chance: the time per block
that the map leaves, by that of the dense kernel. Calls take turns; the least of each counts, as another program on the
machine only ever adds.
"""

from __future__ import annotations

import json as json_format
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from attncc.bench.chosen import chosen
from attncc.driver.lowering import lower
from attncc.driver.running import compiled
from attncc.ir import Attention, Program, parse_attention, print_attention
from attncc.ir.evaluate import DTYPE_OF
from attncc.ir.program import program_of_node
from attncc.kernels.build import built
from attncc.passes.pipeline import Pipeline, parse_pipeline, spelled, standard
from attncc.passes.policies.hiding import Composed
from attncc.runtime.outputs import signature_of

HEADS, GROUP, WIDTH = 9, 3, 64
TOKENS, FEW_TOKENS = 8192, 1024
#: Of a selection, as a share of the attention that it selects for.
MOST_SHARE = 0.10
#: (share of the causal blocks, most that one of them may cost by one of the dense kernel)
DENSITIES = (0.25, 1.15), (0.05, 1.3)
BLOCKS = 64, 128
POLICIES = (
    "block-means{rows=64,keys=64,take=fraction,amount=0.25}",
    "block-means{rows=128,keys=128,take=fraction,amount=0.25}",
    "block-means{rows=64,keys=64,take=fraction,amount=0.25,share=max}",
    "antidiagonal{block=128,stride=16,take=fraction,amount=0.25}",
    "antidiagonal{block=64,stride=16,take=fraction,amount=0.25}",
    "self-similar{rows=128,keys=64,take=fraction,amount=0.25,similar=-0.1}", "chunk-means{chunk=128,budget=2048}",
    "vertical-slash{columns=100,diagonals=1024}", "flex-prefill{gamma=0.5}",
    "routed-streaming{sinks=128,window=1024,miss=0.9}", "pooled-rest{amount=0.25}", "pooled-rest{amount=0.125}",
    "block-means{take=fraction,amount=0.125}", "rectified{block=64,mass=0.3,drop=0.75}",
)  # fmt: skip
DECODE = (
    "pages{page=16,budget=1024}", "pages{page=16,budget=1024,share=max}", "page-mass{page=16,budget=1024}",
)  # fmt: skip


def attention(n: int, dtype: str, rows: int = 0, map_block: int = 0) -> Attention:
    """`rows`: the last of n that the call has, all where it is 0; `map_block`: under a map of such blocks."""
    m, n = n, rows or n
    kv = HEADS // GROUP
    blocks = -(-n // map_block) if map_block else 0
    lines = [
        "attention", f"batch  b = 1, h = {HEADS}", f"axis   i = {n}, j = {m}, d = {WIDTH}, e = {WIDTH}",
        f"tensor q: {dtype}[1, {HEADS}, {n}, {WIDTH}]",
        *(f"tensor {x}: {dtype}[1, {kv}, {m}, {WIDTH}]" for x in "kv"),
        *([f"tensor map: bool[1, {HEADS}, {blocks}, {blocks}]"] if map_block else []),
        "q      q[b, h, i, d]", f"k      k[b, h // {GROUP}, j, d]", f"v      v[b, h // {GROUP}, j, e]",
        f"score  s * {WIDTH**-0.5!r}",
        f"mask   j <= i + {m - n}" + (f" and map[b, h, i // {map_block}, j // {map_block}]" if map_block else ""),
        "norm   softmax", "empty  zero", "weight w", "give   out", f"dtype  {dtype}",
    ]  # fmt: skip
    return parse_attention("\n".join(lines) + "\n")


def example(a: Attention) -> dict[str, Tensor]:
    """Queries and keys that drift, so that near ones are alike and some blocks matter more than others."""
    g = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for t in a.tensors[:3]:
        shape = [int(getattr(n, "value", 0)) for n in t.shape]
        walk = torch.randn(shape, generator=g).cumsum(-2) * 0.1
        found[t.name] = (torch.randn(shape, generator=g) + walk).to(DTYPE_OF[t.dtype])
    return found


def kernel_call(p: Program, values: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """The attention of a program after the passes, by its kernel; the first, of several."""
    step = next(s for s in p.steps if isinstance(s.node, Attention))
    text = print_attention(step.node)  # type: ignore[arg-type]
    made = built(text, "cpu")
    given = [values[x] for x in step.arguments]
    outs = signature_of(text).allocate(given, [])

    def call() -> Tensor:
        made.kernel(given, [], outs)
        return outs[0]

    return call


def selection_call(p: Program, tensors: Sequence[Tensor]) -> tuple[Callable[[], Sequence[Tensor]], list[str]]:
    """What comes before the attention, as Inductor compiles it; and the names of what it makes."""
    at = next(n for n, s in enumerate(p.steps) if isinstance(s.node, Attention))
    names = [x for x in p.steps[at].arguments if x not in {t.name for t in p.inputs}]
    before = replace(p, steps=p.steps[:at], outputs=tuple(names))
    graph = fx.Graph()
    given = [graph.placeholder(t.name) for t in before.inputs]
    graph.output(tuple(lower(before, graph, given, [])))
    run: Any = torch.compile(fx.GraphModule(torch.nn.Module(), graph), dynamic=False)
    return lambda: run(*tensors), names


def least(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each call, the least of some rounds in which they take turns."""
    found: dict[str, float] = {}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            took = (time.perf_counter() - start) * 1e3
            found[name] = min(found.get(name, took), took)
    return found


def policy_row(spelling: str, n: int, dtype: str, rows: int, rounds: int) -> dict[str, Any]:
    """One policy: milliseconds of the selection, of the kernel under it and of the whole mask's kernel; where the
    policy does more, of all that it does as well. For a call of some rows of a longer sequence all of it is a step of
    decoding, with boxes kept beside the cache, against the same call dense. `off`: the norm of the output's change by
    that of the output."""
    (policy,) = parse_pipeline(spelling)
    a = attention(n, dtype, rows)
    tensors = example(a)
    p = Pipeline((policy, *standard().passes)).run(program_of_node(a))
    select, names = selection_call(p, list(tensors.values()))
    made = dict(zip(names, select(), strict=True))
    dense = standard().run(program_of_node(a))
    calls: dict[str, Callable[[], Any]] = {
        "selection": select, "sparse": kernel_call(p, tensors | made), "dense": kernel_call(dense, tensors)
    }  # fmt: skip
    if rows:
        steps = [tensors | {"q": tensors["q"].roll(n, -1)} for n in range(4)]  # no two in a row choose the same
        calls |= {"whole": _in_turn(compiled(p, tensors, {}, ["k"]), steps),
                  "dense": _in_turn(compiled(dense, tensors, {}), steps)}  # fmt: skip
    elif isinstance(policy, Composed):
        calls["whole"] = partial(compiled(p, tensors, {}), tensors)
    ms = least(calls, rounds)
    whole = calls.get("whole", calls["sparse"])
    exact, own = (_first(call()) for call in (calls["dense"], whole))  # both have had as many turns
    off = float((own.reshape(exact.shape) - exact).norm() / exact.norm())
    return {"policy": spelled(policy) if not rows else f"{spelled(policy)}, {rows} row", "dtype": dtype, "tokens": n,
            "off": off, "ms": ms, "share": ms["selection"] / ms["sparse"]}  # fmt: skip


def _in_turn(call: Callable[[Mapping[str, Tensor]], Any], given: Sequence[Mapping[str, Tensor]]) -> Callable[[], Any]:
    turns = cycle(given)
    return lambda: call(next(turns))


def _first(found: Any) -> Tensor:
    return (found if isinstance(found, Tensor) else found[0]).float()


def block_row(block: int, density: float, most: float, n: int, dtype: str, rounds: int) -> dict[str, Any]:
    """The kernel under a map drawn by chance, with the diagonal: its time per block, by the dense kernel's."""
    count = n // block
    below = torch.ones(count, count, dtype=torch.bool).tril()
    drawn = torch.rand(1, HEADS, count, count, generator=torch.Generator().manual_seed(0)) < density
    chosen = (drawn | torch.eye(count, dtype=torch.bool)) & below
    a, whole = attention(n, dtype, map_block=block), attention(n, dtype)
    tensors = example(a)
    calls = {
        "sparse": kernel_call(standard().run(program_of_node(a)), tensors | {"map": chosen}),
        "dense": kernel_call(standard().run(program_of_node(whole)), tensors),
    }
    ms = least(calls, rounds)
    left = float(chosen.sum()) / (HEADS * float(below.sum()))
    return {"block": block, "density": left, "dtype": dtype, "tokens": n, "ms": ms, "most": most,
            "per_block": ms["sparse"] / ms["dense"] / left}  # fmt: skip


def line(row: dict[str, Any]) -> str:
    ms = row["ms"]
    if "policy" in row:
        verdict = "met" if row["share"] <= MOST_SHARE else "missed"
        whole = ms.get("whole", ms["selection"] + ms["sparse"])
        return (f"{row['policy']}, {row['dtype']}: selection {ms['selection']:.2f} ms, sparse {ms['sparse']:.1f} ms, "
                f"dense {ms['dense']:.1f} ms; selection {row['share']:.1%} of sparse (<= {MOST_SHARE:.0%}: {verdict}), "
                f"dense / all {ms['dense'] / whole:.2f}x, output off by {row['off']:.3f}")  # fmt: skip
    verdict = "met" if row["per_block"] <= row["most"] else "missed"
    return (f"blocks of {row['block']}, {row['density']:.1%} of the causal ones, {row['dtype']}: "
            f"sparse {ms['sparse']:.1f} ms, dense {ms['dense']:.1f} ms; per block {row['per_block']:.2f} of the dense "
            f"kernel's (<= {row['most']:g}: {verdict})")  # fmt: skip


@torch.no_grad()
def run(*, quick: bool = False, json: Path | None = None, only: str = "") -> dict[str, Any]:
    """Measures and prints every row, and writes them to `json`. `only`: words, by commas, of the rows' names."""
    n, rounds = (FEW_TOKENS, 3) if quick else (TOKENS, 7)
    jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    for dtype in ("f32", "bf16"):
        for block in BLOCKS:
            for density, most in DENSITIES:
                name = f"blocks of {block} {density} {dtype}"
                jobs.append((name, lambda t=(block, density, most, n, dtype, rounds): block_row(*t)))
        for spelling, rows in (*((x, 0) for x in POLICIES), *((x, 1) for x in DECODE)):
            name = f"{spelling.replace(',', ' ')} {dtype}"  # commas separate the words of --rows
            jobs.append((name, lambda t=(spelling, n, dtype, rows, rounds): policy_row(*t)))
    names = chosen((name for name, _ in jobs), only)
    found: list[dict[str, Any]] = []
    print(f"{n} tokens, {HEADS} heads on {HEADS // GROUP}, width {WIDTH}, {torch.get_num_threads()} threads, "
          f"{platform.processor() or platform.machine()}")  # fmt: skip
    for name, job in jobs:
        if name in names:
            found.append(job())
            print(line(found[-1]), flush=True)
    report = {"threads": torch.get_num_threads(), "rows": found}
    if json is not None:
        json.write_text(json_format.dumps(report, indent=1))
    return report
