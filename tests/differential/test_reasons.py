"""Why something is no attention, or none that is known: the reason names what an engineer would look for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reading.lifting import Q, read
from reading.reason_model import WIDTH, B, D, H, Model, N

from attncc.ir.reasons import Reason, because
from attncc.patterns.lift import Refusal, lift_all


def l1(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return F.normalize(q @ k.mT, p=1, dim=-1) @ v


def without_rule(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return torch.atan(q @ k.mT) @ v / N


def maybe_negative(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    """A Taylor softmax of odd order."""
    scores = q @ k.mT * 0.2
    weights = 1 + scores + scores**2 / 2 + scores**3 / 6
    return weights / weights.sum(-1, keepdim=True) @ v


def maybe_zero(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    weights = F.relu(q @ k.mT)
    return weights / weights.sum(-1, keepdim=True) @ v


def bent_products(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return torch.tanh(q[..., :, None, :] * k[..., None, :, :]).sum(-1).softmax(-1) @ v


def three_factors(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    """Each pair has a vector of its own between the two."""
    between = (q[..., :, None, :] + k[..., None, :, :]).sin()
    return (q[..., :, None, :] * between * k[..., None, :, :]).sum(-1).softmax(-1) @ v


def summed_over_rows(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    """The product is summed over the queries."""
    return (q[..., :, None, :] * k[..., None, :, :]).sum(-3).softmax(-1) @ v[..., :D, :]


def plain_distances(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return (-(q[..., :, None, :] - k[..., None, :, :]).norm(dim=-1)).softmax(-1) @ v


def vector_attention(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    """Each component of a value has weights of its own, as in point transformers."""
    return ((q[..., :, None, :] - k[..., None, :, :]).relu().softmax(-2) * v[..., None, :, :]).sum(-2)


def wrong_axis(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    weights = (q @ k.mT).exp()
    return weights / weights.sum(-2, keepdim=True) @ v


def written_back(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    scores, chosen = (q @ k.mT).topk(5, -1)
    return torch.zeros(B, H, N, N).scatter(-1, chosen, scores.softmax(-1)) @ v


def additive(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return torch.tanh(q[:, :, :, None] + k[:, :, None]).sum(-1).softmax(-1) @ v


def distances(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return (-torch.cdist(q, k)).softmax(-1) @ v


def signed_edges(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    """Exponentials of three factors, masked: a softmax over the edges of a graph."""
    edges = x[:, :, None] + x[:, None]
    scores = torch.einsum("bid,bjd,bijd->bij", x, x.flip(1), edges).clamp(-5, 5).exp() * (x[:, :, :1] > 0)
    return scores / 1.1 / (scores.sum(-1, keepdim=True) + 1e-6) @ x


def over_edges(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    """Graph attention over a list of edges."""
    start, end = torch.arange(4 * N) % N, torch.arange(4 * N) * 5 % N
    scores = m.one(x)[:, start, 0] + m.one(x)[:, end, 0]
    powers = scores.exp()
    sums = torch.zeros(B, N).scatter_add(1, end.expand(B, -1), powers) + 1e-16
    weights = powers / sums.index_select(1, end)
    return torch.zeros(B, N, WIDTH).index_add(1, end, weights[..., None] * x[:, start])


def expected(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    """The mean of a distribution over bins."""
    probabilities = m.gate(x).softmax(-1)
    return (probabilities * torch.linspace(0, 1, probabilities.shape[-1])).sum(-1)


def pooled(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return x + m.lin(m.one(x).softmax(1).mT @ x)


def mixed_experts(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return torch.einsum("bne,bnec->bnc", m.gate(x).softmax(-1), m.experts(x))


def summed_experts(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return (m.gate(x).softmax(-1)[..., None] * m.experts(x)).sum(2)


def routed(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    weights, chosen = m.gate(x).softmax(-1).topk(2, -1)
    return (m.experts(x).gather(2, chosen[..., None].expand(-1, -1, -1, WIDTH)) * weights[..., None]).sum(2)


def classified(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return m.gate(x.mean(1)).softmax(-1)


def beside(q: Q, k: Q) -> Q:
    wide = (*q.shape[:-1], k.shape[-2], D)
    return torch.cat([q[..., None, :].expand(wide), k[..., None, :, :].expand(wide)], -1)


def concatenated(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    """A non-local block's pairs (Wang et al., 2017: arXiv 1711.07971)."""
    return F.relu(beside(q, k) @ m.pair) / N @ v


