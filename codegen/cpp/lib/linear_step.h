// ---- linear attention: one token -------------------------------------------------------------------------------------
// Decay, what the delta rule takes back, what is written and what is read, in one pass over the state, which is read once
// and written once:
//
//     u   = rate (v - [delta] (k g) S)          S' = g S + k u^T          o = q S'
//
// A step is as long as reading and writing its states. Vectors run along the columns e, or along the channels d where
// those lie next to each other in memory, old and new; a state that lies otherwise is moved by way of a buffer. Under the
// delta rule a block of columns, or some rows of channels, is read twice, the second time from the nearest cache. As in
// `linear.h`, a decay is known as what it is less than one.
constexpr int64_t WIDE = 4;  // vectors of a block of columns
constexpr int64_t ROWS = 4;  // columns that are rows of channels, at a time

// A store of what is not read soon passes by the caches: they need not fetch what it overwrites.
INLINE void stream(real* p, vreal x) {
#ifdef __x86_64__
    asm volatile("vmovntps %1, %0" : "=m"(*(vreal*)p) : "v"(x));
#else
    store(p, x);
#endif
}
INLINE void streamed() {
#ifdef __x86_64__
    __builtin_ia32_sfence();
#endif
}

INLINE int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE real summed(vreal x) {
    real s = 0;
    EACH_LANE(s += x[l])
    return s;
}

// What a thread works with: rows of d, padded with zeros to whole vectors, then rows of e.
struct Room {
    real *q, *k, *g, *less;  // [rows]: query and key, feature maps applied, decays and decays less one
    real* ask;               // [rows]: the key times the decays
    real *v, *out;           // [columns], and a block behind them
    real* block;             // [D][WIDE * LANES]
    real rate;
    char* whole;
};

static bool reserve(const Call& c, Room& r) {
    const int64_t rows = rounded(rounded(c.D, LANES), 64), columns = rounded(c.E + WIDE * LANES, 64);
    const int64_t all = 5 * rows + 2 * columns + c.D * WIDE * LANES;
    r.whole = (char*)aligned_alloc(128, rounded(all * (int64_t)sizeof(real), 128));
    if (!r.whole) return false;
    real* at = (real*)r.whole;
    real **by_d[] = {&r.q, &r.k, &r.g, &r.less, &r.ask}, **by_e[] = {&r.v, &r.out};
    for (real** part : by_d) *part = at, at += rows;
    for (real** part : by_e) *part = at, at += columns;
    r.block = at;
    return true;
}

// What the token brings: its rows, its decays and its rate.
static void prepare(const Call& c, const Batch& b, Room& r, int64_t e0, int64_t width) {
    const int64_t rows = rounded(c.D, LANES);
    take(key_at(c, b, 0), c.k_d, c.D, rows, r.k);
    map_key(c, b, 0, r.k, rows);
    take(query_at(c, b, 0), c.q_d, c.D, rows, r.q);
    map_query(c, b, 0, r.q, rows);
    take(value_at(c, b, 0) + e0 * c.v_e, c.v_e, width, width + WIDE * LANES, r.v);
    decay_of(c, b, 0, r.g, r.less, rows);
    r.rate = rate_of(c, b, 0);
    if (!CHANNELS)
        for (int64_t d = 1; d < rows; ++d) r.g[d] = r.g[0], r.less[d] = r.less[0];
    for (int64_t d = 0; d < rows; d += LANES) store(r.ask + d, load(r.k + d) * load(r.g + d));
}

// V vectors of columns, all channels; `to` may be `from`.
template <int V, bool FAR, class S> static void by_columns(int64_t D, const Room& r, int64_t e, const S* from, int64_t step, real* to,
                                                 int64_t to_step) {
    vreal u[V], o[V];
    for (int x = 0; x < V; ++x) u[x] = o[x] = vreal{};
    if (DELTA)
        for (int64_t d = 0; d < D; ++d)
            for (int x = 0; x < V; ++x) u[x] += row(from + d * step + x * LANES) * r.ask[d];
    for (int x = 0; x < V; ++x) u[x] = (load(r.v + e + x * LANES) - u[x]) * r.rate;
    for (int64_t d = 0; d < D; ++d)
        for (int x = 0; x < V; ++x) {
            const vreal before = row(from + d * step + x * LANES);
            const vreal now = before * r.less[d] + before + u[x] * r.k[d];
            FAR ? stream(to + d * to_step + x * LANES, now) : store(to + d * to_step + x * LANES, now);
            o[x] += now * r.q[d];
        }
    for (int x = 0; x < V; ++x) store(r.out + e + x * LANES, o[x]);
}

