"""What the processes of `test_context.py` run: rows and keys cut over processes, keys gathered and taken in turns."""

from __future__ import annotations

import os
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from sharded_programs import OPTIONS, start
from torch import Tensor

from attncc.ir import interpret, parse_attention
from attncc.runtime import ring, sharding

HEAD = """attention
size   n
batch  b = 2, h = 4
axis   i = n, j = n, d = 8, e = 8
tensor q: f32[2, 4, n, 8]
tensor k: f32[2, 2, n, 8]
tensor v: f32[2, 2, n, 8]
{tensors}q      q[b, h, i, d]
k      k[b, h // 2, j, d]
v      v[b, h // 2, j, e]
score  {score}
mask   {mask}
norm   {norm}
empty  {empty}
{sink}weight {weight}
give   {give}
dtype  f32
"""
PLAIN = {
    "tensors": "", "score": "s * 0.3", "mask": "True", "norm": "softmax", "empty": "zero", "sink": "", "weight": "w",
    "give": "out, lse",
}  # fmt: skip
DOCS, BIAS = "tensor doc: i64[2, n]\n", "tensor bias: f32[4, n, n]\n"
DOCUMENTS = {"tensors": DOCS, "mask": "j <= i and doc[b, i] == doc[b, j]"}
FORMS: dict[str, dict[str, str]] = {
    "dense": {},
    "causal": {"mask": "j <= i"},
    "window": {"mask": "j <= i and i < j + 5"},
    "documents": DOCUMENTS,
    "bias": {"tensors": BIAS, "score": "s * 0.3 + bias[h, i, j]", "mask": "j <= i"},
    "sink": {"tensors": "tensor z: f32[4]\n", "mask": "j <= i", "sink": "sink   z[h]\n"},
    "weighed": {"mask": "j <= i", "weight": "w * 0.5 * float(i - j)"},
    "sigmoid": {"mask": "j <= i", "norm": "sigmoid", "give": "out"},
    "empty rows": {"mask": "j + 3 <= i and i < j + 9"},
    "mean": {"mask": "j + 3 <= i", "empty": "mean", "give": "out, lse"},
    "NaN": {"mask": "j + 3 <= i", "empty": "nan"},
    "large": {"score": "s * 300.0", "mask": "j <= i"},
    "no rows seen at first": {"mask": "i < j and j < i + 7"},
}
#: Those that are tried on every change.
SOME = ("dense", "window", "documents", "sink", "large")


def every_form(rank: int, world: int, folder: str, results: Any) -> None:
    forms(rank, world, folder, results, every=True)


def case(name: str, n: int) -> tuple[str, list[Tensor]]:
    spec = HEAD.format(**(PLAIN | FORMS[name]))
    r = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, h, n, 8, generator=r) for h in (4, 2, 2)]
    if "doc:" in spec:
        tensors.append(torch.tensor([[x * 3 // n for x in range(n)], [int(x > n // 3) for x in range(n)]]))
    if "bias:" in spec:
        tensors.append(torch.randn(4, n, n, generator=r))
    if "z:" in spec:
        tensors.append(torch.randn(4, generator=r))
    return spec, tensors


def compared(name: str, n: int, how: str, mesh: Any, placements: list[Any]) -> tuple[float, int]:
    """The largest error of outputs and gradients, and how many runs of keys this process received."""
    from torch.distributed.tensor import Replicate, distribute_tensor  # noqa: PLC0415 - heavy

    os.environ["ATTNCC_CONTEXT"] = how
    spec, whole = case(name, n)
    a = parse_attention(spec)
    same = [Replicate()] * mesh.ndim
    parts = [distribute_tensor(x, mesh, placements if at < 3 else same) for at, x in enumerate(whole)]
    parts = [x.requires_grad_() if x.is_floating_point() else x for x in parts]
    exact = [x.double().requires_grad_() if x.is_floating_point() else x for x in whole]
    received = 0
    plain = ring.Messages.receive

    def counting(self: Any, into: Tensor, source: int, tag: int) -> Tensor:
        nonlocal received
        received += tag == 0 and into.dim() == 4 and into.shape[1] == 2
        return plain(self, into, source, tag)

    ring.Messages.receive = counting  # type: ignore[method-assign]
    try:
        got = torch.ops.attncc.attention(parts, [n], spec)
    finally:
        ring.Messages.receive = plain  # type: ignore[method-assign]
    named = {t.name: x for t, x in zip(a.tensors, exact, strict=True)}
    want = interpret(a, named, [n], compute=torch.float64)["out"]
    out = got[0].full_tensor()
    assert got[0].placements == tuple(placements)
    assert torch.equal(out.isnan(), want.isnan()), name
    got[0].nan_to_num().square().sum().backward()
    want.nan_to_num().square().sum().backward()
    errors = [(out - want).nan_to_num().abs().max() / want.nan_to_num().abs().max()]
    for x, y in zip(parts, exact, strict=True):
        if y.requires_grad:
            fine = y.grad.isfinite()  # what a row that is NaN passes on is not promised
            off = (x.grad.full_tensor() - y.grad)[fine].abs()
            errors.append(off.max() / y.grad[fine].abs().max().clamp_min(1e-6) if len(off) else torch.zeros(()))
    return max(float(x.detach()) for x in errors), received


def forms(rank: int, world: int, folder: str, results: Any, every: bool = False) -> None:
    from torch.distributed.tensor import Shard  # noqa: PLC0415 - heavy

    mesh = start(rank, world, folder)
    sharding.install()
    for name, how in product(FORMS if every else SOME, ("ring", "gather")):
        results[name, how, rank] = compared(name, 24, how, mesh, [Shard(2)])
    n = 5 * world  # no two equal chunks a process
    results["odd", "ring", rank] = compared("causal", n, "ring", mesh, [Shard(2)])
    dist.destroy_process_group()


def two_ways(rank: int, world: int, folder: str, results: Any) -> None:
    """Heads and rows at once."""
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - heavy
    from torch.distributed.tensor import Shard  # noqa: PLC0415 - heavy

    start(rank, world, folder)
    sharding.install()
    mesh = init_device_mesh("cpu", (2, 2))
    for name in ("causal", "bias"):
        results[name, rank] = compared(name, 24, "ring", mesh, [Shard(1), Shard(2)])
    dist.destroy_process_group()


def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def compiled(rank: int, world: int, folder: str, results: Any) -> None:
    """A compiled function, with its backward."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor  # noqa: PLC0415 - heavy

    mesh = start(rank, world, folder)
    os.environ["ATTNCC_CONTEXT"] = "ring"
    hidden = torch.ones(16, 16, dtype=torch.bool).triu(1)
    torch.manual_seed(0)
    whole = [torch.randn(1, 2, 16, 8) for _ in range(3)]
    parts = [distribute_tensor(x, mesh, [Shard(2)]).requires_grad_() for x in whole]
    exact = [x.double().requires_grad_() for x in whole]
    mask = distribute_tensor(hidden, mesh, [Replicate()])
    got = torch.compile(attend, backend="attncc", options=OPTIONS)(*parts, mask)
    want = attend(*exact, hidden)
    got.full_tensor().square().sum().backward()
    want.square().sum().backward()
    errors = [(got.full_tensor() - want).detach().abs().max()]
    errors += [(x.grad.full_tensor() - y.grad).abs().max() for x, y in zip(parts, exact, strict=True)]
    results[rank] = float(max(errors)), str(got.placements), ring._site.cache_info().currsize
    dist.destroy_process_group()
