// ---- a tile of a backward: QUERIES keys in lanes, and the blocks of query rows that they are seen by -----------------
// What it says of "rows" are keys, of "keys" queries: the attention seen from its keys.
INLINE int64_t round_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
INLINE int64_t padded_d(const Call& c) { return round_to(c.D, LANES); }

// One thread's working memory of a tile. Scores and their gradients lie as [query][QUERIES]; keys, values and their
// gradients as columns of lanes, [column][D or E][LANES]; keys once more as rows, zeros past the last and past D.
struct Work {
    real *scores, *slopes, *k, *v, *k_rows, *dk, *dv, *q, *g, *near, *key_sums;
    Slants slants;
    Tile tile;
};

// What the items of a batch point add up: dq, then the sums of loads, each for all members of its group.
struct Part {
    real* dq;
    real* sums[TERMS + 1];
};

// A block of query rows: queries and gradients of the output, in the compute type.
struct Rows {
    int64_t j0, count;
    Left q, g;
};
INLINE const real* as_real(const real* p) { return p; }
template <class T> INLINE const real* as_real(const T*) { return nullptr; }
template <class T>
INLINE Left rows_of(const T* p, int64_t row, int64_t column, int64_t count, int64_t width, real* room) {
    if (const real* own = as_real(p)) return {own, row, column};
    return {plain(p, row, column, count, width, room), width, 1};
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
        to_lanes(k_rows, c.q_d, c.D, w.k + n * c.D * LANES);
        to_lanes(v_rows, c.v_e, c.E, w.v + n * c.E * LANES);
    }
    for (int64_t r = 0; r < QUERIES; ++r) {
        real* to = w.k_rows + r * padded_d(c);
        int64_t d = 0;
        if (r < t.rows && c.q_d == 1)
            for (; d + LANES <= c.D; d += LANES) store(to + d, row(k + (t.i0 + r) * c.q_i + d));
        if (r < t.rows)
            for (; d < c.D; ++d) to[d] = value(k[(t.i0 + r) * c.q_i + d * c.q_d]);
        for (; d < padded_d(c); ++d) to[d] = 0;
    }
}

// One vector of keys against query row j: the score in `s` becomes the weight of the gradient that is the value's, the one in
// `ds`, gradient times value, becomes the score's. `terms` are the gradients of loads.
template <bool MASKED>
INLINE void derive(const Call& c, const Uniform& u, const RowValues& r, int64_t j, real base, real delta, vmask present,
                   real* s, real* ds, vreal (&terms)[TERMS + 1]) {
    vmask visible = present;
    vreal logit, slope, factor;
    local<MASKED>(c, u, r, j, load(s), visible, logit, slope, factor, terms);
    vreal p = exp2_weight(logit * SCALE - splat(base));
    if (MASKED) p = pick(visible, p, vreal{});
    const vreal t = p * (load(ds) * factor - splat(delta)), x = t * slope;
    store(s, p * factor);
    store(ds, MASKED ? pick(visible, x, vreal{}) : x);
    for (int n = 0; n < TERMS; ++n) terms[n] = MASKED ? pick(visible, t * terms[n], vreal{}) : t * terms[n];
}

INLINE real sum_of_lanes(vreal x) { real s = 0; EACH_LANE(s += x[l]) return s; }

// Row n of the table of a term's sums that a query row's terms are added to.
template <bool MASKED>
static void derive_rows(const Call& c, const Tile& t, const Uniform& u, int64_t column, const Rows& at, int64_t from, int64_t to,
                        const real* bases, const real* deltas, const Part& part, Work& w, vreal (&whole)[TERMS + 1]) {
    vmask present = splat_mask(true);
    if (MASKED) EACH_LANE(present[l] = -(mask_int)(column * LANES + l < t.rows))
    const RowValues& r = t.values[column];
    for (int64_t n = from; n < to; ++n) {
        vreal terms[TERMS + 1];
        const int64_t j = at.j0 + n;
        real* s = w.scores + n * QUERIES + column * LANES;
        derive<MASKED>(c, u, r, j, bases[j], deltas[j], present, s, w.slopes + n * QUERIES + column * LANES, terms);
        for (int x = 0; x < TERMS; ++x) {
            if (OVER[x] == ALL) whole[x] += terms[x];
            if (OVER[x] == QUERY) part.sums[x][t.g0 * c.M + j] += sum_of_lanes(terms[x]);
            if (OVER[x] == KEY) {
                real* to = w.key_sums + (x * QUERIES + column * LANES);
                store(to, load(to) + terms[x]);
            }
            if (OVER[x] == DISTANCE) {
                real* to = part.sums[x] + t.g0 * distances(c) + (t.i0 + column * LANES - j + c.M - 1);
                store(to, load(to) + terms[x]);
            }
        }
    }
}

// Everything that one tile of keys and one block of query rows of member `t.g0` of the group give.
static void add_block(const Call& c, const Batch& b, Tile& t, const Rows& at, const real* bases, const real* deltas,
                      const Part& part, Work& w) {
    const int64_t columns = t.columns;
    gradient_product<false>(at.count, columns, at.q, {w.k, LANES, c.D * LANES}, c.D, {w.scores, QUERIES, LANES});
    if (NEEDS_SLOPES)
        gradient_product<false>(at.count, columns, at.g, {w.v, LANES, c.E * LANES}, c.E, {w.slopes, QUERIES, LANES});
    int64_t from, to;
    full_run(t, at.j0, at.count, from, to);
    if (t.rows < columns * LANES) from = to = at.count;
    Uniform u = uniform(c, b, t);
    u.near = w.near;
    u.j0 = at.j0;
    vreal whole[TERMS + 1];
    for (int x = 0; x < TERMS; ++x) whole[x] = vreal{};
    for (int64_t column = 0; column < columns; ++column) {
        if (STAGED) bring_near(c, u, t.values[column], at.count, w.near);
        if (SLANTED) bring_slanted(c, b, u, t, column * LANES, at.count, w.slants);
        derive_rows<true>(c, t, u, column, at, 0, from, bases, deltas, part, w, whole);
        derive_rows<false>(c, t, u, column, at, from, to, bases, deltas, part, w, whole);
        derive_rows<true>(c, t, u, column, at, to, at.count, bases, deltas, part, w, whole);
    }
    for (int x = 0; x < TERMS; ++x)
        if (OVER[x] == ALL) part.sums[x][t.g0] += sum_of_lanes(whole[x]);
    if (WANTS_V)
        gradient_product<true>(c.E, columns, {at.g.at, at.g.step, at.g.row}, {w.scores, QUERIES, LANES}, at.count,
                               {w.dv, LANES, c.E * LANES});
    if (WANTS_K)
        gradient_product<true>(c.D, columns, {at.q.at, at.q.step, at.q.row}, {w.slopes, QUERIES, LANES}, at.count,
                               {w.dk, LANES, c.D * LANES});
    if (WANTS_Q)
        gradient_product<true>(at.count, padded_d(c) / LANES, {w.slopes, QUERIES, 1}, {w.k_rows, padded_d(c), LANES}, t.rows,
                               {part.dq + (t.g0 * c.M + at.j0) * padded_d(c), padded_d(c), LANES});
}