// R columns that are rows of channels in memory; whole vectors of channels.
template <int R, bool FAR, class S> static void by_rows(int64_t D, const Room& r, int64_t e, const S* from, int64_t step, real* to,
                                              int64_t to_step) {
    vreal o[R], taken[R];
    real u[R];
    for (int x = 0; x < R; ++x) o[x] = taken[x] = vreal{};
    if (DELTA)
        for (int64_t d = 0; d < D; d += LANES)
            for (int x = 0; x < R; ++x) taken[x] += row(from + x * step + d) * load(r.ask + d);
    for (int x = 0; x < R; ++x) u[x] = (r.v[e + x] - (DELTA ? summed(taken[x]) : 0)) * r.rate;
    for (int64_t d = 0; d < D; d += LANES)
        for (int x = 0; x < R; ++x) {
            const vreal before = row(from + x * step + d);
            const vreal now = before * load(r.less + d) + before + load(r.k + d) * u[x];
            FAR ? stream(to + x * to_step + d, now) : store(to + x * to_step + d, now);
            o[x] += now * load(r.q + d);
        }
    for (int x = 0; x < R; ++x) r.out[e + x] = summed(o[x]);
}

// What of the columns lies well in memory, as far as it does: the columns that are done.
template <bool FAR> static int64_t in_place(const Call& c, const Batch& b, int64_t e0, int64_t width, Room& r) {
    const int64_t D = c.D, new_d = c.s_state[STATE_RANK];
    const state_element* from = state_at(c, b, 0) + e0 * c.s_e;
    real* to = new_state_at(c, b, 0) + e0 * c.new_e;
    int64_t e = 0;
    if (c.s_d == 1 && new_d == 1 && D % LANES == 0) {
        for (; e + ROWS <= width; e += ROWS)
            by_rows<ROWS, FAR>(D, r, e, from + e * c.s_e, c.s_e, to + e * c.new_e, c.new_e);
        for (; e < width; ++e) by_rows<1, FAR>(D, r, e, from + e * c.s_e, c.s_e, to + e * c.new_e, c.new_e);
    } else if (c.s_e == 1 && c.new_e == 1) {
        for (; e + WIDE * LANES <= width; e += WIDE * LANES) by_columns<WIDE, FAR>(D, r, e, from + e, c.s_d, to + e, new_d);
        for (; e + LANES <= width; e += LANES) by_columns<1, FAR>(D, r, e, from + e, c.s_d, to + e, new_d);
    }
    return e;
}

// Whether vectors of the new states are stored whole and aligned, and these are too many to stay in the nearer caches.
static bool is_far(const Call& c) {
    const int64_t new_d = c.s_state[STATE_RANK], bytes = sizeof(real);
    bool whole = (int64_t)c.state % (LANES * bytes) == 0 && (c.new_e == 1 ? new_d : c.new_e) % LANES == 0;
    for (int64_t n = 0; n < STATE_RANK; ++n) whole &= c.s_state[n] % LANES == 0;
    return whole && batch_count(c) * c.D * c.E * bytes >= 1 << 19;
}

static void run_task(const Call& c, const Batch& b, int64_t e0, int64_t width, Room& r, bool far) {
    prepare(c, b, r, e0, width);
    const int64_t D = c.D, new_d = c.s_state[STATE_RANK];
    const state_element* from = state_at(c, b, 0) + e0 * c.s_e;
    real* to = new_state_at(c, b, 0) + e0 * c.new_e;
    int64_t e = far ? in_place<true>(c, b, e0, width, r) : in_place<false>(c, b, e0, width, r);
    for (; e < width; e += WIDE * LANES) {
        const int64_t here = width - e < WIDE * LANES ? width - e : WIDE * LANES, step = WIDE * LANES;
        for (int64_t d = 0; d < D; ++d) take(from + d * c.s_d + e * c.s_e, c.s_e, here, step, r.block + d * step);
        by_columns<WIDE, false>(D, r, e, r.block, step, r.block, step);
        for (int64_t d = 0; d < D; ++d) give(r.block + d * step, here, to + d * new_d + e * c.new_e, c.new_e);
    }
    give(r.out, width, out_at(c, b, 0) + e0 * c.out_e, c.out_e);
}

static int32_t run(const Call& c) {
    const int64_t points = batch_count(c), threads = omp_get_max_threads(), slices = (c.E + WIDE * LANES - 1) / (WIDE * LANES);
    if (points == 0 || slices == 0) return 0;
    int64_t parts = points >= threads ? 1 : (threads + points - 1) / points;
    parts = parts < slices ? parts : slices;
    const int64_t each = (slices + parts - 1) / parts * WIDE * LANES, tasks = points * parts;
    // A thread is worth waking for some ten microseconds of memory.
    const int64_t useful = 1 + points * c.D * c.E / (1 << 16), most = threads < tasks ? threads : tasks;
    const int64_t team = most < useful ? most : useful;
    const bool far = is_far(c);
    int32_t failed = 0;
#pragma omp parallel num_threads(team) if (team > 1)
    {
        Room r;
        const bool ready = reserve(c, r);
        if (!ready) {
#pragma omp atomic write
            failed = OUT_OF_MEMORY;
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < tasks; ++n) {
            const int64_t e0 = n % parts * each;
            if (ready && e0 < c.E) run_task(c, batch_at(c, n / parts), e0, c.E - e0 < each ? c.E - e0 : each, r, far);
        }
        if (far) streamed();
        if (ready) free(r.whole);
    }
    return failed;
}
