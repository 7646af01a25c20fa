// ---- few queries: lanes run along a key's or a value's row, which is read once, in order, as it lies ----------------
// Queries lie as [FEW][D up to LANES], scores and weights as ever, a row a key and a lane a query.
constexpr int64_t FEW = 8;
INLINE int64_t few_d(const Call& c) { return (c.D + LANES - 1) / LANES * LANES; }
INLINE bool is_few(const Call& c, int64_t rows) {
    return rows <= FEW && rows <= LANES && c.N <= FEW && c.D >= 16 && c.k_d == 1 && c.v_e == 1;
}

static void load_few(const Call& c, const q_element* const (&rows)[LANES], real* q) {
    for (int64_t r = 0; r < FEW && r < LANES; ++r)
        for (int64_t d = 0; d < few_d(c); ++d)
            q[r * few_d(c) + d] = rows[r] && d < c.D ? value(rows[r][d * c.q_d]) : 0;
}

// LANES elements of a row, zeros from `count` on.
template <class T> INLINE vreal row_up_to(const T* p, int64_t count) {
    if (count >= LANES) return row(p);
    vreal x = {};
    for (int64_t l = 0; l < count; ++l) x[l] = value(p[l]);
    return x;
}

// Lane n of the result is the sum over the lanes of x[n].
INLINE vreal sums_of(vreal (&x)[LANES]) {
#pragma GCC unroll 8
    for (int n = LANES / 2; n >= 1; n /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i)
            x[i] = __builtin_shufflevector(x[i], x[i + n], ZIP_LOW) + __builtin_shufflevector(x[i], x[i + n], ZIP_HIGH);
    return x[0];
}

template <int R>
static void few_scores(const Call& c, const real* q, const k_element* k, int64_t count, real* s) {
    constexpr int KEYS_AT_ONCE = LANES / R > 0 ? LANES / R : 1;
    for (int64_t j = 0; j < count; j += KEYS_AT_ONCE) {
        vreal sum[KEYS_AT_ONCE * R];
#pragma GCC unroll 16
        for (int g = 0; g < KEYS_AT_ONCE; ++g) {
            const k_element* at = k + (j + g < count ? j + g : count - 1) * c.k_j;
            vreal x[R];
            for (int r = 0; r < R; ++r) x[r] = vreal{};
            for (int64_t d = 0; d < c.D; d += LANES) {
                const vreal y = row_up_to(at + d, c.D - d);
                for (int r = 0; r < R; ++r) x[r] += y * load(q + r * few_d(c) + d);
            }
            for (int r = 0; r < R; ++r) sum[g * R + r] = x[r];
        }
        const vreal every = sums_of(*(vreal(*)[LANES])sum);
        alignas(64) real flat[LANES];
        store(flat, every);
        for (int g = 0; g < KEYS_AT_ONCE && j + g < count; ++g)
            for (int r = 0; r < R; ++r) s[(j + g) * LANES + r] = flat[g * R + r];
    }
}

template <int R>
static void few_values(const Call& c, const v_element* v, const real* p, int64_t count, real* o, const real* keep) {
    constexpr int WIDE = R > 4 ? 2 : R > 2 ? 4 : 8;
    real weights[KEYS * R];
    for (int64_t j = 0; j < count; ++j)
        for (int r = 0; r < R; ++r) weights[j * R + r] = weight_at(p, j, r);
    for (int64_t e = 0; e < c.E; e += WIDE * LANES) {
        vreal sum[R][WIDE];
        for (int r = 0; r < R; ++r)
            for (int w = 0; w < WIDE; ++w) sum[r][w] = vreal{};
        if (e + WIDE * LANES <= c.E) {
            for (int64_t j = 0; j < count; ++j) {
                for (int w = 0; w < WIDE; ++w) {
                    const vreal y = row(v + j * c.v_j + e + w * LANES);
                    for (int r = 0; r < R; ++r) sum[r][w] += splat(weights[j * R + r]) * y;
                }
            }
        } else {
            for (int64_t j = 0; j < count; ++j)
                for (int w = 0; w < WIDE && e + w * LANES < c.E; ++w) {
                    const vreal y = row_up_to(v + j * c.v_j + e + w * LANES, c.E - e - w * LANES);
                    for (int r = 0; r < R; ++r) sum[r][w] += splat(weights[j * R + r]) * y;
                }
        }
        for (int r = 0; r < R; ++r)
            for (int64_t n = 0; n < WIDE * LANES && e + n < c.E; ++n) {
                real* at = o + (e + n) * LANES + r;
                const real before = keep ? *at * (PRODUCT_KEEPS ? keep[r] : 1) : 0;
                *at = before + sum[r][n / LANES][n % LANES];
            }
    }
}

static void few_score_product(const Call& c, const Batch& b, const Tile& t, const Block& at, real* s) {
    const k_element* k = key_at(c, b) + at.j0 * c.k_j;
    if (t.rows == 1) few_scores<1>(c, t.q, k, at.count, s);
    else if (t.rows == 2) few_scores<2>(c, t.q, k, at.count, s);
    else if (t.rows <= 4) few_scores<4>(c, t.q, k, at.count, s);
    else few_scores<LANES < 8 ? 4 : 8>(c, t.q, k, at.count, s);
}
static void few_value_product(const Call& c, const Batch& b, const Tile& t, const Block& at, const real* p,
                              const real* keep) {
    const v_element* v = value_at(c, b) + at.j0 * c.v_j;
    const real* before = t.fresh ? nullptr : keep;
    if (t.rows == 1) few_values<1>(c, v, p, at.count, t.o, before);
    else if (t.rows == 2) few_values<2>(c, v, p, at.count, t.o, before);
    else if (t.rows <= 4) few_values<4>(c, v, p, at.count, t.o, before);
    else few_values<LANES < 8 ? 4 : 8>(c, v, p, at.count, t.o, before);
}
