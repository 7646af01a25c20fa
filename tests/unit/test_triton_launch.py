"""Which source a kernel runs: measured once a bucket of shapes, remembered, and never measured where it may not be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_kernels.cases import make

from attncc.codegen.triton import TritonConfig, emit, reads_by_key
from attncc.ir import print_attention
from attncc.kernels import build
from attncc.kernels.build import Remembered
from attncc.kernels.skip_tables import BySize
from attncc.passes.bounds.bounds import loop_bounds
from attncc.runtime import triton_launch
from attncc.runtime.store import Store
from attncc.runtime.triton_launch import TritonKernel, tuning_allowed
from attncc.runtime.triton_module import load_module

SOURCE = """
calls = []


def launch(tensors, sizes, outputs):
    calls.append(tuple(sizes))
    if {fails}:
        raise RuntimeError("out of shared memory")
    outputs[0].fill_({value})
"""


def kernel(*values: int, remember: dict[str, str] | None = None, fails: int = -1) -> TritonKernel:
    """Sources that write their number; the timer finds the one with the smallest number the fastest."""
    sources = [SOURCE.format(value=v, fails=v == fails) for v in values]
    made = TritonKernel(sources, remember=remember)
    out = torch.zeros(1)

    def timer(call: Callable[[], object]) -> float:
        call()
        return float(LAST[0][0])

    made.timer = timer
    LAST[0] = out
    return made


LAST = [torch.zeros(1)]


def run(k: TritonKernel, *sizes: int) -> float:
    k([], list(sizes), [LAST[0]])
    return float(LAST[0][0])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuning is allowed, as on a GPU."""
    monkeypatch.setattr(triton_launch, "tuning_allowed", lambda device: True)


def test_no_gpu_no_tuning() -> None:
    assert not tuning_allowed(torch.device("cpu"))
    k = kernel(3, 1, 2)
    assert run(k, 100) == 3


def test_the_switch_turns_tuning_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tuning_allowed(torch.device("cuda"))
    monkeypatch.setenv("ATTNCC_TUNE", "off")
    assert not tuning_allowed(torch.device("cuda"))


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not tuning_allowed(torch.device("cuda"))


@pytest.mark.usefixtures("gpu")
def test_the_fastest_is_found_once_for_a_bucket() -> None:
    remember: dict[str, str] = {}
    k = kernel(30, 10, 20, remember=remember)
    assert run(k, 100) == 10
    assert run(k, 120) == 10
    assert len(remember) == 1
    assert k.module(0).calls == [(100,)]  # 120 is in the same bucket
    run(k, 1000)
    assert len(remember) == 2 and k.module(0).calls == [(100,), (1000,)]


def test_what_was_remembered_is_used_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    remember: dict[str, str] = {}
    with monkeypatch.context() as patch:
        patch.setattr(triton_launch, "tuning_allowed", lambda device: True)
        assert run(kernel(31, 11, 21, remember=remember), 100) == 11
    again = kernel(31, 11, 21, remember=remember)
    assert run(again, 100) == 11
    assert run(kernel(31, 11, 22, remember=remember), 100) == 31  # other sources, nothing known


def test_a_choice_outlives_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through the store, which a later process opens anew."""
    with monkeypatch.context() as patch:
        patch.setattr(triton_launch, "tuning_allowed", lambda device: True)
        assert run(kernel(35, 15, 25, remember=Remembered(Store(tmp_path))), 100) == 15
    assert run(kernel(35, 15, 25, remember=Remembered(Store(tmp_path))), 100) == 15
    assert run(kernel(35, 15, 25, remember=Remembered(Store(tmp_path / "other"))), 100) == 35


def test_large_calls_of_masks_that_data_decides_make_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the driver builds for a GPU, seen on a machine without one."""
    monkeypatch.setattr(build, "capability_of", lambda device: "sm_90")
    monkeypatch.setattr(build, "default_store", lambda: Store(tmp_path))
    monkeypatch.setattr(build, "_built", build._built.__wrapped__)  # nothing of this machine's is to be found again
    documents = build.built(print_attention(make("documents").attention), "cuda")
    assert documents.language == "triton" and isinstance(documents.kernel, BySize)
    assert "look" not in documents.kernel.plain.module(0).SIGNATURES
    seen: list[int] = []
    large = documents.kernel._build()
    assert "look" in large.module(0).SIGNATURES
    monkeypatch.setattr(documents.kernel, "_build", lambda: lambda tensors, sizes, outputs: seen.append(sizes[1]))
    monkeypatch.setattr(documents.kernel, "plain", lambda tensors, sizes, outputs: seen.append(-sizes[1]))
    for n in (1000, 2000):
        documents.kernel([], [1, n, n], [])
    assert seen == [-1000, 2000]
    causal = build.built(print_attention(make("causal").attention), "cuda")
    assert isinstance(causal.kernel, TritonKernel)


