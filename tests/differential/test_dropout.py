"""Dropout of attention weights in training: fused, the same mask in both directions, drawn from torch's generator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attncc.driver import backend
from attncc.ir.streams import kept

B, H, N, M, D, P = 2, 3, 20, 24, 8, 0.3


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT / D**0.5).softmax(-1), P, training=True) @ v


def as_an_operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.dropout((q @ k.mT / D**0.5).softmax(-1), P, train=True) @ v


def of_a_module(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT / D**0.5).masked_fill(torch.ones(N, M).triu(1).bool(), -torch.inf)
    return nn.Dropout(P)(scores.softmax(-1, dtype=torch.float32).to(q.dtype)) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=P, is_causal=True)


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(N, M).tril(3).bool(), dropout_p=P, scale=0.2)


FORMS = {f.__name__: f for f in (written_out, as_an_operator, of_a_module, sdpa, masked_sdpa)}
#: Keys of row i are those up to i + n.
SEEN = {"written_out": M, "as_an_operator": M, "of_a_module": 0, "sdpa": 0, "masked_sdpa": 3}


def exact(name: str, q: Tensor, k: Tensor, v: Tensor, words: Tensor) -> Tensor:
    scores = q @ k.mT * (0.2 if name == "masked_sdpa" else D**-0.5)
    weights = scores.masked_fill(torch.ones(N, M).triu(1 + SEEN[name]).bool(), -torch.inf).softmax(-1)
    return (weights * kept(words, M, P) / (1 - P)) @ v


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    r = torch.Generator().manual_seed(1)
    return [torch.randn(B, H, n, D, generator=r).to(dtype).requires_grad_() for n in (N, M, M)]


def words_of(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (B, H, N, 2), dtype=torch.int32)


@pytest.fixture
def compiled() -> Callable[[Callable[..., Tensor]], tuple[Callable[..., Tensor], backend.Collected]]:
    def make(f: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], backend.Collected]:
        torch._dynamo.reset()
        found = backend.Collected()
        token = backend.collecting.set(found)
        own = torch.compile(f, backend=backend.attncc_backend, options={"inductor": False, "measure": False})
        try:
            own(*inputs())
        finally:
            backend.collecting.reset(token)
        return own, found

    return make


@pytest.mark.parametrize("name", FORMS)
def test_forward_and_backward_drop_the_same(name: str, compiled) -> None:
    own, found = compiled(FORMS[name])
    assert [s.status for s in found.sites] == ["fused"], found.sites
    given = inputs()
    torch.manual_seed(7)
    out = own(*given)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    got = torch.autograd.grad(out, given, seed)
    wide = [x.detach().double().requires_grad_() for x in given]
    want = exact(name, *wide, words_of(7))
    assert (out - want).abs().max() < 1e-5
    for x, w in zip(got, torch.autograd.grad(want, wide, seed.double()), strict=True):
        assert (x - w).abs().max() < 2e-5


def test_a_seed_gives_one_mask_and_calls_differ(compiled) -> None:
    own, found = compiled(written_out)
    assert "not eager's" in found.notes[0]
    given = inputs()
    torch.manual_seed(3)
    first, second = own(*given), own(*given)
    torch.manual_seed(3)
    again = own(*given)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_a_checkpoint_drops_the_same_when_it_runs_again(compiled) -> None:
    own, _ = compiled(written_out)
    given, grads = inputs(), list[tuple[Tensor, ...]]()
    for way in (own, lambda *x: checkpoint(own, *x, use_reentrant=False)):
        torch.manual_seed(5)
        out = way(*given)
        torch.manual_seed(99)  # backward must not draw anew
        grads.append(torch.autograd.grad(out.square().sum(), given))
    for x, y in zip(*grads, strict=True):
        assert torch.equal(x, y)


def test_weights_that_are_given_out_keep_the_graph_and_eagers_stream(compiled) -> None:
    """`output_attentions`: the weights exist, so nothing is fused, and the dropout is the model's own."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = F.dropout((q @ k.mT).softmax(-1), P)
        return torch.cat([(weights @ v).flatten(), weights.flatten()])

    own, found = compiled(model)
    assert [s.status for s in found.sites] == ["kept"] and found.notes == []
    given = inputs()
    torch.manual_seed(4)
    want = model(*given)
    torch.manual_seed(4)
    assert torch.allclose(own(*given), want)


def test_nothing_is_dropped_in_inference(compiled) -> None:
    _, found = compiled(lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), P, training=False) @ v)
    assert [s.status for s in found.sites] == ["fused"] and "mix" not in found.sites[0].ir


def test_sizes_that_change(compiled) -> None:
    torch._dynamo.reset()
    found = backend.Collected()
    token = backend.collecting.set(found)
    options = {"inductor": False, "measure": False}
    own = torch.compile(written_out, backend=backend.attncc_backend, options=options, dynamic=True)
    try:
        own(*inputs())
    finally:
        backend.collecting.reset(token)
    assert [s.status for s in found.sites] == ["fused"]


# ---- the stream ------------------------------------------------------------------------------------------------------
ROWS, KEYS = 512, 1024


@pytest.fixture(scope="module")
def mask() -> Tensor:
    words = torch.randint(-(2**31), 2**31, (ROWS, 2), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    return kept(words, KEYS, 0.5)


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
def test_it_drops_as_many_as_asked(p: float) -> None:
    words = torch.randint(-(2**31), 2**31, (ROWS, 2), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    stay = kept(words, KEYS, p).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(float(stay.mean()) - (1 - p)) < 4 * sigma / (ROWS * KEYS) ** 0.5
    for sums, count in ((stay.sum(0), ROWS), (stay.sum(1), KEYS)):  # of keys, of rows: chi-square
        z = (sums - count * (1 - p)) / (sigma * count**0.5)
        assert abs(float(z.square().sum()) - len(z)) < 5 * (2 * len(z)) ** 0.5


def test_rows_and_keys_are_independent(mask: Tensor) -> None:
    """No pair of rows, of keys, or of neighbours at some distance agrees more often than chance."""
    x = mask.double() * 2 - 1
    for pairs, count in ((x @ x.T, KEYS), (x.T @ x, ROWS)):
        off = pairs[~torch.eye(len(pairs), dtype=torch.bool)] / count**0.5
        assert float(off.abs().max()) < 6.5 and abs(float(off.square().mean()) - 1) < 0.02
    for lag in (1, 2, 3, 4, 8, 16, 64, 256):
        apart = (x[:, lag:] * x[:, :-lag]).sum() / (ROWS * (KEYS - lag)) ** 0.5
        assert abs(float(apart)) < 4


def test_words_of_rows_that_differ_little_give_masks_that_differ_much() -> None:
    """One bit of either word changes half of the keys."""
    words = torch.randint(-(2**31), 2**31, (2,), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    first = kept(words, 4096, 0.5)
    for at in range(2):
        for bit in range(32):
            other = words.clone()
            other[at] ^= -(2**31) if bit == 31 else 1 << bit
            differ = float((kept(other, 4096, 0.5) != first).double().mean())
            assert abs(differ - 0.5) < 0.05, (at, bit, differ)
