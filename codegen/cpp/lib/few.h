// ---- few queries: lanes run along a key's or a value's row, which is read once, in order, as it lies ----------------
// Queries lie as [row][D up to LANES], sums of values as [row][E up to LANES], both in the order in which `two_rows` gives
// elements. Scores and weights of a block lie as [key][R]; where a mask or a bias has to look at them, as ever.
constexpr int64_t FEW = LANES < 8 ? LANES : 8;
// Bytes between what is read and what is asked for: the processor foresees no row beyond a page, and none in time.
constexpr int64_t KEYS_AHEAD = 3072, VALUES_AHEAD = 8192;
// Values that stay in the nearest cache while every column of theirs is summed. Their sums start anew, so that rounding
// errors do not grow with the number of keys.
constexpr int64_t FEW_STEP = 32;

INLINE int64_t few_width(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
INLINE real* few_sums(const Call& c, const Tile& t) { return t.o + o_rows(c) * LANES; }
INLINE bool few_in_rows(const Call& c, int64_t rows) {
    return rows <= FEW && c.N <= FEW && c.D >= 16 && c.E >= 16 && c.k_d == 1 && c.v_e == 1;
}

// Twice LANES elements. Of bfloat16 the even ones come first, then the odd ones: no shuffle takes them apart.
template <class T> INLINE void two_rows(const T* p, vreal& a, vreal& b) { a = row(p), b = row(p + LANES); }
template <class T> constexpr bool evens_first(const T*) { return false; }
#if !REAL_IS_DOUBLE
typedef uint32_t any_words __attribute__((vector_size(LANES * 4), aligned(2), may_alias));
INLINE void two_rows(const bf16* p, vreal& a, vreal& b) {
    const vword x = *(const any_words*)p;
    a = (vreal)(x << 16), b = (vreal)(x & 0xffff0000);
}
constexpr bool evens_first(const bf16*) { return true; }
#endif

// LANES elements of a row, zeros from `count` on.
template <class T> INLINE vreal row_up_to(const T* p, int64_t count) {
    if (count >= LANES) return row(p);
    vreal x = {};
    for (int64_t l = 0; l < count; ++l) x[l] = value(p[l]);
    return x;
}

// Two vectors of a row that ends after `count` elements.
template <class T> INLINE void two_rows_up_to(const T* p, int64_t count, vreal& a, vreal& b) {
    if (count >= 2 * LANES) return two_rows(p, a, b);
    a = row_up_to(p, count), b = count > LANES ? row_up_to(p + LANES, count - LANES) : vreal{};
}

static void load_rows(const Call& c, const q_element* const (&rows)[LANES], real* q) {
    for (int64_t r = 0; r < FEW; ++r, q += few_width(c.D)) {
        int64_t d = 0;
        if (!rows[r]) {
            memset(q, 0, few_width(c.D) * sizeof(real));
            continue;
        }
        if (evens_first((const k_element*)nullptr))
            for (; d + 2 * LANES <= c.D; d += 2 * LANES)
                for (int64_t l = 0; l < 2 * LANES; ++l) q[d + l % 2 * LANES + l / 2] = value(rows[r][(d + l) * c.q_d]);
        for (; d < few_width(c.D); ++d) q[d] = d < c.D ? value(rows[r][d * c.q_d]) : 0;
    }
}

// Puts the sums of a finished tile where every tile has them.
static void end_few(const Call& c, const Tile& t) {
    const real* rows[LANES];
    for (int64_t r = 0; r < LANES; ++r) {
        real* at = few_sums(c, t) + r * few_width(c.E);
        rows[r] = r < t.rows ? at : nullptr;
        if (r < t.rows && evens_first((const v_element*)nullptr))
            for (int64_t e = 0; e + 2 * LANES <= c.E; e += 2 * LANES) {
                const vreal a = load(at + e), b = load(at + e + LANES);
                store(at + e, __builtin_shufflevector(a, b, ZIP_LOW));
                store(at + e + LANES, __builtin_shufflevector(a, b, ZIP_HIGH));
            }
    }
    to_lanes(rows, 1, c.E, t.o);
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

// How many rows ahead lie `bytes` of them.
template <class T> INLINE int64_t rows_ahead(const T*, int64_t bytes, int64_t columns) {
    return (bytes + columns * (int64_t)sizeof(T) - 1) / (columns * (int64_t)sizeof(T));
}

// s[key][R], to whole vectors: the last key again where there are no more.
template <int R> static void few_scores(const Call& c, const real* q, const k_element* k, int64_t count, real* s) {
    constexpr int AT_ONCE = LANES / R;
    const int64_t ahead = rows_ahead(k, KEYS_AHEAD, c.D) * c.k_j;
    for (int64_t j = 0; j < count; j += AT_ONCE) {
        vreal sum[LANES];
#pragma GCC unroll 16
        for (int g = 0; g < AT_ONCE; ++g) {
            const k_element* at = k + (j + g < count ? j + g : count - 1) * c.k_j;
            vreal x[R];
            for (int r = 0; r < R; ++r) x[r] = vreal{};
            for (int64_t d = 0; d < c.D; d += 2 * LANES) {
                foresee_near(at + ahead + d, 2 * LANES);
                vreal a, b;
                two_rows_up_to(at + d, c.D - d, a, b);
                for (int r = 0; r < R; ++r) x[r] += a * load(q + r * few_width(c.D) + d);
                if (d + LANES >= c.D) break;
                for (int r = 0; r < R; ++r) x[r] += b * load(q + r * few_width(c.D) + d + LANES);
            }
            for (int r = 0; r < R; ++r) sum[g * R + r] = x[r];
        }
        store(s + j * R, sums_of(sum));
    }
}

// o[r][e] = o[r][e] * keep[r] + sum_j p[j][r] * v[j][e]; without `keep`, o = the sum.
template <int R>
static void few_values(const Call& c, const v_element* v, const real* p, int64_t count, real* o, const real* keep) {
    constexpr int WIDE = R > 4 ? 2 : R > 2 ? 4 : 8;
    const int64_t ahead = rows_ahead(v, VALUES_AHEAD, c.E) * c.v_j, width = few_width(c.E);
    for (int64_t j0 = 0; j0 < count; j0 += FEW_STEP, v += FEW_STEP * c.v_j, p += FEW_STEP * R) {
        const int64_t n = count - j0 < FEW_STEP ? count - j0 : FEW_STEP;
        for (int64_t e = 0; e < width; e += WIDE * LANES) {
            const int64_t columns = (width - e) / LANES;
            vreal sum[R][WIDE];
            for (int r = 0; r < R; ++r)
                for (int w = 0; w < WIDE; ++w) sum[r][w] = vreal{};
            auto add = [&](auto whole) {
                for (int64_t j = 0; j < n; ++j) {
                    const v_element* at = v + j * c.v_j + e;
                    foresee_near(at + ahead, WIDE * LANES);
#pragma GCC unroll 4
                    for (int w = 0; w < WIDE; w += 2) {
                        vreal a, b;
                        if (whole()) two_rows(at + w * LANES, a, b);
                        else if (e + w * LANES < c.E) two_rows_up_to(at + w * LANES, c.E - e - w * LANES, a, b);
                        else break;
                        for (int r = 0; r < R; ++r) sum[r][w] += splat(p[j * R + r]) * a;
                        for (int r = 0; r < R; ++r) sum[r][w + 1] += splat(p[j * R + r]) * b;
                    }
                }
            };
            if (e + WIDE * LANES <= c.E) add([] { return true; });
            else add([] { return false; });
            for (int r = 0; r < R; ++r)
                for (int w = 0; w < WIDE && w < columns; ++w) {
                    real* to = o + r * width + e + w * LANES;
                    if (j0 > 0) sum[r][w] += load(to);
                    else if (keep) sum[r][w] += load(to) * splat(keep[r]);
                    store(to, sum[r][w]);
                }
        }
    }
}
