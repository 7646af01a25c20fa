// ---- gradients of linear attention, by chunks of C tokens -------------------------------------------------------------
// In a chunk that begins with the state S, [s, t] the product of the decays behind s up to t, [t] of those up to t, and
// rows for tokens (Yang et al., 2024, arXiv 2412.06464):
//
//     M = (k_t . k_s [s, t]) for s < t         A = (q_t . k_s [s, t]) for s <= t         W = k_s [s, C]
//     Y = V - [delta] K[t] S - [delta] M U     U = rate Y
//     O = Q[t] S + A U                         S' = [C] S + W^T U
//
// A first pass keeps the states between chunks, transposed, and Y. The second one goes back over the chunks, with dO, dS':
//
//     dU = A^T dO + W dS' - [delta] M^T dY     dY = rate dU = dV         d rate = rowsum(dU Y)
//     dA = dO U^T,  dM = -dY U^T               d[Q[t]] = dO S^T          d[K[t]] = -dY S^T         dW = U dS'^T
//     dS = [C] dS' + Q[t]^T dO - K[t]^T dY
//
// The gradient of the logarithm of a decay is the sum of what goes over it, each times its own gradient. Over that of t
// go the state before the chunk, to its end and to the tokens from t on, and what tokens s < t write, to the end and to
// the tokens r >= t (of each channel):
//
//     [C] S . dS' + sum_(r >= t) p_r [r] S . dp_r + sum_(s < t) W_s . dW_s + sum_(s < t <= r) (dA A + dM M)_rs
//
// As sum_(r >= t) (p_r . dp_r - w_r . dw_r) it would be the small difference of large sums where decays are strong.
constexpr int64_t C = CHUNK;

struct Room {
    real *q, *k, *g, *less;              // [C][rows]; decays [C][rows] for each channel, else [C]
    real *since, *rest;                  // [C][rows] or [C]: products of the decays up to a token, and behind it
    real *reads_q, *reads_k, *writes;    // [C][rows]: q and k [t], k [s, C]
    real *read_q, *read_k, *written;     // [C][rows]: gradients of q and of k where it reads and where it writes
    real *kT;                            // [rows][C]
    real *y, *u, *o, *du, *dy, *minus;   // [C][cols]; o: the gradient of the output; minus: that of y, less than nothing
    real *uT;                            // [cols][C]
    real *a, *m, *between;               // [C][C]: A, -M, and decays between tokens
    real *da, *dm;                       // [C][C]
    real *rate, *rated;                  // [C]
    real *kept;                          // [rows]: the decays of a chunk less one
    real *decayed;                       // [C][rows] or [C]: gradients of the logarithms
    real *end;                           // [rows]: what the state before the chunk is worth behind it
    real *state, *dstate, *dstateT;      // [rows][cols], the last one [cols][rows]
    real *states;                        // [chunks][cols][rows]: before each chunk, transposed
    real *ys;                            // [chunks][C][cols]
    char* whole;
};

INLINE int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE int64_t chunks(const Call& c) { return (c.N + C - 1) / C; }

static bool reserve(const Call& c, Room& r) {
    const int64_t rows = rounded(c.D, LANES), cols = rounded(c.E, LANES), by_d = C * rows, by_e = C * cols;
    real** parts[] = {&r.q, &r.k, &r.g, &r.less, &r.since, &r.rest, &r.reads_q, &r.reads_k, &r.writes, &r.read_q, &r.read_k,
                      &r.written, &r.kT, &r.y, &r.u, &r.o, &r.du, &r.dy, &r.minus, &r.uT, &r.a, &r.m, &r.between, &r.da,
                      &r.dm, &r.rate, &r.rated, &r.kept, &r.decayed, &r.end, &r.state, &r.dstate, &r.dstateT, &r.states,
                      &r.ys};
    const int64_t sizes[] = {by_d, by_d, by_d, by_d, by_d, by_d, by_d, by_d, by_d, by_d, by_d,
                             by_d, by_d, by_e, by_e, by_e, by_e, by_e, by_e, by_e, C * C, C * C, C * C, C * C,
                             C * C, C, C, rows, by_d, rows, rows * cols, rows * cols, rows * cols,
                             chunks(c) * rows * cols, DELTA ? chunks(c) * by_e : 0};
    int64_t all = 0;
    for (int64_t n : sizes) all += rounded(n, 64) + 64;  // rows of powers of two would share few sets of the cache
    r.whole = (char*)aligned_alloc(128, rounded(all * (int64_t)sizeof(real), 128));
    if (!r.whole) return false;
    real* at = (real*)r.whole;
    for (size_t n = 0; n < sizeof(sizes) / sizeof(*sizes); ++n) *parts[n] = at, at += rounded(sizes[n], 64) + 64;
    return true;
}

