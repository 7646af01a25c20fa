"""A kernel is held against the plain-torch form before it is used: wrong ones are found, right ones are not accused,
and what was found is remembered."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from compilers.faulty import miscompiling
from cpp_kernels.cases import FORMS, case, tensors_of
from hypothesis import HealthCheck, given, settings
from random_ir.programs import Program, programs

import attncc
from attncc.ir import Attention, parse_attention, print_attention
from attncc.kernels import build, compiled, first_use
from attncc.kernels.build import TorchKernel, built, find_toolchain
from attncc.kernels.first_use import CheckedAtFirst, Untried, check_of, wrong
from attncc.kernels.made_up import attempts

DENSE = """attention
batch  b = {batch}, h = 4
axis   i = {rows}, j = {rows}, d = 64, e = 64
tensor q: f32[{batch}, 4, {rows}, 64]
tensor k: f32[{batch}, 4, {rows}, 64]
tensor v: f32[{batch}, 4, {rows}, 64]
q      q[b, h, i, d]
k      k[b, h, j, d]
v      v[b, h, j, e]
score  s * 0.125
mask   j <= i
norm   softmax
empty  zero
weight w
give   out
dtype  f32
layout b, h, i, e
"""


class Spoilt:
    """The plain-torch form, with outputs changed by `spoil`."""

    def __init__(self, a: Attention, spoil: Callable[[torch.Tensor], object]) -> None:
        self.kernel, self.spoil = TorchKernel(a), spoil

    def __call__(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> None:
        self.kernel(tensors, sizes, outputs)
        self.spoil(outputs[0])


SPOILT: dict[str, Callable[[torch.Tensor], object]] = {
    "one is off": lambda x: x[..., -1, 7, 3:4].add_(0.5),
    "one is missing": lambda x: x[..., -1, -1, -1:].fill_(float("nan")),
    "a row is zero": lambda x: x[-1, -1].zero_(),
    "all are a little large": lambda x: x.mul_(1.03),
    "one is infinite": lambda x: x[..., 0, 5, :1].fill_(float("inf")),
    "nothing is written": lambda x: x.fill_(float("nan")),
}


@pytest.mark.parametrize("dtype", ["f64", "f32", "f16", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_right_is_not_accused(form: str, dtype: str) -> None:
    a = case(form, dtype, d=16, e=16, lse=True)
    assert wrong(TorchKernel(a), a) is None


@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_nothing_that_is_right_is_accused(program: Program) -> None:
    a = program.attention
    try:
        assert wrong(TorchKernel(a), a) is None
    except Untried as reason:
        assert "made up" in str(reason) or "made-up" in str(reason)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("spoil", SPOILT)
def test_what_is_wrong_is_found(spoil: str, dtype: str) -> None:
    a = case("causal", dtype, d=16, e=16)
    assert "where it should be" in str(wrong(Spoilt(a, SPOILT[spoil]), a))


def test_large_and_static_is_compared_in_part() -> None:
    a = parse_attention(DENSE.format(batch=2, rows=512))
    assert wrong(TorchKernel(a), a) is None
    assert wrong(Spoilt(a, lambda x: x[1, 3, -1, -1:].add_(1.0)), a) is not None


def test_data_is_made_for_every_form() -> None:
    """Masks hide something and show something, and no index leaves its tensor."""
    for form in FORMS:
        a = case(form)
        first = next(attempts(a, len(a.tensors)))
        assert [t.dtype for t in first.tensors] == [x.dtype for x in tensors_of(a, 9, 9).values()]
        assert min(first.sizes) > 64


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES: dict[str, Callable[[], Any]] = {
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "meta by default": lambda: default_device("meta"),
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "gradients": torch.enable_grad,
    "fakes": lambda: torch._subclasses.FakeTensorMode(),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_mode_of_the_first_user_is_of_no_account(mode: str) -> None:
    a = case("causal", "f32", d=16, e=16)
    state = torch.get_rng_state()
    with MODES[mode]():
        assert wrong(TorchKernel(a), a) is None
        assert wrong(Spoilt(a, SPOILT["all are a little large"]), a) is not None
    assert torch.equal(torch.get_rng_state(), state)


def test_inside_a_transform() -> None:
    a = case("causal", "f32", d=16, e=16)

    def run(x: torch.Tensor) -> torch.Tensor:
        assert wrong(TorchKernel(a), a) is None
        return x

    torch.vmap(run)(torch.zeros(3))


def test_too_much_for_a_trial_is_compared_at_the_first_call() -> None:
    a = parse_attention(DENSE.format(batch=64, rows=2048))
    with pytest.raises(Untried, match="too much"):
        wrong(TorchKernel(a), a)


@pytest.mark.parametrize("spoil", [None, *SPOILT])
def test_the_first_call(spoil: str | None) -> None:
    a = case("causal", "f32", d=16, e=16)
    given = list(tensors_of(a, 80, 90).values())
    want, have = torch.empty(2, 80, 4, 16), torch.empty(2, 80, 4, 16)
    want, have = want.permute(0, 2, 1, 3).view(2, 2, 2, 80, 16), have.permute(0, 2, 1, 3).view(2, 2, 2, 80, 16)
    right, told = TorchKernel(a), list[str | None]()
    tried = right if spoil is None else Spoilt(a, SPOILT[spoil])
    kernel = CheckedAtFirst(tried, check_of(a).differs, lambda why: told.append(why) or right)
    right(given, [80, 90], [want])
    for _ in range(3):
        kernel(given, [80, 90], [have])
        assert torch.equal(have, want)
    assert len(told) == 1 and (told[0] is None) == (spoil is None)


def test_calls_that_tell_nothing_are_followed_by_a_check() -> None:
    a = case("causal", "f32", d=16, e=16)
    given = list(tensors_of(a, 8, 8).values())
    told: list[str | None] = []
    kernel = CheckedAtFirst(TorchKernel(a), check_of(a).differs, lambda why: told.append(why) or TorchKernel(a))
    out = torch.empty(2, 2, 2, 8, 16)
    kernel([torch.full_like(x, float("nan")) for x in given], [8, 8], [out])
    assert told == []
    kernel(given, [8, 8], [out])
    assert told == [None]


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store and a process that know no kernel."""
    if find_toolchain() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(tmp_path / "cache"))
    build._built.cache_clear()
    yield tmp_path
    build._built.cache_clear()
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_check_costs_once(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[object] = []
    monkeypatch.setattr(first_use, "wrong", lambda *args: checks.append(args))
    spec = print_attention(case("dense", "f32", d=16, e=16))
    assert built(spec, "cpu").language == "cpp" and len(checks) == 1
    build._built.cache_clear()
    assert built(spec, "cpu").language == "cpp" and len(checks) == 1
    build._built.cache_clear()
    compiled._here.cache_clear()
    with monkeypatch.context() as other:  # the same store on another machine
        other.setattr(compiled, "device_name", lambda _: "another processor")
        assert built(spec, "cpu").language == "cpp" and len(checks) == 2
    compiled._here.cache_clear()


def model(x: torch.Tensor) -> torch.Tensor:
    scores = x @ x.mT * 0.3
    return scores.masked_fill(torch.ones(200, 200, dtype=torch.bool).triu(1), float("-inf")).softmax(-1) @ x


@pytest.mark.slow
@pytest.mark.parametrize("change", ["s/^#define SCALE .*/#define SCALE 0.9f/", "s/l_old \\* factor + sum/l_old + sum/"])
def test_a_compiler_that_is_wrong(alone: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    bad = miscompiling(alone, change)
    monkeypatch.setenv("ATTNCC_CXX", str(bad))
    x = torch.randn(1, 2, 200, 16, generator=torch.Generator().manual_seed(0))
    compilations: list[str] = []
    compile_ = compiled.CppToolchain.compile
    monkeypatch.setattr(
        compiled.CppToolchain, "compile", lambda self, *args: compilations.append(self.path) or compile_(self, *args)
    )
    for attempt in range(2):  # the second time as in another process
        build._built.cache_clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            report = attncc.explain(model, x)
        assert attempt > 0 or any("made a kernel that is wrong" in str(x.message) for x in said)
        (site,) = report.sites
        assert site.status == "kept" and site.kernel is not None
        assert f"{bad} made a kernel that is wrong, which is not used: out is" in site.reason
        assert compilations == [str(bad)]
    assert build.default_store().entries() == []
    torch._dynamo.reset()
    build._built.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        have = torch.compile(model, backend="attncc", options={"inductor": False})(x)
    torch.testing.assert_close(have, model(x))
    monkeypatch.delenv("ATTNCC_CXX")
    assert built(site.ir or "", "cpu").language == "cpp" and len(compilations) == 2
