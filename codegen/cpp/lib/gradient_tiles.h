// ---- a backward in the matrix unit: every product takes pairs of bfloat16 along the axis that it sums over -----------
// Scores lie as [column][KEYS][LANES]. Keys and values as columns of pairs of channels, [column][D or E / 2][LANES]; keys once
// more as pairs of keys, [channels / 16][QUERIES / 2][LANES]. Queries and gradients once for each batch point with their rows
// along: [rows / 32][channels / 16][16][32 rows], so blocks begin at multiples of 32 rows. Weights and gradients of scores
// are packed as pairs of rows, and the latter as rows too.
INLINE int64_t by_16(int64_t n) { return round_to(n, 16); }
INLINE int64_t by_32(int64_t n) { return round_to(n, 32); }
INLINE int64_t padded_d(const Call& c) { return by_16(c.D); }
INLINE int64_t dk_rows(const Call& c) { return by_16(c.D); }
INLINE int64_t dv_rows(const Call& c) { return by_16(c.E); }
INLINE int64_t dq_row(const Call&) { return LANES; }
INLINE int64_t dq_next(const Call& c) { return by_32(c.M) * LANES; }
INLINE int64_t dq_member(const Call& c) { return by_32(c.M) * by_16(c.D); }
static size_t k_room(const Call& c) { return QUERIES * by_32(c.D) * 2; }
static size_t v_room(const Call& c) { return QUERIES * by_32(c.E) * 2; }
static size_t k_rows_room(const Call& c) { return QUERIES * by_16(c.D) * 2; }
static size_t q_room(const Call& c) { return KEYS * by_32(c.D) * 2; }
static size_t g_room(const Call& c) { return KEYS * by_32(c.E) * 2; }
INLINE int64_t turned_size(const Call& c) { return by_32(c.M) * (by_16(c.D) + by_16(c.E)); }
static size_t turned_room(const Call& c, int64_t group) { return group * turned_size(c) * 2; }
static size_t packed_room() { return 3 * KEYS * QUERIES * 2; }

typedef uint16_t half_row __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t word_row __attribute__((vector_size(64), aligned(2), may_alias));
INLINE vword zero_extended(half_row x) {
    vword r;
    asm("vpmovzxwd %1, %0" : "=v"(r) : "v"(x));
    return r;
}
// 16 elements of a row, zeros from `count` on.
INLINE half_row some_of(const bf16* p, int64_t step, int64_t count) {
    if (step == 1 && count >= 16) return *(const half_row*)p;
    half_row x = {};
    for (int64_t n = 0; n < 16 && n < count; ++n) x[n] = p[n * step].bits;
    return x;
}
// Two rows as pairs, element by element.
INLINE vword paired(half_row first, half_row second) { return zero_extended(first) | zero_extended(second) << 16; }

// Columns of pairs of channels: out[channel / 2][lane] of 16 rows.
static void to_pairs(const bf16* const (&rows)[LANES], int64_t step, int64_t width, uint32_t* out) {
    for (int64_t d = 0; d < width; d += 32, out += 16 * LANES) {
        vword x[LANES];
        for (int l = 0; l < LANES; ++l) {
            const half_row low = some_of(rows[l] + d * step, step, width - d);
            const half_row high = d + 16 < width ? some_of(rows[l] + (d + 16) * step, step, width - d - 16) : half_row{};
            memcpy(&x[l], &low, 32);
            memcpy((char*)&x[l] + 32, &high, 32);
        }
        transpose(x);
        for (int l = 0; l < LANES; ++l) *(vword*)(out + l * LANES) = x[l];
    }
}

// [rows / 32][channels / 16][16][32 rows], zeros past the last of either.
static void turn(const bf16* p, int64_t row, int64_t step, int64_t count, int64_t width, uint16_t* out) {
    for (int64_t j = 0; j < count; j += 32)
        for (int64_t e = 0; e < width; e += 16, out += 512) {
            vword x[16];
            for (int n = 0; n < 16; ++n) {
                const int64_t at = j + 2 * n;
                const bf16* from = p + at * row + e * step;
                const half_row zero = {};
                x[n] = paired(at < count ? some_of(from, step, width - e) : zero, at + 1 < count ? some_of(from + row, step, width - e) : zero);
            }
            transpose(x);
            for (int n = 0; n < 16; ++n) *(word_row*)(out + n * 32) = x[n];
        }
}

INLINE uint16_t* turned_q(const Call& c, const Work& w, int64_t member) { return (uint16_t*)w.turned + member * turned_size(c); }
INLINE uint16_t* turned_g(const Call& c, const Work& w, int64_t member) { return turned_q(c, w, member) + by_32(c.M) * by_16(c.D); }
static void prepare_member(const Call& c, const Batch& b, int64_t member, Work& w) {
    if (WANTS_K) turn(query_at(c, b), c.k_j, c.k_d, c.M, c.D, turned_q(c, w, member));
    if (WANTS_V) turn(grad_at(c, b), c.k_grad_j, c.grad_e, c.M, c.E, turned_g(c, w, member));
}

