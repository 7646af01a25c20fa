// ---- a backward in the compute type: rows of queries and of gradients where they lie, or converted -------------------
// Scores lie as [query][QUERIES]; keys, values and their gradients as columns of lanes, [column][D or E][LANES]; keys once
// more as rows, zeros past the last and past D; dq as rows.
INLINE int64_t padded_d(const Call& c) { return round_to(c.D, LANES); }
INLINE int64_t dk_rows(const Call& c) { return c.D; }
INLINE int64_t dv_rows(const Call& c) { return c.E; }
INLINE int64_t dq_row(const Call& c) { return padded_d(c); }
INLINE int64_t dq_next(const Call&) { return LANES; }
INLINE int64_t dq_member(const Call& c) { return c.M * padded_d(c); }
static size_t k_room(const Call& c) { return QUERIES * c.D * sizeof(real); }
static size_t v_room(const Call& c) { return QUERIES * c.E * sizeof(real); }
static size_t k_rows_room(const Call& c) { return QUERIES * padded_d(c) * sizeof(real); }
static size_t q_room(const Call& c) { return KEYS * c.D * sizeof(real); }
static size_t g_room(const Call& c) { return KEYS * c.E * sizeof(real); }
static size_t turned_room(const Call&, int64_t) { return 0; }
static size_t packed_room() { return 0; }
static void prepare_member(const Call&, const Batch&, int64_t, Work&) {}

INLINE const real* as_real(const real* p) { return p; }
template <class T> INLINE const real* as_real(const T*) { return nullptr; }
template <class T> INLINE Left rows_of(const T* p, int64_t row, int64_t column, int64_t count, int64_t width, void* room) {
    if (const real* own = as_real(p)) return {own, row, column};
    return {plain(p, row, column, count, width, (real*)room), width, 1};
}

static void load_keys(const Call& c, const Batch& b, Tile& t, Work& w) {
    const lane_k* k = lane_k_at(c, b);
    const lane_v* v = lane_v_at(c, b);
    for (int64_t n = 0; n < t.columns; ++n) {
        const lane_k* k_rows[LANES];
        const lane_v* v_rows[LANES];
        for (int64_t l = 0; l < LANES; ++l) {
            const int64_t i = n * LANES + l < t.rows ? t.i0 + n * LANES + l : t.i1 - 1;  // past the last key it again
            k_rows[l] = k + i * c.q_i;
            v_rows[l] = v + i * c.v_i;
            set_lane(t, n * LANES + l, {}, i);
        }
        to_lanes(k_rows, c.q_d, c.D, (real*)w.k + n * c.D * LANES);
        to_lanes(v_rows, c.v_e, c.E, (real*)w.v + n * c.E * LANES);
    }
    for (int64_t r = 0; r < QUERIES; ++r) {
        real* to = (real*)w.k_rows + r * padded_d(c);
        int64_t d = 0;
        if (r < t.rows && c.q_d == 1)
            for (; d + LANES <= c.D; d += LANES) store(to + d, row(k + (t.i0 + r) * c.q_i + d));
        if (r < t.rows)
            for (; d < c.D; ++d) to[d] = value(k[(t.i0 + r) * c.q_i + d * c.q_d]);
        for (; d < padded_d(c); ++d) to[d] = 0;
    }
}

// A block of query rows: queries and gradients of the output.
struct Rows {
    int64_t j0, count;
    Left q, g;
};
static Rows rows_at(const Call& c, const Batch& b, int64_t j0, int64_t count, Work& w) {
    return {j0, count, rows_of(query_at(c, b) + j0 * c.k_j, c.k_j, c.k_d, count, c.D, w.q),
            rows_of(grad_at(c, b) + j0 * c.k_grad_j, c.k_grad_j, c.grad_e, count, c.E, w.g)};
}

static void score_products(const Call& c, const Tile& t, const Rows& at, Work& w) {
    gradient_product<false>(at.count, t.columns, at.q, {(real*)w.k, LANES, c.D * LANES}, c.D, {w.scores, QUERIES, LANES});
    if (NEEDS_SLOPES)
        gradient_product<false>(at.count, t.columns, at.g, {(real*)w.v, LANES, c.E * LANES}, c.E, {w.slopes, QUERIES, LANES});
}
INLINE void pack_column(const Rows&, int64_t, Work&) {}
static void gradient_products(const Call& c, const Tile& t, const Rows& at, const Part& part, Work& w) {
    if (WANTS_V)
        gradient_product<true>(c.E, t.columns, {at.g.at, at.g.step, at.g.row}, {w.scores, QUERIES, LANES}, at.count,
                               {w.dv, LANES, c.E * LANES});
    if (WANTS_K)
        gradient_product<true>(c.D, t.columns, {at.q.at, at.q.step, at.q.row}, {w.slopes, QUERIES, LANES}, at.count,
                               {w.dk, LANES, c.D * LANES});
    if (WANTS_Q)
        gradient_product<true>(at.count, padded_d(c) / LANES, {w.slopes, QUERIES, 1}, {(real*)w.k_rows, padded_d(c), LANES},
                               t.rows, {part.dq + t.g0 * dq_member(c) + at.j0 * padded_d(c), padded_d(c), LANES});
}
