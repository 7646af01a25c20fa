"""The gradient of out[b, hk, g, i, e] = sum_j w_j v[j, e] for

    attention
    size   B, N, M
    batch  b = B, hk = 2, g = 2
    axis   i = N, j = N, d = 16, e = 16
    tensor q: bf16[B, 4, N, 16]
    tensor k: bf16[B, 2, N, 16]
    tensor v: bf16[B, 2, N, 16]
    q      q[b, hk * 2 + g, i, d]
    k      k[b, hk, j, d]
    v      v[b, hk, j, e]
    score  s * 0.25
    mask   j <= i
    norm   softmax
    empty  zero
    weight w
    give   out, lse
    dtype  bf16

    operands q, k, v
    by s     0.25
    by w     1.0

A tile of i visits 0 <= j < i1; without mask 0 <= j < i0 + 1.
A tile of j visits i0 <= i < N; without mask i1 - 1 <= i < N.
"""

import torch
import triton
import triton.language as tl

CONFIG = "block_m=64 block_n=64 warps=4 stages=2 split=False together=8 precision=ieee descriptors=False specialize=False lists=False persistent=0; block_m=64 block_n=64 warps=4 stages=2 split=False together=8 precision=ieee descriptors=False specialize=False lists=False persistent=0"


@triton.jit(do_not_specialize=["B", "N", "M"])
def gradient_statistics(
    q_ptr, q_s0, q_s1, q_s2, q_s3, k_ptr, k_s0, k_s1, k_s2, k_s3, v_ptr, v_s0, v_s1, v_s2, v_s3, grad_out_ptr,
    grad_out_s0, grad_out_s1, grad_out_s2, grad_out_s3, grad_out_s4, out_ptr, out_s0, out_s1, out_s2, out_s3,
    out_s4, lse_ptr, lse_s0, lse_s1, lse_s2, lse_s3, grad_lse_ptr, grad_lse_s0, grad_lse_s1, grad_lse_s2,
    grad_lse_s3, B, N, M, delta_ptr, delta_s0, delta_s1, delta_s2, delta_s3, peak_ptr, rest_ptr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    rows = 2 * N
    tiles = tl.cdiv(rows, BLOCK_M)
    # 8 batch points at a time, the longest rows first
    points = B * 2
    first = pid // (8 * tiles) * 8
    width = tl.minimum(points - first, 8)
    point = first + pid % (8 * tiles) % width
    tile = tiles - 1 - pid % (8 * tiles) // width
    hk = point % 2
    point0 = point // 2
    b = point0
    row = (tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    row_ok = row < rows
    i = row // 2
    g = row % 2
    i0 = (tile * BLOCK_M) // 2
    i1 = (tl.minimum(tile * BLOCK_M + BLOCK_M, rows) - 1) // 2 + 1
    keys = tl.arange(0, BLOCK_N)[:, None]
    d = tl.arange(0, 16)[None, :]
    k_in = keys * k_s2 + d * k_s3
    e = tl.arange(0, 16)[None, :]
    v_in = keys * v_s2 + e * v_s3
    k_at = k_ptr + b.to(tl.int64) * k_s0 + hk.to(tl.int64) * k_s1
    v_at = v_ptr + b.to(tl.int64) * v_s0 + hk.to(tl.int64) * v_s1
    w_at = grad_out_ptr + b.to(tl.int64) * grad_out_s0 + hk.to(tl.int64) * grad_out_s1 + (g.to(tl.int64) * grad_out_s2 + i.to(tl.int64) * grad_out_s3)
    w = tl.load(w_at + e * grad_out_s4, mask=row_ok, other=0).to(tl.float32)
    kept_at = out_ptr + b.to(tl.int64) * out_s0 + hk.to(tl.int64) * out_s1 + (g.to(tl.int64) * out_s2 + i.to(tl.int64) * out_s3)
    kept = tl.load(kept_at + e * out_s4, mask=row_ok, other=0).to(tl.float32)
    delta = (tl.sum(w * kept, 1))[:, None] - tl.load(grad_lse_ptr + b.to(tl.int64) * grad_lse_s0 + hk.to(tl.int64) * grad_lse_s1 + g.to(tl.int64) * grad_lse_s2 + i.to(tl.int64) * grad_lse_s3 + tl.zeros([BLOCK_M, 1], tl.int32), mask=row_ok, other=0.0)
    lse = tl.load(lse_ptr + b.to(tl.int64) * lse_s0 + hk.to(tl.int64) * lse_s1 + g.to(tl.int64) * lse_s2 + i.to(tl.int64) * lse_s3 + tl.zeros([BLOCK_M, 1], tl.int32), mask=row_ok, other=float("-inf"))
    # a row that sees no key has no weights; one whose sum is no number has no other
    rest = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    rest = tl.where(lse == float("inf"), float("nan"), rest)
    peak = tl.zeros([BLOCK_M, 1], tl.float32)
    rough = (tl.abs(lse) > 1000.0) & (tl.abs(lse) != float("inf"))
    if tl.max(tl.where(rough & row_ok, 1, 0)) > 0:
        q_at = q_ptr + b.to(tl.int64) * q_s0 + hk.to(tl.int64) * (2 * q_s1) + (g.to(tl.int64) * q_s1 + i.to(tl.int64) * q_s2)
        q = tl.load(q_at + d * q_s3, mask=row_ok, other=0)
        m = tl.full([BLOCK_M, 1], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M, 1], tl.float32)
        # blocks whose keys all rows see
        t0 = (i0 + 1) // 64
        t1 = (i1 + 63) // 64
        for block in range(0, tl.minimum(t0, t1)):
            j0 = block * BLOCK_N
            j = (j0 + tl.arange(0, BLOCK_N))[None, :]
            k_block = k_at + j0.to(tl.int64) * k_s2
            k = tl.load(k_block + k_in)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            x = s
            x_new = tl.maximum(m, tl.max(x, 1)[:, None])
            base = tl.where(x_new == float("-inf"), 0.0, x_new)
            l = l * tl.exp2((m - base) * 0.36067376022224085) + tl.sum(tl.exp2((x - base) * 0.36067376022224085), 1)[:, None]
            m = x_new
        # blocks where the mask decides
        for block in range(t0, tl.maximum(t0, t1)):
            j0 = block * BLOCK_N
            j = (j0 + tl.arange(0, BLOCK_N))[None, :]
            j_ok = j < N
            jv = j0 + keys
            jv_ok = jv < N
            k_block = k_at + j0.to(tl.int64) * k_s2
            k = tl.load(k_block + k_in, mask=jv_ok, other=0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            visible = j_ok & (j <= i)
            x = s
            x = tl.where(visible, x, float("-inf"))
            x_new = tl.maximum(m, tl.max(x, 1)[:, None])
            base = tl.where(x_new == float("-inf"), 0.0, x_new)
            l = l * tl.exp2((m - base) * 0.36067376022224085) + tl.sum(tl.exp2((x - base) * 0.36067376022224085), 1)[:, None]
            m = x_new
        top = tl.zeros([BLOCK_M, 1], tl.float32)
        peak = tl.where(rough, m, peak)
        rest = tl.where(rough, top + tl.log2(l), rest)
    tl.store(delta_ptr + b.to(tl.int64) * delta_s0 + hk.to(tl.int64) * delta_s1 + g.to(tl.int64) * delta_s2 + i.to(tl.int64) * delta_s3 + tl.zeros([BLOCK_M, 1], tl.int32), delta, mask=row_ok)
    tl.store(peak_ptr + b.to(tl.int64) * delta_s0 + hk.to(tl.int64) * delta_s1 + g.to(tl.int64) * delta_s2 + i.to(tl.int64) * delta_s3 + tl.zeros([BLOCK_M, 1], tl.int32), peak, mask=row_ok)
    tl.store(rest_ptr + b.to(tl.int64) * delta_s0 + hk.to(tl.int64) * delta_s1 + g.to(tl.int64) * delta_s2 + i.to(tl.int64) * delta_s3 + tl.zeros([BLOCK_M, 1], tl.int32), rest, mask=row_ok)


@triton.jit(do_not_specialize=["B", "N", "M"])
def gradient_rows(
    q_ptr, q_s0, q_s1, q_s2, q_s3, k_ptr, k_s0, k_s1, k_s2, k_s3, v_ptr, v_s0, v_s1, v_s2, v_s3, grad_out_ptr,
    grad_out_s0, grad_out_s1, grad_out_s2, grad_out_s3, grad_out_s4, B, N, M, delta_ptr, delta_s0, delta_s1,
    delta_s2, delta_s3, peak_ptr, rest_ptr, dq_ptr, dq_s0, dq_s1, dq_s2, dq_s3, dq_s4, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    rows = 2 * N
    tiles = tl.cdiv(rows, BLOCK_M)
    # 8 batch points at a time, the longest rows first
    points = B * 2
    first = pid // (8 * tiles) * 8
    width = tl.minimum(points - first, 8)
    point = first + pid % (8 * tiles) % width
    tile = tiles - 1 - pid % (8 * tiles) // width
    hk = point % 2
    point0 = point // 2
    b = point0
    row = (tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    row_ok = row < rows
    i = row // 2
    g = row % 2
    i0 = (tile * BLOCK_M) // 2
    i1 = (tl.minimum(tile * BLOCK_M + BLOCK_M, rows) - 1) // 2 + 1
    keys = tl.arange(0, BLOCK_N)[:, None]
    d = tl.arange(0, 16)[None, :]
    k_in = keys * k_s2 + d * k_s3
    e = tl.arange(0, 16)[None, :]
    v_in = keys * v_s2 + e * v_s3
    k_at = k_ptr + b.to(tl.int64) * k_s0 + hk.to(tl.int64) * k_s1
    v_at = v_ptr + b.to(tl.int64) * v_s0 + hk.to(tl.int64) * v_s1
    q_at = q_ptr + b.to(tl.int64) * q_s0 + hk.to(tl.int64) * (2 * q_s1) + (g.to(tl.int64) * q_s1 + i.to(tl.int64) * q_s2)
    q = tl.load(q_at + d * q_s3, mask=row_ok, other=0)
    w_at = grad_out_ptr + b.to(tl.int64) * grad_out_s0 + hk.to(tl.int64) * grad_out_s1 + (g.to(tl.int64) * grad_out_s2 + i.to(tl.int64) * grad_out_s3)
    w = tl.load(w_at + e * grad_out_s4, mask=row_ok, other=0)
    delta = tl.load(delta_ptr + b.to(tl.int64) * delta_s0 + hk.to(tl.int64) * delta_s1 + g.to(tl.int64) * delta_s2 + i.to(tl.int64) * delta_s3 + tl.zeros([BLOCK_M, 1], tl.int32), mask=row_ok, other=0.0)
    peak = tl.load(peak_ptr + b.to(tl.int64) * delta_s0 + hk.to(tl.int64) * delta_s1 + g.to(tl.int64) * delta_s2 + i.to(tl.int64) * delta_s3 + tl.zeros([BLOCK_M, 1], tl.int32), mask=row_ok, other=0.0)
    rest = tl.load(rest_ptr + b.to(tl.int64) * delta_s0 + hk.to(tl.int64) * delta_s1 + g.to(tl.int64) * delta_s2 + i.to(tl.int64) * delta_s3 + tl.zeros([BLOCK_M, 1], tl.int32), mask=row_ok, other=float("inf"))
    acc = tl.zeros([BLOCK_M, 16], tl.float32)
    # blocks whose keys all rows see
    t0 = (i0 + 1) // 64
    t1 = (i1 + 63) // 64
    for block in range(0, tl.minimum(t0, t1)):
        j0 = block * BLOCK_N
        j = (j0 + tl.arange(0, BLOCK_N))[None, :]
        k_block = k_at + j0.to(tl.int64) * k_s2
        k = tl.load(k_block + k_in)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        x = s
        p = tl.exp2((x - peak) * 0.36067376022224085 - rest)
        v_block = v_at + j0.to(tl.int64) * v_s2
        v = tl.load(v_block + v_in)
        u = tl.dot(w, tl.trans(v), input_precision="ieee")
        ws = p * (u - delta)
        ds = ws.to(tl.bfloat16)
        acc = tl.dot(ds, k, acc, input_precision="ieee")
    # blocks where the mask decides
    for block in range(t0, tl.maximum(t0, t1)):
        j0 = block * BLOCK_N
        j = (j0 + tl.arange(0, BLOCK_N))[None, :]
        j_ok = j < N
        jv = j0 + keys
        jv_ok = jv < N
        k_block = k_at + j0.to(tl.int64) * k_s2
        k = tl.load(k_block + k_in, mask=jv_ok, other=0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        visible = j_ok & (j <= i)
        x = s
        p = tl.where(visible, tl.exp2((x - peak) * 0.36067376022224085 - rest), 0.0)
        v_block = v_at + j0.to(tl.int64) * v_s2
        v = tl.load(v_block + v_in, mask=jv_ok, other=0)
        u = tl.dot(w, tl.trans(v), input_precision="ieee")
        ws = p * (u - delta)
        ws = tl.where(visible, ws, 0.0)
        ds = ws.to(tl.bfloat16)
        acc = tl.dot(ds, k, acc, input_precision="ieee")
    tl.store(dq_ptr + b.to(tl.int64) * dq_s0 + hk.to(tl.int64) * dq_s1 + g.to(tl.int64) * dq_s2 + i.to(tl.int64) * dq_s3 + d * dq_s4, acc * 0.25, mask=row_ok)


@triton.jit(do_not_specialize=["B", "N", "M"])
def gradient_keys(
    q_ptr, q_s0, q_s1, q_s2, q_s3, k_ptr, k_s0, k_s1, k_s2, k_s3, v_ptr, v_s0, v_s1, v_s2, v_s3, grad_out_ptr,
    grad_out_s0, grad_out_s1, grad_out_s2, grad_out_s3, grad_out_s4, B, N, M, delta_ptr, delta_s0, delta_s1,
    delta_s2, delta_s3, peak_ptr, rest_ptr, dk_ptr, dk_s0, dk_s1, dk_s2, dk_s3, dv_ptr, dv_s0, dv_s1, dv_s2,
    dv_s3, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    rows = N
    tiles = tl.cdiv(rows, BLOCK_M)
    # 8 batch points at a time, the longest rows first
    points = B * 2
    first = pid // (8 * tiles) * 8
    width = tl.minimum(points - first, 8)
    point = first + pid % (8 * tiles) % width
    tile = pid % (8 * tiles) // width
    hk = point % 2
    point0 = point // 2
    b = point0
    row = (tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    row_ok = row < rows
    j = row
    i0 = tile * BLOCK_M
    i1 = tl.minimum(tile * BLOCK_M + BLOCK_M, rows)
    keys = tl.arange(0, BLOCK_N)[:, None]
    d = tl.arange(0, 16)[None, :]
    k_in = keys * q_s2 + d * q_s3
    e = tl.arange(0, 16)[None, :]
    v_in = keys * grad_out_s3 + e * grad_out_s4
    q_at = k_ptr + b.to(tl.int64) * k_s0 + hk.to(tl.int64) * k_s1 + (j.to(tl.int64) * k_s2)
    q = tl.load(q_at + d * k_s3, mask=row_ok, other=0)
    w_at = v_ptr + b.to(tl.int64) * v_s0 + hk.to(tl.int64) * v_s1 + (j.to(tl.int64) * v_s2)
    w = tl.load(w_at + e * v_s3, mask=row_ok, other=0)
    acc = tl.zeros([BLOCK_M, 16], tl.float32)
    values = tl.zeros([BLOCK_M, 16], tl.float32)
    t0 = (tl.maximum(i1 - 1, 0) + 63) // 64
    t1 = i0 // 64
    t2 = tl.maximum(t0, t1)
    t3 = tl.maximum(t0, N // 64)
    t4 = tl.maximum(t1, (N + 63) // 64)
    t5 = tl.maximum(t2, tl.minimum(t3, t4))
    t6 = tl.maximum(t3, t1)
    t7 = tl.maximum(t1, tl.minimum(t0, t4)) - t1 + (tl.maximum(t6, t4) - t6)
    t8 = tl.maximum(t1, tl.minimum(t0, t4)) - t1
    for member in range(0, 2):
        g = member
        k_at = q_ptr + b.to(tl.int64) * q_s0 + hk.to(tl.int64) * (2 * q_s1) + g.to(tl.int64) * q_s1
        v_at = grad_out_ptr + b.to(tl.int64) * grad_out_s0 + hk.to(tl.int64) * grad_out_s1 + g.to(tl.int64) * grad_out_s2
        # blocks whose keys all rows see
        for block in range(t2, t5):
            j0 = block * BLOCK_N
            i = (j0 + tl.arange(0, BLOCK_N))[None, :]
            k_block = k_at + j0.to(tl.int64) * q_s2
            k = tl.load(k_block + k_in)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            x = s
            delta = tl.load(delta_ptr + b.to(tl.int64) * delta_s0 + hk.to(tl.int64) * delta_s1 + g.to(tl.int64) * delta_s2 + i.to(tl.int64) * delta_s3)
            peak = tl.load(peak_ptr + b.to(tl.int64) * delta_s0 + hk.to(tl.int64) * delta_s1 + g.to(tl.int64) * delta_s2 + i.to(tl.int64) * delta_s3)
            rest = tl.load(rest_ptr + b.to(tl.int64) * delta_s0 + hk.to(tl.int64) * delta_s1 + g.to(tl.int64) * delta_s2 + i.to(tl.int64) * delta_s3)
            p = tl.exp2((x - peak) * 0.36067376022224085 - rest)
            v_block = v_at + j0.to(tl.int64) * grad_out_s3
            v = tl.load(v_block + v_in)
            pw = p.to(tl.bfloat16)
            values = tl.dot(pw, v, values, input_precision="ieee")
            u = tl.dot(w, tl.trans(v), input_precision="ieee")
            ws = p * (u - delta)
            ds = ws.to(tl.bfloat16)
            acc = tl.dot(ds, k, acc, input_precision="ieee")
        # blocks where the mask decides
        count = t7
        before = t8
        for t in range(0, count):
            block = t1 + t
            block = tl.where(t >= before, t6 + t - before, block)
            j0 = block * BLOCK_N
            i = (j0 + tl.arange(0, BLOCK_N))[None, :]
            j_ok = i < N
            jv = j0 + keys
            jv_ok = jv < N
            k_block = k_at + j0.to(tl.int64) * q_s2
            k = tl.load(k_block + k_in, mask=jv_ok, other=0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            visible = j_ok & (j <= i)
            x = s
            delta = tl.load(delta_ptr + b.to(tl.int64) * delta_s0 + hk.to(tl.int64) * delta_s1 + g.to(tl.int64) * delta_s2 + i.to(tl.int64) * delta_s3, mask=j_ok, other=0.0)
            peak = tl.load(peak_ptr + b.to(tl.int64) * delta_s0 + hk.to(tl.int64) * delta_s1 + g.to(tl.int64) * delta_s2 + i.to(tl.int64) * delta_s3, mask=j_ok, other=0.0)
            rest = tl.load(rest_ptr + b.to(tl.int64) * delta_s0 + hk.to(tl.int64) * delta_s1 + g.to(tl.int64) * delta_s2 + i.to(tl.int64) * delta_s3, mask=j_ok, other=float("inf"))
            p = tl.where(visible, tl.exp2((x - peak) * 0.36067376022224085 - rest), 0.0)
            v_block = v_at + j0.to(tl.int64) * grad_out_s3
            v = tl.load(v_block + v_in, mask=jv_ok, other=0)
            pw = p.to(tl.bfloat16)
            values = tl.dot(pw, v, values, input_precision="ieee")
            u = tl.dot(w, tl.trans(v), input_precision="ieee")
            ws = p * (u - delta)
            ws = tl.where(visible, ws, 0.0)
            ds = ws.to(tl.bfloat16)
            acc = tl.dot(ds, k, acc, input_precision="ieee")
    tl.store(dk_ptr + b.to(tl.int64) * dk_s0 + hk.to(tl.int64) * dk_s1 + j.to(tl.int64) * dk_s2 + d * dk_s3, acc * 0.25, mask=row_ok)
    tl.store(dv_ptr + b.to(tl.int64) * dv_s0 + hk.to(tl.int64) * dv_s1 + j.to(tl.int64) * dv_s2 + e * dv_s3, values, mask=row_ok)


#: Triton's types of the arguments of each kernel, in order.
SIGNATURES = {
    "gradient_statistics": {
        "q_ptr": "*bf16", "q_s0": "i32", "q_s1": "i32", "q_s2": "i32", "q_s3": "i32", "k_ptr": "*bf16",
        "k_s0": "i32", "k_s1": "i32", "k_s2": "i32", "k_s3": "i32", "v_ptr": "*bf16", "v_s0": "i32", "v_s1": "i32",
        "v_s2": "i32", "v_s3": "i32", "grad_out_ptr": "*bf16", "grad_out_s0": "i32", "grad_out_s1": "i32",
        "grad_out_s2": "i32", "grad_out_s3": "i32", "grad_out_s4": "i32", "out_ptr": "*bf16", "out_s0": "i32",
        "out_s1": "i32", "out_s2": "i32", "out_s3": "i32", "out_s4": "i32", "lse_ptr": "*fp32", "lse_s0": "i32",
        "lse_s1": "i32", "lse_s2": "i32", "lse_s3": "i32", "grad_lse_ptr": "*fp32", "grad_lse_s0": "i32",
        "grad_lse_s1": "i32", "grad_lse_s2": "i32", "grad_lse_s3": "i32", "B": "i32", "N": "i32", "M": "i32",
        "delta_ptr": "*fp32", "delta_s0": "i32", "delta_s1": "i32", "delta_s2": "i32", "delta_s3": "i32",
        "peak_ptr": "*fp32", "rest_ptr": "*fp32", "BLOCK_M": "constexpr", "BLOCK_N": "constexpr",
    },
    "gradient_rows": {
        "q_ptr": "*bf16", "q_s0": "i32", "q_s1": "i32", "q_s2": "i32", "q_s3": "i32", "k_ptr": "*bf16",
        "k_s0": "i32", "k_s1": "i32", "k_s2": "i32", "k_s3": "i32", "v_ptr": "*bf16", "v_s0": "i32", "v_s1": "i32",
        "v_s2": "i32", "v_s3": "i32", "grad_out_ptr": "*bf16", "grad_out_s0": "i32", "grad_out_s1": "i32",
        "grad_out_s2": "i32", "grad_out_s3": "i32", "grad_out_s4": "i32", "B": "i32", "N": "i32", "M": "i32",
        "delta_ptr": "*fp32", "delta_s0": "i32", "delta_s1": "i32", "delta_s2": "i32", "delta_s3": "i32",
        "peak_ptr": "*fp32", "rest_ptr": "*fp32", "dq_ptr": "*fp32", "dq_s0": "i32", "dq_s1": "i32", "dq_s2": "i32",
        "dq_s3": "i32", "dq_s4": "i32", "BLOCK_M": "constexpr", "BLOCK_N": "constexpr",
    },
    "gradient_keys": {
        "q_ptr": "*bf16", "q_s0": "i32", "q_s1": "i32", "q_s2": "i32", "q_s3": "i32", "k_ptr": "*bf16",
        "k_s0": "i32", "k_s1": "i32", "k_s2": "i32", "k_s3": "i32", "v_ptr": "*bf16", "v_s0": "i32", "v_s1": "i32",
        "v_s2": "i32", "v_s3": "i32", "grad_out_ptr": "*bf16", "grad_out_s0": "i32", "grad_out_s1": "i32",
        "grad_out_s2": "i32", "grad_out_s3": "i32", "grad_out_s4": "i32", "B": "i32", "N": "i32", "M": "i32",
        "delta_ptr": "*fp32", "delta_s0": "i32", "delta_s1": "i32", "delta_s2": "i32", "delta_s3": "i32",
        "peak_ptr": "*fp32", "rest_ptr": "*fp32", "dk_ptr": "*fp32", "dk_s0": "i32", "dk_s1": "i32", "dk_s2": "i32",
        "dk_s3": "i32", "dv_ptr": "*fp32", "dv_s0": "i32", "dv_s1": "i32", "dv_s2": "i32", "dv_s3": "i32",
        "BLOCK_M": "constexpr", "BLOCK_N": "constexpr",
    },
}
#: What contiguous tensors make of strides: one, or a multiple of 16.
CONTIGUOUS = {
    "q_s0": 16, "q_s1": 16, "q_s2": 16, "q_s3": 1, "k_s0": 16, "k_s1": 16, "k_s2": 16, "k_s3": 1, "v_s0": 16,
    "v_s1": 16, "v_s2": 16, "v_s3": 1, "grad_out_s0": 16, "grad_out_s1": 16, "grad_out_s2": 16,
    "grad_out_s3": 16, "grad_out_s4": 1, "out_s0": 16, "out_s1": 16, "out_s2": 16, "out_s3": 16, "out_s4": 1,
    "lse_s3": 1, "grad_lse_s3": 1, "delta_s3": 1, "dq_s0": 16, "dq_s1": 16, "dq_s2": 16, "dq_s3": 16, "dq_s4": 1,
    "dk_s0": 16, "dk_s1": 16, "dk_s2": 16, "dk_s3": 1, "dv_s0": 16, "dv_s1": 16, "dv_s2": 16, "dv_s3": 1,
}


def launch(tensors, sizes, outputs):
    """`tensors` are those of the attention, the gradients and the outputs; see the head of the file."""
    tensor_0, tensor_1, tensor_2, tensor_3, tensor_4, tensor_5, tensor_6 = tensors
    size_B, size_N, size_M = sizes
    dq, dk, dv = outputs
    points, rows, keys = (size_B, 2, 2,), size_N, size_N
    if 0 in (*points, rows, keys):
        for output in outputs:
            output.zero_()
        return
    new = {"dtype": torch.float32, "device": dq.device}
    delta, peak, rest = torch.empty((3, *points, rows), **new)
    gradient_statistics[(triton.cdiv(2 * size_N, 64) * size_B * 2,)](
        tensor_0, tensor_0.stride(0), tensor_0.stride(1), tensor_0.stride(2), tensor_0.stride(3), tensor_1,
        tensor_1.stride(0), tensor_1.stride(1), tensor_1.stride(2), tensor_1.stride(3), tensor_2, tensor_2.stride(0),
        tensor_2.stride(1), tensor_2.stride(2), tensor_2.stride(3), tensor_3, tensor_3.stride(0), tensor_3.stride(1),
        tensor_3.stride(2), tensor_3.stride(3), tensor_3.stride(4), tensor_4, tensor_4.stride(0), tensor_4.stride(1),
        tensor_4.stride(2), tensor_4.stride(3), tensor_4.stride(4), tensor_5, tensor_5.stride(0), tensor_5.stride(1),
        tensor_5.stride(2), tensor_5.stride(3), tensor_6, tensor_6.stride(0), tensor_6.stride(1), tensor_6.stride(2),
        tensor_6.stride(3), size_B, size_N, size_M, delta, delta.stride(0), delta.stride(1), delta.stride(2),
        delta.stride(3), peak, rest, 64, 64, num_warps=4, num_stages=2, enable_fp_fusion=True,
    )
    gradient_rows[(triton.cdiv(2 * size_N, 64) * size_B * 2,)](
        tensor_0, tensor_0.stride(0), tensor_0.stride(1), tensor_0.stride(2), tensor_0.stride(3), tensor_1,
        tensor_1.stride(0), tensor_1.stride(1), tensor_1.stride(2), tensor_1.stride(3), tensor_2, tensor_2.stride(0),
        tensor_2.stride(1), tensor_2.stride(2), tensor_2.stride(3), tensor_3, tensor_3.stride(0), tensor_3.stride(1),
        tensor_3.stride(2), tensor_3.stride(3), tensor_3.stride(4), size_B, size_N, size_M, delta, delta.stride(0),
        delta.stride(1), delta.stride(2), delta.stride(3), peak, rest, dq, dq.stride(0), dq.stride(1), dq.stride(2),
        dq.stride(3), dq.stride(4), 64, 64, num_warps=4, num_stages=2, enable_fp_fusion=True,
    )
    gradient_keys[(triton.cdiv(size_N, 64) * size_B * 2,)](
        tensor_0, tensor_0.stride(0), tensor_0.stride(1), tensor_0.stride(2), tensor_0.stride(3), tensor_1,
        tensor_1.stride(0), tensor_1.stride(1), tensor_1.stride(2), tensor_1.stride(3), tensor_2, tensor_2.stride(0),
        tensor_2.stride(1), tensor_2.stride(2), tensor_2.stride(3), tensor_3, tensor_3.stride(0), tensor_3.stride(1),
        tensor_3.stride(2), tensor_3.stride(3), tensor_3.stride(4), size_B, size_N, size_M, delta, delta.stride(0),
        delta.stride(1), delta.stride(2), delta.stride(3), peak, rest, dk, dk.stride(0), dk.stride(1), dk.stride(2),
        dk.stride(3), dv, dv.stride(0), dv.stride(1), dv.stride(2), dv.stride(3), 64, 64,
        num_warps=4, num_stages=2, enable_fp_fusion=True,
    )
