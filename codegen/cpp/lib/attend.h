// ---- the attention of one tile with one block of keys ---------------------------------------------------------------
// Stages: online softmax (or a pointwise normaliser) in one go; sums alone; weights from known sums; rows without keys.
enum Stage { ONLINE, SUMS, WEIGHTS, EMPTIES };

// Logits to base 2. A score that is not `s * constant` may hold the lowest finite value: it stays finite, and is rounded
// before anything is subtracted, so that equal scores differ by nothing (a fused multiply-add would keep the rounding).
INLINE vreal scaled(vreal x) {
    if (PLAIN || SCALE == 1) return x;
    x = pick(x == splat(-INFINITY), x, high(x, splat(REAL_IS_DOUBLE ? -1.2e308 : -2.3e38f))) * SCALE;
#if defined(__aarch64__)
    __asm__("" : "+w"(x));
#elif defined(WIDE_512)
    __asm__("" : "+v"(x));
#else
    __asm__("" : "+x"(x));
#endif
    return x;
}
static constexpr real LATE = PLAIN ? SCALE : 1;  // what `scaled` leaves to do

template <bool MASKED>
INLINE vreal logit_at(const Call& c, const Uniform& u, const RowValues& r, int64_t j, real* s, vmask& seen) {
    vmask visible = splat_mask(true);
    vreal x = scaled(logit<MASKED>(c, u, r, j, load(s), visible));
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
                   vreal (&top)[4], vmask& seen) {
    int64_t k = from;
    if (!MASKED && to > from) seen = splat_mask(true);
    for (; k + 4 <= to; k += 4)
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n)
            top[n] = high(logit_at<MASKED>(c, u, r, j0 + k + n, s + (k + n) * LANES, seen), top[n]);
    for (; k < to; ++k) top[0] = high(logit_at<MASKED>(c, u, r, j0 + k, s + k * LANES, seen), top[0]);
}

// Scores in `s` become weights where they need no running maximum: pointwise normalisers and known sums.
template <bool MASKED>
INLINE void weights(const Call& c, const Uniform& u, const RowValues& r, int64_t j0, int64_t from, int64_t to, real* s,
                    vreal m, vreal inverse) {
    for (int64_t k = from; k < to; ++k) {
        const vreal raw = load(s + k * LANES);
        vmask visible = splat_mask(true);
        vreal w = logit<MASKED>(c, u, r, j0 + k, raw, visible);
        if (IS_SOFTMAX) w = exp2_of(scaled(w) * LATE - m) * inverse;
        w = weight(c, u, r, j0 + k, raw, w);
        store(s + k * LANES, MASKED ? pick(visible, w, vreal{}) : w);
    }
}

// The longest run of keys of the block that every row of the tile sees, of the first few of each span (which has one stripe
// or table at most, so that `first_key` is exact).
INLINE void full_run(const Tile& t, int64_t j0, int64_t count, int64_t& from, int64_t& to) {
    from = to = count;
    for (int64_t n = 0; n < t.fulls; ++n) {
        int64_t j = j0;
        for (int round = 0; round < ROUNDS; ++round) {
            const int64_t lo = first_key(t.full[n], j);
            if (lo >= t.full[n].hi || lo >= j0 + count) break;
            j = run_end(t.full[n], lo);
            const int64_t hi = j < j0 + count ? j : j0 + count;
            if (hi - lo > to - from) from = lo - j0, to = hi - j0;
            if (!t.full[n].stripes && !t.full[n].tables) break;
        }
    }
}