INLINE real summed(vreal x) {
    real s = 0;
    EACH_LANE(s += x[l])
    return s;
}
template <class E> INLINE const E* row_of(const E* p, const int64_t* s, const Point& at, int64_t n) {
    return p + at.x * s[0] + at.y * s[1] + n * s[2];
}
template <class E> INLINE E* row_of(E* p, const int64_t* s, const Point& at, int64_t n) {
    return p + at.x * s[0] + at.y * s[1] + n * s[2];
}

// The tokens from `from` on: k, decays, rate, and what comes of them alone; q and the gradient of the output where `back`.
// Tokens behind the last one are as if they were not.
static void prepare(const Call& c, const Point& at, Room& r, int64_t from, bool back) {
    const int64_t rows = rounded(c.D, LANES), cols = rounded(c.E, LANES), wide = CHANNELS ? rows : 1;
    const int64_t count = c.N - from < C ? c.N - from : C;
    for (int64_t t = 0; t < C; ++t) {
        const bool real_one = t < count;
        const int64_t n = from + (real_one ? t : 0), d = real_one ? c.D : 0, e = real_one ? c.E : 0;
        take(row_of(c.t_k, c.s_k, at, n), c.s_k[3], d, rows, r.k + t * rows);
        take(row_of(c.t_v, c.s_v, at, n), c.s_v[3], e, cols, r.y + t * cols);
        if (back) {
            take(row_of(c.t_q, c.s_q, at, n), c.s_q[3], d, rows, r.q + t * rows);
            take(row_of(c.t_o, c.s_o, at, n), c.s_o[3], e, cols, r.o + t * cols);
        }
        r.rate[t] = real_one ? *row_of(c.t_rate, c.s_rate, at, n) : 0;
        real* log = r.less + t * wide;
        take(row_of(c.t_log, c.s_log, at, n), c.s_log[3], real_one ? (CHANNELS ? c.D : 1) : 0, wide, log);
    }
    for (int64_t x = 0; x < C * wide; x += LANES) {
        const vreal log = load(r.less + x);
        store(r.g + x, exp_of(log));
        store(r.less + x, expm1_of(log));
    }
    if (CHANNELS)
        for (int64_t d = 0; d < rows; d += LANES) {
            vreal since = splat(1), taken{}, rest = splat(1);
            for (int64_t x = d; x < C * rows; x += rows) {
                since *= load(r.g + x), taken += load(r.less + x) * (1 + taken);
                store(r.since + x, since);
            }
            for (int64_t x = (C - 1) * rows + d; x >= 0; x -= rows) store(r.rest + x, rest), rest *= load(r.g + x);
            store(r.kept + d, taken);
        }
    if (!CHANNELS) {
        real since = 1, taken = 0, rest = 1;
        for (int64_t t = 0; t < C; ++t) since *= r.g[t], taken += r.less[t] * (1 + taken), r.since[t] = since;
        for (int64_t t = C - 1; t >= 0; --t) r.rest[t] = rest, rest *= r.g[t];
        for (int64_t d = 0; d < rows; ++d) r.kept[d] = taken;
        for (int64_t t = 0; t < C; ++t) {
            real between = 1;
            for (int64_t s = C - 1; s > t; --s) r.between[t * C + s] = 0;
            for (int64_t s = t; s >= 0; --s) r.between[t * C + s] = between, between *= r.g[s];
        }
    }
    for (int64_t t = 0; t < C; ++t)
        for (int64_t d = 0; d < rows; d += LANES) {
            const int64_t x = t * rows + d;
            const vreal since = CHANNELS ? load(r.since + x) : splat(r.since[t]), k = load(r.k + x);
            if (DELTA) store(r.reads_k + x, k * since);
            if (back) store(r.reads_q + x, load(r.q + x) * since);
            store(r.writes + x, k * (CHANNELS ? load(r.rest + x) : splat(r.rest[t])));
        }
    if (!CHANNELS) transpose(r.k, rows, C, rows, r.kT, C);
}

