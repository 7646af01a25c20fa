// ---- from the scores of a column of queries to their weights --------------------------------------------------------
// Stages: online softmax (or a pointwise normaliser) in one go; sums alone; weights from known sums; rows without keys.
enum Stage { ONLINE, SUMS, WEIGHTS, EMPTIES };

template <bool VALUE> struct Known {
    constexpr bool operator()() const { return VALUE; }
};

// What the matrix unit reads once a strip is weighed, asked for meanwhile: its sums, then the next strip's queries.
struct Soon {
    const char *at, *end, *next, *last;
    void ask(int64_t lines) {
        for (int64_t n = 0; n < lines && TILES; ++n, at += 64) {
            if (at >= end) at = next, end = last;
            if (at >= end) return;
            __builtin_prefetch(at, 0, 3);
        }
    }
};
static Soon soon_of(const Call& c, const Tile& t, int64_t v, int64_t columns) {
    const real *o = t.o + v * LANES * o_rows(c), *q = t.q + (v + columns) * LANES * q_rows(c);
    return {(const char*)o, (const char*)(o + columns * LANES * o_rows(c)), (const char*)q, (const char*)(q + columns * LANES * q_rows(c))};
}

// One column of queries against one block of keys: the first key, and the scores, a row a key.
struct Column {
    const Call& c;
    const Uniform& u;
    const RowValues& r;
    int64_t j0;
    const real* s;
};
template <bool MASKED, bool NEAR> INLINE vreal logit_at(const Column& x, int64_t k, vmask& seen, vreal& reach) {
    vmask visible = splat_mask(true);
    const vreal y = logit<MASKED, NEAR>(x.c, x.u, x.r, x.j0 + k, load(x.s + k * LANES), visible, reach);
    if (!MASKED) return y;
    seen |= visible;
    return pick(visible, y, splat(-INFINITY));
}

// The highest logit of keys [from, to) and `most`, -inf where none is visible. NaN is passed over.
template <bool MASKED> INLINE vreal highest(const Column& x, int64_t from, int64_t to, vreal most) {
    vmask seen;
    vreal reach;
    vreal top[4] = {most, most, most, most};
    int64_t k = from;
    for (; k + 4 <= to; k += 4)
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) top[n] = high(logit_at<MASKED, false>(x, k + n, seen, reach), top[n]);
    for (; k < to; ++k) top[0] = high(logit_at<MASKED, false>(x, k, seen, reach), top[0]);
    return high(high(top[0], top[1]), high(top[2], top[3]));
}

// Weights of keys [from, to) against the maximum m, and their sums. Only the last range of a block may end between fours.
struct Sums {
    vreal part[4], reach;
    vmask seen;
};
INLINE vreal summed(const Column& x, int64_t k, vreal w, vreal& sum) {
    if (SUMS_ROUNDED) w = rounded(w);
    sum += w;
    return SUMS_ROUNDED ? w : rounded(linear_weight(x.c, x.u, x.r, x.j0 + k, w));
}
template <bool MASKED, bool NEAR> INLINE vreal weight_of(const Column& x, int64_t k, vreal m, vreal& sum, Sums& all) {
    const vreal w = exp2_weight(logit_at<MASKED, NEAR>(x, k, all.seen, all.reach) * SCALE - m);
    return SUMS_BY_PAIRS ? nudged(w) : summed(x, k, w, sum);
}
INLINE void put_two(real* p, int64_t k, vreal w, vreal x, vreal& sum) {
    if (SUMS_BY_PAIRS) put_and_sum(p, k, w, x, sum);
    else put_weights(p, k, w, x);
}
template <bool MASKED, bool NEAR>
INLINE void weigh(const Column& x, int64_t from, int64_t to, vreal m, real* p, Sums& sums, Soon& soon) {
    if (!MASKED && to > from) sums.seen = splat_mask(true);
    int64_t k = from;
    for (; k + 4 <= to; k += 4) {
        vreal w[4];
        soon.ask(4);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) w[n] = weight_of<MASKED, NEAR>(x, k + n, m, sums.part[n], sums);
        put_two(p, k, w[0], w[1], sums.part[0]);
        put_two(p, k + 2, w[2], w[3], sums.part[1]);
    }
    for (; k < to; k += 2) {
        const vreal w = weight_of<MASKED, NEAR>(x, k, m, sums.part[0], sums);
        const vreal next = k + 1 < to ? weight_of<MASKED, NEAR>(x, k + 1, m, sums.part[1], sums) : vreal{};
        put_two(p, k, w, next, sums.part[0]);
    }
}

