// ---- operands in the compute type: queries in lanes, keys and values where they lie or converted --------------------
static size_t q_scratch(const Call& c) { return (size_t)c.D * QUERIES * sizeof(real); }
static size_t k_scratch(const Call& c) { return (size_t)c.D * KEYS * sizeof(real); }
static size_t v_scratch(const Call& c) { return (size_t)c.E * KEYS * sizeof(real); }

static void load_queries(const Call& c, const q_element* const (&rows)[LANES], real* q, int64_t lane, int64_t ld) {
    to_lanes(rows, c.q_d, c.D, q + lane, ld);
}

struct Block {
    int64_t j0, count;  // keys j0 <= j < j0 + count
    const real *k, *v;
    int64_t k_row, k_col, v_row, v_col;
};

INLINE const real* compute_type(const real* p) { return p; }
template <class T> INLINE const real* compute_type(const T*) { return nullptr; }

// Keys [j0, j0 + count) of a batch point whose first key is at k, first value at v.
static Block load_block(const Call& c, const k_element* k, const v_element* v, int64_t j0, int64_t count, real* k_at,
                        real* v_at) {
    k += j0 * c.k_j;
    v += j0 * c.v_j;
    Block x = {j0, count, compute_type(k), compute_type(v), c.k_j, c.k_d, c.v_j, c.v_e};
    if (!x.k) x.k = plain(k, c.k_j, c.k_d, count, c.D, k_at), x.k_row = c.D, x.k_col = 1;
    if (!x.v) x.v = plain(v, c.v_j, c.v_e, count, c.E, v_at), x.v_row = c.E, x.v_col = 1;
    return x;
}
