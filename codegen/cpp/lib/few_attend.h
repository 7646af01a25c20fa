// ---- few queries: the attention of a block ---------------------------------------------------------------------------
// Keys that every row sees, with no score to work out but a multiple: lanes hold several keys of every row.
template <int R> static void attend_few(const Call& c, const Batch& b, Tile& t, const Block& at, real* s) {
    few_scores<R>(c, t.q, key_at(c, b) + at.j0 * c.k_j, at.count, s);
    const int64_t end = at.count * R;
    alignas(64) real flat[LANES], keep[LANES];
    for (int64_t n = end; n % LANES; ++n) s[n] = -INFINITY;
    vreal top = splat(-INFINITY);
    for (int64_t n = 0; n < end; n += LANES) top = high(load(s + n), top);
    store(flat, top);
    alignas(64) real tops[LANES];
    store(tops, splat(-INFINITY));
    for (int l = 0; l < LANES; ++l) tops[l % R] = flat[l] > tops[l % R] ? flat[l] : tops[l % R];
    const Peak old = peak_of(t, 0), peak = higher(old, load(tops));
    const Base base = base_of(peak);
    const vreal factor = factor_of(old, base);
    auto repeated = [](vreal x) {
        alignas(64) real rows[LANES], every[LANES];
        store(rows, x);
        for (int l = 0; l < LANES; ++l) every[l] = rows[l % R];
        return load(every);
    };
    const Base every = {repeated(base.first), repeated(base.then)};
    vreal sum[2] = {};
    for (int64_t n = 0; n < end; n += LANES) {
        const vreal w = exp2_weight(exponent(load(s + n), every));
        sum[n / LANES % 2] += w;
        store(s + n, w);
    }
    store(flat, sum[0] + sum[1]);
    if (DROPS) {
        alignas(64) real own[LANES] = {};
        for (int l = 0; l < LANES; ++l) own[l % R] += flat[l];
        if (few_spare(t, factor, load(own), t.rows)) return;
    }
    alignas(64) real l_new[LANES];
    store(l_new, load(t.l) * factor);
    for (int l = 0; l < LANES; ++l) l_new[l % R] += flat[l];
    store(t.m, peak.m);
    store(t.top, peak.top);
    store(t.l, load(l_new));
    store(keep, factor);
    *(vmask*)t.seen = splat_mask(true);
    few_values<R>(c, value_at(c, b) + at.j0 * c.v_j, s, at.count, few_sums(c, t), t.fresh ? nullptr : keep);
    t.fresh = false;
}

template <int R>
static void score_few(const Call& c, const Batch& b, const Tile& t, const Block& at, real* s) {
    real packed[KEYS * R];
    few_scores<R>(c, t.q, key_at(c, b) + at.j0 * c.k_j, at.count, packed);
    for (int64_t j = 0; j < at.count; ++j)
        for (int r = 0; r < R; ++r) s[j * LANES + r] = packed[j * R + r];
}
template <int R>
static void value_few(const Call& c, const Batch& b, Tile& t, const Block& at, const real* p, const real* keep) {
    real packed[KEYS * R];
    for (int64_t j = 0; j < at.count; ++j)
        for (int r = 0; r < R; ++r) packed[j * R + r] = weight_at(p, j, r);
    few_values<R>(c, value_at(c, b) + at.j0 * c.v_j, packed, at.count, few_sums(c, t), t.fresh ? nullptr : keep);
}

// `f`, or `g` in the matrix unit, with the number of rows rounded up to one there is code for.
#define UP_TO(most) (MOST_FEW <= most || t.rows <= most)
#define IN_ROWS(f, ...) \
    (UP_TO(1) ? f<1>(__VA_ARGS__) : UP_TO(2) ? f<2>(__VA_ARGS__) : UP_TO(4) ? f<4>(__VA_ARGS__) : f<FEW>(__VA_ARGS__))
#if TILES
#define BY_ROWS(f, g, ...) \
    (!few_in_tiles(c, t.rows) ? IN_ROWS(f, __VA_ARGS__) : UP_TO(4) ? g<4>(__VA_ARGS__) \
     : UP_TO(8) ? g<8>(__VA_ARGS__) : g<16>(__VA_ARGS__))
#else
#define BY_ROWS(f, g, ...) IN_ROWS(f, __VA_ARGS__)
#endif
INLINE bool is_few(const Call& c, int64_t rows) {
#if TILES
    if (few_in_tiles(c, rows)) return true;
#endif
    return few_in_rows(c, rows);
}
// Rows that groups fold into one tile. Several tiles of few rows read a block of keys one after the other from the cache, which
// is still faster than lanes that stand empty.
static int64_t most_folded(const Call& c) {
    if (PAIRS || c.N * group_count(c) > 2 * FEW || !few_in_rows(c, c.N)) return QUERIES;
    return FEW;
}
static void load_few(const Call& c, const q_element* const (&rows)[LANES], real* q) {
#if TILES
    int64_t n = 0;
    while (n < LANES && rows[n]) ++n;
    if (few_in_tiles(c, n)) return load_queries(c, rows, q);
#endif
    load_rows(c, rows, q);
}
static void few_attention(const Call& c, const Batch& b, Tile& t, const Block& at, real* s) {
    BY_ROWS(attend_few, attend_in_tiles, c, b, t, at, s);
}
static void few_score_product(const Call& c, const Batch& b, const Tile& t, const Block& at, real* s) {
    BY_ROWS(score_few, score_in_tiles, c, b, t, at, s);
}
static void few_value_product(const Call& c, const Batch& b, Tile& t, const Block& at, const real* p,
                              const real* keep) {
    BY_ROWS(value_few, value_in_tiles, c, b, t, at, p, keep);
}