@pytest.mark.usefixtures("gpu")
def test_a_source_that_fails_is_passed_over() -> None:
    assert run(kernel(32, 12, 22, fails=12), 100) == 22
    with pytest.raises(RuntimeError, match="out of shared memory"):
        run(kernel(13, 13, fails=13), 100)


def test_a_choice_not_made_is_made_later(monkeypatch: pytest.MonkeyPatch) -> None:
    k = kernel(33, 14)
    assert run(k, 100) == 33
    monkeypatch.setattr(triton_launch, "tuning_allowed", lambda device: True)
    assert run(k, 100) == 14


def looked(*wrong: int, remember: dict[str, str], values: tuple[int, ...] = (41, 42)) -> tuple[TritonKernel, list[str]]:
    """Sources of which some are wrong, and what is said of them; torch's own form writes 7."""
    said: list[str] = []

    def check(tensors: object, sizes: object, outputs: list[torch.Tensor]) -> str | None:
        number = int(outputs[0][0])
        looks.append(number)
        return f"it is {number}" if number in wrong else None

    def plain() -> Callable[..., None]:
        return lambda tensors, sizes, outputs: outputs[0].fill_(7) and None

    sources = [SOURCE.format(value=v, fails=False) for v in values]
    return TritonKernel(sources, remember=remember, check=check, report=said.append, otherwise=plain), said


looks: list[int] = []


def test_a_source_that_is_wrong_is_not_used_again() -> None:
    """Nor by a later process, which takes what was found for known; a right one is looked at once."""
    looks.clear()
    remember: dict[str, str] = {}
    k, said = looked(41, remember=remember)
    assert [run(k, n) for n in (100, 100, 5000)] == [42, 42, 42] and looks == [41, 42]
    assert len(said) == 1 and "it is 41" in said[0]
    later, said = looked(41, remember=remember)
    assert run(later, 100) == 42 and looks == [41, 42] and said == []


def test_where_no_source_is_right_torch_computes() -> None:
    remember: dict[str, str] = {}
    k, said = looked(41, 42, remember=remember)
    assert [run(k, 100), run(k, 100)] == [7, 7] and len(said) == 2
    assert run(looked(remember=remember)[0], 100) == 7
    single, said = looked(51, remember={}, values=(51,))
    assert run(single, 100) == 7 and len(said) == 1


@pytest.mark.usefixtures("gpu")
def test_the_fastest_may_be_wrong() -> None:
    k, said = looked(61, remember={}, values=(63, 61, 62))
    k.timer = lambda call: (call(), float(LAST[0][0]))[1]  # type: ignore[func-returns-value]
    LAST[0] = torch.zeros(1)
    assert run(k, 100) == 62 and len(said) == 1


def test_nothing_is_looked_at_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing waits for the device, which a capture does not allow."""
    looks.clear()
    k, _ = looked(41, remember={})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert k._right(0, [], [], [], torch.device("cuda")) and looks == []


def test_no_source_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        TritonKernel([])


class Recorded:
    """A kernel that notes its launches instead of running."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], tuple[object, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.launches.append((grid, arguments))


@pytest.mark.parametrize("name", ["decode", "decode with sink", "pages", "documents", "causal block table", "causal"])
@pytest.mark.parametrize("persistent", [0, 2])
def test_what_is_launched_depends_on_sizes_alone(name: str, persistent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read back from the device, so that a CUDA graph may capture a call: the host's part runs on tensors
    that have no values, and launches the same for any values."""
    a, tensors, sizes = make(name, keys=1000 if name.startswith("decode") else 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    config = TritonConfig(16, 16, 4, 1, split=not persistent, lists=reads_by_key(a), persistent=persistent)
    module = load_module(emit(a, loop_bounds(a, rows=True), config))
    with FakeTensorMode():
        outputs = [torch.empty([2] * (len(a.batch) + 1 + (n == "out")), device="cuda") for n in a.outputs]
        given = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors.values()]
        noted = {n: Recorded() for n in module.SIGNATURES}
        for n, recorder in noted.items():
            monkeypatch.setattr(module, n, recorder)
        module.launch(given, sizes, outputs)
    joined = name.startswith("decode") and not persistent
    assert joined or not noted.pop("join", Recorded()).launches  # too few keys to be shared
    for n, k in noted.items():
        ((grid, arguments),) = k.launches
        assert len(arguments) == len(module.SIGNATURES[n])
        assert all(isinstance(x, int) and x > 0 for x in grid)
        assert all(x is None or isinstance(x, (torch.Tensor, int)) for x in arguments)
