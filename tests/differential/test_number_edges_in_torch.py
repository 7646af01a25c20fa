"""docs/numbers.md, held by the plain-torch form and by the gradients from the kept sums of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from cpp_kernels.cases import case, tensors_of
from edge_numbers.edges import Tensors, edges_of, hold
from parameters.thinned import thinned

from attncc.codegen.torch_backward import backward, kept
from attncc.codegen.torch_form import run_blocked
from attncc.ir import Attention, interpret, parse_attention, print_attention
from attncc.passes.bounds.bounds import loop_bounds

FORMS = ("dense", "causal", "window", "documents", "padding, eager's mean", "padding, eager's nan", "bias", "sinks",
         "softcap")  # fmt: skip


def of_many(a: Attention, n: int, m: int) -> list[tuple[str, Tensors]]:
    """Tensors by name of the edge that they hold."""
    made: list[tuple[str, Tensors]] = []
    for name, edge in edges_of(a).items():
        t = tensors_of(a, n, m)
        edge(t, torch.Generator().manual_seed(1))
        made.append((name, t))
    return made


@pytest.mark.parametrize(("form", "dtype"), thinned(FORMS, ["f32", "bf16"]))
def test_edges(form: str, dtype: str) -> None:
    a = case(form, dtype, lse=True)  # without, torch's own kernel is asked for some
    for name, t in of_many(a, 40, 60):
        given = [t[x.name] for x in a.tensors]
        got = run_blocked(a, given, [40, 60], budget=1 << 13, bounds=loop_bounds(a, rows=True))
        hold(a, t, [40, 60], dict(zip(a.outputs, got, strict=True)), f"{name}, {form}, {dtype}")


def gradients(a: Attention, t: Tensors, sizes: Sequence[int], compute: torch.dtype | None) -> list[torch.Tensor]:
    """Those of the interpreter."""
    leaves = {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in t.items()}
    out = interpret(a, leaves, sizes, compute=compute)["out"]
    return list(torch.autograd.grad(out, [leaves[n] for n in "qkv"], seed_of(out), materialize_grads=True))


def seed_of(out: torch.Tensor) -> torch.Tensor:
    return torch.randint(-2, 3, out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)


def hold_gradients(a: Attention, t: Tensors, sizes: Sequence[int], what: str) -> None:
    a = replace(a, outputs=("out", "lse"))
    assert kept(a) is not None
    given = [t[x.name] for x in a.tensors]
    outputs: dict[str, torch.Tensor] = dict(zip(a.outputs, run_blocked(a, given, sizes), strict=True))
    seeds = [seed_of(outputs["out"]), torch.zeros_like(outputs["lse"])]
    wanted = [x.name in "qkv" for x in a.tensors]
    found = backward(a, seeds, given, outputs, sizes, wanted, bounds=loop_bounds(a, rows=True))
    assert found is not None
    exact, eager = gradients(a, t, sizes, torch.float64), gradients(a, t, sizes, None)
    for name, g, w, e in zip("qkv", found, exact, eager, strict=False):
        fine = e.isfinite()
        assert g[fine].isfinite().all(), f"{what}: gradient of {name}"
        if name == "q":  # eager's is NaN too in rows that do not see the key, as zero times NaN
            lost = outputs["out"].isnan().any(-1).movedim(-1, 1).flatten(2)
            assert g.isnan().any(-1)[lost].all(), f"{what}: gradient of {name} where the output is NaN"
        if fine.any():
            off, own = (x.double().sub(w.double())[fine].abs().max() for x in (g, e))
            unit = torch.finfo(e.dtype).eps
            # the weights' differences are lost in their roundings, of which no score is too large for
            other = t["k" if name == "q" else "q"].double().nan_to_num(0.0, 0.0, 0.0)
            size = max(float(w[fine].abs().max()), float(other.abs().max()))
            assert off <= 4 * own + 64 * unit * size, f"{what}: gradient of {name} is off by {off}, of {size}"


@pytest.mark.parametrize(
    ("form", "dtype"), thinned(["dense", "causal", "window", "bias", "sinks", "softcap"], ["f32", "bf16"])
)
def test_edges_of_gradients(form: str, dtype: str) -> None:
    a = case(form, dtype)
    for name, t in of_many(a, 40, 60):
        if not name.startswith("values"):  # their products with the gradient of the output leave the range
            hold_gradients(a, t, [40, 60], f"{name}, {form}, {dtype}")


@pytest.mark.parametrize("size", [1e6, 1e15, 1e30])
@pytest.mark.parametrize("form", ["dense", "causal", "bias"])
def test_gradients_where_no_score_is_exact(form: str, size: float) -> None:
    """The backward sums products in another order than the forward: the scores differ by more than the weights have."""
    a = parse_attention(print_attention(case(form)).replace("0.125", "0.11"))
    t = tensors_of(a, 40, 60)
    t["q"], t["k"] = t["q"] * size**0.5, t["k"] * size**0.5
    hold_gradients(a, t, [40, 60], f"{size}, {form}")
