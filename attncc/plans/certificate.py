"""Certificates: how many unseen samples may fail, for a claim to hold with confidence.

    accept  if  P( Bin(n, alpha) <= failures ) <= delta

so that a plan whose loss exceeds the limit for more than a share alpha of inputs is accepted at most with probability
delta (Clopper and Pearson, 1934; risk control by tests, Angelopoulos et al., 2021, arXiv 2110.01052). Several plans are
tested in a fixed order, the safest first, and none after the first that fails, which keeps delta for all of them.
"""

from __future__ import annotations

from math import comb, log1p


def chance(n: int, failures: int, alpha: float) -> float:
    """P(Bin(n, alpha) <= failures)."""
    return sum(comb(n, k) * alpha**k * (1 - alpha) ** (n - k) for k in range(failures + 1))


def accepts(n: int, failures: int, alpha: float, delta: float) -> bool:
    return chance(n, failures, alpha) <= delta


def needed(alpha: float, delta: float, failures: int = 0) -> int:
    """The fewest samples with which a plan that fails `failures` of them is accepted."""
    n = failures + 1
    if failures == 0:
        n = max(1, int(log1p(delta - 1) / log1p(-alpha)))
    while not accepts(n, failures, alpha, delta):
        n += 1
    return n