// (p_t . k_s [s, t]) times `sign` for s < t, for s <= t where `own`.
static void meet(const Call& c, Room& r, const real* p, real* to, real sign, bool own) {
    const int64_t rows = rounded(c.D, LANES);
    if (!CHANNELS) {
        multiply(ALL, C, C, c.D, p, rows, 1, r.kT, C, to, C, false);
        for (int64_t t = 0; t < C; ++t) {
            for (int64_t s = 0; s < C; s += LANES)
                store(to + t * C + s, load(to + t * C + s) * load(r.between + t * C + s) * sign);
            if (!own) to[t * C + t] = 0;
        }
        return;
    }
    for (int64_t t = 0; t < C; ++t) {
        vreal sums[C];
        for (int64_t s = 0; s < C; ++s) sums[s] = vreal{};
        for (int64_t d = 0; d < rows; d += LANES) {
            vreal seen = load(p + t * rows + d);
            for (int64_t s = t; s >= 0; --s) {
                sums[s] += seen * load(r.k + s * rows + d);
                seen *= load(r.g + s * rows + d);
            }
        }
        for (int64_t s = 0; s < C; ++s) to[t * C + s] = s < t || (own && s == t) ? sign * summed(sums[s]) : 0;
    }
}

// y and u of a chunk, from the state before it: a triangular system, ROWS tokens at a time.
static void solve(const Call& c, Room& r) {
    const int64_t rows = rounded(c.D, LANES), cols = rounded(c.E, LANES);
    if (DELTA) {
        multiply(ALL, C, cols, c.D, r.reads_k, rows, 1, r.state, cols, r.u, cols, false);
        for (int64_t x = 0; x < C * cols; x += LANES) store(r.y + x, load(r.y + x) - load(r.u + x));
    }
    for (int64_t from = 0; from < C; from += ROWS) {
        if (DELTA)
            multiply(ALL, ROWS, cols, from, r.m + from * C, C, 1, r.u, cols, r.y + from * cols, cols, true);
        for (int64_t t = from; t < from + ROWS; ++t)
            for (int64_t e = 0; e < cols; e += LANES) {
                vreal y = load(r.y + t * cols + e);
                if (DELTA)
                    for (int64_t s = from; s < t; ++s) y += load(r.u + s * cols + e) * r.m[t * C + s];
                store(r.y + t * cols + e, y);
                store(r.u + t * cols + e, y * r.rate[t]);
            }
    }
}

// The states between chunks.
static void forth(const Call& c, const Point& at, Room& r) {
    const int64_t rows = rounded(c.D, LANES), cols = rounded(c.E, LANES);
    for (int64_t d = 0; d < rows; ++d)
        take(row_of(c.t_state, c.s_state, at, d < c.D ? d : 0), c.s_state[3], d < c.D ? c.E : 0, cols, r.state + d * cols);
    for (int64_t chunk = 0; chunk < chunks(c); ++chunk) {
        transpose(r.state, cols, rows, cols, r.states + chunk * rows * cols, rows);
        prepare(c, at, r, chunk * C, false);
        if (DELTA) meet(c, r, r.k, r.m, -1, false);
        solve(c, r);
        if (DELTA) memcpy(r.ys + chunk * C * cols, r.y, C * cols * sizeof(real));
        for (int64_t d = 0; d < rows; ++d)
            for (int64_t e = 0; e < cols; e += LANES) {
                const vreal s = load(r.state + d * cols + e);
                store(r.state + d * cols + e, s + s * r.kept[d]);
            }
        multiply(ALL, rows, cols, C, r.writes, 1, rows, r.u, cols, r.state, cols, true);
    }
}

// dU, dY and the gradient of the rates: the system transposed, from the last token.
static void solve_back(const Call& c, Room& r) {
    const int64_t rows = rounded(c.D, LANES), cols = rounded(c.E, LANES);
    multiply(UPPER, C, cols, C, r.a, 1, C, r.o, cols, r.du, cols, false);
    multiply(ALL, C, cols, c.D, r.writes, rows, 1, r.dstate, cols, r.du, cols, true);
    for (int64_t from = C - ROWS; from >= 0; from -= ROWS) {
        const int64_t end = from + ROWS;
        if (DELTA)
            multiply(ALL, ROWS, cols, C - end, r.m + end * C + from, 1, C, r.dy + end * cols, cols, r.du + from * cols, cols,
                     true);
        for (int64_t s = end - 1; s >= from; --s) {
            vreal rated{};
            for (int64_t e = 0; e < cols; e += LANES) {
                vreal du = load(r.du + s * cols + e);
                if (DELTA)
                    for (int64_t t = s + 1; t < end; ++t) du += load(r.dy + t * cols + e) * r.m[t * C + s];
                rated += du * load(r.y + s * cols + e);
                store(r.dy + s * cols + e, du * r.rate[s]);
                store(r.minus + s * cols + e, -du * r.rate[s]);
            }
            r.rated[s] = summed(rated);
        }
    }
}