// The same against maxima some of which are far: the tile keeps their logits. A sum becomes NaN by an infinite logit too, so
// NaN is noted apart. Gives what earlier sums are worth then.
static __attribute__((noinline)) vreal weigh_far(const Column& x, Tile& t, int64_t lane, int64_t n, Peak& peak, real* p,
                                                 Sums& sums) {
    const Peak old = peak_of(t, lane);
    const Base base = base_of(peak);
    const vreal before = load(t.l + lane);
    const real part = t.lifted ? LIFTED : 1;
    vmask nan = (before != before) & (old.m != splat(INFINITY));
    vreal w[2];
    for (int64_t k = 0; k < n; k += 2) {
        w[1] = vreal{};
        for (int64_t next = 0; next < 2 && k + next < n; ++next) {
            const vreal y = settled(logit_at<true, false>(x, k + next, sums.seen, sums.reach));
            nan |= y != y;
            w[next] = summed(x, k + next, exp2_weight(exponent(y, base)) * part, sums.part[next]);
        }
        put_weights(p, k, w[0], w[1]);
    }
    store(t.top + lane, peak.top);
    peak.m = pick(nan, splat(NAN), peak.m);
    return factor_of(old, base);
}

// Scores in `s` become weights where they need no running maximum: pointwise normalisers and known sums.
template <bool MASKED, bool FAR>
INLINE void weights(const Column& x, int64_t from, int64_t to, const Base& base, vreal inverse, real* s) {
    for (int64_t k = from; k < to; ++k) {
        const vreal raw = load(s + k * LANES);
        vmask visible = splat_mask(true);
        vreal reach, w = logit<MASKED, false>(x.c, x.u, x.r, x.j0 + k, raw, visible, reach);
        if (IS_SOFTMAX) w = exp2_of(FAR ? exponent(settled(w), base) : w * SCALE - base.then) * inverse;
        w = weight(x.c, x.u, x.r, x.j0 + k, raw, w);
        store(s + k * LANES, MASKED ? pick(visible, w, vreal{}) : w);
    }
}

static void weigh_known(const Column& x, const Tile& t, int64_t from, int64_t to, int64_t n, int64_t v, Stage stage,
                        real* s, real* p) {
    const int64_t lane = v * LANES;
    if (stage == EMPTIES) {
        // Finite additive masks make all keys of such a row equal: weight 1 / M each, here or in `finish`.
        const vmask seen = *(const vmask*)(t.seen + lane);
        for (int64_t k = 0; k < n; ++k) {
            real* at = s + k * LANES;
            const vreal w = empty_weight(x.c, x.u, x.r, x.j0 + k, load(at));
            store(at, pick(seen, vreal{}, t.lifted ? w * LIFTED : w));
        }
    } else {
        const Base base = base_of(peak_of(t, lane));
        const vreal inverse = 1 / load(t.l + lane);
        if (IS_SOFTMAX && !none(base.first != 0)) weights<true, true>(x, 0, n, base, inverse, s);
        else {
            weights<true, false>(x, 0, from, base, inverse, s);
            weights<false, false>(x, from, to, base, inverse, s);
            weights<true, false>(x, to, n, base, inverse, s);
        }
    }
    int64_t k = 0;
    for (; k + 2 <= n; k += 2) put_weights(p, k, rounded(load(s + k * LANES)), rounded(load(s + (k + 1) * LANES)));
    if (k < n) put_weights(p, k, rounded(load(s + k * LANES)), vreal{});
}

// A maximum need not be one: weights are right against any number that keeps their sum in range. So the first block of a row
// is weighed against 0, which saves a pass over the scores; out of this range, or once a later sum is too large, the block
// is weighed again, against its own maximum. Scores that climb, as towards the diagonal, are foreseen: the sum of a block
// tells its level, which rises by as much to the next.
static constexpr real LARGE = 1048576, SMALL = 1 / LARGE, CLIMB = 10, STEEPEST = 4096;
INLINE vreal exponent_of(vreal x) { return __builtin_convertvector(((vmask)x >> MANTISSA) - BIAS, vreal); }

