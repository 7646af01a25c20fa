// ---- linear attention: blocks of T tokens in registers ---------------------------------------------------------------
// A block of T tokens reads and writes the state once. With S the state before it, g the decays, and [s, t] the product
// of the decays behind s up to t:
//
//     u_t  = rate_t (v_t - [delta] (k_t [.., t]) S - [delta] sum_(s < t) (k_t . k_s [s, t]) u_s)
//     o_t  = (q_t [.., t]) S + sum_(s <= t) (q_t . k_s [s, t]) u_s
//     S'   = [.., T] S + sum_s (k_s [s, T]) u_s
//
// Products of at most T decays are formed, never a quotient or an exponential of a sum, so that nothing overflows and a
// decay of zero is one. What a block takes from the state is kept as a difference: 1 - decay is known to all its digits
// where the decay is near one, and a state that lasts for thousands of tokens is rounded, not bent. Columns of the state are independent: a task is some columns of one batch point, a slice is what
// stays in registers of a row of the state.
constexpr int64_t T = TOKENS;             // of a block
constexpr int64_t BLOCKS = 8;             // of a chunk, whose tokens are prepared together
constexpr int64_t CHUNK = T * BLOCKS;
constexpr int64_t SLICE = VECTORS * LANES;  // columns

INLINE int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What a thread works with; rows of d are padded with zeros to whole vectors.
struct Room {
    real *q, *k;          // [CHUNK][rows]: queries and keys, feature maps applied
    real *g, *less;       // decays, and decays less one: [CHUNK][rows] where each channel has its own, else [CHUNK]
    real *read, *ask, *write;  // [BLOCKS][D][T]: q, k up to their token, k behind it
    real* kept;           // [BLOCKS][rows]: the decay of a block less one
    real *of_q, *of_k;    // [BLOCKS][T][T]
    real *rate, *weight;  // [CHUNK]
    real* total;          // [rows]: the sum of the keys so far
    real *v, *out;        // [CHUNK][columns]
    real* state;          // [columns / SLICE][D][SLICE]
    char* whole;
};

INLINE int64_t padded_rows(const Call& c) { return rounded(c.D, LANES); }

static bool reserve(const Call& c, int64_t columns, Room& r) {
    const int64_t rows = padded_rows(c);
    real** parts[] = {&r.q, &r.k, &r.g, &r.less, &r.read, &r.ask, &r.write, &r.kept, &r.of_q, &r.of_k, &r.rate, &r.weight,
                      &r.total, &r.v, &r.out, &r.state};
    const int64_t sizes[] = {CHUNK * rows, CHUNK * rows, CHUNK * rows, CHUNK * rows, CHUNK * rows, CHUNK * rows,
                             CHUNK * rows, BLOCKS * rows, CHUNK * T, CHUNK * T, CHUNK, CHUNK, rows, CHUNK * columns,
                             CHUNK * columns, rows * columns};
    int64_t all = 0;
    for (int64_t n : sizes) all += rounded(n, 64);
    r.whole = (char*)aligned_alloc(128, rounded(all * (int64_t)sizeof(real), 128));
    if (!r.whole) return false;
    real* at = (real*)r.whole;
    for (int n = 0; n < 16; ++n) {
        *parts[n] = at;
        at += rounded(sizes[n], 64);
    }
    return true;
}

INLINE real summed(vreal x) {
    real s = 0;
    EACH_LANE(s += x[l])
    return s;
}
INLINE real dot(const real* a, const real* b, int64_t rows) {
    vreal s{};
    for (int64_t d = 0; d < rows; d += LANES) s += load(a + d) * load(b + d);
    return summed(s);
}

