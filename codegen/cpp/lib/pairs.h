// ---- operands in bfloat16 pairs: neighbours along the summed axis share a lane --------------------------------------
// Columns of queries hold [D / 2][LANES] pairs, columns of weights [KEYS / 2][LANES]. Keys lie as they are where the
// product can read them there; values are packed with their keys next to each other, zeros past the last.
INLINE int64_t round_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
INLINE int64_t padded_d(const Call& c) { return round_to(c.D, 32); }
INLINE int64_t padded_e(const Call& c) { return round_to(c.E, 16); }
INLINE int64_t q_rows(const Call& c) { return padded_d(c) / 2; }
INLINE int64_t o_rows(const Call& c) { return padded_e(c); }
static size_t k_scratch(const Call& c) { return (size_t)padded_d(c) * KEYS * 2; }
static size_t v_scratch(const Call& c) { return (size_t)padded_e(c) * KEYS * 2; }
static size_t p_scratch() { return (size_t)QUERIES * KEYS * 2; }
constexpr int64_t KEY_STEP = 32;

typedef uint16_t half_row __attribute__((vector_size(32), aligned(2), may_alias));
INLINE vword zero_extended(half_row x) {
    vword r;
    asm("vpmovzxwd %1, %0" : "=v"(r) : "v"(x));
    return r;
}
typedef uint32_t word_row __attribute__((vector_size(64), aligned(2), may_alias));

static void load_queries(const Call& c, const q_element* const (&rows)[LANES], real* column) {
    for (int64_t d = 0; d < padded_d(c); d += 32, column += 16 * LANES) {
        vword x[LANES];
        for (int l = 0; l < LANES; ++l) {
            x[l] = vword{};
            if (!rows[l]) continue;
            if (c.q_d == 1 && d + 32 <= c.D) {
                x[l] = *(const word_row*)(rows[l] + d);
            } else {
                uint16_t pairs[32] = {};
                for (int64_t n = 0; n < 32 && d + n < c.D; ++n) pairs[n] = rows[l][(d + n) * c.q_d].bits;
                memcpy(&x[l], pairs, 64);
            }
        }
        transpose(x);
        for (int l = 0; l < LANES; ++l) *(vword*)(column + l * LANES) = x[l];
    }
}

struct Block {
    int64_t j0, count;  // keys j0 <= j < j0 + count
    const uint16_t *k, *v;
    int64_t k_row;
};

static void pack_keys(const Call& c, const k_element* k, int64_t count, uint16_t* out) {
    const int64_t width = padded_d(c);
    for (int64_t j = 0; j < round_to(count, 32); ++j) {
        uint16_t* to = out + j * width;
        if (j < count && c.k_d == 1) memcpy(to, k + j * c.k_j, c.D * 2);
        else
            for (int64_t d = 0; d < c.D; ++d) to[d] = j < count ? k[j * c.k_j + d * c.k_d].bits : 0;
        for (int64_t d = c.D; d < width; ++d) to[d] = 0;
    }
}

#if TILES
// [keys / 32][e / 16][16][32 keys]
INLINE int64_t v_tile(const Call& c, int64_t key, int64_t e) { return (key / 32 * (padded_e(c) / 16) + e / 16) * 512; }
INLINE void put_pairs(const Call& c, vword (&x)[16], int64_t key, int64_t e, uint16_t* out) {
    transpose(x);
    for (int n = 0; n < 16; ++n) *(word_row*)(out + v_tile(c, key, e) + n * 32) = x[n];
}
#else
// [keys / 2][e] pairs, as the product broadcasts them one by one
INLINE int64_t v_tile(const Call& c, int64_t key, int64_t e) { return key * padded_e(c) + 2 * e; }
INLINE void put_pairs(const Call& c, vword (&x)[16], int64_t key, int64_t e, uint16_t* out) {
    for (int n = 0; n < 16; ++n) *(word_row*)(out + v_tile(c, key + 2 * n, e)) = x[n];
}
#endif

static void pack_values(const Call& c, const v_element* v, int64_t count, uint16_t* out) {
    for (int64_t key = 0; key < count; key += 32)
        for (int64_t e = 0; e < padded_e(c); e += 16) {
            vword x[16];
            auto pair = [&](int n, bool first, bool second) {
                const v_element* at = v + (key + 2 * n) * c.v_j + e;
                half_row a = {}, z = {};
                if (first) a = *(const half_row*)at;
                if (second) z = *(const half_row*)(at + c.v_j);
                x[n] = zero_extended(a) | zero_extended(z) << 16;
            };
            if (c.v_e == 1 && e + 16 <= c.E && key + 32 <= count) {
#pragma GCC unroll 16
                for (int n = 0; n < 16; ++n) pair(n, true, true);
            } else if (c.v_e == 1 && e + 16 <= c.E) {
                for (int n = 0; n < 16; ++n) pair(n, key + 2 * n < count, key + 2 * n + 1 < count);
            } else {
                for (int n = 0; n < 16; ++n) {
                    const int64_t j = key + 2 * n;
                    uint16_t pairs[32] = {};
                    for (int64_t l = 0; l < 16 && e + l < c.E; ++l) {
                        if (j < count) pairs[2 * l] = v[j * c.v_j + (e + l) * c.v_e].bits;
                        if (j + 1 < count) pairs[2 * l + 1] = v[(j + 1) * c.v_j + (e + l) * c.v_e].bits;
                    }
                    memcpy(&x[n], pairs, 64);
                }
            }
            put_pairs(c, x, key, e, out);
        }
}