// What the states before and behind the chunk have to do with its decays; `written` and what reads are of states alone yet.
static void over_states(const Call& c, Room& r) {
    const int64_t rows = rounded(c.D, LANES);
    for (int64_t d = 0; d < rows; d += LANES) {
        vreal before = load(r.end + d), behind{};
        for (int64_t x = d; x < C * rows; x += rows) {
            store(r.decayed + x, before);
            before += load(r.k + x) * load(r.written + x);
        }
        for (int64_t x = (C - 1) * rows + d; x >= 0; x -= rows) {
            behind += load(r.q + x) * load(r.read_q + x);
            if (DELTA) behind += load(r.k + x) * load(r.read_k + x);
            store(r.decayed + x, load(r.decayed + x) + behind);
        }
    }
    if (CHANNELS) return;
    for (int64_t t = 0; t < C; ++t) {
        vreal sum{};
        for (int64_t d = 0; d < rows; d += LANES) sum += load(r.decayed + t * rows + d);
        r.decayed[t] = summed(sum);  // where a row was that is read
    }
}

// What tokens of the chunk write for others of it: `a` is what each pair is worth.
static void over_decays(Room& r) {
    real worth[C] = {};
    for (int64_t t = C - 1; t >= 0; --t) {
        for (int64_t s = 0; s < C; ++s) worth[s] += r.a[t * C + s];
        for (int64_t s = 0; s < t; ++s) r.decayed[t] += worth[s];
    }
}

// Gradients of q and k of what tokens of the chunk make of each other, onto those of what they make of the state.
static void pairs(const Call& c, Room& r) {
    const int64_t rows = rounded(c.D, LANES);
    if (!CHANNELS) {
        for (int64_t x = 0; x < C * C; x += LANES) {
            const vreal da = load(r.da + x), dm = DELTA ? load(r.dm + x) : vreal{}, between = load(r.between + x);
            store(r.a + x, da * load(r.a + x) - (DELTA ? dm * load(r.m + x) : vreal{}));
            store(r.da + x, da * between);
            if (DELTA) store(r.dm + x, dm * between);
        }
        over_decays(r);
        if (DELTA)
            for (int64_t t = 0; t < C; ++t) r.dm[t * C + t] = 0;
        multiply(LOWER, C, rows, C, r.da, C, 1, r.k, rows, r.read_q, rows, true);
        multiply(UPPER, C, rows, C, r.da, 1, C, r.q, rows, r.written, rows, true);
        if (!DELTA) return;
        multiply(LOWER, C, rows, C, r.dm, C, 1, r.k, rows, r.read_k, rows, true);
        multiply(UPPER, C, rows, C, r.dm, 1, C, r.k, rows, r.written, rows, true);
        return;
    }
    for (int64_t d = 0; d < rows; d += LANES)
        for (int64_t t = 0; t < C; ++t) {
            const vreal q = load(r.q + t * rows + d), own = load(r.k + t * rows + d);
            vreal read_q = load(r.read_q + t * rows + d), read_k = DELTA ? load(r.read_k + t * rows + d) : vreal{};
            vreal between = splat(1), worth[C], over{};
            for (int64_t s = t; s >= 0; --s) {
                const int64_t x = s * rows + d;
                const vreal key = load(r.k + x);
                read_q += key * between * r.da[t * C + s];
                vreal back = q * r.da[t * C + s];
                if (DELTA && s < t) {
                    read_k += key * between * r.dm[t * C + s];
                    back += own * r.dm[t * C + s];
                }
                store(r.written + x, load(r.written + x) + back * between);
                worth[s] = key * (back * between);
                between *= load(r.g + x);
            }
            store(r.read_q + t * rows + d, read_q);
            if (DELTA) store(r.read_k + t * rows + d, read_k);
            for (int64_t s = 0; s < t; ++s) {
                const int64_t x = (s + 1) * rows + d;
                over += worth[s];
                store(r.decayed + x, load(r.decayed + x) + over);
            }
        }
}