static void attend(const Call& c, const Batch& b, Tile& t, const Block& at, Stage stage, real* scores, real* spare) {
    const int64_t n = at.count;
    alignas(128) real keep[QUERIES];
    Uniform u = uniform(c, b, t);
    alignas(128) real near[STAGED * KEYS * LANES + 1];
    u.near = near;
    u.j0 = at.j0;
    int64_t from, to;
    full_run(t, at.j0, n, from, to);
    if (t.few && FEW_ALONE && stage == ONLINE && from == 0 && to == n) return few_attention(c, b, t, at, scores);
    for (int64_t v = 0; v < t.columns; ++v) {
        // A few columns at a time, so that their scores stay in the nearest cache until they are used.
        if (v % STRIP == 0) {
            if (v > 0 && stage != SUMS && HAS_OUT)
                value_product(c, t, v - STRIP, STRIP, at, weight_column(scores, spare, 0), keep);
            if (t.few) few_score_product(c, b, t, at, scores);
            else score_product(c, t, v, v + STRIP < t.columns ? STRIP : t.columns - v, at, scores);
        }
        const int64_t lane = v * LANES;
        const RowValues r = t.values[v];
        if (STAGED) bring_near(c, u, r, n, near);
        real* s = scores + v % STRIP * KEYS * LANES;
        real* p = weight_column(scores, spare, v % STRIP);
        vmask seen = *(const vmask*)(t.seen + lane);
        const vreal m_old = load(t.m + lane);
        if (!IS_SOFTMAX || stage == WEIGHTS || stage == EMPTIES) {
            const vreal safe = m_old == -INFINITY ? vreal{} : m_old;
            const vreal inverse = 1 / load(t.l + lane);
            if (stage == EMPTIES) {
                // Finite additive masks make all keys of such a row equal: weight 1 / M each, here or in `finish`.
                for (int64_t k = 0; k < n; ++k) {
                    real* x = s + k * LANES;
                    store(x, pick(seen, vreal{}, empty_weight(c, u, r, at.j0 + k, load(x))));
                }
            } else {
                weights<true>(c, u, r, at.j0, 0, from, s, safe, inverse);
                weights<false>(c, u, r, at.j0, from, to, s, safe, inverse);
                weights<true>(c, u, r, at.j0, to, n, s, safe, inverse);
            }
            int64_t k = 0;
            for (; k + 2 <= n; k += 2) put_weights(p, k, load(s + k * LANES), load(s + (k + 1) * LANES));
            put_last_weights(p, k, n, k < n ? load(s + k * LANES) : vreal{});
            store(keep + lane, splat(1));
            continue;
        }
        vreal top[4];
        for (int x = 0; x < 4; ++x) top[x] = splat(-INFINITY);
        logits<true>(c, u, r, at.j0, 0, from, s, top, seen);
        logits<false>(c, u, r, at.j0, from, to, s, top, seen);
        logits<true>(c, u, r, at.j0, to, n, s, top, seen);
        const vreal block_top = high(high(top[0], top[1]), high(top[2], top[3]));
        vreal m = high(block_top * LATE, m_old);
        if (!PRODUCT_KEEPS && none(m > m_old + LAZY)) m = m_old;
        const vreal safe = m == -INFINITY ? vreal{} : m;
        vreal sum[4];
        for (int x = 0; x < 4; ++x) sum[x] = vreal{};
        int64_t k = 0;
        for (; k + 4 <= n; k += 4) {
            vreal w[4];
#pragma GCC unroll 4
            for (int x = 0; x < 4; ++x) {
                w[x] = exp2_weight(load(s + (k + x) * LANES) * LATE - safe);
                sum[x] += w[x];
                w[x] = linear_weight(c, u, r, at.j0 + k + x, w[x]);
            }
            put_weights(p, k, w[0], w[1]);
            put_weights(p, k + 2, w[2], w[3]);
        }
        vreal w[2] = {};
        for (int64_t x = 0; x < n - k; ++x) {
            w[x & 1] = exp2_weight(load(s + (k + x) * LANES) * LATE - safe);
            sum[x] += w[x & 1];
            w[x & 1] = linear_weight(c, u, r, at.j0 + k + x, w[x & 1]);
            if (x == 1) put_weights(p, k, w[0], w[1]);
        }
        put_last_weights(p, n & ~int64_t(1), n, w[0]);
        const vreal factor = exp2_of(m_old - safe);
        if (!PRODUCT_KEEPS && !t.few && !t.fresh && !none(m != m_old)) rescale(c, t, v, factor);
        store(t.m + lane, m);
        store(t.l + lane, load(t.l + lane) * factor + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
        store(keep + lane, factor);
        *(vmask*)(t.seen + lane) = seen;
    }
    if (stage == SUMS || !HAS_OUT) return;
    const int64_t last = (t.columns - 1) / STRIP * STRIP;
    if (t.few) few_value_product(c, b, t, at, weight_column(scores, spare, 0), keep);
    else value_product(c, t, last, t.columns - last, at, weight_column(scores, spare, 0), keep);
    t.fresh = false;
}
