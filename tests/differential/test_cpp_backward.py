"""C++ backward kernels of the forms that models use, against the equations in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from cpp_kernels.backward import build_backward, check_backward, given_of, gradient, run_backward
from cpp_kernels.build import host_isas
from cpp_kernels.cases import FORMS, case, tensors_of
from masks.catalogue import CATALOGUE, N

from attncc.codegen.cpp import unsupported_gradient
from attncc.ir import Attention, Load, Tensor, interpret, print_attention
from attncc.ir.attention_grad import shapes_of_grad
from attncc.ir.build import TRUE, add
from attncc.kernels import gradients
from attncc.kernels.skip_tables import Tabled
from attncc.passes.bounds.bounds import loop_bounds
from attncc.passes.bounds.simulate import full_keys, keys_of, simulate
from attncc.passes.gradient import gradient_of
from attncc.passes.tables import spans
from attncc.runtime.memory import peak_bytes

ISAS = host_isas()


def _known(form: str) -> bool:
    a = case(form, lse=FORMS[form].get("norm", "softmax") == "softmax")
    g = gradient_of(a, [t.name for t in a.tensors if t.kind == "float"])
    return not isinstance(g, str) and unsupported_gradient(g) is None


#: Forms whose gradient has a kernel.
KNOWN = [form for form in FORMS if _known(form)]


def agrees(a: Attention, n: int, m: int, isa: str) -> None:
    check_backward(gradient(a), tensors_of(a, n, m), [n, m], isa)


def test_what_has_a_kernel() -> None:
    assert {"dense", "window", "documents", "padding", "relative table", "alibi", "softcap", "sinks"} <= {*KNOWN}


@pytest.mark.parametrize("form", ["causal", "documents", "relative table", "softcap"])
def test_forms(form: str) -> None:
    a = case(form, lse=True)
    for n, m in ((70, 70), (1, 70), (33, 150), (130, 131)):
        if "doc" not in [t.name for t in a.tensors] or n <= m:
            agrees(a, n, m, ISAS[0])


@pytest.mark.full
@pytest.mark.parametrize("isa", host_isas(every=True))
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
@pytest.mark.parametrize("form", KNOWN)
def test_every_form_everywhere(form: str, dtype: str, isa: str) -> None:
    a = case(form, dtype, lse=True)
    for n, m in ((70, 70), (33, 150)):
        agrees(a, n, m, isa)


def test_bfloat16() -> None:
    a = case("window", "bf16", lse=True)
    for n, m in ((100, 100), (3, 300), (130, 17)):
        agrees(a, n, m, ISAS[0])


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("widths", [(1, 1), (4, 9), (17, 64), (40, 24), (96, 33), (256, 256)])
def test_head_sizes(widths: tuple[int, int], dtype: str) -> None:
    agrees(case("causal", dtype, d=widths[0], e=widths[1], lse=True), 70, 90, ISAS[0])


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_threads_that_share_a_point(threads: int) -> None:
    """With three threads the four points are cut into parts of their keys, whose sums are joined."""
    a = case("relative table", groups=2, lse=True)
    g, tensors = gradient(a), tensors_of(a, 200, 500)
    check_backward(g, tensors, [200, 500], ISAS[0])
    given = given_of(a, tensors, [200, 500])
    first, again = (run_backward(g, tensors, given, [200, 500], ISAS[0]) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))  # not a bit differs


def test_only_what_is_wanted() -> None:
    a = case("causal", lse=True)
    tensors = tensors_of(a, 70, 70)
    given = given_of(a, tensors, [70, 70])
    every = dict(zip("qkv", run_backward(gradient(a), tensors, given, [70, 70], ISAS[0]), strict=True))
    for wanted in ("q", "v"):
        (got,) = run_backward(gradient(a, [wanted]), tensors, given, [70, 70], ISAS[0])
        assert torch.equal(got, every[wanted])


@pytest.mark.parametrize("name", CATALOGUE)
def test_bounds_of_keys_are_those_of_the_transposed_mask(name: str) -> None:
    """Every row that sees a key is visited by the key's tile, and no row in `full` is hidden from any of its keys."""
    mask = CATALOGUE[name]
    a, tensors = mask.attention(), mask.tensors()
    g = gradient_of(replace(a, outputs=("out", "lse")), ["q", "k", "v"])
    assert not isinstance(g, str)
    bounds = loop_bounds(g.by_key, rows=True)
    tiles = simulate(g.by_key, bounds, [], tensors)
    seen = _seen(a, tensors).mT  # (batch, keys, rows)
    some, every = (f(seen.unflatten(-2, (-1, 64)), -2) for f in (torch.any, torch.all))
    assert not (some & ~keys_of(tiles.visit, tiles.shape, N)).any()
    assert not (full_keys(tiles, N) & ~every).any()