// Keys, values, decays and rates of the tokens [from, from + count), and what comes of them alone; queries too where
// they see the past. Tokens up to the end of the last block are as if they were not.
static void prepare(const Call& c, const Batch& b, Room& r, int64_t from, int64_t count, int64_t e0, int64_t columns,
                    int64_t width) {
    const int64_t rows = padded_rows(c), filled = rounded(count, T);
    for (int64_t t = 0; t < filled; ++t) {
        real *k = r.k + t * rows, *q = r.q + t * rows, *v = r.v + t * columns;
        real *g = r.g + (CHANNELS ? t * rows : t), *less = r.less + (CHANNELS ? t * rows : t);
        const int64_t j = from + t;
        if (t >= count) {
            memset(k, 0, rows * sizeof(real));
            memset(v, 0, columns * sizeof(real));
            if (PAST) memset(q, 0, rows * sizeof(real));
            for (int64_t d = 0; d < (CHANNELS ? rows : 1); ++d) g[d] = 1, less[d] = 0;
            r.rate[t] = r.weight[t] = 0;
            continue;
        }
        take(key_at(c, b, j), c.k_d, c.D, rows, k);
        map_key(c, b, j, k, rows);
        take(value_at(c, b, j) + e0 * c.v_e, c.v_e, width, columns, v);
        decay_of(c, b, j, g, less, rows);
        r.rate[t] = rate_of(c, b, j);
        if (!PAST) continue;
        take(query_at(c, b, j), c.q_d, c.D, rows, q);
        map_query(c, b, j, q, rows);
        if (WEIGHED) {
            for (int64_t d = 0; d < rows; d += LANES) store(r.total + d, load(r.total + d) + load(k + d));
            r.weight[t] = dot(q, r.total, rows);
        }
    }
    if (WEIGHED && !PAST)
        for (int64_t t = 0; t < count; ++t)
            for (int64_t d = 0; d < rows; d += LANES) store(r.total + d, load(r.total + d) + load(r.k + t * rows + d));
}

// [s, t] of a block for one decay a token, and what the block makes of its queries and keys.
static void meet(const Call& c, Room& r, int64_t block) {
    const int64_t rows = padded_rows(c), D = c.D;
    const real *q = r.q + block * T * rows, *k = r.k + block * T * rows;
    real *read = r.read + block * D * T, *ask = r.ask + block * D * T, *write = r.write + block * D * T;
    real *of_q = r.of_q + block * T * T, *of_k = r.of_k + block * T * T, *kept = r.kept + block * rows;
    if (!CHANNELS) {
        const real* g = r.g + block * T;
        real since[T], rest[T];
        for (int64_t t = 0; t < T; ++t) since[t] = t ? since[t - 1] * g[t] : g[0];
        rest[T - 1] = 1;
        for (int64_t t = T - 1; t > 0; --t) rest[t - 1] = rest[t] * g[t];
        real taken = 0;
        for (int64_t t = 0; t < T; ++t) taken += r.less[block * T + t] * (1 + taken);
        for (int64_t d = 0; d < rows; ++d) kept[d] = taken;
        for (int64_t d = 0; d < D; ++d)
            for (int64_t t = 0; t < T; ++t) {
                if (PAST) read[d * T + t] = q[t * rows + d] * since[t];
                if (DELTA) ask[d * T + t] = k[t * rows + d] * since[t];
                write[d * T + t] = k[t * rows + d] * rest[t];
            }
        vreal a[T][T], m[T][T];
        for (int64_t t = 0; t < T; ++t)
            for (int64_t s = 0; s < T; ++s) a[t][s] = m[t][s] = vreal{};
        for (int64_t d = 0; d < rows; d += LANES)
            for (int64_t t = 0; t < T; ++t)
                for (int64_t s = 0; s <= t; ++s) {
                    const vreal key = load(k + s * rows + d);
                    if (PAST) a[t][s] += load(q + t * rows + d) * key;
                    if (DELTA && s < t) m[t][s] += load(k + t * rows + d) * key;
                }
        for (int64_t t = 0; t < T; ++t) {
            real between = 1;
            for (int64_t s = t; s >= 0; --s) {
                if (PAST) of_q[t * T + s] = summed(a[t][s]) * between;
                if (DELTA && s < t) of_k[t * T + s] = summed(m[t][s]) * between;
                between *= g[s];
            }
        }
        return;
    }
    const real *g = r.g + block * T * rows, *less = r.less + block * T * rows;
    vreal a[T][T], m[T][T];
    for (int64_t t = 0; t < T; ++t)
        for (int64_t s = 0; s < T; ++s) a[t][s] = m[t][s] = vreal{};
    for (int64_t d = 0; d < rows; d += LANES) {
        vreal since = splat(1), taken{}, all_q[T], all_k[T], rest[T];
        for (int64_t t = 0; t < T; ++t) {
            since *= load(g + t * rows + d);
            taken += load(less + t * rows + d) * (1 + taken);
            all_q[t] = load(q + t * rows + d) * since;
            all_k[t] = load(k + t * rows + d) * since;
        }
        store(kept + d, taken);
        vreal behind = splat(1);
        for (int64_t t = T - 1; t >= 0; --t) {
            rest[t] = load(k + t * rows + d) * behind;
            behind *= load(g + t * rows + d);
        }
        for (int64_t t = 0; t < T; ++t) {
            vreal between = splat(1);
            for (int64_t s = t; s >= 0; --s) {
                const vreal key = load(k + s * rows + d) * between;
                if (PAST) a[t][s] += load(q + t * rows + d) * key;
                if (DELTA && s < t) m[t][s] += load(k + t * rows + d) * key;
                between *= load(g + s * rows + d);
            }
        }
        for (int64_t l = 0; l < LANES && d + l < D; ++l)
            for (int64_t t = 0; t < T; ++t) {
                if (PAST) read[(d + l) * T + t] = all_q[t][l];
                if (DELTA) ask[(d + l) * T + t] = all_k[t][l];
                write[(d + l) * T + t] = rest[t][l];
            }
    }
    for (int64_t t = 0; t < T; ++t)
        for (int64_t s = 0; s <= t; ++s) {
            if (PAST) of_q[t * T + s] = summed(a[t][s]);
            if (DELTA && s < t) of_k[t * T + s] = summed(m[t][s]);
        }
}