// Column v of a tile: scores in `s` become weights in `p`, and `keep` what its rows' earlier sums are worth now. True where
// its rows leave the block out.
static bool soften(const Call& c, const Batch& b, Tile& t, const Block& at, const Uniform& u, int64_t v, Stage stage,
                   int64_t from, int64_t to, real* s, real* p, real* keep, Soon& soon) {
    const int64_t n = at.count, lane = v * LANES;
    const Column x = {c, u, t.values[v], at.j0, s};
    if (!IS_SOFTMAX || stage == WEIGHTS || stage == EMPTIES) {
        weigh_known(x, t, from, to, n, v, stage, s, p);
        end_weights(p, n);
        store(keep, splat(1));
        return false;
    }
    const vreal m_old = load(t.m + lane), l_old = load(t.l + lane);
    vreal m = pick(m_old == splat(-INFINITY), vreal{}, m_old), factor, sum;
    Sums sums;
    bool again = false, far = false;
    Peak peak;
    auto raise = [&] {
        const vreal least = splat(-INFINITY);
        const vreal top = highest<true>(x, to, n, highest<false>(x, from, to, highest<true>(x, 0, from, least)));
        peak = higher(peak_of(t, lane), top);
        m = peak.m;
        far = t.lifted || !none(is_far(m) & (m != least));
    };
    const vreal expected = load(t.expected + lane);
    const vmask climbing = expected - m > splat(CLIMB);
    if (t.lifted || !none(climbing | is_far(m))) {
        again = t.lifted || to - from < n;  // masked keys may be those it climbs to
        if (!again) m = pick(climbing, expected, m);
        if (again || !none(is_far(m))) raise();
    }
    for (;;) {
        for (int i = 0; i < 4; ++i) sums.part[i] = vreal{};
        sums.seen = *(const vmask*)(t.seen + lane);
        if (far) {
            factor = weigh_far(x, t, lane, n, peak, p, sums);
            m = peak.m;
            sum = sums.part[0] + sums.part[1];
            break;
        }
        const vreal safe = pick(m == splat(-INFINITY), vreal{}, m);
        auto weigh_all = [&](auto near) {
            sums.reach = vreal{};
            weigh<true, near()>(x, 0, from, safe, p, sums, soon);
            weigh<false, near()>(x, from, to, safe, p, sums, soon);
            weigh<true, near()>(x, to, n, safe, p, sums, soon);
            if (near() && !none(sums.reach > splat(NEAR_REACH))) t.near = false;
        };
        if (HAS_NEAR && t.near) {
            weigh_all(Known<HAS_NEAR>{});
            if (!t.near) continue;
        } else weigh_all(Known<false>{});
        factor = pick(m_old - safe < splat(-100), vreal{}, exp2_of(m_old - safe));
        sum = (sums.part[0] + sums.part[1]) + (sums.part[2] + sums.part[3]);
        if (again || none((sum > splat(LARGE)) | (sums.seen & (l_old * factor + sum < splat(SMALL))))) break;
        if (WEIGHTS_OVERWRITE && lies_in_rows(t)) few_score_product(c, b, t, at, s);
        else if (WEIGHTS_OVERWRITE) score_product(c, t, v, 1, at, s);
        raise();
        again = true;
    }
    if (DROPS && !far && none(m != m_old) && spares(t, lane, sum)) return true;
    end_weights(p, n);
    const vreal level = m + exponent_of(sum), risen = level - load(t.level + lane);
    store(t.level + lane, level);
    if (!DROPS)  // whose blocks are not in the order of their keys
        store(t.expected + lane, level + pick((risen > vreal{}) & (risen < splat(STEEPEST)), risen, vreal{}));
    m = pick(sums.seen | (m_old != splat(-INFINITY)), m, m_old);
    // Far maxima may differ where their roundings do not.
    if (!PRODUCT_KEEPS && !lies_in_rows(t) && !t.fresh && (far || !none(m != m_old))) rescale(c, t, v, factor);
    store(t.m + lane, m);
    store(t.l + lane, l_old * factor + sum);
    store(keep, factor);
    rescale_dropped(t, lane, factor);
    *(vmask*)(t.seen + lane) = sums.seen;
    return false;
}

static void attend(const Call& c, const Batch& b, Tile& t, const Block& at, Stage stage, real* scores, real* spare,
                   Slants& slants) {
    int64_t from, to;
    full_run(t, at.j0, at.count, from, to);
    note_visit(t, at.count);
    const bool all_seen = from == 0 && to == at.count;
    if (lies_in_rows(t) && FEW_ALONE && stage == ONLINE && all_seen && !t.lifted) return few_attention(c, b, t, at, scores);
    // Ranges meet at multiples of four keys.
    from = (from + 3) / 4 * 4;
    to = to == at.count ? to : to / 4 * 4;
    if (from >= to) from = to = at.count;
    alignas(128) real keep[QUERIES];
    alignas(128) real near[STAGED * KEYS * LANES + 1];
    Uniform u = uniform(c, b, t);
    u.near = near;
    u.j0 = at.j0;
    real* const p = weight_column(scores, spare, 0);
    // A few columns at a time, so that their scores stay in the nearest cache until they are used.
    for (int64_t v = 0; v < t.columns; v += STRIP) {
        const int64_t columns = v + STRIP < t.columns ? STRIP : t.columns - v;
        if (lies_in_rows(t)) few_score_product(c, b, t, at, scores);
        else score_product(c, t, v, columns, at, scores);
        bool left[STRIP] = {};
        Soon soon = soon_of(c, t, v, columns);
        for (int64_t x = 0; x < columns; ++x) {
            if (STAGED && (STAGED_BY_SCORE || from > 0 || to < at.count))
                bring_near(c, u, t.values[v + x], at.count, near);
            if (SLANTED) bring_slanted(c, b, u, t, (v + x) * LANES, at.count, slants);
            left[x] = soften(c, b, t, at, u, v + x, stage, from, to, scores + x * KEYS * LANES, weight_column(scores, spare, x),
                   keep + (v + x) * LANES, soon);
        }
        if (stage == SUMS || !HAS_OUT) continue;
        for (int64_t x = 0, end; x < columns; x = end) {  // columns that follow each other and keep the block
            for (end = x + 1; DROPS && end < columns && left[end] == left[x];) ++end;
            if (!DROPS) end = columns;
            if (left[x]) continue;
            if (lies_in_rows(t)) few_value_product(c, b, t, at, p, keep);
            else value_product(c, t, v + x, end - x, at, weight_column(scores, spare, x), keep);
        }
    }
    if (stage != SUMS && HAS_OUT) t.fresh = false;
}