INLINE bool keys_as_they_lie(const Call& c, int64_t count) {
    return c.k_d == 1 && (TILES ? c.D % 32 == 0 && count % 16 == 0 : c.D % 2 == 0);
}
// Keys [j0, j0 + count) of a batch point, as they lie or where `bring` puts them.
static Block block_of(const Call& c, const k_element* k, const v_element*, int64_t j0, int64_t count, real* k_at, real* v_at) {
    if (!keys_as_they_lie(c, count)) return {j0, count, (const uint16_t*)k_at, (const uint16_t*)v_at, padded_d(c)};
    return {j0, count, (const uint16_t*)(k + j0 * c.k_j), (const uint16_t*)v_at, c.k_j};
}
// Its keys from `from`, a multiple of KEY_STEP, to `to`, counted from its first, packed.
static void bring(const Call& c, const k_element* k, const v_element* v, const Block& x, int64_t from, int64_t to, real* k_at,
                  real* v_at) {
    if (!keys_as_they_lie(c, x.count))
        pack_keys(c, k + (x.j0 + from) * c.k_j, to - from, (uint16_t*)k_at + from * padded_d(c));
    pack_values(c, v + (x.j0 + from) * c.v_j, to - from, (uint16_t*)v_at + v_tile(c, from, 0));
}
static Block part_of(const Call& c, const Block& x, int64_t from, int64_t to) {
    return {x.j0 + from, to - from, x.k + from * x.k_row, x.v + v_tile(c, from, 0), x.k_row};
}

INLINE real* weight_column(real*, real* spare, int64_t column) { return spare + column * (KEYS / 2) * LANES; }
INLINE real weight_at(const real* p, int64_t k, int64_t lane) {
    return from_bf16(((const uint16_t*)(p + k / 2 * LANES + lane))[k & 1]);
}
// To bfloat16, in place. Where nobody asks for the sums, weights are summed as the product takes them, so that the ratio of
// the two does not see the rounding, nor that all are cut off and none rounded up; a sink, which is not cut, would.
INLINE vreal nudged(vreal w) { return (vreal)((vword)w + (SUMS_ROUNDED && !HAS_SINK ? 0 : 0x8000)); }
INLINE vreal rounded(vreal w) { return (vreal)((vword)nudged(w) & 0xffff0000); }
// The upper halves of both, those of x above.
INLINE vword pair_of(vreal w, vreal x) {
    vword pair = (vword)x;
    asm("vpternlogd $0xea, %2, %1, %0" : "+v"(pair) : "v"(vword{} + 0xffff0000), "v"((vword)w >> 16));
    return pair;
}
INLINE void put_weights(real* p, int64_t k, vreal w, vreal x) { *(vword*)(p + (k >> 1) * LANES) = pair_of(w, x); }
#if TILES
#define SUMS_BY_PAIRS 0
INLINE void put_and_sum(real*, int64_t, vreal, vreal, vreal&) {}
#else
#define SUMS_BY_PAIRS SUMS_ROUNDED  // one product with ones in the place of two roundings and two sums
INLINE void put_and_sum(real* p, int64_t k, vreal w, vreal x, vreal& sum) {
    const vword pair = pair_of(w, x);
    *(vword*)(p + (k >> 1) * LANES) = pair;
    sum = multiply_add(sum, (vreal)pair, (vreal)(vword{} + 0x3f803f80));
}
#endif
// Zeros from where the weights of n keys end to the end of what the product reads.
INLINE void end_weights(real* p, int64_t n) {
    for (int64_t k = round_to(n, 2); k < round_to(n, 32); k += 2) store(p + k / 2 * LANES, vreal{});
}
#define WEIGHTS_OVERWRITE 0

#define PRODUCT_KEEPS 0
INLINE void rescale(const Call& c, const Tile& t, int64_t column, vreal factor) {
    real* o = t.o + column * o_rows(c) * LANES;
    for (int64_t e = 0; e < c.E; ++e) store(o + e * LANES, load(o + e * LANES) * factor);
}
#if TILES
constexpr int64_t STRIP = 2;
static void score_product(const Call& c, const Tile& t, int64_t v, int64_t columns, const Block& at, real* s) {
    tile_product((at.count + 15) / 16, columns, at.k, at.k_row * 2, at.k_row * 32, 64, t.q + v * LANES * q_rows(c), q_rows(c) * LANES,
                 padded_d(c) / 32, s, KEYS * LANES, false);
}
static void value_product(const Call& c, const Tile& t, int64_t v, int64_t columns, const Block& at, const real* p, const real*) {
    tile_product(o_rows(c) / 16, columns, at.v, 64, 1024, o_rows(c) * 64, p, KEYS / 2 * LANES, (at.count + 31) / 32,
                 t.o + v * LANES * o_rows(c), o_rows(c) * LANES, !t.fresh);
}
#else
constexpr int64_t STRIP = TILE_VECTORS;
static void score_product(const Call& c, const Tile& t, int64_t v, int64_t columns, const Block& at, real* s) {
    product(at.count, columns, at.k, at.k_row, 2, t.q + v * LANES * q_rows(c), q_rows(c) * LANES, (c.D + 1) / 2, s, KEYS * LANES, false);
}
static void value_product(const Call& c, const Tile& t, int64_t v, int64_t columns, const Block& at, const real* p, const real*) {
    product(c.E, columns, at.v, 2, 2 * padded_e(c), p, KEYS / 2 * LANES, (at.count + 1) / 2, t.o + v * LANES * o_rows(c), o_rows(c) * LANES,
            !t.fresh);
}
#endif
