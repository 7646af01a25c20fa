"""The closed-form masks of the field, as predicates for 256 rows and 256 keys of 2 batches and 4 heads.

Each has the tensors it reads, and what is true of its loop bounds: the blocks of keys that a tile visits are the fewest
that cover the mask, or at most `more` blocks more; those that need no mask are all found, but in a tile of rows on both
sides of row `meet`; and `why`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from attncc.ir import Attention, parse_attention, verify

N = 256
Data = Callable[[torch.Generator], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Mask:
    text: str
    declared: str = ""
    data: Data = lambda g: {}
    more: int = 0
    meet: int = 0
    why: str = ""

    def attention(self, batch: str = "b = 2, h = 4") -> Attention:
        declared = "\n".join(f"tensor {line.strip()}" for line in self.declared.split(";") if line.strip())
        return verify(
            parse_attention(f"""attention
batch  {batch}
axis   i = {N}, j = {N}, d = 4, e = 4
tensor q: f32[2, 4, {N}, 4]
tensor k: f32[2, 4, {N}, 4]
tensor v: f32[2, 4, {N}, 4]
{declared}
q      q[b, h, i, d]
k      k[b, h, j, d]
v      v[b, h, j, e]
score  s
mask   {self.text}
norm   softmax
empty  zero
weight w
give   out
dtype  f32
""")
        )

    def tensors(self, seed: int = 0) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        operands = {name: torch.randn(2, 4, N, 4, generator=g) for name in "qkv"}
        return operands | self.data(g)


def documents(g: torch.Generator) -> dict[str, torch.Tensor]:
    """Four documents a sequence, with the start of each token's own, and whether it is the last."""
    cuts = (torch.randperm(N, generator=g)[:3].sort().values for _ in range(2))
    doc = torch.stack([torch.bucketize(torch.arange(N), cut) for cut in cuts])
    start = (doc[:, :, None] == doc[:, None, :]).to(torch.int32).argmax(-1)
    return {"doc": doc, "start": start, "last": doc.amax(-1), "pad": torch.arange(N) >= torch.tensor([[9], [70]])}


DOC = f"doc: i64[2, {N}]"
DOC_START = f"{DOC}; start: i64[2, {N}]"


