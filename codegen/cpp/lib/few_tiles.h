// ---- few queries in the matrix unit: keys and values are read where they lie ----------------------------------------
// Three rows and more leave the memory no time to spare in float vectors; the unit does. Queries lie in columns as for many,
// scores and weights of a block as [row][KEYS], sums as [row][E], even columns of 32 first.
INLINE bool few_in_tiles(const Call& c, int64_t rows) {
    return rows > 2 && rows <= 16 && c.N <= 16 && c.D % 32 == 0 && c.D <= 512 && c.E % 64 == 0 && c.E <= 512 &&
           c.k_d == 1 && c.v_e == 1;
}

// Blocks short enough that their stages take turns often.
constexpr int64_t FEW_KEYS = 64;

// The order in which rows will be needed: the block's values, the next block's keys, its values. Every stage asks for as many
// as its share of the work, so that the memory is never idle while the unit or the softmax is busy.
struct Ahead {
    const bf16 *k, *v;
    int64_t n;
};
INLINE void ask(const Call& c, Ahead& ahead, int64_t rows) {
    for (; rows > 0; --rows, ++ahead.n) {
        if (ahead.n >= FEW_KEYS && ahead.n < 2 * FEW_KEYS) {
            const bf16* row = ahead.k + ahead.n * c.k_j;
            foresee(row, row + c.D);
        } else {
            const bf16* row = ahead.v + (ahead.n < FEW_KEYS ? ahead.n : ahead.n - FEW_KEYS) * c.v_j;
            foresee(row, row + c.E);
        }
    }
}
// Rows asked for: before the first, by the scores of 16 keys, by the weights of a block, by its values.
constexpr int64_t LEAD = 32, ASK_SCORES = 6, ASK_WEIGHTS = 16, ASK_VALUES = 88;

// 16 rows from `at` on; where fewer are left, copies of them and the last one again.
INLINE const bf16* sixteen(const bf16* at, int64_t& stride, int64_t left, int64_t columns, uint16_t* copy) {
    if (left >= 16) return at;
    for (int64_t g = 0; g < 16; ++g) memcpy(copy + g * columns, at + (g < left ? g : left - 1) * stride, columns * 2);
    stride = columns;
    return (const bf16*)copy;
}

// Scores of 16 keys, [key][row].
INLINE void tile_scores(const Call& c, const real* q, const bf16* k, int64_t left, Ahead& ahead, real* sums) {
    alignas(64) uint16_t copy[16 * 512];
    int64_t stride = c.k_j;
    ask(c, ahead, ASK_SCORES);
    k = sixteen(k, stride, left, c.D, copy);
    TILE_ZERO(0);
    for (int64_t d = 0; d < c.D; d += 32) {
        TILE_LOAD(4, k + d, stride * 2);
        TILE_LOAD(6, q + d / 2 * LANES, 64);
        TILE_DOT(0, 4, 6);
    }
    TILE_STORE(0, sums, 64);
}

// Weights of 16 keys as the unit's rows of pairs: alone in the first of a pair, then in the second.
typedef uint32_t TileWeights[2][16][16];
INLINE void put_tile_weights(TileWeights& to, int r, vreal w) {
    half_row low;
    asm("vcvtneps2bf16 %1, %t0" : "=v"(low) : "v"(w));
    const vword x = zero_extended(low);
    *(vword*)to[0][r] = x;
    *(vword*)to[1][r] = x << 16;
}

// o[r][e] = o[r][e] * keep[r] + sum_j w[r][j] * v[j][e]. A row of values is a row of pairs of neighbours: weights that are
// alone in their pair pick the even columns or the odd ones, so values need no packing. False where a sum is not finite: an
// infinite value has reached its neighbour.
template <int R>
static bool tile_values(const Call& c, const bf16* v, const TileWeights* w, int64_t count, Ahead& ahead, real* o,
                        const real* keep) {
    const int64_t each = ASK_VALUES * 16 * 64 / (FEW_KEYS * c.E);
    alignas(64) uint16_t copy[16 * 512];
    alignas(64) real sums[4][16 * 16];
    vreal all = {};
    for (int64_t e = 0; e < c.E; e += 64) {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
        for (int64_t j = 0; j < count; j += 16) {
            int64_t stride = c.v_j;
            const bf16* at = v + j * c.v_j;
            ask(c, ahead, each);
            at = sixteen(at, stride, count - j, c.E, copy) + e;
            TILE_LOAD(4, w[j / 16][0], 64);
            TILE_LOAD(6, at, stride * 2);
            TILE_DOT(0, 4, 6);
            TILE_LOAD(5, w[j / 16][1], 64);
            TILE_DOT(1, 5, 6);
            TILE_LOAD(7, at + 32, stride * 2);
            TILE_DOT(2, 4, 7);
            TILE_DOT(3, 5, 7);
        }
        TILE_STORE(0, sums[0], 64);
        TILE_STORE(1, sums[1], 64);
        TILE_STORE(2, sums[2], 64);
        TILE_STORE(3, sums[3], 64);
        for (int r = 0; r < R; ++r)
            for (int x = 0; x < 4; ++x) {
                real* to = o + r * few_width(c.E) + e + x * 16;
                const vreal sum = load(sums[x] + r * 16);
                all += sum * 0;
                store(to, keep ? load(to) * splat(keep[r]) + sum : sum);
            }
    }
    return none(all != 0);
}

INLINE real highest(vreal x) {
    alignas(64) real flat[LANES];
    store(flat, x);
    real most = flat[0];
    for (int l = 1; l < LANES; ++l) most = flat[l] > most ? flat[l] : most;
    return most;
}
INLINE real sum_of(vreal x) {
    alignas(64) real flat[LANES];
    store(flat, x);
    real sum = 0;
    for (int l = 0; l < LANES; ++l) sum += flat[l];
    return sum;
}