static void give_rows(const Call& c, const Point& at, Room& r, int64_t from) {
    const int64_t rows = rounded(c.D, LANES), cols = rounded(c.E, LANES), wide = CHANNELS ? rows : 1;
    const int64_t count = c.N - from < C ? c.N - from : C;
    for (int64_t t = count - 1; t >= 0; --t) {
        const int64_t n = from + t;
        for (int64_t d = 0; d < rows; d += LANES) {
            const int64_t x = t * rows + d;
            store(r.written + x, load(r.written + x) + (DELTA ? load(r.read_k + x) : vreal{}));
        }
        give(r.read_q + t * rows, c.D, row_of(c.dq, c.s_dq, at, n), c.s_dq[3]);
        give(r.written + t * rows, c.D, row_of(c.dk, c.s_dk, at, n), c.s_dk[3]);
        give(r.dy + t * cols, c.E, row_of(c.dv, c.s_dv, at, n), c.s_dv[3]);
        *row_of(c.drate, c.s_drate, at, n) = r.rated[t];
        give(r.decayed + t * wide, CHANNELS ? c.D : 1, row_of(c.dlog, c.s_dlog, at, n), c.s_dlog[3]);
    }
}

static void back(const Call& c, const Point& at, Room& r) {
    const int64_t rows = rounded(c.D, LANES), cols = rounded(c.E, LANES);
    for (int64_t d = 0; d < rows; ++d)
        take(row_of(c.t_dstate, c.s_dstate, at, d < c.D ? d : 0), c.s_dstate[3], d < c.D ? c.E : 0, cols,
             r.dstate + d * cols);
    for (int64_t chunk = chunks(c) - 1; chunk >= 0; --chunk) {
        const real* stateT = r.states + chunk * rows * cols;
        prepare(c, at, r, chunk * C, true);
        if (DELTA) {
            memcpy(r.y, r.ys + chunk * C * cols, C * cols * sizeof(real));
            meet(c, r, r.k, r.m, -1, false);
        }
        for (int64_t t = 0; t < C; ++t)
            for (int64_t e = 0; e < cols; e += LANES) store(r.u + t * cols + e, load(r.y + t * cols + e) * r.rate[t]);
        meet(c, r, r.q, r.a, 1, true);
        solve_back(c, r);
        transpose(r.u, cols, C, cols, r.uT, C);
        transpose(r.dstate, cols, rows, cols, r.dstateT, rows);
        for (int64_t d = 0; d < rows; d += LANES) {
            vreal sum{};
            for (int64_t e = 0; e < c.E; ++e) sum += load(stateT + e * rows + d) * load(r.dstateT + e * rows + d);
            store(r.end + d, sum * (CHANNELS ? load(r.since + (C - 1) * rows + d) : splat(r.since[C - 1])));
        }
        multiply(ALL, C, C, c.E, r.o, cols, 1, r.uT, C, r.da, C, false);
        multiply(ALL, C, rows, c.E, r.o, cols, 1, stateT, rows, r.read_q, rows, false);
        multiply(ALL, C, rows, c.E, r.u, cols, 1, r.dstateT, rows, r.written, rows, false);
        if (DELTA) {
            multiply(ALL, C, C, c.E, r.minus, cols, 1, r.uT, C, r.dm, C, false);
            multiply(ALL, C, rows, c.E, r.minus, cols, 1, stateT, rows, r.read_k, rows, false);
        }
        for (int64_t t = 0; t < C; ++t)
            for (int64_t d = 0; d < rows; d += LANES) {
                const int64_t x = t * rows + d;
                const vreal since = CHANNELS ? load(r.since + x) : splat(r.since[t]);
                store(r.read_q + x, load(r.read_q + x) * since);
                if (DELTA) store(r.read_k + x, load(r.read_k + x) * since);
                store(r.written + x, load(r.written + x) * (CHANNELS ? load(r.rest + x) : splat(r.rest[t])));
            }
        over_states(c, r);
        pairs(c, r);
        give_rows(c, at, r, chunk * C);
        for (int64_t d = 0; d < rows; ++d)
            for (int64_t e = 0; e < cols; e += LANES) {
                const vreal s = load(r.dstate + d * cols + e);
                store(r.dstate + d * cols + e, s + s * r.kept[d]);
            }
        multiply(ALL, rows, cols, C, r.reads_q, 1, rows, r.o, cols, r.dstate, cols, true);
        if (DELTA) multiply(ALL, rows, cols, C, r.reads_k, 1, rows, r.minus, cols, r.dstate, cols, true);
    }
    for (int64_t d = 0; d < c.D; ++d)
        give(r.dstate + d * cols, c.E, row_of(c.dstart, c.s_dstart, at, d), c.s_dstart[3]);
}

static int32_t run(const Call& c) {
    const int64_t points = c.B * c.H, threads = omp_get_max_threads(), team = threads < points ? threads : points;
    if (points == 0) return 0;
    return in_rooms<Room>(team, points, [&](Room& r) { return reserve(c, r); }, [&](Room& r, int64_t n) {
        const Point at{n / c.H, n % c.H};
        forth(c, at, r);
        back(c, at, r);
    });
}
