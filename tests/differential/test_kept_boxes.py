"""Boxes that are kept beside a static cache: whatever is written to it, by whom ever, they are those of its keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from planned.made import plan, site
from policies.situations import SITUATIONS, Situation, applied
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import attncc
from attncc.driver.lowering import lower
from attncc.ir import Attention, Boxes, interpret_program, parse_attention
from attncc.ir.boxes import bounds, order_of
from attncc.ir.program import program_of_node
from attncc.kernels.boxes import build_boxes, changed, made_up, wrong
from attncc.passes.policies import Pages
from attncc.plans.plan import Rule
from attncc.runtime import kept
from attncc.runtime.kept import Call, Kept

B, H, HK, N, D = 2, 4, 2, 64, 16
FORM = "pages{page=4,budget=12}"
#: Pages of a cache: one more where the first may begin anywhere in one.
ALL = N // 4 + 1
WHAT = f"{H} heads of {D} and {D}, f32: softmax(s * 0.25) v"
Write = Callable[[Tensor, Tensor, Tensor], Tensor]


def put(cache: Tensor, at: Tensor, x: Tensor) -> Tensor:
    cache[:, :, at] = x
    return cache


def copied(cache: Tensor, at: Tensor, x: Tensor) -> Tensor:
    return cache.index_copy_(2, at, x)


def in_slice(cache: Tensor, at: Tensor, x: Tensor) -> Tensor:
    cache[:, :, 30 : 30 + x.shape[2]] = x
    return cache


def twice(cache: Tensor, at: Tensor, x: Tensor) -> Tensor:
    cache[:, :, at - 8] = x
    cache[:, :, at] = x
    return cache


def late(cache: Tensor, at: Tensor, x: Tensor) -> Tensor:
    """The keys that are read are not those that are kept."""
    return copied(cache.clone(), at, x)


def nothing(cache: Tensor, at: Tensor, x: Tensor) -> Tensor:
    return cache


class Decoder(nn.Module):
    """q, k and v (B, heads, n, D) of n tokens at positions `at` of a cache (B, HK, N, D), or (B, N, HK, D)."""

    def __init__(self, write: Write = copied, *, rows_first: bool = False) -> None:
        super().__init__()
        self.write, self.rows_first = write, rows_first

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, at: Tensor, pad: Tensor) -> Tensor:
        if self.rows_first:
            keys[:, at] = k.transpose(1, 2)
            values[:, at] = v.transpose(1, 2)
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        else:
            keys = self.write(keys, at, k)
            values.index_copy_(2, at, v)
        j = torch.arange(N)
        seen = (j <= at[:, None])[None, None] & (j >= pad[:, None])[:, None, None]
        return sdpa(q, keys, values, attn_mask=seen, enable_gqa=True)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    kept._rooms.clear()
    yield
    torch.compiler.reset()


def known(form: str = FORM) -> Any:
    own = msgspec.structs.replace(
        site(""), phase="decode", what=WHAT, heads=H, rules=(Rule(form, tuple(range(H)), 0.3, 1e-4),), keys=(1, N)
    )
    return plan(nn.Identity(), own, lengths=(1, N))


def caches(*, rows_first: bool = False) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    shape = (B, N, HK, D) if rows_first else (B, HK, N, D)
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g)


def token(seed: int, n: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, h, n, D, generator=g) for h in (H, HK, HK))
    return q, 3 * k, v


class Steps:
    """A decoder under a plan, each call held against one whose boxes are made of all keys; `renewed` are the pages that
    the last call made."""

    def __init__(self, model: nn.Module, *, form: str = FORM, inductor: bool = False) -> None:
        options = {"plan": known(form), "inductor": inductor}
        self.run = torch.compile(model, backend="attncc", options=options, dynamic=False)
        self.renewed, self.report = 0, Any

    def __call__(
        self, keys: Tensor, values: Tensor, at: list[int], pad: tuple[int, int] = (0, 0), seed: int | None = None
    ) -> Tensor:
        q, k, v = token(at[0] if seed is None else seed, len(at))
        where = torch.tensor(at), torch.tensor(pad)
        others = keys.clone(), values.clone()
        found: list[tuple[Tensor, Tensor]] = []
        with pytest.MonkeyPatch.context() as patch:
            own = Kept.bounds
            patch.setattr(Kept, "bounds", lambda x, *call: (y := own(x, *call), found.append((y, x.dirty.clone())))[0])
            out = self.run(q, k, v, keys, values, *where)
            known = dict(kept._rooms)
            kept._rooms.clear()
            fresh = self.run(q, k, v, *others, *where)
            kept._rooms.clear()
            kept._rooms.update(known)
        (mine, dirty), (anew, _) = found[-2:]  # where the kernel is new, it is tried before
        self.renewed = int(dirty.any(0).any(0).sum())
        assert torch.equal(mine, anew), at
        torch.testing.assert_close(out, fresh, rtol=1e-4, atol=1e-5)
        return out


@torch.no_grad()
@pytest.mark.parametrize("write", [put, copied, nothing])
@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.full)])
def test_the_writes_of_a_graph_are_followed(write: Write, inductor: bool) -> None:
    """One token after another, several at once, one again, back to an earlier place: few pages are made anew."""
    steps = Steps(Decoder(write), inductor=inductor)
    keys, values = caches()
    steps(keys, values, [30])
    assert steps.renewed == ALL, "all, the first time"
    for at in (31, 32, 32, 20, 21, 63, 22):
        steps(keys, values, [at], seed=at + 100)
    steps(keys, values, [23])
    assert steps.renewed == 1, "the page that is written to"
    steps(keys, values, [23], seed=7)
    assert steps.renewed == (0 if write is nothing else 1), "the same place again"


@torch.no_grad()
def test_several_tokens_and_negative_positions() -> None:
    steps = Steps(Decoder(put))
    keys, values = caches()
    for at in ([40, 41, 42], [43, 44, 45], [10, 50, 44]):
        steps(keys, values, at)
    torch.compiler.reset()
    steps = Steps(Plain())
    for at in (-1, -5, -1):
        steps(keys, values, [at], seed=at + 50)
    assert steps.renewed == 1


class Plain(nn.Module):
    """A decoder that sees the whole cache."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, at: Tensor, pad: Tensor) -> Tensor:
        keys[:, :, at] = k
        return sdpa(q, keys, values, enable_gqa=True)