static void load_keys(const Call& c, const Batch& b, Tile& t, Work& w) {
    const bf16 *k = lane_k_at(c, b), *v = lane_v_at(c, b);
    for (int64_t n = 0; n < t.columns; ++n) {
        const bf16 *k_rows[LANES], *v_rows[LANES];
        for (int64_t l = 0; l < LANES; ++l) {
            const int64_t i = n * LANES + l < t.rows ? t.i0 + n * LANES + l : t.i1 - 1;  // past the last key it again
            k_rows[l] = k + i * c.q_i;
            v_rows[l] = v + i * c.v_i;
            set_lane(t, n * LANES + l, {}, i);
        }
        to_pairs(k_rows, c.q_d, c.D, (uint32_t*)w.k + n * by_32(c.D) / 2 * LANES);
        to_pairs(v_rows, c.v_e, c.E, (uint32_t*)w.v + n * by_32(c.E) / 2 * LANES);
    }
    uint32_t* to = (uint32_t*)w.k_rows;
    for (int64_t d = 0; d < c.D; d += 16)
        for (int64_t r = 0; r < QUERIES; r += 2, to += LANES) {
            const bf16* from = k + (t.i0 + r) * c.q_i + d * c.q_d;
            const half_row zero = {};
            *(vword*)to = paired(r < t.rows ? some_of(from, c.q_d, c.D - d) : zero, r + 1 < t.rows ? some_of(from + c.q_i, c.q_d, c.D - d) : zero);
        }
    if (t.rows < QUERIES) memset(w.packed, 0, packed_room());
}

// A block of query rows: queries and gradients of the output as rows of whole tiles, strides in bytes.
struct Rows {
    int64_t j0, count;
    const void *q, *g;
    int64_t q_row, g_row;
};
// Rows where they lie, if every tile of them lies inside; else copied.
static const void* tile_rows(const Call& c, const bf16* p, int64_t row, int64_t step, int64_t j0, int64_t count, int64_t width,
                             void* room, int64_t& stride) {
    stride = row * 2;
    if (step == 1 && width % 32 == 0 && j0 + by_16(count) <= c.M) return p;
    const int64_t padded = by_32(width);
    stride = padded * 2;
    for (int64_t r = 0; r < by_16(count); ++r) {
        uint16_t* to = (uint16_t*)room + r * padded;
        for (int64_t d = 0; d < padded; d += 16)
            *(half_row*)(to + d) = r < count && d < width ? some_of(p + r * row + d * step, step, width - d) : half_row{};
    }
    return room;
}
static Rows rows_at(const Call& c, const Batch& b, int64_t j0, int64_t count, Work& w) {
    Rows x = {j0, count};
    x.q = tile_rows(c, query_at(c, b) + j0 * c.k_j, c.k_j, c.k_d, j0, count, c.D, w.q, x.q_row);
    x.g = tile_rows(c, grad_at(c, b) + j0 * c.k_grad_j, c.k_grad_j, c.grad_e, j0, count, c.E, w.g, x.g_row);
    return x;
}

static void score_products(const Call& c, const Tile& t, const Rows& at, Work& w) {
    const int64_t rows = (at.count + 15) / 16, d = by_32(c.D), e = by_32(c.E);
    tile_product(rows, t.columns, at.q, at.q_row, 16 * at.q_row, 64, (real*)w.k, d / 2 * LANES, d / 32, w.scores, SCORE_NEXT, false);
    if (NEEDS_SLOPES)
        tile_product(rows, t.columns, at.g, at.g_row, 16 * at.g_row, 64, (real*)w.v, e / 2 * LANES, e / 32, w.slopes, SCORE_NEXT, false);
}

INLINE uint32_t* weight_pairs(const Work& w) { return (uint32_t*)w.packed; }
INLINE uint32_t* slope_pairs(const Work& w) { return weight_pairs(w) + KEYS * QUERIES / 2; }
INLINE bf16* slope_rows(const Work& w) { return (bf16*)(slope_pairs(w) + KEYS * QUERIES / 2); }
INLINE vword halves(vreal low, vreal high) {
    return (((vword)low + 0x8000) >> 16) | (((vword)high + 0x8000) & 0xffff0000);
}
// Weights and gradients of scores of one vector of keys, to bfloat16; zeros from the last row to the end of its tiles.
static void pack_column(const Rows& at, int64_t column, Work& w) {
    real *s = w.scores + column * SCORE_NEXT, *ds = w.slopes + column * SCORE_NEXT;
    for (int64_t n = at.count; n < by_32(at.count); ++n) store(s + n * LANES, vreal{}), store(ds + n * LANES, vreal{});
    uint32_t *p = weight_pairs(w) + column * (KEYS / 2) * LANES, *q = slope_pairs(w) + column * (KEYS / 2) * LANES;
    bf16* rows = slope_rows(w) + column * LANES;
    for (int64_t n = 0; n < by_32(at.count); n += 2, p += LANES, q += LANES) {
        if (WANTS_V) *(vword*)p = halves(load(s + n * LANES), load(s + (n + 1) * LANES));
        const vreal low = load(ds + n * LANES), high = load(ds + (n + 1) * LANES);
        if (WANTS_K) *(vword*)q = halves(low, high);
        if (WANTS_Q) put_row(rows + n * QUERIES, low), put_row(rows + (n + 1) * QUERIES, high);
    }
}

static void gradient_products(const Call& c, const Tile& t, const Rows& at, const Part& part, Work& w) {
    const int64_t steps = (at.count + 31) / 32, next = KEYS / 2 * LANES, block = at.j0 / 32;
    const int64_t d = by_16(c.D), e = by_16(c.E);
    if (WANTS_V)
        tile_product(e / 16, t.columns, turned_g(c, w, t.g0) + block * e * 32, 64, 1024, e * 64, (real*)weight_pairs(w), next, steps,
                     w.dv, e * LANES, true);
    if (WANTS_K)
        tile_product(d / 16, t.columns, turned_q(c, w, t.g0) + block * d * 32, 64, 1024, d * 64, (real*)slope_pairs(w), next, steps,
                     w.dk, d * LANES, true);
    if (WANTS_Q)
        tile_product((at.count + 15) / 16, d / 16, slope_rows(w), QUERIES * 2, QUERIES * 32, 64, (real*)w.k_rows, QUERIES / 2 * LANES,
                     (t.rows + 31) / 32, part.dq + t.g0 * dq_member(c) + at.j0 * LANES, dq_next(c), true);
}
