"""Operations that Triton lacks, as the text of small functions; a kernel file holds those it uses."""

from __future__ import annotations

HELPERS: dict[str, str] = {
    "floor_div": '''
@triton.jit
def floor_div(a, b):
    """a // b rounded down; Triton rounds towards zero."""
    q = a // b
    return q - tl.where((a != q * b) & ((a < 0) != (b < 0)), 1, 0)
''',
    "floor_mod": '''
@triton.jit
def floor_mod(a, b):
    """a % b with the sign of b; Triton gives the sign of a."""
    r = a % b
    return r + tl.where((r != 0) & ((r < 0) != (b < 0)), b, 0)
''',
    "trunc_div": '''
@triton.jit
def trunc_div(a, b):
    """a / b rounded towards zero."""
    q = tl.abs(a) // tl.abs(b)
    return tl.where((a < 0) == (b < 0), q, -q)
''',
    "tanh": '''
@triton.jit
def tanh(x):
    """tanh to a few units in the last place: a series near zero, (1 - t) / (1 + t) with t = exp(-2|x|) elsewhere."""
    y = x * x
    near = x * (1.0 + y * (-0.3333333333 + y * (0.1333333333 + y * (-0.0539682540 + y * 0.0218694885))))
    t = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - t) / (1.0 + t)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))
''',
    "log1p": '''
@triton.jit
def log1p(x):
    """log(1 + x) without cancellation near zero (Kahan): the error of 1 + x cancels in the quotient."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.where(u == float("inf"), u, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0))))
''',
    "round_even": '''
@triton.jit
def round_even(x):
    """To the nearest integer, halves to the even one."""
    low = tl.floor(x)
    rest = x - low
    odd = low - 2.0 * tl.floor(low * 0.5)
    return low + tl.where((rest > 0.5) | ((rest == 0.5) & (odd == 1.0)), 1.0, 0.0)
''',
    "power": '''
@triton.jit
def power(x, y):
    """x ** y: a negative base gives a value for integral exponents and NaN for others."""
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    odd = y - 2.0 * tl.floor(y * 0.5) == 1.0
    whole = tl.floor(y) == y
    signed = tl.where(x < 0, tl.where(whole, tl.where(odd, -size, size), float("nan")), size)
    return tl.where((y == 0.0) | (x == 1.0), 1.0, signed)
''',
    "mix": '''
@triton.jit
def mix(a, b, j):
    """31 random bits of counter j under the key (a, b)."""
    x = (j.to(tl.uint32) * 0x9E3779B9 + a.to(tl.uint32)) ^ b.to(tl.uint32)
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35
    return ((x ^ (x >> 16)) >> 1).to(tl.int32)
''',
}
