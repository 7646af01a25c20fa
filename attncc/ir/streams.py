"""A counter-based stream of random bits: a number for each key of a row, from the row's own 64 bits.

    mix(a, b, j) = 31 bits of counter j under the key (a, b)

    x = (j * 0x9e3779b9 + a) ^ b    x ^= x >> 16    x *= 0x85ebca6b
    x ^= x >> 13                    x *= 0xc2b2ae35    x ^= x >> 16    x >> 1

all modulo 2^32: the finaliser of MurmurHash3 (Appleby) over a Weyl sequence, both under words of the row. It has no
state, so any pair of a row and a key is reached alone, in every direction and order (Salmon et al., *Parallel Random
Numbers: As Easy as 1, 2, 3*, 2011). Words of rows come from torch's generator.
"""

from __future__ import annotations

import torch

WEYL, FIRST, SECOND = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35
#: Numbers are below it.
STREAM_END = 1 << 31
_LOW = 0xFFFFFFFF


def mix(a: torch.Tensor, b: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """i64 in [0, 2^31), of integers that broadcast; of `a`, `b` and `j` the lowest 32 bits count."""
    a, b, j = (x.to(torch.int64) & _LOW for x in (a, b, j))
    x = ((j * WEYL + a) & _LOW) ^ b
    x = x ^ (x >> 16)
    x = (x * FIRST) & _LOW
    x = x ^ (x >> 13)
    x = (x * SECOND) & _LOW
    return (x ^ (x >> 16)) >> 1


def limit_of(p: float) -> int:
    """Keys whose number is below it stay where each is dropped with probability `p`."""
    return min(STREAM_END - 1, max(0, round((1.0 - p) * STREAM_END)))


def kept(words: torch.Tensor, keys: int, p: float) -> torch.Tensor:
    """bool (*rows, keys): which keys stay; `words` are i32 (*rows, 2)."""
    j = torch.arange(keys, device=words.device)
    return mix(words[..., :1], words[..., 1:], j) < limit_of(p)
