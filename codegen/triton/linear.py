"""From a linear attention to the source of a Python module with its kernels: by chunks, and token by token.

They take what the node is made of, feature maps applied, as `attncc.ir.linear_chunks.factors` gives it; what lies
before is elementwise. A program has some columns of the state of one batch point in registers and goes over all tokens:
`chunks` by products of tiles, with the triangular system of the delta rule inverted row by row (Yang et al., 2024,
arXiv 2412.06464, section 3), `steps` token by token, for decoding. Quotients of products of decays are exponentials of
differences of sums, none of which is above one where decays do not grow; a decay of zero is counted beside the sums.

    tensors   q, k (B, H, N, D), v (B, H, N, E), the logarithms of the decays (B, H, N, D or 1), rate (B, H, N),
              state (B, H, D, E)
    outputs   out (B, H, N, E), the last state (B, H, D, E)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attncc.codegen.triton.kernel import wrapped
from attncc.ir import Const, Linear, print_linear
from attncc.ir.expr import free
from attncc.ir.linear_chunks import unchunked, unfactored

#: Tokens of a chunk; columns of the state that a program has, at most; channels that a program can hold.
_CHUNK, _COLUMNS, _MOST_CHANNELS = 16, 32, 256
#: Channels of the pairs of a chunk at a time, where each channel has its own decay.
_PAIRS = 16
_STRIDED = (("q", 4), ("k", 4), ("v", 4), ("log", 4), ("rate", 3), ("first", 4), ("out", 4), ("last", 4))


@dataclass(frozen=True)
class LinearConfig:
    """Products of float32 run as three of TF32, which are as exact, or in float32 itself (AMD has no others)."""

    warps: int = 4
    stages: int = 2
    precision: Literal["tf32x3", "ieee"] = "tf32x3"


def unsupported_linear(a: Linear) -> str | None:
    """Why no Triton kernel gives `a`, or None."""
    if a.compute_dtype == "f64":
        return "operands in float64"
    reason = unfactored(a)
    if reason:
        return reason
    if not isinstance(a.d.extent, Const) or not isinstance(a.e.extent, Const):
        return "channels of which only the call says how many"
    if int(a.d.extent.value) > _MOST_CHANNELS:
        return f"more than {_MOST_CHANNELS} channels"
    return unchunked(a)


def emit_linear(a: Linear, config: LinearConfig) -> str:
    """The module of `a`: kernels `chunks` and `steps`, `launch(tensors, sizes, outputs)`, and `SIGNATURES` for
    compiling ahead of time. Raises ValueError where `unsupported_linear(a)` has a reason."""
    reason = unsupported_linear(a)
    if reason is not None:
        raise ValueError(f"no Triton kernel: {reason}")
    assert isinstance(a.d.extent, Const) and isinstance(a.e.extent, Const)
    d, e = int(a.d.extent.value), int(a.e.extent.value)
    channels, delta = a.d.index in free(a.decay), a.rule == "delta"
    numbers = {
        "D": d, "E": e, "WIDE": max(16, _power(d)), "COLUMNS": max(16, min(_COLUMNS, _power(e))), "CHUNK": _CHUNK,
        "PAIRS": _PAIRS, "DELTA": delta, "CHANNELS": channels, "PRECISION": repr(config.precision),
    }  # fmt: skip
    out = {"bf16": "bf16", "f16": "fp16"}.get(a.dtype, "fp32")
    types = {name: f"*{out if name == 'out' else 'fp32'}" for name, _ in _STRIDED}
    names = [name for name, _ in _STRIDED]
    strides = [f"{name}_{axis}" for name, rank in _STRIDED for axis in "bhnx"[:rank]]
    arguments = [*names, *strides, "heads", "tokens"]
    signature = [f'"{x}": "{types.get(x, "i32")}"' for x in arguments]
    known = [f'"{name}_x": 1' for name, rank in _STRIDED if rank == 4 and (name != "log" or channels)]
    known += [f'"{name}_{axis}": 16' for name, rank in _STRIDED for axis in "bhn"[: rank - 1] if d % 16 == e % 16 == 0
              and (name not in ("log", "rate") or (channels and name == "log"))]  # fmt: skip
    header = [f'"""{x}' if n == 0 else x for n, x in enumerate((
        "A linear attention: S = decay S + k (rate u)^T, out = q S, over the tokens.", "",
        *(f"    {x}" for x in print_linear(a).splitlines()), '"""',
    ))]  # fmt: skip
    lines = [
        *header, "", "import triton", "import triton.language as tl", "", f'CONFIG = "{config}"',
        *(f"{name} = tl.constexpr({value})" for name, value in numbers.items()), "",
        _TILES.strip("\n"), "", "", _head("chunks", arguments), _CHUNKS.strip("\n"), "", "",
        _head("steps", arguments), _STEPS.strip("\n"), "", "",
        "#: Triton's types of the arguments of each kernel, in order.", "SIGNATURES = {",
        *(x for kernel in ("chunks", "steps") for x in (f'    "{kernel}": {{', *wrapped(signature, " " * 8), "    },")),
        "}", "#: What contiguous tensors make of strides: one, or a multiple of 16.", "CONTIGUOUS = {",
        *wrapped(known, "    "), "}", "", "", *_launch(arguments, config),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _head(name: str, arguments: list[str]) -> str:
    return "\n".join(["@triton.jit", f"def {name}(", *wrapped(arguments, "    "), "):"])


def _launch(arguments: list[str], config: LinearConfig) -> list[str]:
    names = [name for name, _ in _STRIDED]
    given = [x if "_" not in x or x in names else f"{x[:-2]}.stride({'bhnx'.index(x[-1])})" for x in arguments]
    options = f"num_warps={config.warps}, num_stages={config.stages}, enable_fp_fusion=True"
    return [
        "def launch(tensors, sizes, outputs):",
        '    """Tensors and outputs as in the IR\'s factors; no sizes."""',
        f"    {', '.join(names[:6])} = tensors",
        f"    {', '.join(names[6:])} = outputs",
        "    batch, heads, tokens = q.shape[:3]",
        "    if batch * heads == 0:", "        return",
        "    grid = (triton.cdiv(E.value, COLUMNS.value), batch * heads)",
        "    kernel = steps if tokens < CHUNK.value else chunks",
        "    kernel[grid](", *wrapped([*given, options], " " * 8), "    )",
    ]  # fmt: skip


_TILES = '''
@triton.jit
def inverse(lower, at):
    """(1 + lower)^-1 of a triangle that is zero on its diagonal and above: row after row."""
    found = tl.where(at[:, None] > at[None, :], -lower, 0.0)
    for t in range(1, CHUNK):
        row = tl.sum(tl.where((at == t)[:, None], found, 0.0), 0)
        row += tl.sum(row[:, None] * found, 0)
        found = tl.where((at == t)[:, None], row[None, :], found)
    return found + tl.where(at[:, None] == at[None, :], 1.0, 0.0)


@triton.jit
def product(a, b):
    return tl.dot(a, b, input_precision=PRECISION)
'''

_CHUNKS = '''
    point = tl.program_id(1)
    b = (point // heads).to(tl.int64)
    h = (point % heads).to(tl.int64)
    d = tl.arange(0, WIDE)
    e = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.arange(0, CHUNK)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    log += b * log_b + h * log_h
    rate += b * rate_b + h * rate_h
    out += b * out_b + h * out_h
    in_d, in_e = d < D, e < E
    whole = in_d[:, None] & in_e[None, :]
    first += b * first_b + h * first_h
    state = tl.load(first + d[:, None] * first_n + e[None, :] * first_x, mask=whole, other=0.0)
    for start in range(0, tokens, CHUNK):
        n = (start + at).to(tl.int64)
        in_n = n < tokens
        by_d, by_e = in_n[:, None] & in_d[None, :], in_n[:, None] & in_e[None, :]
        qs = tl.load(q + n[:, None] * q_n + d[None, :] * q_x, mask=by_d, other=0.0)
        ks = tl.load(k + n[:, None] * k_n + d[None, :] * k_x, mask=by_d, other=0.0)
        u = tl.load(v + n[:, None] * v_n + e[None, :] * v_x, mask=by_e, other=0.0)
        rates = tl.load(rate + n * rate_n, mask=in_n, other=0.0)
        own = at[:, None] >= at[None, :]
        if CHANNELS:
            logs = tl.load(log + n[:, None] * log_n + d[None, :] * log_x, mask=by_d, other=0.0)
            zero = logs == float("-inf")
            sums = tl.cumsum(tl.where(zero, 0.0, logs), 0)
            zeros = tl.cumsum(zero.to(tl.int32), 0)
            since = tl.where(zeros > 0, 0.0, tl.exp(sums))
            end = (at == CHUNK - 1)[:, None]
            all_sums, all_zeros = tl.sum(tl.where(end, sums, 0.0), 0), tl.max(zeros, 0)
            rest = tl.where(zeros == all_zeros[None, :], tl.exp(all_sums[None, :] - sums), 0.0)
            kept = tl.where(all_zeros > 0, 0.0, tl.exp(all_sums))
            of_q = tl.zeros([CHUNK, CHUNK], tl.float32)
            of_k = tl.zeros([CHUNK, CHUNK], tl.float32)
            for block in range(0, WIDE, PAIRS):
                c = block + tl.arange(0, PAIRS)
                here = in_n[:, None] & (c < D)[None, :]
                qc = tl.load(q + n[:, None] * q_n + c[None, :] * q_x, mask=here, other=0.0)
                kc = tl.load(k + n[:, None] * k_n + c[None, :] * k_x, mask=here, other=0.0)
                logc = tl.load(log + n[:, None] * log_n + c[None, :] * log_x, mask=here, other=0.0)
                none = logc == float("-inf")
                grown = tl.cumsum(tl.where(none, 0.0, logc), 0)
                count = tl.cumsum(none.to(tl.int32), 0)
                met = own[:, :, None] & (count[:, None, :] == count[None, :, :])
                between = tl.where(met, tl.exp(tl.where(met, grown[:, None, :] - grown[None, :, :], 0.0)), 0.0)
                of_q += tl.sum(qc[:, None, :] * kc[None, :, :] * between, 2)
                if DELTA:
                    of_k += tl.sum(kc[:, None, :] * kc[None, :, :] * between, 2)
            held = kept[:, None]
        else:
            logs = tl.load(log + n * log_n, mask=in_n, other=0.0)
            zero = logs == float("-inf")
            sums = tl.cumsum(tl.where(zero, 0.0, logs), 0)
            zeros = tl.cumsum(zero.to(tl.int32), 0)
            since = tl.where(zeros > 0, 0.0, tl.exp(sums))[:, None]
            all_sums, all_zeros = tl.sum(tl.where(at == CHUNK - 1, sums, 0.0), 0), tl.max(zeros, 0)
            rest = tl.where(zeros == all_zeros, tl.exp(all_sums - sums), 0.0)[:, None]
            held = tl.where(all_zeros > 0, 0.0, tl.exp(all_sums))
            met = own & (zeros[:, None] == zeros[None, :])
            between = tl.where(met, tl.exp(tl.where(met, sums[:, None] - sums[None, :], 0.0)), 0.0)
            of_q = product(qs, tl.trans(ks)) * between
            if DELTA:
                of_k = product(ks, tl.trans(ks)) * between
        if DELTA:
            u -= product(ks * since, state)
            u = product(inverse(of_k * rates[:, None], at), u * rates[:, None])
        else:
            u = u * rates[:, None]
        o = product(qs * since, state) + product(of_q, u)
        tl.store(out + n[:, None] * out_n + e[None, :] * out_x, o, mask=by_e)
        state = state * held + product(tl.trans(ks * rest), u)
    tl.store(last + b * last_b + h * last_h + d[:, None] * last_n + e[None, :] * last_x, state, mask=whole)
'''

_STEPS = '''
    point = tl.program_id(1)
    b = (point // heads).to(tl.int64)
    h = (point % heads).to(tl.int64)
    d = tl.arange(0, WIDE)
    e = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_d, in_e = d < D, e < E
    whole = in_d[:, None] & in_e[None, :]
    first += b * first_b + h * first_h
    state = tl.load(first + d[:, None] * first_n + e[None, :] * first_x, mask=whole, other=0.0)
    for t in range(0, tokens):
        n = tl.cast(t, tl.int64)
        qs = tl.load(q + b * q_b + h * q_h + n * q_n + d * q_x, mask=in_d, other=0.0)
        ks = tl.load(k + b * k_b + h * k_h + n * k_n + d * k_x, mask=in_d, other=0.0)
        u = tl.load(v + b * v_b + h * v_h + n * v_n + e * v_x, mask=in_e, other=0.0)
        if CHANNELS:
            logs = tl.load(log + b * log_b + h * log_h + n * log_n + d * log_x, mask=in_d, other=0.0)
            state *= tl.exp(logs)[:, None]
        else:
            state *= tl.exp(tl.load(log + b * log_b + h * log_h + n * log_n))
        if DELTA:
            u -= tl.sum(ks[:, None] * state, 0)
        u *= tl.load(rate + b * rate_b + h * rate_h + n * rate_n)
        state += ks[:, None] * u[None, :]
        o = tl.sum(qs[:, None] * state, 0)
        tl.store(out + b * out_b + h * out_h + n * out_n + e * out_x, o, mask=in_e)
    tl.store(last + b * last_b + h * last_h + d[:, None] * last_n + e[None, :] * last_x, state, mask=whole)
'''