def neighbourhood(q: str, k: str, length: int, window: int, stride: int = 1, dilation: int = 1) -> str:
    """Generalised neighbourhood attention along one dimension, not causal."""
    group, qi, ki, extent = "", f"({q})", f"({k})", str(length)
    if dilation > 1:
        group = f"({q}) % {dilation} == ({k}) % {dilation} and "
        qi, ki = f"(({q}) // {dilation})", f"(({k}) // {dilation})"
        extent = str(length // dilation)
    left, right = window // 2, window - 1 - window // 2
    centre = f"min({qi} // {stride} * {stride} + {stride // 2}, {extent} - 1)"
    past = f"{extent} <= {centre} + {right}"
    start = f"(max({centre} - {left}, 0) + where({past}, {extent} - 1 - {right} - {centre}, 0))"
    return f"({group}{start} <= {ki} and {ki} < {start} + {window})"


def causal_neighbourhood(q: str, k: str, length: int, window: int, stride: int = 1) -> str:
    centre = f"min({q} // {stride} * {stride} + {stride - 1}, {length} - 1)"
    return f"(max({centre} - {window - 1}, 0) <= {k} and {k} <= {q})"


def block_map(g: torch.Generator) -> dict[str, torch.Tensor]:
    blocks = torch.rand(4, 8, 8, generator=g) > 0.7
    return {"blocks": blocks | torch.eye(8, dtype=torch.bool)}


def ragged_blocks(g: torch.Generator) -> dict[str, torch.Tensor]:
    cuts = torch.tensor([20, 37, 90, 101, 160, 222])
    part = torch.bucketize(torch.arange(N), cuts, right=True)
    return {"part": part, "blocks": torch.rand(4, 7, 7, generator=g) > 0.6}


def slashes(g: torch.Generator) -> dict[str, torch.Tensor]:
    vertical, slash = torch.zeros(4, N, dtype=torch.bool), torch.zeros(4, N, dtype=torch.bool)
    for h in range(4):
        vertical[h, torch.randperm(40, generator=g)[:4]] = True
        slash[h, torch.randperm(30, generator=g)[:6]] = True
    return {"vertical": vertical, "slash": slash}


def spans_of_queries(g: torch.Generator) -> dict[str, torch.Tensor]:
    first = (torch.arange(N) - 60 - torch.randint(0, 9, (2, 4, N), generator=g)).clamp(min=0)
    return {"lo": first, "hi": first + 20}


def routed(g: torch.Generator) -> dict[str, torch.Tensor]:
    return {"route": torch.rand(2, 4, 16, 16, generator=g).argsort(-1) < 3}


def clusters(g: torch.Generator) -> dict[str, torch.Tensor]:
    """Tokens sorted by cluster."""
    return {"cluster": torch.randint(0, 6, (2, N), generator=g).sort(-1).values}


def pages(g: torch.Generator) -> dict[str, torch.Tensor]:
    return {"page": torch.rand(2, 4, 16, generator=g) > 0.7}


def falcon(g: torch.Generator) -> dict[str, torch.Tensor]:
    image = torch.full((2, N), -1)
    image[:, 30:80], image[0, 150:170] = 0, 1
    return documents(g) | {"image": image}


def spans_of_heads(g: torch.Generator) -> dict[str, torch.Tensor]:
    return {"span": torch.tensor([16, 40, 64, 200])}


def band(before: int, after: int) -> torch.Tensor:
    """Keys from `before` keys before the row's own to `after` after it; twice as far in the second batch."""
    apart = torch.arange(N) - torch.arange(N)[:, None]
    return torch.stack([(-n * before <= apart) & (apart <= n * after) for n in (1, 2)])


CATALOGUE: dict[str, Mask] = {
    "1 full": Mask("0 <= j"),
    "2 causal": Mask("j <= i"),
    "3 documents": Mask("doc[b, i] == doc[b, j]", DOC, documents),
    "4 causal documents": Mask("doc[b, i] == doc[b, j] and j <= i", DOC, documents),
    "5 causal window": Mask("0 <= i - j and i - j <= 50"),
    "6 window": Mask("abs(i - j) <= 50"),
    "7 share question": Mask("doc[b, i] == doc[b, j] and j <= i or doc[b, j] == 0", DOC, documents),
    "8 causal blockwise": Mask(
        "doc[b, i] == doc[b, j] and j <= i or (doc[b, i] == last[b] and doc[b, j] != last[b])",
        f"{DOC}; last: i64[2]", documents,
    ),
    "9 prefix": Mask("j < 70 or j <= i"),
    "10 prefix documents": Mask("doc[b, i] == doc[b, j] and (j - start[b, j] < 9 or j <= i)", DOC_START, documents,
        more=1, why="the last block of a document may hold the head of the next, so that it is a block with a head"),
    "11 global and sliding": Mask("abs(i - j) <= 30 or i < 10 or j < 10"),
    "12 block causal documents": Mask("doc[b, i] == doc[b, j] and j < (i // 32 + 1) * 32", DOC, documents),
    "13 uniform blocks": Mask("blocks[h, i // 32, j // 32]", "blocks: bool[4, 8, 8]", block_map),
    "14 variable blocks": Mask(
        "blocks[h, part[i], part[j]]", f"part: i64[{N}]; blocks: bool[4, 7, 7]", ragged_blocks
    ),
    "15 neighbourhood": Mask(neighbourhood("i", "j", N, 33)),
    "15 neighbourhood, strided": Mask(neighbourhood("i", "j", N, 33, 8)),
    "15 neighbourhood, causal": Mask(causal_neighbourhood("i", "j", N, 33, 4)),
    "15 neighbourhood, dilated": Mask(neighbourhood("i", "j", N, 15, 1, 4)),
    "15 neighbourhood, 2-D": Mask(
        neighbourhood("i // 16", "j // 16", 16, 5) + " and " + neighbourhood("i % 16", "j % 16", 16, 5)
    ),
    "15 neighbourhood, 2-D wide": Mask(
        neighbourhood("i // 64", "j // 64", 4, 3) + " and " + neighbourhood("i % 64", "j % 64", 64, 9)
    ),
    "16 halo": Mask("i // 32 * 32 - 8 <= j and j < i // 32 * 32 + 40"),
    "17 S2": Mask("j // 16 <= i // 16 and (i // 16 - j // 16 < 2 or (j // 16 + h + 1) % 4 == 0) or h == 3 and j <= i"),
    "18 MoA": Mask("j <= i and (i - j < span[h] or j < 16)", "span: i64[4]", spans_of_heads),
    "19 streaming": Mask("j < 4 or (0 <= i - j and i - j < 60)"),
    "20 vertical slash": Mask(
        "j <= i and (vertical[h, j] or slash[h, max(i - j, 0)])", f"vertical: bool[4, {N}]; slash: bool[4, {N}]",
        slashes,
    ),
    "21 routed regions": Mask("route[b, h, i // 16, j // 16]", "route: bool[2, 4, 16, 16]", routed),
    "22 clusters": Mask("cluster[b, i] == cluster[b, j] or cluster[b, i] + 1 == cluster[b, j]",
        f"cluster: i64[2, {N}]", clusters),
    "23 pages": Mask("page[b, h, j // 16] and j <= i", "page: bool[2, 4, 16]", pages),
    "24 spans": Mask("lo[b, h, i] <= j and j < hi[b, h, i] or 0 <= i - j and i - j < 20",
        f"lo: i64[2, 4, {N}]; hi: i64[2, 4, {N}]", spans_of_queries),
    "26 Falcon": Mask(
        "j <= i and doc[b, i] == doc[b, j] and pad[b, j] or (0 <= image[b, i] and image[b, i] == image[b, j])",
        f"{DOC}; pad: bool[2, {N}]; image: i64[2, {N}]", falcon,
    ),
    "27 text dense, visual blocks": Mask("i < 64 or j < 64 or blocks[h, i // 32, j // 32]", "blocks: bool[4, 8, 8]",
        block_map, meet=64, why="a map says which blocks all rows of a tile see, those of text among them"),
    "28 sliding tiles, 3-D": Mask(
        neighbourhood("i // 64", "j // 64", 4, 2, 2) + " and " + neighbourhood("i // 8 % 8", "j // 8 % 8", 8, 4, 4)
        + " and " + neighbourhood("i % 8", "j % 8", 8, 4, 4)
    ),
    "29 left padding": Mask("pad[b, j] and j <= i", f"pad: bool[2, {N}]", documents),
    "30 identity rows": Mask("(i < 100 and j == i) or (100 <= i and j <= i)"),
    "31 chunked": Mask("i // 96 == j // 96 and j <= i"),
    "32 bidirectional window": Mask("i - j <= 20 and j - i <= 40"),
    "33 static cache": Mask("j <= position[i]", f"position: i64[{N}]",
        lambda g: {"position": torch.arange(N) // 2 + 20}),
    "34 ring cache, not full yet": Mask(
        f"0 <= position[i] - (position[i] - j) % {N} and (position[i] - j) % {N} < 100", f"position: i64[{N}]",
        lambda g: {"position": torch.arange(N) // 2},
    ),
    "tensor": Mask("seen[b, i, j]", f"seen: bool[2, {N}, {N}]", lambda g: {"seen": band(20, 60)}),
    "tensor, beside documents": Mask(
        "doc[b, i] == doc[b, j] and seen[b, i, j]", f"{DOC}; seen: bool[2, {N}, {N}]",
        lambda g: documents(g) | {"seen": torch.rand(2, N, N, generator=g) > 0.2},
    ),
    "tensor of floats, and sinks": Mask(
        "-1.0 < bias[b, h, i, j] or j < 4 and j <= i", f"bias: f32[2, 4, {N}, {N}]",
        lambda g: {"bias": torch.where(band(40, 0)[:, None], 0.0, -1e30).expand(2, 4, N, N)},
    ),
    "34 ring cache": Mask(
        f"0 <= position[i] - (position[i] - j) % {N} and (position[i] - j) % {N} < 100", f"position: i64[{N}]",
        lambda g: {"position": torch.arange(N) + 100},
    ),
}  # fmt: skip
