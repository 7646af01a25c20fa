// ---- tiles: up to QUERIES query rows in lanes, which see the same keys ----------------------------------------------
struct Tile {
    int64_t rows, columns;  // queries, and vectors of them; lanes past the last query repeat it
    int64_t i0, i1, g0;  // rows i0 <= i < i1 of the groups from g0 on
    int64_t lo, hi;      // hull of the visit
    int64_t spans, span_lo[MAX_SPANS], span_hi[MAX_SPANS];
    int64_t fulls, full_lo[MAX_SPANS], full_hi[MAX_SPANS];
    bool few;    // its queries lie in rows: see few.h
    bool fresh;  // no key block has been added yet, so `o` is not set
    real *q, *o; // [columns][D][LANES] and [columns][E][LANES]
    RowValues values[QUERIES / LANES];
    alignas(128) real m[QUERIES], l[QUERIES];     // running maximum and sum, in powers of two
    alignas(128) mask_int seen[QUERIES];          // whether any key was visible
    alignas(128) lane_int lane[ROW_AXES][QUERIES];  // i, then the folded batch axes
};

static void visit(Tile& t, int64_t lo, int64_t hi, int64_t from, int64_t to) {
    lo = lo < from ? from : lo;
    hi = hi > to ? to : hi;
    if (hi <= lo) return;
    t.lo = lo < t.lo ? lo : t.lo;
    t.hi = hi > t.hi ? hi : t.hi;
    t.span_lo[t.spans] = lo;
    t.span_hi[t.spans++] = hi;
}
static void see_all(Tile& t, int64_t lo, int64_t hi) {
    if (hi <= lo) return;
    t.full_lo[t.fulls] = lo;
    t.full_hi[t.fulls++] = hi;
}

// Axis `n` of the rows (0 is i) at LANES lanes from `at` on.
INLINE vint lane_values(const Tile& t, int n, int64_t at) { return *(const vint*)&t.lane[n][at]; }