// A block over one slice of the state.
static void advance(const Call& c, const Room& r, int64_t block, int64_t columns, int64_t slice) {
    const int64_t D = c.D, rows = padded_rows(c);
    real* state = r.state + slice * D * SLICE;
    const real *read = r.read + block * D * T, *ask = r.ask + block * D * T, *write = r.write + block * D * T;
    const real *of_q = r.of_q + block * T * T, *of_k = r.of_k + block * T * T, *kept = r.kept + block * rows;
    const int64_t place = block * T * columns + slice * SLICE;
    vreal o[T][VECTORS], u[T][VECTORS];
    for (int64_t t = 0; t < T; ++t)
        for (int64_t x = 0; x < VECTORS; ++x) o[t][x] = u[t][x] = vreal{};
    if (PAST || DELTA)
        for (int64_t d = 0; d < D; ++d) {
            vreal s[VECTORS];
            for (int64_t x = 0; x < VECTORS; ++x) s[x] = load(state + d * SLICE + x * LANES);
            for (int64_t t = 0; t < T; ++t)
                for (int64_t x = 0; x < VECTORS; ++x) {
                    if (PAST) o[t][x] += s[x] * read[d * T + t];
                    if (DELTA) u[t][x] += s[x] * ask[d * T + t];
                }
        }
    for (int64_t t = 0; t < T; ++t)
        for (int64_t x = 0; x < VECTORS; ++x) {
            vreal y = load(r.v + place + t * columns + x * LANES);
            if (DELTA) {
                y -= u[t][x];
                for (int64_t s = 0; s < t; ++s) y -= u[s][x] * of_k[t * T + s];
            }
            u[t][x] = y * r.rate[block * T + t];
            if (PAST) {
                for (int64_t s = 0; s <= t; ++s) o[t][x] += u[s][x] * of_q[t * T + s];
                store(r.out + place + t * columns + x * LANES, o[t][x]);
            }
        }
    for (int64_t d = 0; d < D; ++d)
        for (int64_t x = 0; x < VECTORS; ++x) {
            const vreal before = load(state + d * SLICE + x * LANES);
            vreal s = before * kept[d] + before;
            for (int64_t t = 0; t < T; ++t) s += u[t][x] * write[d * T + t];
            store(state + d * SLICE + x * LANES, s);
        }
}

// The outputs of queries that see all keys: T of them at a time.
static void look_up(const Call& c, const Batch& b, Room& r, int64_t from, int64_t count, int64_t columns) {
    const int64_t rows = padded_rows(c), D = c.D;
    for (int64_t t = 0; t < T; ++t) {
        real* q = r.q + t * rows;
        if (t >= count) {
            memset(q, 0, rows * sizeof(real));
            continue;
        }
        take(query_at(c, b, from + t), c.q_d, D, rows, q);
        map_query(c, b, from + t, q, rows);
        if (WEIGHED) r.weight[t] = dot(q, r.total, rows);
    }
    for (int64_t slice = 0; slice * SLICE < columns; ++slice) {
        const real* state = r.state + slice * D * SLICE;
        vreal o[T][VECTORS];
        for (int64_t t = 0; t < T; ++t)
            for (int64_t x = 0; x < VECTORS; ++x) o[t][x] = vreal{};
        for (int64_t d = 0; d < D; ++d)
            for (int64_t x = 0; x < VECTORS; ++x) {
                const vreal s = load(state + d * SLICE + x * LANES);
                for (int64_t t = 0; t < T; ++t) o[t][x] += s * r.q[t * rows + d];
            }
        for (int64_t t = 0; t < T; ++t)
            for (int64_t x = 0; x < VECTORS; ++x) store(r.out + t * columns + slice * SLICE + x * LANES, o[t][x]);
    }
}

