// ---- linear attention token by token, vectors along the columns of the state -----------------------------------------
// For decays and rates that change with the column e, or with d in other ways than as one row: selective scans (Gu and
// Dao, 2023, arXiv 2312.00752). Columns are independent, and a task has some of one batch point:
//
//     S[d, e] = decay(d, e) S[d, e] + k[d] rate(d, e) v[e]          o[e] = sum_d q[d] S[d, e]
//
// What decays and rates read along e is fetched into rows before: once where no token changes it, else for each token.
INLINE int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Room {
    real *q, *k;      // [rows]
    real *v, *out;    // [columns]
    real* state;      // [D][columns]
    real* held[HELD]; // what decays and rates read: [columns], or [D][columns]
    int64_t columns;
    char* whole;
};

// ---- the hooks of this attention come here
static bool reserve(const Call& c, int64_t columns, Room& r) {
    const int64_t rows = rounded(c.D, LANES);
    int64_t all = 2 * rounded(rows, 64) + 2 * rounded(columns, 64) + rounded(c.D * columns, 64);
    for (int n = 0; n < HELD; ++n) all += rounded((HELD_D[n] ? c.D : 1) * columns, 64);
    r.whole = (char*)aligned_alloc(128, rounded(all * (int64_t)sizeof(real), 128));
    if (!r.whole) return false;
    real* at = (real*)r.whole;
    r.columns = columns;
    r.q = at, at += rounded(rows, 64);
    r.k = at, at += rounded(rows, 64);
    r.v = at, at += rounded(columns, 64);
    r.out = at, at += rounded(columns, 64);
    r.state = at, at += rounded(c.D * columns, 64);
    for (int n = 0; n < HELD; ++n) r.held[n] = at, at += rounded((HELD_D[n] ? c.D : 1) * columns, 64);
    return true;
}

static void run_task(const Call& c, const Batch& b, int64_t e0, int64_t width, Room& r) {
    const int64_t D = c.D, columns = r.columns, rows = rounded(D, LANES);
    for (int64_t d = 0; d < D; ++d) {
        real* at = r.state + d * columns;
        if (HAS_STATE) take(state_at(c, b, d) + e0 * c.s_e, c.s_e, width, columns, at);
        else memset(at, 0, columns * sizeof(real));
    }
    fetch<false>(c, b, r, 0, e0, width);
    for (int64_t j = 0; j < c.M; ++j) {
        take(key_at(c, b, j), c.k_d, D, rows, r.k);
        map_key(c, b, j, r.k, rows);
        if (HAS_OUT) {
            take(query_at(c, b, j), c.q_d, D, rows, r.q);
            map_query(c, b, j, r.q, rows);
        }
        take(value_at(c, b, j) + e0 * c.v_e, c.v_e, width, columns, r.v);
        fetch<true>(c, b, r, j, e0, width);
        for (int64_t e = 0; e < columns; e += LANES) {
            const vreal v = load(r.v + e);
            vreal o{};
            for (int64_t d = 0; d < D; ++d) {
                const vreal s = load(r.state + d * columns + e) * decay_at(c, b, r, j, d, e)
                              + v * rate_at(c, b, r, j, d, e) * r.k[d];
                store(r.state + d * columns + e, s);
                o += s * r.q[d];
            }
            store(r.out + e, o);
        }
        if (HAS_OUT) give(r.out, width, out_at(c, b, j) + e0 * c.out_e, c.out_e);
    }
    if (GIVES_STATE)
        for (int64_t d = 0; d < D; ++d)
            give(r.state + d * columns, width, new_state_at(c, b, d) + e0 * c.new_e, c.new_e);
}

static int32_t run(const Call& c) {
    // Columns of a task: their states and what is read along them stay in the nearest cache.
    const int64_t points = batch_count(c), threads = omp_get_max_threads();
    int64_t each = rounded(4096 / (c.D + 1) + 1, LANES);
    const int64_t all = rounded(c.E, LANES);
    if (points == 0 || c.E == 0) return 0;
    each = each < all ? each : all;
    const int64_t parts = (c.E + each - 1) / each, tasks = points * parts, team = threads < tasks ? threads : tasks;
    const auto cleared = [&](Room& r) {
        if (!reserve(c, each, r)) return false;
        memset(r.q, 0, rounded(c.D, LANES) * sizeof(real));
        return true;
    };
    return in_rooms<Room>(team, tasks, cleared, [&](Room& r, int64_t n) {
        const int64_t e0 = n % parts * each;
        run_task(c, batch_at(c, n / parts), e0, c.E - e0 < each ? c.E - e0 : each, r);
    });
}
