"""Masks and scores in plain torch, and what attncc reads of them: prints docs/gallery.md.

    python examples/gallery.py > docs/gallery.md
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import attncc

N, HEADS, WIDTH = 1024, 2, 64


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = places()
    return sdpa(q, k, v, attn_mask=(j <= i) & (i - j < 64))


def prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = places()
    return sdpa(q, k, v, attn_mask=(j < 128) | (j <= i))


def dilated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = places()
    return sdpa(q, k, v, attn_mask=(j <= i) & ((i - j) % 8 == 0))


def sinks_and_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = places()
    return sdpa(q, k, v, attn_mask=(j <= i) & ((j < 4) | (i - j < 64)))


def chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = places()
    return sdpa(q, k, v, attn_mask=(j <= i) & (i // 128 == j // 128))


def documents(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=document[:, None] == document)


def padding(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    seen = torch.arange(k.shape[-2]) < length[:, None]
    return sdpa(q, k, v, attn_mask=seen[:, None, None])


def neighbourhood(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = places()  # of a picture of 32 rows of 32
    rows, columns = (i // 32 - j // 32).abs(), (i % 32 - j % 32).abs()
    return sdpa(q, k, v, attn_mask=(rows <= 3) & (columns <= 3))


def alibi(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    i, j = places()
    scores = q @ k.mT / WIDTH**0.5 - slope[:, None, None] * (i - j)
    return scores.masked_fill(j > i, float("-inf")).softmax(-1) @ v


def soft_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = 50 * torch.tanh(q @ k.mT / WIDTH**0.5 / 50)
    i, j = places()
    return scores.masked_fill(j > i, float("-inf")).softmax(-1) @ v


def relative_bias(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    i, j = places()
    bias = table[(j - i).clamp(-128, 128) + 128].permute(2, 0, 1)
    return (q @ k.mT / WIDTH**0.5 + bias).softmax(-1) @ v


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = places()
    return torch.where(j <= i, torch.sigmoid(q @ k.mT / WIDTH**0.5 - 6), 0) @ v


def places() -> tuple[Tensor, Tensor]:
    return torch.arange(N)[:, None], torch.arange(N)


#: What an example takes beside queries, keys and values.
MORE: dict[Callable[..., Tensor], Callable[[], Tensor]] = {
    documents: lambda: torch.repeat_interleave(torch.arange(4), torch.tensor([200, 424, 120, 280])),
    padding: lambda: torch.tensor([600]),
    alibi: lambda: 2.0 ** -torch.arange(1, HEADS + 1),
    relative_bias: lambda: torch.randn(257, HEADS),
}
EXAMPLES = (causal, window, prefix, dilated, sinks_and_window, chunks, documents, padding, neighbourhood, alibi,
            soft_cap, relative_bias, sigmoid)  # fmt: skip


@torch.no_grad()
def read(example: Callable[..., Tensor]) -> str:
    """What attncc makes of an example, as Markdown."""
    torch.manual_seed(0)
    given = [*torch.randn(3, 1, HEADS, N, WIDTH), *([MORE[example]()] if example in MORE else [])]
    options = {"measure": False, "inductor": False}
    with attncc.record() as report:
        found = torch.compile(example, backend="attncc", options=options)(*given)
    torch.testing.assert_close(found, example(*given), rtol=1e-3, atol=1e-4)
    (site,) = report.sites
    shares = [f"{name} {(part or 0) / (site.total or 1):.0%}"
              for name, part in (("visible", site.visible), ("computed", site.visited))]  # fmt: skip
    lines = [f"attention  {site.equation}", f"mask       {site.mask}", f"scores     {', '.join(shares)}"]
    lines += ["", *(line[::2].rstrip() for line in (site.picture or "").splitlines()[::2])]
    code = inspect.getsource(example).strip()
    title = example.__name__.replace("_", " ")
    return f"## {title.capitalize()}\n\n```python\n{code}\n```\n\n```text\n" + "\n".join(lines).strip() + "\n```\n"


INTRODUCTION = """# A gallery of masks and scores

Attention as people write it in plain torch, and what attncc reads of it: the score, the mask as a formula, and how
much of the scores the kernel computes for tiles of 64 rows. `examples/gallery.py` prints this page; it compares each
result with eager first. `i` and `j` are `torch.arange(1024)` down and along. Every one of these is fused with
`backend="attncc"` where it measures no slower; nothing is declared.
"""

if __name__ == "__main__":
    print("\n".join([INTRODUCTION, *map(read, EXAMPLES)]).rstrip())
