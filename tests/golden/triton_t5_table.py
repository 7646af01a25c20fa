"""out[b, hk, g, i, e] = sum_j w_j v[j, e],  w = softmax_j(score(q_i . k_j) where mask)

Rows i0 <= i < i1 visit 0 <= j < N; without mask 0 <= j < N.

    attention
    size   B, N, M
    batch  b = B, hk = 2, g = 1
    axis   i = N, j = N, d = 16, e = 16
    tensor q: bf16[B, 2, N, 16]
    tensor k: bf16[B, 2, N, 16]
    tensor v: bf16[B, 2, N, 16]
    tensor table: bf16[17, 2]
    q      q[b, hk + g, i, d]
    k      k[b, hk, j, d]
    v      v[b, hk, j, e]
    score  s + table[min(max(j - i, -8), 8) + 8, hk + g]
    mask   True
    norm   softmax
    empty  zero
    weight w
    give   out
    dtype  bf16
"""

import triton
import triton.language as tl

CONFIG = "block_m=64 block_n=64 warps=4 stages=3 split=False together=8 precision=ieee descriptors=False specialize=False lists=True persistent=0"
BLOCK_M = tl.constexpr(64)
BLOCK_N = tl.constexpr(64)


@triton.jit(do_not_specialize=["B", "N", "M"])
def attention(
    q_ptr, q_s0, q_s1, q_s2, q_s3, k_ptr, k_s0, k_s1, k_s2, k_s3, v_ptr, v_s0, v_s1, v_s2, v_s3, table_ptr,
    table_s0, table_s1, B, N, M, out_ptr, out_s0, out_s1, out_s2, out_s3, out_s4,
):
    pid = tl.program_id(0)
    rows = N
    tiles = tl.cdiv(rows, BLOCK_M)
    tile = pid % tiles
    point = pid // tiles
    hk = point % 2
    point0 = point // 2
    b = point0
    row = (tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    row_ok = row < rows
    i = row
    i0 = tile * BLOCK_M
    i1 = tl.minimum(tile * BLOCK_M + BLOCK_M, rows)
    keys = tl.arange(0, BLOCK_N)[:, None]
    k_at = k_ptr + b.to(tl.int64) * k_s0 + hk.to(tl.int64) * k_s1
    d = tl.arange(0, 16)[None, :]
    k_in = keys * k_s2 + d * k_s3
    v_at = v_ptr + b.to(tl.int64) * v_s0 + hk.to(tl.int64) * v_s1
    e = tl.arange(0, 16)[None, :]
    v_in = keys * v_s2 + e * v_s3
    q_at = q_ptr + b.to(tl.int64) * q_s0 + hk.to(tl.int64) * q_s1 + (i.to(tl.int64) * q_s2)
    q = tl.load(q_at + d * q_s3, mask=row_ok, other=0)
    lift = tl.ceil(tl.log2(tl.maximum(N, 1) * 1.0)) + 1.0
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, 16], tl.float32)
    # blocks whose keys all rows see
    t0 = N // 64
    t1 = (N + 63) // 64
    for block in range(0, tl.minimum(t0, t1)):
        j0 = block * BLOCK_N
        j = (j0 + tl.arange(0, BLOCK_N))[None, :]
        k_block = k_at + j0.to(tl.int64) * k_s2
        k = tl.load(k_block + k_in)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        table = tl.load(table_ptr + (tl.minimum(tl.maximum(j - i, -8), 8) + 8) * table_s0 + hk.to(tl.int64) * table_s1, mask=row_ok, other=0).to(tl.float32)
        x = s + table
        m_new = tl.maximum(m, tl.max(x, 1))
        rate = tl.where(tl.abs(m_new) < 744261117.954893, 1.4426950408889634, tl.where(tl.abs(m_new) < 1.8446744073709552e+19, 2.0, 1.52587890625e-05))
        lifted = tl.where(tl.abs(m_new) < 744261117.954893, lift, 0.0)
        base = tl.maximum(m_new * rate, -3.4028234663852886e+38) + lifted
        shrink = tl.exp2(tl.maximum(m * rate, -3.4028234663852886e+38) + lifted - base)
        m = m_new
        p = tl.exp2(x * rate[:, None] - base[:, None])
        l = l * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v_block = v_at + j0.to(tl.int64) * v_s2
        v = tl.load(v_block + v_in)
        acc = tl.dot(p.to(tl.bfloat16), v, acc, input_precision="ieee")
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
        visible = j_ok
        table0 = tl.load(table_ptr + (tl.minimum(tl.maximum(j - i, -8), 8) + 8) * table_s0 + hk.to(tl.int64) * table_s1, mask=row_ok & j_ok, other=0).to(tl.float32)
        x = tl.where(visible, s + table0, float("-inf"))
        m_new = tl.maximum(m, tl.max(x, 1))
        rate = tl.where(tl.abs(m_new) < 744261117.954893, 1.4426950408889634, tl.where(tl.abs(m_new) < 1.8446744073709552e+19, 2.0, 1.52587890625e-05))
        lifted = tl.where(tl.abs(m_new) < 744261117.954893, lift, 0.0)
        base = tl.maximum(m_new * rate, -3.4028234663852886e+38) + lifted
        shrink = tl.exp2(tl.maximum(m * rate, -3.4028234663852886e+38) + lifted - base)
        m = m_new
        p = tl.exp2(x * rate[:, None] - base[:, None])
        l = l * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v_block = v_at + j0.to(tl.int64) * v_s2
        v = tl.load(v_block + v_in, mask=jv_ok, other=0)
        acc = tl.dot(p.to(tl.bfloat16), v, acc, input_precision="ieee")
    rate = tl.where(tl.abs(m) < 744261117.954893, 1.4426950408889634, tl.where(tl.abs(m) < 1.8446744073709552e+19, 2.0, 1.52587890625e-05))
    lifted = tl.where(tl.abs(m) < 744261117.954893, lift, 0.0)
    base = tl.maximum(m * rate, -3.4028234663852886e+38) + lifted
    far = tl.abs(m) >= 744261117.954893
    top = tl.where(far, tl.maximum(tl.minimum(m * 1.4426950408889634, 3.4028234663852886e+38), -3.4028234663852886e+38), base)[:, None]
    total = l[:, None]
    empty_row = total == 0.0
    acc = tl.where(empty_row, tl.where(N > 0, float("nan"), 0.0), acc / total)
    tl.store(out_ptr + b.to(tl.int64) * out_s0 + hk.to(tl.int64) * out_s1 + i.to(tl.int64) * out_s3 + e * out_s4, acc.to(tl.bfloat16), mask=row_ok)


