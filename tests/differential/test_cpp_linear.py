"""C++ kernels of linear attention against the recurrence in float64: at most a few roundings beyond the recurrence's
own in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attentions.linear_forms import FORMS, SCANS, data, plain
from cpp_kernels.build import compiled, host_isas

from attncc.codegen.cpp import emit_linear, unsupported_linear
from attncc.ir import Access, Const, Index, Linear, Size, Tensor, interpret_linear, verify_linear
from attncc.ir.build import op
from attncc.ir.evaluate import DTYPE_OF
from attncc.ir.linear_chunks import by_chunks
from attncc.runtime.cpp import CppKernel, Ranks

SIZES = (2, 4, 45, 20, 37)  # batch, heads, tokens, channels of keys and of values: no multiple of any vector


def ranks(a: Linear) -> Ranks:
    return Ranks(tuple(len(t.shape) for t in a.tensors), len(a.sizes), tuple(len(a.batch) + 2 for _ in a.outputs))


def run(a: Linear, tensors: dict[str, torch.Tensor], isa: str, sizes: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    kernel = CppKernel(compiled(emit_linear(a, isa), isa), ranks(a))
    want = interpret_linear(a, tensors, sizes, compute=torch.float64)
    kinds = {"out": DTYPE_OF[a.dtype], "state": DTYPE_OF[a.compute_dtype]}
    outputs = {n: torch.full(want[n].shape, float("nan"), dtype=kinds[n]) for n in a.outputs}
    kernel([tensors[t.name] for t in a.tensors], list(sizes), list(outputs.values()))
    return outputs


def check(a: Linear, tensors: dict[str, torch.Tensor], isa: str, sizes: tuple[int, ...] = ()) -> None:
    got = run(a, tensors, isa, sizes)
    want = interpret_linear(a, tensors, sizes, compute=torch.float64)
    eager = interpret_linear(a, tensors, sizes)
    for name, x in got.items():
        unit = max(torch.finfo(x.dtype).eps, torch.finfo(DTYPE_OF[a.compute_dtype]).eps)
        own = float((eager[name].double() - want[name]).abs().max())
        error = float((x.double() - want[name]).abs().max())
        assert error <= 4 * own + 4 * unit * float(want[name].abs().max()), name


_QUICK = ("retention", "packed", "delta_by_channel", "features", "for_all", "grouped")
_CASES = [
    pytest.param(form, isa, marks=() if (form in _QUICK and at == 0) or form == "packed" else pytest.mark.full)
    for form in FORMS for at, isa in enumerate(host_isas())
]  # fmt: skip


@pytest.mark.parametrize(("form", "isa"), _CASES)
def test_forms(form: str, isa: str) -> None:
    a = verify_linear(FORMS[form](plain(*SIZES)))
    check(a, data(a), isa)


@pytest.mark.parametrize(
    ("form", "isa", "n"),
    [
        pytest.param(form, isa, n, marks=() if (form, at, n) == ("selective_scan", 0, 45) else pytest.mark.full)
        for form in SCANS for at, isa in enumerate(host_isas()) for n in (1, 45)
    ],
)  # fmt: skip
def test_scans(form: str, isa: str, n: int) -> None:
    """Token by token, where each column of the state has its own decay; more columns than a task has."""
    a = verify_linear(SCANS[form](plain(2, 2, n, 20, 331 if form == "selective_scan" else 37)))
    check(a, data(a), isa)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["f64", "bf16"])
def test_scans_of_other_types(dtype: str) -> None:
    a = verify_linear(SCANS["selective_scan"](plain(*SIZES, dtype)))
    check(a, data(a), host_isas()[0])


@pytest.mark.parametrize("dtype", ["f64", "bf16", pytest.param("f16", marks=pytest.mark.full)])
def test_types(dtype: str) -> None:
    a = verify_linear(FORMS["gated_delta"](plain(*SIZES, dtype)))
    check(a, data(a), host_isas()[0])


@pytest.mark.parametrize("n", [1, 3, 4, 33, 70])
def test_lengths_that_the_call_decides(n: int) -> None:
    a = verify_linear(FORMS["grouped"](plain(2, 4, Size("n0"), 20, 37)))
    check(a, data(a, n), host_isas()[0], (n,))


def one_token(form: str, sizes: tuple[int, ...], dtype: str = "f32") -> Linear:
    """One token of `form`, from a state to a state."""
    batch, heads, dk, dv = sizes
    a = FORMS[form](plain(batch, heads, 1, dk, dv, dtype))
    if a.state is None:
        state = Tensor("s0", "f64" if dtype == "f64" else "f32", tuple(Const(n) for n in sizes))
        at = (*(x.index for x in a.batch), a.d.index, a.e.index)
        a = replace(a, tensors=(*a.tensors, state), state=Access("s0", at))
    return verify_linear(replace(a, outputs=("out", "state")))


_STEPS = [
    pytest.param(form, sizes, isa, marks=() if at == 0 and kept else pytest.mark.full)
    for form in FORMS if form not in ("features", "for_all")
    for sizes, kept in (((2, 4, 32, 96), form == "gated_delta"), ((2, 4, 20, 37), form == "delta_by_channel"))
    for at, isa in enumerate(host_isas())
]  # fmt: skip


@pytest.mark.parametrize(("form", "sizes", "isa"), _STEPS)
def test_one_token(form: str, sizes: tuple[int, ...], isa: str) -> None:
    """In each order in memory of the states, before and after."""
    a = one_token(form, sizes)
    given = data(a)
    want = interpret_linear(a, given, compute=torch.float64)
    kernel = CppKernel(compiled(emit_linear(a, isa), isa), ranks(a))
    for before, after in ((0, 0), (1, 1), (0, 1), (1, 0)):
        state = given["s0"].mT.contiguous().mT if before else given["s0"]
        shape = [*sizes[:2], 1, sizes[3]], [*sizes[:2], *sizes[2:][:: -1 if after else 1]]
        out, new = (torch.full(x, float("nan")) for x in shape)
        new = new.mT if after else new
        kernel([(given | {"s0": state})[t.name] for t in a.tensors], [], [out, new])
        for name, got in (("out", out), ("state", new)):
            torch.testing.assert_close(got.double(), want[name], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("f64", marks=pytest.mark.full)])
def test_one_token_of_many_sequences(dtype: str) -> None:
    """States that are stored past the caches."""
    a = one_token("gated_delta", (16, 4, 64, 64), dtype)
    check(a, data(a), host_isas()[0])


def test_operands_in_any_order_in_memory() -> None:
    a = verify_linear(FORMS["gated_delta"](plain(*SIZES)))
    given = {n: x.mT.contiguous().mT if x.ndim > 3 else x for n, x in data(a).items()}
    check(a, given, host_isas()[0])


def test_two_calls_are_one_through_the_state() -> None:
    a = verify_linear(FORMS["gated_delta"](plain(*SIZES)))
    given = data(a)
    whole = run(a, given, host_isas()[0])
    cut, rest = 32, SIZES[2] - 32

    def part(n: int, start: int) -> tuple[Linear, dict[str, torch.Tensor]]:
        own = FORMS["gated_delta"](plain(SIZES[0], SIZES[1], n, *SIZES[3:]))
        return own, {x: t if x == "s0" else t[:, :, start : start + n] for x, t in given.items()}

    own, tensors = part(cut, 0)
    first = run(own, tensors, host_isas()[0])
    own, tensors = part(rest, cut)
    second = run(own, tensors | {"s0": first["state"]}, host_isas()[0])
    torch.testing.assert_close(torch.cat([first["out"], second["out"]], 2), whole["out"])
    torch.testing.assert_close(second["state"], whole["state"])


def test_strong_decays_do_not_overflow() -> None:
    for form in ("gated_delta", "delta_by_channel"):
        a = verify_linear(FORMS[form](plain(*SIZES)))
        given = {n: x * 100 if n in ("g", "gk") else x for n, x in data(a).items()}
        check(a, given, host_isas()[0])


@pytest.mark.full
@pytest.mark.parametrize("form", ["gated", "by_channel"])
def test_a_state_that_lasts_is_not_bent(form: str) -> None:
    """Decays near one round to float32 as a factor that is off by as much for every token: kept as differences, the
    last state is off by a rounding every few tokens, that of chunks by one a chunk."""
    a = verify_linear(FORMS[form](plain(1, 2, 1500, 16, 16)))
    given = {n: x * 2e-3 if n in ("g", "gk") else x for n, x in data(a).items()}
    given["k"], given["v"] = given["k"].abs(), given["v"].abs()
    want = by_chunks(a, {n: x.double() for n, x in given.items()}, compute=torch.float64)
    own, got = by_chunks(a, given), run(a, given, host_isas()[0])

    def off(x: dict[str, torch.Tensor]) -> float:
        return float((x["state"].double() - want["state"]).abs().max() / want["state"].abs().max())

    assert off(got) < max(8 * off(own), 2e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"decay": op("exp", op("float", Index("e"))), "rule": "delta"}, "for each column"),
        ({"decay": op("exp", op("float", Index("d"))), "rule": "delta"}, "several tensors"),
        ({"rate": op("float", Index("d")), "sees": "all"}, "every query sees every key"),
        ({"phi_q": op("float", Index("d"))}, "feature map"),
    ],
)
def test_what_has_no_kernel(change: dict[str, object], reason: str) -> None:
    a = replace(plain(*SIZES), **change)  # type: ignore[arg-type]
    assert reason in str(unsupported_linear(a))
    with pytest.raises(ValueError, match=reason):
        emit_linear(a, "avx2")


def test_neon_takes_it() -> None:
    """As text: machines that compile it are elsewhere."""
    source = emit_linear(FORMS["packed"](plain(*SIZES)), "neon")
    assert "#define LANES 4" in source
