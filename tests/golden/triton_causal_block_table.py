"""out[b, hk, g, i, e] = sum_j w_j v[j, e],  w = softmax_j(score(q_i . k_j) where mask)

Rows i0 <= i < i1 visit 0 <= j < i1.

    attention
    size   B, N, M
    batch  b = B, hk = 2, g = 2
    axis   i = N, j = N, d = 16, e = 16
    tensor q: bf16[B, 4, N, 16]
    tensor k: bf16[B, 2, N, 16]
    tensor v: bf16[B, 2, N, 16]
    tensor table: bool[2, 9, 3]
    q      q[b, hk * 2 + g, i, d]
    k      k[b, hk, j, d]
    v      v[b, hk, j, e]
    score  s * 0.25
    mask   j <= i and table[hk, i // 8, j // 32]
    norm   softmax
    empty  zero
    weight w
    give   out
    dtype  bf16
"""

import torch
import triton
import triton.language as tl

CONFIG = "block_m=64 block_n=64 warps=4 stages=3 split=False together=8 precision=ieee descriptors=False specialize=False lists=True persistent=0"
BLOCK_M = tl.constexpr(64)
BLOCK_N = tl.constexpr(64)


@triton.jit(do_not_specialize=["B", "N", "M"])
def attention(
    q_ptr, q_s0, q_s1, q_s2, q_s3, k_ptr, k_s0, k_s1, k_s2, k_s3, v_ptr, v_s0, v_s1, v_s2, v_s3, table_ptr,
    table_s0, table_s1, table_s2, B, N, M, out_ptr, out_s0, out_s1, out_s2, out_s3, out_s4, blocks_ptr,
    counts_ptr, block_count,
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
    k_at = k_ptr + b.to(tl.int64) * k_s0 + hk.to(tl.int64) * k_s1
    d = tl.arange(0, 16)[None, :]
    k_in = keys * k_s2 + d * k_s3
    v_at = v_ptr + b.to(tl.int64) * v_s0 + hk.to(tl.int64) * v_s1
    e = tl.arange(0, 16)[None, :]
    v_in = keys * v_s2 + e * v_s3
    q_at = q_ptr + b.to(tl.int64) * q_s0 + hk.to(tl.int64) * (2 * q_s1) + (g.to(tl.int64) * q_s1 + i.to(tl.int64) * q_s2)
    q = tl.load(q_at + d * q_s3, mask=row_ok, other=0)
    lift = tl.ceil(tl.log2(tl.maximum(N, 1) * 1.0)) + 1.0
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, 16], tl.float32)
    list_at = ((hk) * tiles + tile).to(tl.int64)
    full = tl.load(counts_ptr + list_at * 2)
    part = tl.load(counts_ptr + list_at * 2 + 1)
    list_at = list_at * block_count
    # the blocks of this tile's list: those whose keys all rows see, then those where the mask decides
    for t in range(0, full):
        block = tl.load(blocks_ptr + list_at + t)
        j0 = block * BLOCK_N
        j = (j0 + tl.arange(0, BLOCK_N))[None, :]
        k_block = k_at + j0.to(tl.int64) * k_s2
        k = tl.load(k_block + k_in)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        x = s
        m_new = tl.maximum(m, tl.max(x, 1))
        rate = tl.where(tl.abs(m_new) < 2977044471.819572, 0.36067376022224085, 0.5)
        lifted = tl.where(tl.abs(m_new) < 2977044471.819572, lift, 0.0)
        base = tl.maximum(m_new * rate, -3.4028234663852886e+38) + lifted
        shrink = tl.exp2(tl.maximum(m * rate, -3.4028234663852886e+38) + lifted - base)
        m = m_new
        p = tl.exp2(x * rate[:, None] - base[:, None])
        l = l * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v_block = v_at + j0.to(tl.int64) * v_s2
        v = tl.load(v_block + v_in)
        acc = tl.dot(p.to(tl.bfloat16), v, acc, input_precision="ieee")
    t0 = i // 8
    for t in range(0, part):
        block = tl.load(blocks_ptr + list_at + block_count - 1 - t)
        j0 = block * BLOCK_N
        j = (j0 + tl.arange(0, BLOCK_N))[None, :]
        j_ok = j < N
        jv = j0 + keys
        jv_ok = jv < N
        k_block = k_at + j0.to(tl.int64) * k_s2
        k = tl.load(k_block + k_in, mask=jv_ok, other=0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        table = tl.load(table_ptr + hk.to(tl.int64) * table_s0 + t0.to(tl.int64) * table_s1 + (j // 32).to(tl.int64) * table_s2, mask=row_ok & j_ok, other=0).to(tl.int1)
        visible = j_ok & ((j <= i) & table)
        x = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(x, 1))
        rate = tl.where(tl.abs(m_new) < 2977044471.819572, 0.36067376022224085, 0.5)
        lifted = tl.where(tl.abs(m_new) < 2977044471.819572, lift, 0.0)
        base = tl.maximum(m_new * rate, -3.4028234663852886e+38) + lifted
        shrink = tl.exp2(tl.maximum(m * rate, -3.4028234663852886e+38) + lifted - base)
        m = m_new
        p = tl.exp2(x * rate[:, None] - base[:, None])
        l = l * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v_block = v_at + j0.to(tl.int64) * v_s2
        v = tl.load(v_block + v_in, mask=jv_ok, other=0)
        acc = tl.dot(p.to(tl.bfloat16), v, acc, input_precision="ieee")
    rate = tl.where(tl.abs(m) < 2977044471.819572, 0.36067376022224085, 0.5)
    lifted = tl.where(tl.abs(m) < 2977044471.819572, lift, 0.0)
    base = tl.maximum(m * rate, -3.4028234663852886e+38) + lifted
    far = tl.abs(m) >= 2977044471.819572
    top = tl.where(far, tl.maximum(tl.minimum(m * 0.36067376022224085, 3.4028234663852886e+38), -3.4028234663852886e+38), base)[:, None]
    total = l[:, None]
    empty_row = total == 0.0
    acc = tl.where(empty_row, 0.0, acc / total)
    tl.store(out_ptr + b.to(tl.int64) * out_s0 + hk.to(tl.int64) * out_s1 + g.to(tl.int64) * out_s2 + i.to(tl.int64) * out_s3 + e * out_s4, acc.to(tl.bfloat16), mask=row_ok & (total != 0.0))
    # rows whose weights sum to zero: those that see keys, all at minus infinity, are not empty
    if tl.max(tl.where(empty_row, 1, 0)) > 0:
        seen = tl.full([BLOCK_M, 1], 0, tl.int32)
        # the blocks of this tile's list: those whose keys all rows see, then those where the mask decides
        for t in range(0, full):
            block = tl.load(blocks_ptr + list_at + t)
            j0 = block * BLOCK_N
            j = (j0 + tl.arange(0, BLOCK_N))[None, :]
            seen = tl.maximum(seen, tl.full([BLOCK_M, 1], 1, tl.int32))
        for t in range(0, part):
            block = tl.load(blocks_ptr + list_at + block_count - 1 - t)
            j0 = block * BLOCK_N
            j = (j0 + tl.arange(0, BLOCK_N))[None, :]
            j_ok = j < N
            table0 = tl.load(table_ptr + hk.to(tl.int64) * table_s0 + t0.to(tl.int64) * table_s1 + (j // 32).to(tl.int64) * table_s2, mask=row_ok & j_ok, other=0).to(tl.int1)
            visible = j_ok & ((j <= i) & table0)
            seen = tl.maximum(seen, tl.max(tl.where(visible, tl.full([BLOCK_M, BLOCK_N], 1, tl.int32), 0), 1)[:, None])
        tl.store(out_ptr + b.to(tl.int64) * out_s0 + hk.to(tl.int64) * out_s1 + g.to(tl.int64) * out_s2 + i.to(tl.int64) * out_s3 + e * out_s4, tl.where(seen > 0, float("nan"), 0.0).to(tl.bfloat16), mask=row_ok & empty_row & (e >= 0))


@triton.jit(do_not_specialize=["B", "N", "M"])
def look(
    table_ptr, table_s0, table_s1, table_s2, B, N, M, flags_ptr, block_count,
):
    pid = tl.program_id(0)
    rows = 2 * N
    tiles = tl.cdiv(rows, BLOCK_M)
    tile = pid % tiles
    point = pid // tiles
    hk = point
    row = (tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    row_ok = row < rows
    i = row // 2
    g = row % 2
    i0 = (tile * BLOCK_M) // 2
    i1 = (tl.minimum(tile * BLOCK_M + BLOCK_M, rows) - 1) // 2 + 1
    at = pid.to(tl.int64) * block_count
    low = tl.min(tl.where(row_ok, (0 - i), 2147483647))
    high = tl.max(tl.where(row_ok, (0 - i), -2147483647))
    t0 = i // 8
    first = tl.program_id(1) * 16
    for block in range(first, tl.minimum(first + 16, block_count)):
        j0 = block * BLOCK_N
        j = (j0 + tl.arange(0, 2) * 32)[None, :]
        j_ok0 = j < N
        table = tl.load(table_ptr + hk.to(tl.int64) * table_s0 + t0.to(tl.int64) * table_s1 + (j // 32).to(tl.int64) * table_s2, mask=row_ok & j_ok0, other=0).to(tl.int1)
        some0 = tl.max(tl.where(table & (row_ok & j_ok0), 1, 0)) > 0
        every0 = tl.min(tl.where(table | ((row_ok & j_ok0) == 0), 1, 0)) > 0
        some = (block < ((i1 + 63) // 64)) & ((low <= (0 - (j0))) & some0)
        every = ((high <= (0 - (tl.minimum(j0 + BLOCK_N, N) - 1))) & every0) & (j0 + BLOCK_N <= N)
        if some & (every == 0):
            j1 = (j0 + tl.arange(0, BLOCK_N))[None, :]
            j_ok1 = j1 < N
            table0 = tl.load(table_ptr + hk.to(tl.int64) * table_s0 + t0.to(tl.int64) * table_s1 + (j1 // 32).to(tl.int64) * table_s2, mask=row_ok & j_ok1, other=0).to(tl.int1)
            some = tl.max(tl.where(row_ok & ((j1 <= i) & table0) & j_ok1, 1, 0)) > 0
            every = (tl.min(tl.where(((j1 <= i) & table0) | (row_ok == 0), 1, 0)) > 0) & (j0 + BLOCK_N <= N)
        flag = tl.where(some, tl.where(every, 2, 1), 0).to(tl.uint8)
        tl.store(flags_ptr + at + block, flag)


@triton.jit
def pack(flags_ptr, blocks_ptr, counts_ptr, block_count):
    """From flags (0 unseen, 1 in part, 2 in full) to lists in ascending order and their lengths (full, part)."""
    tile = tl.program_id(0)
    at = tile.to(tl.int64) * block_count
    full = 0
    part = 0
    for first in range(0, block_count, 256):
        block = first + tl.arange(0, 256)
        flag = tl.load(flags_ptr + at + block, mask=block < block_count, other=0)
        is_full = tl.where(flag == 2, 1, 0)
        is_part = tl.where(flag == 1, 1, 0)
        tl.store(blocks_ptr + at + full + tl.cumsum(is_full, 0) - 1, block, mask=flag == 2)
        tl.store(blocks_ptr + at + block_count - part - tl.cumsum(is_part, 0), block, mask=flag == 1)
        full += tl.sum(is_full, 0)
        part += tl.sum(is_part, 0)
    tl.store(counts_ptr + tile * 2, full)
    tl.store(counts_ptr + tile * 2 + 1, part)


#: Triton's types of the arguments of each kernel, in order.
SIGNATURES = {
    "attention": {
        "q_ptr": "*bf16", "q_s0": "i32", "q_s1": "i32", "q_s2": "i32", "q_s3": "i32", "k_ptr": "*bf16",
        "k_s0": "i32", "k_s1": "i32", "k_s2": "i32", "k_s3": "i32", "v_ptr": "*bf16", "v_s0": "i32", "v_s1": "i32",
        "v_s2": "i32", "v_s3": "i32", "table_ptr": "*i1", "table_s0": "i32", "table_s1": "i32", "table_s2": "i32",
        "B": "i32", "N": "i32", "M": "i32", "out_ptr": "*bf16", "out_s0": "i32", "out_s1": "i32", "out_s2": "i32",
        "out_s3": "i32", "out_s4": "i32", "blocks_ptr": "*i32", "counts_ptr": "*i32", "block_count": "i32",
    },
    "look": {
        "table_ptr": "*i1", "table_s0": "i32", "table_s1": "i32", "table_s2": "i32", "B": "i32", "N": "i32",
        "M": "i32", "flags_ptr": "*u8", "block_count": "i32",
    },
    "pack": {
        "flags_ptr": "*u8", "blocks_ptr": "*i32", "counts_ptr": "*i32", "block_count": "i32",
    },
}
#: What contiguous tensors make of strides: one, or a multiple of 16.
CONTIGUOUS = {
    "q_s0": 16, "q_s1": 16, "q_s2": 16, "q_s3": 1, "k_s0": 16, "k_s1": 16, "k_s2": 16, "k_s3": 1, "v_s0": 16,
    "v_s1": 16, "v_s2": 16, "v_s3": 1, "table_s2": 1, "out_s0": 16, "out_s1": 16, "out_s2": 16, "out_s3": 16,
    "out_s4": 1,
}


def launch(tensors, sizes, outputs):
    """`tensors`, `sizes` and `outputs` in the order of the attention; outputs have logical dimensions."""
    tensor_0, tensor_1, tensor_2, tensor_3 = tensors
    size_B, size_N, size_M = sizes
    out, = outputs
    rows, points = 2 * size_N, size_B * 2
    programs = triton.cdiv(rows, BLOCK_M.value) * points
    if programs == 0:
        return
    lists = triton.cdiv(rows, BLOCK_M.value) * 2
    block_count = triton.cdiv(size_N, BLOCK_N.value)
    device = out.device
    flags = torch.empty((lists, block_count), dtype=torch.uint8, device=device)
    blocks = torch.empty((lists, block_count), dtype=torch.int32, device=device)
    counts = torch.empty((lists, 2), dtype=torch.int32, device=device)
    if block_count:
        look[(lists, triton.cdiv(block_count, 16))](
            tensor_3, tensor_3.stride(0), tensor_3.stride(1), tensor_3.stride(2), size_B, size_N, size_M, flags,
            block_count, num_warps=4,
        )
    pack[(lists,)](flags, blocks, counts, block_count, num_warps=4)
    attention[(programs,)](
        tensor_0, tensor_0.stride(0), tensor_0.stride(1), tensor_0.stride(2), tensor_0.stride(3), tensor_1,
        tensor_1.stride(0), tensor_1.stride(1), tensor_1.stride(2), tensor_1.stride(3), tensor_2, tensor_2.stride(0),
        tensor_2.stride(1), tensor_2.stride(2), tensor_2.stride(3), tensor_3, tensor_3.stride(0), tensor_3.stride(1),
        tensor_3.stride(2), size_B, size_N, size_M, out, out.stride(0), out.stride(1), out.stride(2), out.stride(3),
        out.stride(4), blocks, counts, block_count, num_warps=4, num_stages=3, enable_fp_fusion=True,
    )
