// ---- tables of what the distance between row and key gives: see slanted_at ------------------------------------------
// One number a distance, for the rows of one group: distance x is at[x - lo]. Neighbouring tiles and blocks meet nearly the
// same distances, so a table follows the visits and only what is new is worked out.
struct Slants {
    int64_t group, lo, hi;
    real* at;
};
static size_t slanted_size() { return SLANTED * SLANT_ROOM * sizeof(real); }

// Distances [from, to), which are those of some row and key, so that nothing is loaded that lies outside.
static void fill_slants(const Call& c, const Batch& b, const Uniform& u, const Tile& t, const Slants& x, int64_t from, int64_t to) {
    for (int64_t n = from; n < to; n += LANES) {
        alignas(64) lane_int lanes[LANES];
        EACH_LANE(lanes[l] = (lane_int)(n + l < to ? n + l : to - 1))
        vint distance;
        memcpy(&distance, lanes, sizeof distance);
        slanted_at(c, b, u, t, 0, distance, x.at + (n - x.lo));
    }
}

// Makes `x` hold distances [from, to) of a tile whose rows are of one group.
static void reach_slants(const Call& c, const Batch& b, const Uniform& u, const Tile& t, Slants& x, int64_t from, int64_t to) {
    constexpr int64_t most = SLANT_ROOM - LANES;
    if (x.group == t.g0 && x.lo <= from && to <= x.hi) return;
    if (x.group != t.g0 || from > x.hi || to < x.lo) x.group = t.g0, x.lo = x.hi = from;
    const int64_t lo = from < x.lo ? from : to - most > x.lo ? to - most : x.lo;
    const int64_t hi = to > x.hi ? to : lo + most < x.hi ? lo + most : x.hi;
    const int64_t kept_lo = lo > x.lo ? lo : x.lo, kept_hi = hi < x.hi ? hi : x.hi;
    for (int64_t n = 0; n < SLANTED && lo != x.lo; ++n)
        memmove(x.at + n * SLANT_ROOM + (kept_lo - lo), x.at + n * SLANT_ROOM + (kept_lo - x.lo), (kept_hi - kept_lo) * sizeof(real));
    x.lo = lo;
    x.hi = hi;
    // The ends are whole vectors: the lower one first keeps what it overlaps for the distances that were there.
    real saved[SLANTED + 1][LANES];
    for (int64_t n = 0; n < SLANTED; ++n) memcpy(saved[n], x.at + n * SLANT_ROOM + (kept_lo - lo), sizeof saved[n]);
    fill_slants(c, b, u, t, x, lo, kept_lo);
    for (int64_t n = 0; n < SLANTED; ++n) memcpy(x.at + n * SLANT_ROOM + (kept_lo - lo), saved[n], sizeof saved[n]);
    fill_slants(c, b, u, t, x, kept_hi, hi);
}

// Points `u` to what the lanes from `at` on need for a block: a table of diagonals, where lanes of the next key begin one
// before, if they hold neighbouring rows; elsewhere a vector a key.
static void bring_slanted(const Call& c, const Batch& b, Uniform& u, const Tile& t, int64_t at, int64_t count, Slants& x) {
    if (t.rows == t.i1 - t.i0) {
        reach_slants(c, b, u, t, x, t.i0 - (u.j0 + count - 1), t.i1 - u.j0);
        u.slanted = x.at + (t.i0 + at - u.j0 - x.lo);
        u.slant = -1;
    } else {
        x.group = -1;
        for (int64_t k = 0; k < count; ++k)
            slanted_at(c, b, u, t, at, lane_values(t, 0, at) - splat_int(u.j0 + k), x.at + k * LANES);
        u.slanted = x.at;
        u.slant = LANES;
    }
}
