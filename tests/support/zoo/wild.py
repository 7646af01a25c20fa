"""Attention in the spellings of papers and first drafts: no product in sight, other normalisers, scores that add up."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from zoo.case import Case
from zoo.spellings import CAUSAL, D, Extra, H, N, Q, case, randoms

HALF = (torch.float32, torch.bfloat16)


def element_by_element(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    weights = ((q.unsqueeze(3) * k.unsqueeze(2)).sum(-1) * D**-0.5).softmax(-1)
    return (weights.unsqueeze(-1) * v.unsqueeze(2)).sum(3)


def weighed_features(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """A weight for each feature of the comparison."""
    return (q[..., :, None, :] * k[..., None, :, :] * extra["weight"][:, None, None]).mean(-1).softmax(-1) @ v


def outer_einsum(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return torch.einsum("bhid,bhjd->bhijd", q, k).sum(-1).div(math.sqrt(D)).softmax(-1) @ v


def three_factors(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """A decay among the factors of one einsum, a weight of each key among those of the other."""
    weights = torch.einsum("bhid,bhjd,hij->bhij", q, k, extra["decay"]).softmax(-1)
    weights = torch.einsum("bhij,hij->bhij", weights, extra["decay"])
    return torch.einsum("bhij,bhjd,bhj->bhid", weights, v, k[..., 0])


def radial(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """A Gaussian kernel over points far from the origin."""
    q, k = q + 20.0, k + 20.0
    scores = -(q[..., :, None, :] - k[..., None, :, :]).square().sum(-1) / 4.5
    return scores.masked_fill(~extra["mask"], -math.inf).softmax(-1) @ v


def squared_cdist(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return (-0.2 * torch.cdist(q, k) ** 2).softmax(-1) @ v


def powers_of_two(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = (q @ k.mT) * (D**-0.5 * math.log2(math.e))
    powers = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True) @ v


def relu_shares(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = F.relu(q @ k.mT).masked_fill(~extra["mask"], 0.0)
    return scores / (scores.sum(-1, keepdim=True) + 1e-6) @ v


def signed_shares(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = q @ k.mT * D**-0.5
    return scores / (scores.abs().sum(-1, keepdim=True) + 1e-3) @ v


def sigmoid_shares(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = (q @ k.mT).sigmoid() ** 2
    return scores / scores.sum(-1, keepdim=True) @ v


def expanded_shares(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """The first terms of the exponential, which are positive; divided by their sum after the values."""
    s = q @ k.mT * D**-0.5
    weights = (1 + s + 0.5 * s**2).masked_fill(~extra["mask"], 0.0)
    return (weights @ v) / (weights.sum(-1, keepdim=True) + 1e-6)


def divided_by_signed(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """The same of weights that may be negative, which no softmax is."""
    weights = (q @ k.mT * D**-0.5 + 0.5).masked_fill(~extra["mask"], 0.0)
    return (weights @ v) / (weights.sum(-1, keepdim=True) + 1e-6)


def graph_attention(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """GAT: the score of a pair is a sum of one number each."""
    rows, keys = ((x * extra[name][:, None]).sum(-1) for x, name in ((q, "weight"), (k, "other")))
    return F.leaky_relu(rows[..., :, None] + keys[..., None, :], 0.2).softmax(-1) @ v


def off_by_one(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Softmax plus one, its maximum kept above zero."""
    scores = q @ k.mT * D**-0.5
    highest = scores.amax(-1, keepdim=True).clamp(min=0)
    powers = (scores - highest).exp()
    return powers / (powers.sum(-1, keepdim=True) + (-highest).exp()) @ v