static void write_rows(const Call& c, const Batch& b, Room& r, int64_t from, int64_t count, int64_t e0, int64_t columns,
                       int64_t width) {
    if (!HAS_OUT) return;
    for (int64_t t = 0; t < count; ++t) {
        real* o = r.out + t * columns;
        if (WEIGHED) {
            const real z = over_of(c, b, r.weight[t]);
            for (int64_t e = 0; e < width; ++e) o[e] /= z;
        }
        give(o, width, out_at(c, b, from + t) + e0 * c.out_e, c.out_e);
    }
}

static void run_task(const Call& c, const Batch& b, int64_t e0, int64_t width, Room& r) {
    const int64_t columns = rounded(width, SLICE), D = c.D;
    memset(r.total, 0, padded_rows(c) * sizeof(real));
    for (int64_t d = 0; d < D; ++d)
        for (int64_t slice = 0; slice * SLICE < columns; ++slice) {
            real* at = r.state + (slice * D + d) * SLICE;
            const int64_t here = width - slice * SLICE < SLICE ? width - slice * SLICE : SLICE;
            if (HAS_STATE) take(state_at(c, b, d) + (e0 + slice * SLICE) * c.s_e, c.s_e, here, SLICE, at);
            else memset(at, 0, SLICE * sizeof(real));
        }
    for (int64_t from = 0; from < c.M; from += CHUNK) {
        const int64_t count = c.M - from < CHUNK ? c.M - from : CHUNK;
        prepare(c, b, r, from, count, e0, columns, width);
        const int64_t blocks = (count + T - 1) / T;
        for (int64_t block = 0; block < blocks; ++block) meet(c, r, block);
        for (int64_t slice = 0; slice * SLICE < columns; ++slice)
            for (int64_t block = 0; block < blocks; ++block) advance(c, r, block, columns, slice);
        if (PAST) write_rows(c, b, r, from, count, e0, columns, width);
    }
    if (!PAST && HAS_OUT)
        for (int64_t from = 0; from < c.N; from += T) {
            const int64_t count = c.N - from < T ? c.N - from : T;
            look_up(c, b, r, from, count, columns);
            write_rows(c, b, r, from, count, e0, columns, width);
        }
    if (GIVES_STATE)
        for (int64_t d = 0; d < D; ++d)
            for (int64_t slice = 0; slice * SLICE < columns; ++slice) {
                const int64_t here = width - slice * SLICE < SLICE ? width - slice * SLICE : SLICE;
                give(r.state + (slice * D + d) * SLICE, here, new_state_at(c, b, d) + (e0 + slice * SLICE) * c.new_e,
                     c.new_e);
            }
}

static int32_t run(const Call& c) {
    const int64_t points = batch_count(c), threads = omp_get_max_threads();
    const int64_t slices = (c.E + SLICE - 1) / SLICE;
    if (points == 0 || slices == 0) return 0;
    // Each task prepares its tokens, so that a batch point is shared out only where there are too few of them.
    int64_t parts = points >= 2 * threads ? 1 : (2 * threads + points - 1) / points;
    parts = threads == 1 ? 1 : parts < slices ? parts : slices;
    const int64_t each = (slices + parts - 1) / parts * SLICE, tasks = points * parts;
    const int64_t team = threads < tasks ? threads : tasks;
    return in_rooms<Room>(team, tasks, [&](Room& r) { return reserve(c, each, r); }, [&](Room& r, int64_t n) {
        const int64_t e0 = n % parts * each;
        if (e0 < c.E) run_task(c, batch_at(c, n / parts), e0, c.E - e0 < each ? c.E - e0 : each, r);
    });
}
