"""out[b, hk, g, i, e] = sum_j w_j v[j, e],  w = softmax_j(score(q_i . k_j) where mask)

Rows i0 <= i < i1 visit 0 <= j < length[b]; without mask 0 <= j < length[b].

    attention
    size   B, N, M
    batch  b = B, hk = 2, g = 2
    axis   i = N, j = M, d = 16, e = 16
    tensor q: bf16[B, 4, N, 16]
    tensor k: bf16[B, 2, M, 16]
    tensor v: bf16[B, 2, M, 16]
    tensor length: i32[B]
    q      q[b, hk * 2 + g, i, d]
    k      k[b, hk, j, d]
    v      v[b, hk, j, e]
    score  s * 0.25
    mask   j < length[b]
    norm   softmax
    empty  zero
    weight w
    give   out
    dtype  bf16
"""

import torch
import triton
import triton.language as tl

CONFIG = "block_m=64 block_n=64 warps=4 stages=3 split=True together=8 precision=ieee descriptors=False specialize=False lists=False persistent=0"
BLOCK_M = tl.constexpr(64)
BLOCK_N = tl.constexpr(64)


@triton.jit(do_not_specialize=["B", "N", "M"])
def attention(
    q_ptr, q_s0, q_s1, q_s2, q_s3, k_ptr, k_s0, k_s1, k_s2, k_s3, v_ptr, v_s0, v_s1, v_s2, v_s3, length_ptr,
    length_s0, B, N, M, out_ptr, out_s0, out_s1, out_s2, out_s3, out_s4, part_ptr, stat_ptr,
    PARTIAL: tl.constexpr,
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
    split, splits = tl.program_id(1), tl.num_programs(1)
    keys = tl.arange(0, BLOCK_N)[:, None]
    k_at = k_ptr + b.to(tl.int64) * k_s0 + hk.to(tl.int64) * k_s1
    d = tl.arange(0, 16)[None, :]
    k_in = keys * k_s2 + d * k_s3
    v_at = v_ptr + b.to(tl.int64) * v_s0 + hk.to(tl.int64) * v_s1
    e = tl.arange(0, 16)[None, :]
    v_in = keys * v_s2 + e * v_s3
    q_at = q_ptr + b.to(tl.int64) * q_s0 + hk.to(tl.int64) * (2 * q_s1) + (g.to(tl.int64) * q_s1 + i.to(tl.int64) * q_s2)
    q = tl.load(q_at + d * q_s3, mask=row_ok, other=0)
    lift = tl.ceil(tl.log2(tl.maximum(M, 1) * 1.0)) + 1.0
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, 16], tl.float32)
    # blocks whose keys all rows see
    length = tl.load(length_ptr + b.to(tl.int64) * length_s0)
    t0 = tl.maximum(tl.minimum(length, M), 0)
    t1 = t0 // 64
    t2 = (t0 + 63) // 64
    count = tl.minimum(t1, t2)
    for block in range(count * split // splits, count * (split + 1) // splits):
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
    # blocks where the mask decides
    count0 = tl.maximum(t1, t2) - t1
    for t in range(count0 * split // splits, count0 * (split + 1) // splits):
        block = t1 + t
        j0 = block * BLOCK_N
        j = (j0 + tl.arange(0, BLOCK_N))[None, :]
        j_ok = j < M
        jv = j0 + keys
        jv_ok = jv < M
        k_block = k_at + j0.to(tl.int64) * k_s2
        k = tl.load(k_block + k_in, mask=jv_ok & (jv < length), other=0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        visible = j_ok & (j < length)
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
        v = tl.load(v_block + v_in, mask=jv_ok & (jv < length), other=0)
        acc = tl.dot(p.to(tl.bfloat16), v, acc, input_precision="ieee")
    if PARTIAL:
        at = (split.to(tl.int64) * (B * 2) + (b * 2 + hk)) * rows + row
        tl.store(part_ptr + at * 16 + e, acc, mask=row_ok)
        tl.store(stat_ptr + at, m[:, None], mask=row_ok)
        tl.store(stat_ptr + splits.to(tl.int64) * (B * 2) * rows + at, l[:, None], mask=row_ok & (l[:, None] != 0.0))
        empty_row = l[:, None] == 0.0
        # rows whose weights sum to zero: those that see keys, all at minus infinity, are not empty
        if tl.max(tl.where(empty_row, 1, 0)) > 0:
            seen = tl.full([BLOCK_M, 1], 0, tl.int32)
            # blocks whose keys all rows see
            count1 = tl.minimum(t1, t2)
            for block in range(count1 * split // splits, count1 * (split + 1) // splits):
                j0 = block * BLOCK_N
                j = (j0 + tl.arange(0, BLOCK_N))[None, :]
                seen = tl.maximum(seen, tl.full([BLOCK_M, 1], 1, tl.int32))
            # blocks where the mask decides
            count2 = tl.maximum(t1, t2) - t1
            for t in range(count2 * split // splits, count2 * (split + 1) // splits):
                block = t1 + t
                j0 = block * BLOCK_N
                j = (j0 + tl.arange(0, BLOCK_N))[None, :]
                j_ok = j < M
                visible = j_ok & (j < length)
                seen = tl.maximum(seen, tl.max(tl.where(visible, tl.full([BLOCK_M, BLOCK_N], 1, tl.int32), 0), 1)[:, None])
            tl.store(stat_ptr + splits.to(tl.int64) * (B * 2) * rows + at, tl.where(seen > 0, -1.0, 0.0), mask=row_ok & empty_row)
    else:
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
            # blocks whose keys all rows see
            count3 = tl.minimum(t1, t2)
            for block in range(count3 * split // splits, count3 * (split + 1) // splits):
                j0 = block * BLOCK_N
                j = (j0 + tl.arange(0, BLOCK_N))[None, :]
                seen = tl.maximum(seen, tl.full([BLOCK_M, 1], 1, tl.int32))
            # blocks where the mask decides
            count4 = tl.maximum(t1, t2) - t1
            for t in range(count4 * split // splits, count4 * (split + 1) // splits):
                block = t1 + t
                j0 = block * BLOCK_N
                j = (j0 + tl.arange(0, BLOCK_N))[None, :]
                j_ok = j < M
                visible = j_ok & (j < length)
                seen = tl.maximum(seen, tl.max(tl.where(visible, tl.full([BLOCK_M, BLOCK_N], 1, tl.int32), 0), 1)[:, None])
            tl.store(out_ptr + b.to(tl.int64) * out_s0 + hk.to(tl.int64) * out_s1 + g.to(tl.int64) * out_s2 + i.to(tl.int64) * out_s3 + e * out_s4, tl.where(seen > 0, float("nan"), 0.0).to(tl.bfloat16), mask=row_ok & empty_row & (e >= 0))


@triton.jit(do_not_specialize=["B", "N", "M"])
def join(
    q_ptr, q_s0, q_s1, q_s2, q_s3, k_ptr, k_s0, k_s1, k_s2, k_s3, v_ptr, v_s0, v_s1, v_s2, v_s3, length_ptr,
    length_s0, B, N, M, out_ptr, out_s0, out_s1, out_s2, out_s3, out_s4, part_ptr, stat_ptr, splits,
):
    pid = tl.program_id(0)
    rows = 2 * N
    tiles = tl.cdiv(rows, 1)
    tile = pid % tiles
    point = pid // tiles
    hk = point % 2
    point0 = point // 2
    b = point0
    row = (tile * 1 + tl.arange(0, 1))[:, None]
    row_ok = row < rows
    i = row // 2
    g = row % 2
    i0 = (tile * 1) // 2
    i1 = (tl.minimum(tile * 1 + 1, rows) - 1) // 2 + 1
    keys = tl.arange(0, BLOCK_N)[:, None]
    v_at = v_ptr + b.to(tl.int64) * v_s0 + hk.to(tl.int64) * v_s1
    e = tl.arange(0, 16)[None, :]
    v_in = keys * v_s2 + e * v_s3
    at = (b * 2 + hk).to(tl.int64) * rows + tile
    step = (B * 2).to(tl.int64) * rows
    lift = tl.ceil(tl.log2(tl.maximum(M, 1) * 1.0)) + 1.0
    m = tl.full([1], float("-inf"), tl.float32)
    l = tl.zeros([1], tl.float32)
    seen = tl.full([1, 1], 0, tl.int32)
    acc = tl.zeros([1, 16], tl.float32)
    for s0 in range(0, splits, 16):
        s = s0 + tl.arange(0, 16)
        s_ok = s < splits
        s_at = at + s * step
        ms = tl.load(stat_ptr + s_at, mask=s_ok, other=0.0)
        ls = tl.load(stat_ptr + splits * step + s_at, mask=s_ok, other=0.0)
        m_new = tl.maximum(m, tl.max(tl.where(s_ok, ms, float("-inf")), 0))
        rate = tl.where(tl.abs(m_new) < 2977044471.819572, 0.36067376022224085, 0.5)
        lifted = tl.where(tl.abs(m_new) < 2977044471.819572, lift, 0.0)
        base = tl.maximum(m_new * rate, -3.4028234663852886e+38) + lifted
        shrink = tl.exp2(tl.maximum(m * rate, -3.4028234663852886e+38) + lifted - base)
        m = m_new
        share = tl.exp2(tl.where(s_ok & (ms > float("-inf")), tl.maximum(ms * rate, -3.4028234663852886e+38) + lifted, float("-inf")) - base)
        l = l * shrink + tl.sum(ls * share, 0)
        seen = tl.maximum(seen, tl.max(tl.where(s_ok & (ls < 0.0), 1, 0), 0))
        acc = acc * shrink[:, None] + tl.sum(tl.load(part_ptr + s_at[:, None] * 16 + e, mask=s_ok[:, None], other=0.0) * share[:, None], 0)[None, :]
    rate = tl.where(tl.abs(m) < 2977044471.819572, 0.36067376022224085, 0.5)
    lifted = tl.where(tl.abs(m) < 2977044471.819572, lift, 0.0)
    base = tl.maximum(m * rate, -3.4028234663852886e+38) + lifted
    far = tl.abs(m) >= 2977044471.819572
    top = tl.where(far, tl.maximum(tl.minimum(m * 0.36067376022224085, 3.4028234663852886e+38), -3.4028234663852886e+38), base)[:, None]
    total = l[:, None]
    empty_row = total == 0.0
    empty_row = empty_row & (seen == 0)
    acc = tl.where(empty_row, 0.0, acc / total)
    tl.store(out_ptr + b.to(tl.int64) * out_s0 + hk.to(tl.int64) * out_s1 + g.to(tl.int64) * out_s2 + i.to(tl.int64) * out_s3 + e * out_s4, acc.to(tl.bfloat16), mask=row_ok)


#: Triton's types of the arguments of each kernel, in order.
SIGNATURES = {
    "attention": {
        "q_ptr": "*bf16", "q_s0": "i32", "q_s1": "i32", "q_s2": "i32", "q_s3": "i32", "k_ptr": "*bf16",
        "k_s0": "i32", "k_s1": "i32", "k_s2": "i32", "k_s3": "i32", "v_ptr": "*bf16", "v_s0": "i32", "v_s1": "i32",
        "v_s2": "i32", "v_s3": "i32", "length_ptr": "*i32", "length_s0": "i32", "B": "i32", "N": "i32", "M": "i32",
        "out_ptr": "*bf16", "out_s0": "i32", "out_s1": "i32", "out_s2": "i32", "out_s3": "i32", "out_s4": "i32",
        "part_ptr": "*fp32", "stat_ptr": "*fp32", "PARTIAL": "constexpr",
    },
    "join": {
        "q_ptr": "*bf16", "q_s0": "i32", "q_s1": "i32", "q_s2": "i32", "q_s3": "i32", "k_ptr": "*bf16",
        "k_s0": "i32", "k_s1": "i32", "k_s2": "i32", "k_s3": "i32", "v_ptr": "*bf16", "v_s0": "i32", "v_s1": "i32",
        "v_s2": "i32", "v_s3": "i32", "length_ptr": "*i32", "length_s0": "i32", "B": "i32", "N": "i32", "M": "i32",
        "out_ptr": "*bf16", "out_s0": "i32", "out_s1": "i32", "out_s2": "i32", "out_s3": "i32", "out_s4": "i32",
        "part_ptr": "*fp32", "stat_ptr": "*fp32", "splits": "i32",
    },
}
#: What contiguous tensors make of strides: one, or a multiple of 16.
CONTIGUOUS = {
    "q_s0": 16, "q_s1": 16, "q_s2": 16, "q_s3": 1, "k_s0": 16, "k_s1": 16, "k_s2": 16, "k_s3": 1, "v_s0": 16,
    "v_s1": 16, "v_s2": 16, "v_s3": 1, "length_s0": 1, "out_s0": 16, "out_s1": 16, "out_s2": 16, "out_s3": 16,
    "out_s4": 1,
}


def count_processors(device):
    """Of a GPU; one elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def choose_splits(programs, keys, device):
    """How many programs share the keys of one tile: enough to fill the device twice, each with some blocks to walk."""
    if device.type != "cuda":
        return 1
    return max(1, min(2 * count_processors(device) // programs, keys // (4 * BLOCK_N.value), 128))


def launch(tensors, sizes, outputs, splits=None):
    """`tensors`, `sizes` and `outputs` in the order of the attention; outputs have logical dimensions."""
    tensor_0, tensor_1, tensor_2, tensor_3 = tensors
    size_B, size_N, size_M = sizes
    out, = outputs
    rows, points = 2 * size_N, size_B * 2
    programs = triton.cdiv(rows, BLOCK_M.value) * points
    if programs == 0:
        return
    if splits is None:
        splits = choose_splits(programs, size_M, out.device)
    part = stat = None
    if splits > 1:
        new = {"dtype": torch.float32, "device": out.device}
        part = torch.empty((splits, points, rows, 16), **new)
        stat = torch.empty((2, splits, points, rows), **new)
    attention[(programs, splits)](
        tensor_0, tensor_0.stride(0), tensor_0.stride(1), tensor_0.stride(2), tensor_0.stride(3), tensor_1,
        tensor_1.stride(0), tensor_1.stride(1), tensor_1.stride(2), tensor_1.stride(3), tensor_2, tensor_2.stride(0),
        tensor_2.stride(1), tensor_2.stride(2), tensor_2.stride(3), tensor_3, tensor_3.stride(0), size_B, size_N,
        size_M, out, out.stride(0), out.stride(1), out.stride(2), out.stride(3), out.stride(4), part, stat,
        splits > 1, num_warps=4, num_stages=3, enable_fp_fusion=True,
    )
    if splits > 1:
        join[(rows * points,)](
            tensor_0, tensor_0.stride(0), tensor_0.stride(1), tensor_0.stride(2), tensor_0.stride(3), tensor_1,
            tensor_1.stride(0), tensor_1.stride(1), tensor_1.stride(2), tensor_1.stride(3), tensor_2, tensor_2.stride(0),
            tensor_2.stride(1), tensor_2.stride(2), tensor_2.stride(3), tensor_3, tensor_3.stride(0), size_B, size_N,
            size_M, out, out.stride(0), out.stride(1), out.stride(2), out.stride(3), out.stride(4), part, stat, splits,
            num_warps=4, enable_fp_fusion=True,
        )
