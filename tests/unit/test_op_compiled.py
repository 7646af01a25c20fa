"""The operator in graphs: compiled with static and dynamic shapes, trained, exported, cached on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from attentions.op_case import PLAIN, attend, build, inputs, reference

from attncc.codegen.torch_form import run_blocked
from attncc.ir import Attention
from attncc.runtime import op

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    before = op._installed
    op.install(build, run_blocked)
    yield
    op._installed = before


def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """What a graph around the operator looks like: something before, the transpose after, something else."""
    (out,) = attend([q * 2.0, k + 1.0, v, bias, length])
    return out.transpose(1, 2).flatten(2).relu() + 1.0


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    (out,) = reference([q * 2.0, k + 1.0, v, bias, length])
    return out.transpose(1, 2).flatten(2).relu() + 1.0


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_inference(dynamic: bool) -> None:
    compiled = torch.compile(model, backend="inductor", dynamic=dynamic, fullgraph=True)
    for shape in ((2, 5, 7), (2, 5, 7), (3, 9, 4)):
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs(*shape)), eager(*inputs(*shape)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_training(dynamic: bool) -> None:
    compiled = torch.compile(model, backend="inductor", dynamic=dynamic, fullgraph=True)
    for shape in ((2, 5, 7), (3, 9, 4)):
        tensors = [inputs(*shape) for _ in range(2)]
        for twin in tensors:
            for t in twin[:4]:
                t.requires_grad_()
        got, want = compiled(*tensors[0]), eager(*tensors[1])
        torch.testing.assert_close(got, want)
        got.square().sum().backward()
        want.square().sum().backward()
        for g, w in zip(tensors[0][:4], tensors[1][:4], strict=True):
            torch.testing.assert_close(g.grad, w.grad)


def test_compiled_calls_copy_no_input() -> None:
    """Keys that are a transposed view reach the kernel with the strides they have."""
    strides: list[tuple[int, ...]] = []

    def watching(a: Attention, text: str, device: torch.device) -> op.Kernel:
        inner = build(a, text, device)

        def kernel(tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]) -> None:
            strides.append(tensors[1].stride())
            inner(tensors, sizes, outputs)

        return kernel

    op.install(watching, run_blocked)
    q, k, v, bias, length = inputs()

    def transposed(k: torch.Tensor) -> torch.Tensor:
        return attend([q, k.transpose(1, 2), v, bias, length])[0] * 2.0

    base = k.transpose(1, 2).contiguous()
    with torch.no_grad():
        torch.compile(transposed, backend="inductor", fullgraph=True)(base)
    assert strides == [base.transpose(1, 2).stride()]


def test_export_keeps_one_node() -> None:
    class Module(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return model(*tensors)

    program = torch.export.export(Module(), tuple(inputs()), strict=False)
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count(torch.ops.attncc.attention.default) == 1
    torch.testing.assert_close(program.module()(*inputs()), eager(*inputs()))


CACHED = """
import torch
from torch._dynamo.utils import counters
from attncc.codegen.torch_form import run_blocked
from attncc.runtime import op

def build(a, text, device):
    def kernel(tensors, sizes, outputs):
        for out, value in zip(outputs, run_blocked(a, tensors, sizes)):
            out.copy_(value)
    return kernel

def model(q, k, v, bias, length):
    return torch.ops.attncc.attention([q * 2.0, k, v, bias, length], [2, 5, 7], SPEC)[0].relu()

op.install(build, run_blocked)
shapes = ((2, 5, 32), (2, 4, 7, 8), (2, 4, 7, 6), (4, 5, 7))
tensors = [torch.linspace(-1, 1, torch.Size(s).numel()).view(s).requires_grad_() for s in shapes]
out = torch.compile(model)(*tensors, torch.tensor([3, 7]))
out.sum().backward()
print(counters["aot_autograd"]["autograd_cache_hit"], f"{out.sum().item():.5f} {tensors[0].grad.norm().item():.5f}")
"""


@pytest.mark.full
def test_graphs_cached_on_disk_run_in_a_fresh_process_and_see_a_changed_spec(tmp_path: Path) -> None:
    def run(text: str) -> list[str]:
        program = CACHED.replace("SPEC", repr(text))
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env)
        return done.stdout.split()

    first, second, changed = run(PLAIN), run(PLAIN), run(PLAIN.replace("s * 0.25", "s * 0.75"))
    assert (first[0], second[0], changed[0]) == ("0", "1", "0")
    assert first[1:] == second[1:] != changed[1:]