BY_DATA = [n for n, x in CATALOGUE.items() if spans.reads_by_key(x.attention())]


@pytest.mark.parametrize("name", BY_DATA)
def test_tables_bound_keys_as_they_bound_rows(name: str) -> None:
    """What only data can say bounds the rows that a tile of keys visits, and skips no row that sees one of them."""
    mask = CATALOGUE[name]
    a, tensors = mask.attention(), mask.tensors()
    g = gradient_of(replace(a, outputs=("out", "lse")), ["q", "k", "v"])
    assert not isinstance(g, str)
    found = spans.spanned(g.by_key, fills=False)
    named = tensors | spans.tables(found, tensors)
    tiles = simulate(found.attention, found.bounds, [], named)
    visit, full = keys_of(tiles.visit, tiles.shape, N), full_keys(tiles, N)
    seen = _seen(a, tensors).mT
    some, every = (f(seen.unflatten(-2, (-1, 64)), -2) for f in (torch.any, torch.all))
    assert not (some & ~visit).any() and not (full & ~every).any()
    plain = simulate(g.by_key, loop_bounds(g.by_key, rows=True), [], tensors)
    assert visit.float().mean() <= keys_of(plain.visit, plain.shape, N).float().mean()


def test_large_calls_read_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a mask that data decides: the same bits as without."""
    monkeypatch.setattr("attncc.kernels.skip_tables.WORTHWHILE", 1)
    a = case("documents", lse=True)
    built = gradients.built_backward(a, ("q", "k", "v"), torch.device("cpu"))
    assert built.run is not None and isinstance(built.run.kernel, Tabled)
    tensors = tensors_of(a, 200, 200)
    given = [tensors[t.name] for t in a.tensors] + given_of(a, tensors, [200, 200])
    shapes = shapes_of_grad(built.run.g, [200, 200])
    with_tables, without = ([torch.full(x, float("nan")) for x in shapes] for _ in range(2))
    built.run.kernel(given, [200, 200], with_tables)
    built.run.kernel.plain(given, [200, 200], without)
    assert built.run.kernel.more(given, [200, 200])
    assert all(torch.equal(x, y) for x, y in zip(with_tables, without, strict=True))


def test_what_is_added_to_scores_hides_no_row_from_keys() -> None:
    """A row whose keys all have the lowest bias sees all of them, though each of its keys has other rows."""
    a = case("documents", lse=True)
    bias = Tensor("bias", "f32", (a.i.extent, a.j.extent))
    score = add(a.score, Load("bias", (a.i.index, a.j.index), "float"))
    a = replace(a, mask=TRUE, score=score, tensors=(*(t for t in a.tensors if t.name in "qkv"), bias))
    g = gradient(a, ["q", "k", "v"])
    assert spans.reads_by_key(g.by_key) and not spans.spanned(g.by_key, fills=False).spans


@pytest.mark.parametrize(("name", "visited"), [("2 causal", 160 * N), ("6 window", None)])
def test_tiles_of_keys_visit_as_much_as_tiles_of_rows(name: str, visited: int | None) -> None:
    """A mask of distances is as large seen from its keys as from its rows."""
    a = CATALOGUE[name].attention()
    g = gradient_of(replace(a, outputs=("out", "lse")), ["q", "k", "v"])
    assert not isinstance(g, str)
    both = [
        int(keys_of((t := simulate(x, loop_bounds(x, rows=True), [], {})).visit, t.shape, N).sum()) * 64 // t.shape[0]
        for x in (a, g.by_key)
    ]  # fmt: skip
    assert both[0] == both[1] < N * N
    assert visited is None or both[1] == visited


def _seen(a: Attention, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    probe = replace(a, outputs=("weights",), normalizer="none", score=a.score)
    ones = {n: torch.ones_like(x) if n in "qkv" else x for n, x in tensors.items()}
    return interpret(probe, ones, [])["weights"] != 0


@pytest.mark.parametrize("form", ["relative table", "sinks"])
def test_the_operators_backward_runs_it(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the operator: gradients of tensors as they lie, and of everything that the score and the sink read."""
    a = case(form, lse=True)
    tensors = tensors_of(a, 70, 90)
    wanted = [t.name for t in a.tensors if t.kind == "float"]
    assert gradients.built_backward(a, tuple(wanted), torch.device("cpu")).run is not None

    def found(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = {n: x.to(dtype) if x.is_floating_point() else x for n, x in tensors.items()}
        leaves = {n: x.detach().requires_grad_(n in wanted) for n, x in leaves.items()}
        if dtype is torch.float32:
            out, lse = torch.ops.attncc.attention([leaves[t.name] for t in a.tensors], [70, 90], print_attention(a))
        else:
            made = interpret(a, leaves, [70, 90], compute=dtype)
            out, lse = made["out"], made["lse"]
        lse = lse.masked_fill(~lse.isfinite(), 0.0)
        seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        return torch.autograd.grad((out * seed).sum() + lse.square().sum(), [leaves[n] for n in wanted])

    calls: list[str] = []
    library = gradients.torch_backward.backward
    monkeypatch.setattr(gradients.torch_backward, "backward", lambda *x, **y: calls.append("torch") or library(*x, **y))
    for n, x, w in zip(wanted, found(torch.float32), found(torch.float64), strict=True):
        assert (x - w).abs().max() <= 1e-5 * (1 + w.abs().max()), n
    assert calls == []


def test_rows_whose_sums_are_known_roughly_are_left_to_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    a = case("dense", lse=True)
    tensors = {n: x * 60 for n, x in tensors_of(a, 40, 40).items()}
    leaves = {n: x.requires_grad_() for n, x in tensors.items()}
    monkeypatch.setattr(gradients, "built_backward", lambda *_: pytest.fail("a kernel was asked for"))
    out, _ = torch.ops.attncc.attention(list(leaves.values()), [40, 40], print_attention(a))
    out.sum().backward()


def test_no_square() -> None:
    """The peak of memory grows with the rows, not with their square."""
    a = case("causal", groups=1, lse=True)
    kernel, peaks = build_backward(gradient(a), ISAS[0]), list[int]()
    for n in (1024, 2048):
        tensors = tensors_of(a, n, n)
        given = [torch.zeros(2, 2, 1, n, *more) for more in ((32,), (32,), (), ())]
        outputs = [torch.empty(2, 2, 1, n, 32), torch.empty(2, 2, n, 32), torch.empty(2, 2, n, 32)]
        call = [tensors[t.name] for t in a.tensors] + given, [n, n], outputs
        kernel(*call)
        peak = peak_bytes(lambda call=call: kernel(*call), torch.device("cpu"))
        if peak is None:
            pytest.skip("the peak of memory is not known here")
        peaks.append(peak)
    assert peaks[1] < 4 * 2048 * 2048 // 4