def bent_scores(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    scores = F.softplus(q @ k.mT * D**-0.5) + F.gelu(q @ k.mT * 0.1)
    return scores.softmax(-1) @ v


def silu_weights(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return F.silu(q @ k.mT * D**-0.5) @ v / N


def slopes_in_the_graph(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """A constant that the model writes as a list of numbers."""
    at, slopes = torch.arange(N), torch.tensor([2.0**-n for n in range(1, H + 1)], dtype=q.dtype)
    return (q @ k.mT * D**-0.5 - (at - at[:, None]).abs() * slopes[:, None, None]).softmax(-1) @ v


def hopfield(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """The output of one step is the query of the next."""
    for _ in range(3):
        q = (q @ k.mT * 0.5).softmax(-1) @ k
    return q


def heated_hopfield(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """The same with a learned temperature, between two products that no softmax is between."""
    for _ in range(2):
        q = (q * extra["heat"] @ k.mT).softmax(-1) @ k
    return q


def spread_out(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Both sides repeated before they are compared and weighed."""
    rows, keys = q.unsqueeze(3).repeat(1, 1, 1, N, 1), k.unsqueeze(2).expand(-1, -1, N, -1, -1)
    near = (-(rows - keys).pow(2).sum(-1) / 9).softmax(-1).unsqueeze(-1).expand(-1, -1, -1, -1, D)
    return (near * v.unsqueeze(2).expand(-1, -1, N, -1, -1)).sum(3)


def special_names(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """The names of `torch.special`: a softmax whose values are weighed by another, the Laplace function."""
    first = torch.special.softmax(torch.linalg.vecdot(q[..., :, None, :], k[..., None, :, :]), -1) @ v
    laplace = 0.5 * (1 + torch.special.erf((q @ k.mT / D - 0.7) / 0.4))
    return first + laplace @ v


def written_weights(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Weights set to zero by index where a mask hides the key, as the scores were."""
    scores = q @ k.mT * D**-0.5
    hidden = (~extra["mask"]).expand_as(scores)
    scores[hidden] = -math.inf
    weights = scores.softmax(-1).clone()
    weights[hidden] = 0.0
    return weights @ v


def looped_graph(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """A bias whose diagonal and some columns are set by lists of numbers."""
    bias, at = extra["mask"].to(q.dtype).clone(), torch.arange(N)
    bias[at, at] = 2.0
    bias[:, torch.tensor([1, 4])] = 0.5
    return (q @ k.mT * D**-0.5 + bias).softmax(-1) @ v


def rolled_rows(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Scores of a row, taken for another one."""
    scores = (q @ k.mT * D**-0.5).roll(2, 2).masked_fill(~extra["mask"], -math.inf)
    return scores.softmax(-1).roll(-3, 2) @ v


WEIGHTS = {"weight": randoms(H, D), "other": randoms(H, D).flip(0)}
MASK = {"mask": CAUSAL}
HEAT = {"heat": randoms(H, 1, 1).abs()}
WILD: tuple[Case, ...] = (
    case("element-by-element", element_by_element, "both products written out", dtypes=HALF, golden=0),
    case("weighed-features", weighed_features, "three factors, averaged", extra=WEIGHTS, golden=0),
    case("outer-einsum", outer_einsum, "an einsum that sums nothing, then a sum"),
    case("three-factors", three_factors, "einsums of three factors", extra={"decay": randoms(H, N, N)}, dtypes=HALF,
         golden=0, backward=True),
    case("radial", radial, "distances of points far from the origin", extra=MASK, golden=0, backward=True),
    case("squared-cdist", squared_cdist, "distances by the library's operation"),
    case("powers-of-two", powers_of_two, "exp2", dtypes=HALF, golden=0),
    case("relu-shares", relu_shares, "L1 normalised", extra=MASK, golden=0, backward=True),
    case("signed-shares", signed_shares, "normalised by the sum of magnitudes", golden=0),
    case("sigmoid-shares", sigmoid_shares, "a positive function normalised"),
    case("expanded-shares", expanded_shares, "a positive polynomial, normalised after the values", extra=MASK,
         golden=0, dtypes=HALF),
    case("signed-shares-after", divided_by_signed, "weights that may be negative", extra=MASK, kept=1),
    case("graph-attention", graph_attention, "additive scores", extra=WEIGHTS, golden=0),
    case("off-by-one", off_by_one, "a sink of zero beside a clamped maximum"),
    case("bent-scores", bent_scores, "activations of scores"),
    case("silu-weights", silu_weights, "an activation in place of the softmax", golden=0),
    case("slopes-in-the-graph", slopes_in_the_graph, "a constant tensor in the model's code"),
    case("heated-hopfield", heated_hopfield, "a tensor scales one product before the next", extra=HEAT, sites=2),
    case("spread-out", spread_out, "copies that broadcast", golden=0, dtypes=HALF),
    case("special-names", special_names, "other names of the same functions", sites=2),
    case("written-weights", written_weights, "scores and weights written by index", extra=MASK, golden=0),
    case("looped-graph", looped_graph, "a bias assigned to by numbers", extra=MASK, golden=0),
    case("rolled-rows", rolled_rows, "scores and weights whose rows are turned round", extra=MASK, golden=0),
    case("hopfield", hopfield, "steps that feed each other", sites=3),
)