#: Triton's types of the arguments of each kernel, in order.
SIGNATURES = {
    "attention": {
        "q_ptr": "*bf16", "q_s0": "i32", "q_s1": "i32", "q_s2": "i32", "q_s3": "i32", "k_ptr": "*bf16",
        "k_s0": "i32", "k_s1": "i32", "k_s2": "i32", "k_s3": "i32", "v_ptr": "*bf16", "v_s0": "i32", "v_s1": "i32",
        "v_s2": "i32", "v_s3": "i32", "table_ptr": "*bf16", "table_s0": "i32", "table_s1": "i32", "B": "i32",
        "N": "i32", "M": "i32", "out_ptr": "*bf16", "out_s0": "i32", "out_s1": "i32", "out_s2": "i32",
        "out_s3": "i32", "out_s4": "i32",
    },
}
#: What contiguous tensors make of strides: one, or a multiple of 16.
CONTIGUOUS = {
    "q_s0": 16, "q_s1": 16, "q_s2": 16, "q_s3": 1, "k_s0": 16, "k_s1": 16, "k_s2": 16, "k_s3": 1, "v_s0": 16,
    "v_s1": 16, "v_s2": 16, "v_s3": 1, "table_s1": 1, "out_s0": 16, "out_s1": 16, "out_s2": 16, "out_s3": 16,
    "out_s4": 1,
}


def launch(tensors, sizes, outputs):
    """`tensors`, `sizes` and `outputs` in the order of the attention; outputs have logical dimensions."""
    tensor_0, tensor_1, tensor_2, tensor_3 = tensors
    size_B, size_N, size_M = sizes
    out, = outputs
    rows, points = size_N, size_B * 2
    programs = triton.cdiv(rows, BLOCK_M.value) * points
    if programs == 0:
        return
    attention[(programs,)](
        tensor_0, tensor_0.stride(0), tensor_0.stride(1), tensor_0.stride(2), tensor_0.stride(3), tensor_1,
        tensor_1.stride(0), tensor_1.stride(1), tensor_1.stride(2), tensor_1.stride(3), tensor_2, tensor_2.stride(0),
        tensor_2.stride(1), tensor_2.stride(2), tensor_2.stride(3), tensor_3, tensor_3.stride(0), tensor_3.stride(1),
        size_B, size_N, size_M, out, out.stride(0), out.stride(1), out.stride(2), out.stride(3), out.stride(4),
        num_warps=4, num_stages=3, enable_fp_fusion=True,
    )
