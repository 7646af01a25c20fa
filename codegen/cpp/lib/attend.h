// ---- the attention of one tile with one block of keys ---------------------------------------------------------------
// Stages: online softmax (or a pointwise normaliser) in one go; sums alone; weights from known sums; rows without keys.
enum Stage { ONLINE, SUMS, WEIGHTS, EMPTIES };

template <bool MASKED>
INLINE vreal logit_at(const Call& c, const Uniform& u, const RowValues& r, int64_t j, real* s, vmask& seen) {
    vmask visible = splat_mask(true);
    vreal x = logit<MASKED>(c, u, r, j, load(s), visible);
    if (MASKED) {
        x = pick(visible, x, splat(-INFINITY));
        seen |= visible;
    }
    if (MASKED || !PLAIN) store(s, x);
    return x;
}

// Scores in `s` become logits, -inf where masked; `top` collects their maximum.
template <bool MASKED>
INLINE void logits(const Call& c, const Uniform& u, const RowValues& r, int64_t j0, int64_t from, int64_t to, real* s,
                   int64_t ld, vreal (&top)[4], vmask& seen) {
    int64_t k = from;
    if (!MASKED && to > from) seen = splat_mask(true);
    for (; k + 4 <= to; k += 4)
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n)
            top[n] = high(logit_at<MASKED>(c, u, r, j0 + k + n, s + (k + n) * ld, seen), top[n]);
    for (; k < to; ++k) top[0] = high(logit_at<MASKED>(c, u, r, j0 + k, s + k * ld, seen), top[0]);
}

// Scores in `s` become weights where they need no running maximum: pointwise normalisers and known sums.
template <bool MASKED, Stage STAGE>
INLINE void weights(const Call& c, const Uniform& u, const RowValues& r, int64_t j0, int64_t from, int64_t to, real* s,
                    int64_t ld, vreal m, vreal inverse, vmask& seen) {
    for (int64_t k = from; k < to; ++k) {
        const vreal raw = load(s + k * ld);
        vmask visible = splat_mask(true);
        vreal w = logit<MASKED>(c, u, r, j0 + k, raw, visible);
        if (IS_SOFTMAX) w = exp2_of(w * SCALE - m) * inverse;
        w = weight(c, u, r, j0 + k, raw, w);
        store(s + k * ld, MASKED ? pick(visible, w, vreal{}) : w);
    }
}

// The longest run of keys of the block that every row of the tile sees.
INLINE void full_run(const Tile& t, int64_t j0, int64_t count, int64_t& from, int64_t& to) {
    from = to = count;
    for (int64_t n = 0; n < t.fulls; ++n) {
        const int64_t lo = t.full_lo[n] > j0 ? t.full_lo[n] - j0 : 0;
        const int64_t hi = t.full_hi[n] < j0 + count ? t.full_hi[n] - j0 : count;
        if (hi - lo > to - from) from = lo, to = hi;
    }
}

static void attend(const Call& c, const Batch& b, Tile& t, const Block& at, Stage stage, real* s) {
    const int64_t ld = t.ld, n = at.count;
    alignas(128) real keep[QUERIES];
    product(n, at.k, at.k_row, at.k_col, t.q, ld, c.D, s, nullptr);
    const Uniform u = uniform(c, b, t);
    int64_t from, to;
    full_run(t, at.j0, n, from, to);
    for (int64_t lane = 0; lane < ld; lane += LANES) {
        const RowValues r = t.values[lane / LANES];
        real* column = s + lane;
        vmask seen = *(const vmask*)(t.seen + lane);
        const vreal m_old = load(t.m + lane);
        if (stage == EMPTIES) {
            // Finite additive masks make all keys of such a row equal: weight 1 / M each, here or in `finish`.
            for (int64_t k = 0; k < n; ++k) {
                const vreal w = empty_weight(c, u, r, at.j0 + k, load(column + k * ld));
                store(column + k * ld, pick(seen, vreal{}, w));
            }
            continue;
        }
        if (!IS_SOFTMAX || stage == WEIGHTS) {
            const vreal safe = m_old == -INFINITY ? vreal{} : m_old;
            const vreal inverse = 1 / load(t.l + lane);
            weights<true, WEIGHTS>(c, u, r, at.j0, 0, from, column, ld, safe, inverse, seen);
            weights<false, WEIGHTS>(c, u, r, at.j0, from, to, column, ld, safe, inverse, seen);
            weights<true, WEIGHTS>(c, u, r, at.j0, to, n, column, ld, safe, inverse, seen);
            continue;
        }
        vreal top[4];
        for (int x = 0; x < 4; ++x) top[x] = splat(-INFINITY);
        logits<true>(c, u, r, at.j0, 0, from, column, ld, top, seen);
        logits<false>(c, u, r, at.j0, from, to, column, ld, top, seen);
        logits<true>(c, u, r, at.j0, to, n, column, ld, top, seen);
        const vreal block_top = high(high(top[0], top[1]), high(top[2], top[3]));
        const vreal m = high(block_top * SCALE, m_old), safe = m == -INFINITY ? vreal{} : m;
        const vreal factor = exp2_of(m_old - safe);
        vreal sum[4];
        for (int x = 0; x < 4; ++x) sum[x] = vreal{};
        int64_t k = 0;
        for (; k + 4 <= n; k += 4)
#pragma GCC unroll 4
            for (int x = 0; x < 4; ++x) {
                real* p = column + (k + x) * ld;
                const vreal w = exp2_weight(load(p) * SCALE - safe);
                sum[x] += w;
                store(p, linear_weight(c, u, r, at.j0 + k + x, w));
            }
        for (; k < n; ++k) {
            real* p = column + k * ld;
            const vreal w = exp2_weight(load(p) * SCALE - safe);
            sum[0] += w;
            store(p, linear_weight(c, u, r, at.j0 + k, w));
        }
        store(t.m + lane, m);
        store(t.l + lane, load(t.l + lane) * factor + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
        store(keep + lane, factor);
        *(vmask*)(t.seen + lane) = seen;
    }
    if (stage == SUMS || !HAS_OUT) return;
    if (stage != ONLINE || !IS_SOFTMAX)
        for (int64_t lane = 0; lane < ld; lane += LANES) store(keep + lane, splat(1));
    product(c.E, at.v, at.v_col, at.v_row, s, ld, n, t.o, t.fresh ? nullptr : keep);
    t.fresh = false;
}