def concatenated_convolved(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    pairs = beside(q[:, 0], k[:, 0]).permute(0, 3, 1, 2)
    return F.relu(F.conv2d(pairs, m.pair.view(1, -1, 1, 1)))[:, 0] / N @ v[:, 0]


def added_pairs(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return F.relu(q.sum(-1)[..., :, None] + k.sum(-1)[..., None, :]) @ v


def attention_free(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    """Positions and keys, component by component (Zhai et al., 2021: arXiv 2105.14103)."""
    w, k = m.positions.exp(), k.exp()
    return torch.sigmoid(q) * (w @ (k * v)) / (w @ k)


def attention_free_written_out(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    w = torch.exp(m.positions[:, :, None] + k[:, :, None])
    return torch.sigmoid(q) * (w * v[:, :, None]).sum(3) / w.sum(3)


def attention_free_softmax(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    w = (m.positions[:, :, None] + k[:, :, None]).softmax(3)
    return torch.sigmoid(q) * torch.einsum("bhijd,bhjd->bhid", w, v)


def attention_free_simple(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return torch.sigmoid(q) * (k.softmax(-2) * v).sum(-2, keepdim=True)


def attention_free_quotient(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    w = k.exp()
    return torch.sigmoid(q) * (w * v).sum(-2, keepdim=True) / w.sum(-2, keepdim=True)


def hard(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return F.one_hot((q @ k.mT).argmax(-1), N).to(v.dtype) @ v


def hard_by_gather(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return v.gather(2, (q @ k.mT).argmax(-1)[..., None].expand(-1, -1, -1, D))


def chunked(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    """The far part of a mixed chunk attention (Hua et al., 2022: arXiv 2202.10447)."""
    q, k, v = (y.unflatten(2, (3, 7)) for y in (q, k, v))
    return q @ F.pad((k.mT @ v / N).cumsum(2), (0, 0, 0, 0, 1, -1))


def gated(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return m.lin(x) * m.lin(x.flip(1)).softmax(1) + x


def normalised_twice(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    """External attention: over the tokens, then over a memory of few rows."""
    weights = m.gate(x).softmax(1)
    return (weights / weights.sum(2, keepdim=True)) @ m.lin.weight[:4]


def after_a_break(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    """Scores that another graph made, their maxima subtracted."""
    return (x - x.amax(-1, keepdim=True)).softmax(-1) @ k.mT.reshape(B, WIDTH, N)


def masked_after_a_break(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    """The same under a causal mask that this graph makes."""
    hidden = ~x.new_ones(N, WIDTH).tril().bool()
    return x.masked_fill(hidden, torch.finfo(x.dtype).min).softmax(-1) @ k.mT.reshape(B, WIDTH, N)


def heads_of_one_channel(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return F.normalize(q, dim=-1) * (F.normalize(k, dim=-1) * v).sum(-2, keepdim=True)


def picked_and_gathered(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    scores, chosen = (q @ k.mT).topk(5, -1)
    values = v[:, :, None].expand(-1, -1, N, -1, -1).gather(3, chosen[..., None].expand(-1, -1, -1, -1, D))
    return (scores.softmax(-1)[..., None] * values).sum(-2)


def largest_weights(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    weights = (q @ k.mT).softmax(-1)
    largest, chosen = weights.topk(5, -1)
    return torch.zeros_like(weights).scatter(-1, chosen, largest) @ v


def learned(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    """A random synthesizer (Tay et al., 2020: arXiv 2005.00743)."""
    return m.positions.softmax(-1) @ v


def additive_by_layer(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return (torch.tanh(q[..., :, None, :] + k[..., None, :, :]) @ m.pair[:D]).softmax(-1) @ v


def convolved_scores(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    """Scores that depend on their neighbours (Golovneva et al., 2025: arXiv 2504.00927)."""
    taps = m.positions[: H * 3, : H * 3].reshape(H, H, 3, 3)
    return F.conv2d(q @ k.mT, taps, padding=1).softmax(-1) @ v


def summed_alone(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return q + torch.einsum("bhn,bhnd->bhd", q.sum(-1).softmax(-1), v)[:, :, None]


def dropped(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return F.dropout((q @ k.mT).softmax(-1), 0.1, True) @ v


def dropped_shares(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return F.dropout((q @ k.mT).sigmoid(), 0.1, True) @ v


def dropped_inside(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


def function_of_scores(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return (torch.special.i0(q @ k.mT / D) * 0.5).softmax(-1) @ v


def function_of_weights(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return torch.digamma((q @ k.mT).softmax(-1) + 1) @ v


def double_mask(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    """The mask lifts the softmax of a float32 product into float64."""
    mask = torch.zeros(N, N, dtype=torch.float64).masked_fill(torch.ones(N, N).triu(1).bool(), -1e9)
    return (q @ k.mT + mask).softmax(-1).to(v.dtype) @ v


def mixed_by_data(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    mixing = x.mean(1)[:, : H * H].reshape(B, H, H)
    return torch.einsum("bhij,bhg->bgij", (q @ k.mT).softmax(-1), mixing) @ v


def additive_gate(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return x * torch.sigmoid(m.one(F.relu(m.lin(x) + m.lin(x.flip(1)))))


def squeeze_excite(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return x * m.lin(F.relu(m.lin(x.mean(1, keepdim=True)))).sigmoid()


def gate_of_normed(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    """A share for each token, out of its channels, whose mean square they are divided by."""
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return v * m.one(normed).sigmoid()[:, None]


def gate_of_itself(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return x * torch.sigmoid(m.one(x))


@pytest.mark.parametrize(
    ("core", "reason"),
    [
        (squeeze_excite, because("squeeze-excite")),
        (gate_of_itself, because("gate")),
        (function_of_scores, because("scores-function", "special_i0")),
        (function_of_weights, because("weights-through", "digamma")),
        (double_mask, because("scores-widened", "f32")),
        (mixed_by_data, because("weights-mixed")),
        (additive_gate, because("additive-gate")),
        (dropped, because("dropout")),
        (dropped_shares, because("no-softmax", because("dropout"))),
        (dropped_inside, because("dropout")),
        (concatenated, because("no-softmax", because("weights-additive"))),
        (concatenated_convolved, because("no-softmax", because("weights-additive"))),
        (added_pairs, because("no-softmax", because("weights-additive"))),
        (attention_free, because("vector-attention")),
        (attention_free_written_out, because("vector-attention")),
        (attention_free_softmax, because("vector-attention")),
        (attention_free_simple, because("vector-attention")),
        (attention_free_quotient, because("vector-attention")),
        (hard, because("no-softmax", because("hard-attention"))),
        (hard_by_gather, because("no-softmax", because("hard-attention"))),
        (heads_of_one_channel, because("no-softmax", because("linear-channels"))),
        (chunked, because("no-softmax", because("running-sum-of-chunks"))),
        (l1, because("no-softmax", because("unknown-normaliser", "linalg_vector_norm"))),
        (without_rule, because("no-softmax", because("unknown-function", "atan"))),
        (maybe_negative, because("may-be-negative")),
        (maybe_zero, because("sum-may-be-zero")),
        (bent_products, because("scores-additive")),
        (three_factors, because("scores-additive")),
        (summed_over_rows, because("scores-additive")),
        (plain_distances, because("scores-lengths")),
        (vector_attention, because("vector-attention")),
        (wrong_axis, because("other-axis")),
        (written_back, because("scores-chosen", "topk")),
        (picked_and_gathered, because("scores-chosen", "topk")),
        (largest_weights, because("keeps-largest", "topk")),
        (learned, because("scores-learned")),
        (additive_by_layer, because("scores-layer-over-pairs")),
        (convolved_scores, because("scores-layer-over-scores", "conv2d")),
        (summed_alone, because("scores-of-each-token")),
        (additive, because("scores-additive")),
        (distances, because("scores-distances")),
        (signed_edges, because("scores-of-edges")),
        (over_edges, because("edge-softmax")),
        (expected, because("weights-whole-tensors", because("scores-layer", "linear"))),
        (pooled, because("scores-layer", "linear")),
        (mixed_experts, because("scores-layer", "linear")),
        (summed_experts, because("weights-whole-tensors", because("scores-layer", "linear"))),
        (routed, because("goes-to-router", "topk")),
        (classified, because("goes-to-output")),
        (gated, because("gates")),
        (normalised_twice, because("goes-to-sum")),
        (after_a_break, because("scores-from-outside")),
        (masked_after_a_break, because("scores-from-outside")),
    ],
)
def test_reason(core: Callable[..., Q], reason: Reason) -> None:
    facts, *_ = read(Model(core).eval(), torch.randn(B, N, WIDTH))
    (site,) = lift_all(facts)
    assert isinstance(site, Refusal)
    assert site.reason == reason


def test_a_mean_that_divides_its_own_tensor_pools_nothing() -> None:
    facts, *_ = read(Model(gate_of_normed).eval(), torch.randn(B, N, WIDTH))
    assert because("squeeze-excite") not in [x.reason for x in lift_all(facts) if isinstance(x, Refusal)]