template <int R> static void add_tile_values(const Call& c, const Batch& b, Tile& t, const Block& at, const TileWeights* w,
                                             Ahead& ahead, const real* keep) {
    const bf16* v = value_at(c, b) + at.j0 * c.v_j;
    real* o = few_sums(c, t);
    alignas(64) real before[R * 512];
    if (!t.fresh) memcpy(before, o, R * few_width(c.E) * sizeof(real));
    if (!tile_values<R>(c, v, w, at.count, ahead, o, t.fresh ? nullptr : keep)) {
        real plain[KEYS * R];
        for (int64_t j = 0; j < at.count; ++j)
            for (int r = 0; r < R; ++r) plain[j * R + r] = from_bf16((uint16_t)w[j / 16][0][r][j % 16]);
        if (!t.fresh) memcpy(o, before, R * few_width(c.E) * sizeof(real));
        few_values<R>(c, v, plain, at.count, o, t.fresh ? nullptr : keep);
    }
}

// Keys that every row sees, with no score to work out but a multiple: lanes hold keys.
template <int R> static void attend_short_block(const Call& c, const Batch& b, Tile& t, const Block& at, real* s) {
    const bf16* k = key_at(c, b) + at.j0 * c.k_j;
    Ahead ahead = {k, value_at(c, b) + at.j0 * c.v_j, DROPS ? FEW_KEYS : LEAD};  // values wait for whether they are read
    alignas(64) real sums[16 * 16];
    alignas(64) TileWeights weights[FEW_KEYS / 16];
    vreal top[R];
    for (int r = 0; r < R; ++r) top[r] = splat(-INFINITY);
    for (int64_t j = 0; j < at.count; j += 16) {
        tile_scores(c, t.q, k + j * c.k_j, at.count - j, ahead, sums);
        vreal x[LANES];
#pragma GCC unroll 16
        for (int g = 0; g < LANES; ++g) x[g] = load(sums + g * 16);
        transpose(x);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            store(s + r * FEW_KEYS + j, x[r]);  // the last key again changes no maximum
            top[r] = high(x[r], top[r]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int64_t j = at.count; j % 16; ++j) s[r * FEW_KEYS + j] = -INFINITY;
    alignas(64) real tops[LANES], first[LANES], then[LANES], l[LANES], keep[LANES], own[LANES] = {};
    store(tops, splat(-INFINITY));
    for (int r = 0; r < R; ++r) tops[r] = highest(top[r]);
    const Peak old = peak_of(t, 0), peak = higher(old, load(tops));
    const Base base = base_of(peak);
    const vreal factor = factor_of(old, base);
    store(first, base.first);
    store(then, base.then);
    store(keep, factor);
    store(l, load(t.l) * factor);
    for (int r = 0; r < R; ++r) {
        ask(c, ahead, ASK_WEIGHTS / R);
        vreal sum = {};
        const Base each = {splat(first[r]), splat(then[r])};
        for (int64_t j = 0; j < at.count; j += 16) {
            const vreal w = exp2_weight(exponent(load(s + r * FEW_KEYS + j), each));
            sum += w;
            put_tile_weights(weights[j / 16], r, w);
        }
        own[r] = sum_of(sum);
        l[r] += own[r];
    }
    if (DROPS && few_spare(t, factor, load(own), t.rows)) return;
    if (DROPS) ahead.n = 0, ask(c, ahead, FEW_KEYS);
    store(t.m, peak.m);
    store(t.top, peak.top);
    store(t.l, load(l));
    *(vmask*)t.seen = splat_mask(true);
    add_tile_values<R>(c, b, t, at, weights, ahead, keep);
    t.fresh = false;
}

template <int R> static void attend_in_tiles(const Call& c, const Batch& b, Tile& t, const Block& at, real* s) {
    for (int64_t j = 0; j < at.count; j += FEW_KEYS) {
        Block part = {};
        part.j0 = at.j0 + j;
        part.count = at.count - j < FEW_KEYS ? at.count - j : FEW_KEYS;
        attend_short_block<R>(c, b, t, part, s);
    }
}

template <int R>
static void score_in_tiles(const Call& c, const Batch& b, const Tile& t, const Block& at, real* s) {
    const bf16* k = key_at(c, b) + at.j0 * c.k_j;
    Ahead ahead = {k, value_at(c, b) + at.j0 * c.v_j, LEAD};
    alignas(64) real sums[16 * 16];
    for (int64_t j = 0; j < at.count; j += 16) {
        tile_scores(c, t.q, k + j * c.k_j, at.count - j, ahead, sums);
        memcpy(s + j * LANES, sums, (at.count - j < 16 ? at.count - j : 16) * LANES * sizeof(real));
    }
}
template <int R>
static void value_in_tiles(const Call& c, const Batch& b, Tile& t, const Block& at, const real* p, const real* keep) {
    Ahead ahead = {key_at(c, b) + at.j0 * c.k_j, value_at(c, b) + at.j0 * c.v_j, LEAD + FEW_KEYS};
    alignas(64) TileWeights weights[KEYS / 16];
    for (int64_t j = 0; j < at.count; j += 16)
        for (int r = 0; r < R; ++r) {
            vreal w = {};
            for (int64_t n = 0; n < 16 && j + n < at.count; ++n) w[n] = weight_at(p, j + n, r);
            put_tile_weights(weights[j / 16], r, w);
        }
    add_tile_values<R>(c, b, t, at, weights, ahead, keep);
}
