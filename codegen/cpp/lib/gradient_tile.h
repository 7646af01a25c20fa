// ---- a tile of a backward: QUERIES keys in lanes, and the blocks of query rows that they are seen by -----------------
// What a tile says of "rows" are keys, of "keys" queries: the attention seen from its keys.
INLINE int64_t round_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// One thread's working memory. Scores and their gradients hold a vector of keys for each query row, `SCORE_ROW` from row to
// row and `SCORE_NEXT` from vector to vector; what else there is says gradient_plain.h or gradient_tiles.h.
struct Work {
    real *scores, *slopes, *dk, *dv, *near, *key_sums, *diagonals, *bases, *deltas, *shares;
    void *k, *v, *k_rows, *q, *g, *turned, *packed;
    char* part;
    Slants slants;
    Tile tile;
};

// What the items of a batch point add up: dq, then the sums of loads, each for all members of its group.
struct Part {
    real* dq;
    real* sums[TERMS + 1];
};

// A row whose lse is so far from zero is off by more than its weights' last digits: they are summed first, and divided by it.
constexpr real FAR = REAL_IS_DOUBLE ? 1024 : 32;
INLINE bool is_far(real lse) { return HAS_SINK == 0 && lse - lse == 0 && (lse > FAR || lse < -FAR); }

// The weights of one vector of keys for query row j, but for what divides all of the row.
template <bool MASKED>
INLINE vreal weights(const Call& c, const Uniform& u, const RowValues& r, int64_t j, real base, const real* s, vmask& visible,
                     vreal& slope, vreal& factor, vreal (&terms)[TERMS + 1]) {
    vreal logit;
    local<MASKED>(c, u, r, j, load(s), visible, logit, slope, factor, terms);
    const vreal p = exp2_weight(logit * SCALE - splat(base));
    return MASKED ? pick(visible, p, vreal{}) : p;
}

// One vector of keys against query row j: the score in `s` becomes the weight that the value's gradient takes, the number in
// `ds`, gradient times value, becomes the gradient of the score. `terms` are the gradients of loads.
template <bool MASKED>
INLINE void derive(const Call& c, const Uniform& u, const RowValues& r, int64_t j, real base, real share, real delta, vmask present,
                   real* s, real* ds, vreal (&terms)[TERMS + 1]) {
    vmask visible = present;
    vreal slope, factor;
    const vreal p = weights<MASKED>(c, u, r, j, base, s, visible, slope, factor, terms) * splat(share);
    const vreal t = p * (load(ds) * factor - splat(delta)), x = t * slope;
    store(s, p * factor);
    store(ds, MASKED ? pick(visible, x, vreal{}) : x);
    for (int n = 0; n < TERMS; ++n) terms[n] = MASKED ? pick(visible, t * terms[n], vreal{}) : t * terms[n];
}

// Sums by distance of a block: those of row n are shifted by n against those of row 0, and a vector that overlaps one just
// written waits for it. So rows n, n + LANES, .. share a table, in which they meet at whole vectors; `add_diagonals` brings
// the LANES tables together.
constexpr int64_t DIAGONALS = QUERIES + KEYS + 2 * LANES;
INLINE real* diagonals_of(const Work& w, int term, int64_t row) { return w.diagonals + (term * LANES + row) * DIAGONALS; }
INLINE void add_diagonals(const Call& c, const Tile& t, int64_t j0, int term, const Part& part, const Work& w) {
    // Of the table of row r, element LANES + p is of distance t.i0 - j0 - r + p - (KEYS - LANES).
    const int64_t first = t.i0 - j0 - (KEYS - LANES) - (LANES - 1) + c.M - 1, all = distances(c);
    real* const sums = part.sums[term] + t.g0 * all;
    for (int64_t p = 0; p + LANES <= QUERIES + KEYS; p += LANES) {
        vreal sum = {};
        for (int64_t r = 0; r < LANES; ++r) sum += load(diagonals_of(w, term, r) + p + 1 + r);
        const int64_t at = first + p;
        if (at >= 0 && at + LANES <= all) store(sums + at, load(sums + at) + sum);
        else
            for (int64_t l = 0; l < LANES; ++l)
                if (at + l >= 0 && at + l < all) sums[at + l] += sum[l];
    }
}

INLINE real sum_of_lanes(vreal x) { real s = 0; EACH_LANE(s += x[l]) return s; }

INLINE vmask present_in(const Tile& t, int64_t column) {
    vmask present;
    EACH_LANE(present[l] = -(mask_int)(column * LANES + l < t.rows))
    return present;
}

// Rows [from, to) of the block from j0 on against one vector of keys: what their weights sum to.
template <bool MASKED>
static void sum_rows(const Call& c, const Tile& t, const Uniform& u, int64_t column, int64_t from, int64_t to, Work& w) {
    const vmask present = MASKED ? present_in(t, column) : splat_mask(true);
    const real *bases = w.bases + t.g0 * c.M, *s = w.scores + column * SCORE_NEXT;
    for (int64_t n = from; n < to; ++n) {
        vmask visible = present;
        vreal slope, factor, terms[TERMS + 1];
        const int64_t j = u.j0 + n;
        const vreal p = weights<MASKED>(c, u, t.values[column], j, bases[j], s + n * SCORE_ROW, visible, slope, factor, terms);
        w.shares[t.g0 * c.M + j] += sum_of_lanes(p);
    }
}

// Rows [from, to) of the block from j0 on against one vector of keys.
template <bool MASKED>
static void derive_rows(const Call& c, const Batch& b, const Tile& t, const Uniform& u, int64_t column, int64_t from, int64_t to,
                        const Part& part, Work& w, vreal (&whole)[TERMS + 1]) {
    const vmask present = MASKED ? present_in(t, column) : splat_mask(true);
    const RowValues& r = t.values[column];
    const real *bases = w.bases + t.g0 * c.M, *deltas = w.deltas + t.g0 * c.M, *shares = w.shares + t.g0 * c.M;
    real *s = w.scores + column * SCORE_NEXT, *ds = w.slopes + column * SCORE_NEXT;
    for (int64_t n = from; n < to; ++n) {
        vreal terms[TERMS + 1];
        const int64_t j = u.j0 + n;
        derive<MASKED>(c, u, r, j, bases[j], shares[j], deltas[j], present, s + n * SCORE_ROW, ds + n * SCORE_ROW, terms);
        for (int x = 0; x < TERMS; ++x) {
            if (OVER[x] == ALL) whole[x] += terms[x];
            if (OVER[x] == QUERY) part.sums[x][t.g0 * c.M + j] += sum_of_lanes(terms[x]);
            if (OVER[x] == PAIR) {
                const int64_t step = sums_step(c, x, 1), lane = column * LANES;
                real* to = sums_at(c, b, x) + j * sums_step(c, x) + (t.i0 + lane) * step;
                if (step == 1 && lane + LANES <= t.rows) store(to, terms[x]);
                else
                    for (int64_t l = 0; l < LANES && lane + l < t.rows; ++l) to[l * step] = terms[x][l];
            }
            if (OVER[x] == KEY) {
                real* to = w.key_sums + (x * QUERIES + column * LANES);
                store(to, load(to) + terms[x]);
            }
            if (OVER[x] == DISTANCE) {
                real* to = diagonals_of(w, x, n % LANES) + LANES + column * LANES + KEYS - LANES - n / LANES * LANES;
                store(to, load(to) + terms[x]);
            }
        }
    }
}
