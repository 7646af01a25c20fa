"""What the processes of `test_sharded.py` run: attention on distributed tensors, beside the same on whole ones."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

OPTIONS = {"measure": False}


def grouped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Two heads of queries to one of keys, a learned bias per pair of tokens that all heads read."""
    k, v = (x.unsqueeze(2) for x in (k, v))
    q = q.unflatten(1, (k.shape[1], -1))
    return ((q @ k.mT * 0.3 + bias).softmax(-1) @ v).flatten(1, 2)


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT * 0.3 + bias).softmax(-1) @ v


def by_scores(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Without a softmax, and scores bent: other nodes take another way."""
    return torch.sigmoid(q @ k.mT * 0.3 + bias) @ v


#: By name: the form, and how many heads of keys it has.
FORMS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "grouped": (grouped, 2), "plain": (plain, 4), "sigmoid": (by_scores, 4),
}  # fmt: skip


class Block(nn.Module):
    """A layer of attention whose heads can be spread over processes."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.size = width // heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        n = x.shape[1]
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        scores = (q @ k.mT * self.size**-0.5).masked_fill(~seen, -torch.inf)
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def start(rank: int, world: int, folder: str) -> Any:
    warnings.filterwarnings("error", message="attncc:.*")  # a fused graph that does not compile is said by a warning
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - after the group

    return init_device_mesh("cpu", (world,))


def forms(rank: int, world: int, folder: str, results: Any) -> None:
    """Each form, with gradients of everything; each placement where there are more than two processes, which are not
    tried on every change."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor  # noqa: PLC0415 - heavy

    from attncc.driver.backend import Collected, collecting  # noqa: PLC0415 - after the environment is set

    mesh = start(rank, world, folder)
    same, batch, heads, rows = Replicate(), Shard(0), Shard(1), Shard(2)
    places = {"grouped": (batch, heads), "plain": (same, rows), "sigmoid": (heads,)}
    for name, (form, kv) in FORMS.items():
        for place in places[name] if world == 2 else (same, batch, heads, rows):
            torch.manual_seed(0)
            torch._dynamo.reset()
            whole = [torch.randn(world, h * world // 2, 12, 8) for h in (4, kv, kv)] + [torch.randn(12, 12)]
            cuts = [[place]] * 3 + [[Replicate()]]
            parts = [distribute_tensor(x, mesh, c).requires_grad_() for x, c in zip(whole, cuts, strict=True)]
            exact = [x.double().requires_grad_() for x in whole]
            found = Collected()
            token = collecting.set(found)
            try:
                got = torch.compile(form, backend="attncc", options=OPTIONS)(*parts)
            finally:
                collecting.reset(token)
            want = form(*exact)
            got.full_tensor().square().sum().backward()
            want.square().sum().backward()
            errors = [float((got.full_tensor() - want).detach().abs().max())]
            errors += [float((x.grad.full_tensor() - y.grad).abs().max() / y.grad.abs().max())
                       for x, y in zip(parts, exact, strict=True)]  # fmt: skip
            if rank == 0:
                results[name, str(place)] = ([s.status for s in found.sites], str(got.placements[0]), max(errors))
    dist.destroy_process_group()


def layers(rank: int, world: int, folder: str, results: Any) -> None:
    """A layer under tensor parallelism, and one whose parameters are sharded (FSDP2), trained for a step."""
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - heavy
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - heavy
    from torch.distributed.tensor.parallel import (  # noqa: PLC0415 - heavy
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = start(rank, world, folder)
    for how in ("tensor parallel", "FSDP2"):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model, x = Block(), torch.randn(2, 16, 32)
        exact = Block().double()
        exact.load_state_dict(model.state_dict())
        if how == "FSDP2":
            fully_shard(model, mesh=mesh)
        else:
            plan = {n: RowwiseParallel() if n == "out" else ColwiseParallel() for n in ("q", "k", "v", "out")}
            parallelize_module(model, mesh, plan)
        out = torch.compile(model, backend="attncc", options=OPTIONS)(x)
        out.square().sum().backward()
        want = exact(x.double())
        want.square().sum().backward()
        errors = [float((out - want).detach().abs().max())]
        for p, y in zip(model.parameters(), exact.parameters(), strict=True):
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            errors.append(float((grad - y.grad).abs().max() / y.grad.abs().max()))
        if rank == 0:
            results[how] = max(errors)
    dist.destroy_process_group()


def steps(rank: int, world: int, folder: str, results: Any) -> None:
    """Some steps of a model whose processes see other data, replicated (DDP) and sharded (FSDP2): its parameters after
    the last beside those of one process that sees all data in float64, and how far these moved at least."""
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - heavy
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - heavy
    from torch.nn.parallel import DistributedDataParallel  # noqa: PLC0415 - heavy

    from attncc.driver.backend import Collected, collecting  # noqa: PLC0415 - after the environment is set

    mesh = start(rank, world, folder)
    data = torch.randn(3, world * 2, 16, 32, generator=torch.Generator().manual_seed(1))

    def trained(run: Callable[..., Tensor], model: nn.Module, x: Tensor) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        for batch in x:
            for half in batch.chunk(2):  # gradients of two batches are added up
                ((run(half) - half.roll(1, -1)).square().mean() / 2).backward()
            optimizer.step()
            optimizer.zero_grad()

    for how in ("DDP", "FSDP2"):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = nn.Sequential(Block(), Block())
        exact = nn.Sequential(Block(), Block()).double()
        exact.load_state_dict(model.state_dict())
        if how == "DDP":
            wrapped: nn.Module = DistributedDataParallel(model)
        else:
            for block in model:
                fully_shard(block, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        found = Collected()
        token = collecting.set(found)
        try:
            own = data.unflatten(1, (2, world))[:, :, rank]  # a part of each half
            trained(torch.compile(wrapped, backend="attncc", options=OPTIONS), wrapped, own)
        finally:
            collecting.reset(token)
        before = [p.detach().clone() for p in exact.parameters()]
        trained(exact, exact, data.double())
        moved = min(float((p.detach() - x).abs().max()) for p, x in zip(exact.parameters(), before, strict=True))
        errors = []
        for p, y in zip(model.parameters(), exact.parameters(), strict=True):
            whole = p.full_tensor() if isinstance(p, DTensor) else p
            errors.append(float((whole - y).detach().abs().max() / y.detach().abs().max()))
        if rank == 0:
            results[how] = ([s.status for s in found.sites], max(errors), moved)
    dist.destroy_process_group()