OUTSIDE: dict[str, Callable[[Tensor], object]] = {
    "an element": lambda x: x[0, 1, 17].fill_(9.0),
    "a reset": lambda x: x.zero_(),
    "a view": lambda x: x[:, :, 4:9].transpose(1, 2).mul_(-2.0),
    "another order of the batch": lambda x: x.copy_(x.flip(0)),
    "a compiled function": torch.compile(lambda x: x[:, :, 3].add_(5.0), backend="aot_eager"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", OUTSIDE)
def test_what_others_write_is_seen(name: str) -> None:
    steps = Steps(Decoder())
    keys, values = caches()
    for at in (30, 31):
        steps(keys, values, [at])
    OUTSIDE[name](keys)
    steps(keys, values, [32])
    assert steps.renewed == ALL
    steps(keys, values, [33])
    assert steps.renewed == 1


@torch.no_grad()
def test_each_cache_has_boxes_of_its_own() -> None:
    steps = Steps(Decoder())
    one, other = caches(), caches()
    other[0].mul_(-1.0)
    for at in (30, 31, 32):
        steps(*one, [at])
        steps(*other, [at + 5])
        assert steps.renewed == (ALL if at == 30 else 1)
    assert len(kept._rooms) == 2
    del one
    assert len(kept._rooms) == 1, "they go with the cache"


@torch.no_grad()
def test_a_call_that_fails_leaves_no_boxes() -> None:
    keys, _ = caches()

    def fail() -> None:
        raise RuntimeError("half-way")

    kept.run_beside([keys], lambda: None)
    with pytest.raises(RuntimeError, match="half-way"):
        kept.run_beside([keys], fail)
    assert kept._rooms[id(keys)][1].version is None


@torch.no_grad()
def test_padding_moves_the_pages_of_a_sequence() -> None:
    """Sequences begin elsewhere; where one begins may change, and then its pages are others."""
    steps = Steps(Decoder())
    keys, values = caches()
    for at, pad, most in ((30, (0, 7), 17), (31, (0, 7), 2), (32, (0, 7), 2), (33, (2, 7), 17), (34, (2, 7), 2)):
        steps(keys, values, [at], pad)
        assert steps.renewed <= most, at


@pytest.mark.full
@torch.no_grad()
def test_a_cache_of_rows_first_and_shared_bounds() -> None:
    for form in (FORM, "pages{page=4,budget=12,share=max}"):
        torch.compiler.reset()
        steps = Steps(Decoder(rows_first=True), form=form)
        keys, values = caches(rows_first=True)
        for at in (30, 31, 32):
            steps(keys, values, [at])
        assert steps.renewed == 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("write", "code"),
    [
        (in_slice, "cache-written"), pytest.param(twice, "cache-written", marks=pytest.mark.full),
        pytest.param(late, "cache-new", marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_other_caches_are_read_anew_and_say_so(write: Write, code: str) -> None:
    model = Decoder(write)
    keys, values = caches()
    for at in (30, 31):
        q, k, v = token(at)
        given = q, k, v, keys, values, torch.tensor([at]), torch.tensor([0, 0])
        (own,) = attncc.explain_plan(known(), model, *given).sites
        assert own.status == "fused" and "pages-from-keys" in own.code and code in own.code
    assert not kept._rooms


def test_with_gradients_boxes_are_made_of_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attncc.driver.rewriting.slower", lambda *_: None)
    q, k, v = token(3)
    keys, values = caches()
    given = q.requires_grad_(), k, v, keys, values, torch.tensor([9]), torch.tensor([0, 0])
    (own,) = attncc.explain_plan(known(), Decoder(), *given).sites
    assert "cache-gradients" in own.code


@torch.no_grad()
def test_inference_tensors_get_no_boxes() -> None:
    """They have no version that would tell who wrote to them."""
    with torch.inference_mode():
        steps = Steps(Decoder())
        keys, values = caches()
        for at in (30, 31):
            steps(keys, values, [at])
            keys[:, :, 5] = at
        steps(keys, values, [32])
    assert not kept._rooms


@pytest.mark.parametrize("s", [s for s in SITUATIONS if s.mask not in ("documents", "padded both ways")], ids=str)
def test_the_operator_gives_what_the_node_means(s: Situation) -> None:
    """Whatever the attention: kept boxes select as the interpreter does."""
    few = Situation(s.mask, s.heads, s.group, min(s.n, 3), s.m, s.padding, dynamic=False)
    a = few.attention()
    if Pages(4, 12).applies(a) is not None:
        pytest.skip("pages have no meaning there")
    data = few.tensors()
    p = applied(Pages(4, 12), a)
    node = next(x.node for x in p.steps if isinstance(x.node, Boxes))
    assert order_of(node) is not None
    graph = fx.Graph()
    given = [graph.placeholder(t.name) for t in p.inputs]
    graph.output(tuple(lower(p, graph, given, [], kept={"k": None})))
    assert "kept_boxes" in str(graph)
    module = fx.GraphModule(nn.Module(), graph)
    found = kept.run_beside([data["k"]], lambda: module(*(data[t.name] for t in p.inputs)))[0]
    torch.testing.assert_close(found, interpret_program(p, data)[p.outputs[0]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_is_that_of_torch(dtype: torch.dtype) -> None:
    kernel = build_boxes(dtype)
    assert kernel is not None and wrong(kernel, dtype) is None
    g = torch.Generator().manual_seed(3)
    x = made_up(dtype, g)
    mine, plain = Kept(x), Kept(x)
    for part in (x, changed(x, g, (0, 49)), changed(x, g, (7, -1, 7)), moved(x), x):
        found = mine.bounds(part, kernel)
        torch.testing.assert_close(found, plain.bounds(part, None), rtol=1e-5, atol=1e-5)
        anew = Kept(part)
        torch.testing.assert_close(found, anew.bounds(part, None), rtol=1e-5, atol=1e-5)
        assert torch.equal(mine.least, anew.least) and torch.equal(mine.largest, anew.largest)
        products = part.q @ part.keys.float().mT
        page = (torch.arange(50) + part.shift[..., None]) // 4
        bound = found.gather(-1, page[:, :, None].expand(2, 2, 3, 50))
        assert ((products <= bound + 1e-3) | ~part.seen[:, :, None]).all(), "a bound of every key that is seen"


def moved(x: Call) -> Call:
    return Call(x.q, x.keys, x.seen, x.shift + 1, None, x.size, x.count)


def test_what_is_no_number_stays_one() -> None:
    x = made_up(torch.float32, torch.Generator().manual_seed(0))
    x.keys[0, 0, 9, 3] = float("nan")
    for kernel in (build_boxes(torch.float32), None):
        found = Kept(x).bounds(x, kernel)
        assert found[0, 0, :, 2].isnan().all() and int(found.isnan().sum()) == 3


def test_a_kernel_that_is_wrong_is_found() -> None:
    def silent(tensors: Any, sizes: Any, outputs: Any) -> None:
        for out in outputs:
            out.zero_()

    assert wrong(silent, torch.float32) is not None
    assert bounds(torch.ones(1, 1, 1, 2), -torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2)).item() == 2.0


def test_keys_that_are_read_otherwise() -> None:
    """Components and heads in one dimension: the boxes are made by the interpreter."""
    text = """attention
batch  b = 2, h = 2
axis   i = 1, j = 12, d = 4, e = 4
tensor q: f32[2, 2, 1, 4]
tensor k: f32[2, 12, 8]
tensor v: f32[2, 2, 12, 4]
q      q[b, h, i, d]
k      k[b, j, h * 4 + d]
v      v[b, h, j, e]
score  s
mask   True
norm   softmax
empty  zero
weight w
give   out
dtype  f32
"""
    a: Attention = parse_attention(text)
    p = Pages(4, 8)(program_of_node(a))
    node = next(x.node for x in p.steps if isinstance(x.node, Boxes))
    assert order_of(node) is None
