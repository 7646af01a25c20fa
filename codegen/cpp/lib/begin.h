// ---- tiles: where their rows lie, what they begin with, what they give ---------------------------------------------
// The state of a tile, as the parts of a split key range leave it: m, l, top, seen, then o.
static size_t part_size(const Call& c) {
    return QUERIES * (3 * sizeof(real) + sizeof(mask_int) + o_rows(c) * sizeof(real));
}

// How the rows of one batch point fall into tiles: few rows a group are folded, several groups to a tile.
struct Tiling {
    int64_t per_group, folded, count;
};
static Tiling tiling(const Call& c) {
    const int64_t groups = group_count(c);
    const int64_t fit = c.N > 0 ? most_folded(c) / c.N : 1;
    if (groups > 1 && fit > 1) {
        const int64_t folded = fit < groups ? fit : groups;
        return {1, folded, (groups + folded - 1) / folded};
    }
    const int64_t per_group = (c.N + QUERIES - 1) / QUERIES;
    return {per_group, 1, per_group * groups};
}

// Places tile `n` of batch point `b`, with the keys it visits inside [from, to).
static void place(const Call& c, const Tiling& g, const Batch& b, int64_t n, int64_t from, int64_t to, Tile& t) {
    const int64_t groups = group_count(c);
    t.g0 = n / g.per_group * g.folded;
    t.i0 = n % g.per_group * QUERIES;
    t.i1 = t.i0 + QUERIES < c.N ? t.i0 + QUERIES : c.N;
    const int64_t taken = t.g0 + g.folded < groups ? g.folded : groups - t.g0;
    t.rows = (t.i1 - t.i0) * taken;
    t.columns = (t.rows + LANES - 1) / LANES;
    t.spans = t.hides = 0;
    t.lo = to;
    t.hi = from;
    find_spans(c, b, t, from, to);
}

// The rows of a tile in the order of its lanes.
struct Row {
    Group g;
    int64_t group, i;
};
static Row first_row(const Call& c, const Tile& t) { return {group_at(c, t.g0), t.g0, t.i0}; }
INLINE void next_row(const Call& c, const Tile& t, Row& r) {
    if (++r.i < t.i1) return;
    r.i = t.i0;
    if (t.rows > t.i1 - t.i0) r.g = group_at(c, ++r.group);
}

// Loads the queries of a placed tile and everything of its rows that no key changes.
static void begin(const Call& c, const Batch& b, Tile& t, bool with_sink, bool lifted) {
    t.fresh = t.near = true;
    t.lifted = lifted;
    t.few = MOST_FEW > 0 && is_few(c, t.rows);
    Row at = first_row(c, t);
    for (int64_t v = 0; v < t.columns * LANES; v += LANES) {
        const q_element* rows[LANES];
        for (int64_t l = 0; l < LANES; ++l) {
            const bool real_row = v + l < t.rows;
            rows[l] = real_row ? query_at(c, b, at.g, at.i) : nullptr;
            set_lane(t, v + l, at.g, at.i);
            if (v + l + 1 < t.rows) next_row(c, t, at);
        }
        if (lies_in_rows(t)) load_few(c, rows, t.q);
        else load_queries(c, rows, t.q + v * q_rows(c));
    }
    const Uniform u = uniform(c, b, t);
    for (int64_t v = 0; v < t.columns * LANES; v += LANES) {
        t.values[v / LANES] = row_values(c, b, u, t, v);
        const vreal sink = with_sink ? first_logit(c, b, u, t, v) : splat(-INFINITY);
        const vreal m = limited(sink * LOG2E, sink), safe = pick(m == splat(-INFINITY), vreal{}, m);
        store(t.m + v, m);
        store(t.top + v, limited(sink * (LOG2E / SCALE), sink));
        store(t.level + v, splat(NAN));
        store(t.expected + v, splat(NAN));
        store(t.l + v, exp2_of(m - safe) * (lifted ? LIFTED : 1));
        *(vmask*)(t.seen + v) = vmask{};
        begin_dropping(c, b, u, t, v);
    }
}

INLINE real log_of_sum(real m, real top, real l) {
    if (!IS_SOFTMAX) return 0;
    if (m == INFINITY) return m;
    if (absolute(m) < FAR_FROM) return (m + FN(__builtin_log2)(l)) * LN2;
    return m != m ? m : top * (SCALE * LN2) + FN(__builtin_log2)(l) * LN2;
}

// Writes what a finished tile gives: out and, if asked, the log of the sum. False where a sum of weighted values has left the
// range of floats, in which its quotient may lie.
static bool finish(const Call& c, const Batch& b, Tile& t) {
    bool finite = true;
    if (t.fresh) memset(t.o, 0, o_rows(c) * t.columns * LANES * sizeof(real));
    Row at = first_row(c, t);
    for (int64_t v = 0; v < t.columns * LANES; v += LANES) {
        const vmask seen = *(const vmask*)(t.seen + v);
        const vreal l = load(t.l + v), m = load(t.m + v), top = load(t.top + v);
        out_element* rows[LANES];
        for (int64_t n = 0; n < LANES; ++n) {
            rows[n] = nullptr;
            if (v + n >= t.rows) continue;
            if (HAS_OUT) rows[n] = out_at(c, b, at.g, at.i);
            if (HAS_LSE && !t.lifted) *lse_at(c, b, at.g, at.i) = log_of_sum(m[n], top[n], l[n]);
            next_row(c, t, at);
        }
        vmask keep = splat_mask(true);
        vreal scale = splat(1);
        if (IS_SOFTMAX) {
            scale = NORMALIZED_EARLY ? splat(1) : 1 / l;
            if (EMPTY == EMPTY_ZERO || HAS_SINK) keep = seen;
            else if (c.M == 0) scale = splat(0);
            else if (EMPTY == EMPTY_NAN) scale = pick(seen, scale, splat(NAN));
            else scale = pick(seen, scale, splat(NORMALIZED_EARLY ? 1 : (t.lifted ? 1 / LIFTED : 1) / (real)c.M));
        }
        if (!HAS_OUT) continue;
        const vmask whole = from_lanes(t.o + v * o_rows(c), scale, keep, rows, c.out_e, c.E);
        finite &= none(~whole & (EMPTY == EMPTY_MEAN ? ~((l == 0) & seen) & (l == l) : l > 0));
    }
    return finite || !IS_SOFTMAX || NORMALIZED_EARLY;
}
