// ---- operands in the compute type: queries in lanes, keys and values where they lie or converted --------------------
// Working memory holds columns of LANES queries, rows one after the other.
INLINE int64_t q_rows(const Call& c) { return c.D; }
INLINE int64_t o_rows(const Call& c) { return c.E; }
static size_t k_scratch(const Call& c) { return (size_t)c.D * KEYS * sizeof(real); }
static size_t v_scratch(const Call& c) { return (size_t)c.E * KEYS * sizeof(real); }
static size_t p_scratch() { return 0; }  // weights overwrite their scores
constexpr int64_t KEY_STEP = 1;                   // where a part of a block may begin

static void load_queries(const Call& c, const q_element* const (&rows)[LANES], real* column) {
    to_lanes(rows, c.q_d, c.D, column);
}

struct Block {
    int64_t j0, count;  // keys j0 <= j < j0 + count
    const real *k, *v;
    int64_t k_row, k_col, v_row, v_col;
};

INLINE const real* compute_type(const real* p) { return p; }
template <class T> INLINE const real* compute_type(const T*) { return nullptr; }

// Keys [j0, j0 + count) of a batch point whose first key is at k, first value at v: as they lie, or where `bring` puts them.
static Block block_of(const Call& c, const k_element* k, const v_element* v, int64_t j0, int64_t count, real* k_at,
                      real* v_at) {
    Block x = {j0, count, compute_type(k + j0 * c.k_j), compute_type(v + j0 * c.v_j), c.k_j, c.k_d, c.v_j, c.v_e};
    if (!x.k) x.k = k_at, x.k_row = c.D, x.k_col = 1;
    if (!x.v) x.v = v_at, x.v_row = c.E, x.v_col = 1;
    return x;
}
// Its keys from `from` to `to`, counted from its first, in the compute type.
static void bring(const Call& c, const k_element* k, const v_element* v, const Block& x, int64_t from, int64_t to, real* k_at,
                  real* v_at) {
    k += (x.j0 + from) * c.k_j;
    v += (x.j0 + from) * c.v_j;
    if (!compute_type(k)) plain(k, c.k_j, c.k_d, to - from, c.D, k_at + from * c.D);
    if (!compute_type(v)) plain(v, c.v_j, c.v_e, to - from, c.E, v_at + from * c.E);
}
// The same keys as a block.
static Block part_of(const Call&, const Block& x, int64_t from, int64_t to) {
    return {x.j0 + from, to - from, x.k + from * x.k_row, x.v + from * x.v_row, x.k_row, x.k_col, x.v_row, x.v_col};
}

static void score_product(const Call& c, const Tile& t, int64_t v, int64_t columns, const Block& at, real* s) {
    product(at.count, columns, at.k, at.k_row, at.k_col, t.q + v * LANES * q_rows(c), q_rows(c) * LANES, c.D, s, KEYS * LANES, nullptr);
}
static void value_product(const Call& c, const Tile& t, int64_t v, int64_t columns, const Block& at, const real* p, const real* keep) {
    product(c.E, columns, at.v, at.v_col, at.v_row, p, KEYS * LANES, at.count, t.o + v * LANES * o_rows(c), o_rows(c) * LANES,
            t.fresh ? nullptr : keep + v * LANES);
}
INLINE real* weight_column(real* scores, real*, int64_t column) { return scores + column * KEYS * LANES; }
INLINE real weight_at(const real* p, int64_t k, int64_t lane) { return p[k * LANES + lane]; }
INLINE vreal rounded(vreal w) { return w; }
INLINE vreal nudged(vreal w) { return w; }
INLINE void put_weights(real* p, int64_t k, vreal w, vreal x) { store(p + k * LANES, w); store(p + (k + 1) * LANES, x); }
#define SUMS_BY_PAIRS 0
INLINE void put_and_sum(real*, int64_t, vreal, vreal, vreal&) {}
INLINE void end_weights(real*, int64_t) {}
#define WEIGHTS_OVERWRITE 1  // their scores
INLINE void rescale(const Call&, const Tile&, int64_t, vreal) {}
constexpr int64_t STRIP = TILE_VECTORS;  // columns that go through scores, weights and values together
#define PRODUCT_KEEPS 1  // the value product applies `keep`
