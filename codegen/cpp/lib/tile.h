// ---- tiles: up to QUERIES query rows in lanes, which see the same keys ----------------------------------------------
struct Tile {
    int64_t rows, columns;  // queries, and vectors of them; lanes past the last query repeat it
    int64_t i0, i1, g0;  // rows i0 <= i < i1 of the groups from g0 on
    int64_t lo, hi;      // hull of the visit
    int64_t spans, hides;
    Span span[MAX_SPANS], hidden[MAX_HIDDEN];  // keys that it visits, and those that some row does not see
    bool few;    // its queries lie in rows: see few.h
    bool near;   // every argument of tanh so far was within what tanh_near is right for
    bool fresh;  // no key block has been added yet, so `o` is not set
    bool lifted;  // its weights are LIFTED times what they are elsewhere, as its values are near the largest number
    real *q, *o; // [columns][D][LANES] and [columns][E][LANES]
    RowValues values[QUERIES / LANES];
    alignas(128) real m[QUERIES], l[QUERIES];     // running maximum and sum, in powers of two
    alignas(128) real top[QUERIES];               // the maximum as a logit, where m is far
    alignas(128) real level[QUERIES], expected[QUERIES];  // of the logits of the last block and of the next, about
    alignas(128) mask_int seen[QUERIES];          // whether any key was visible
#if MAY_DROP
    alignas(128) real share[QUERIES], dropped[QUERIES];  // of a row's weights may be left out; their sum that was
    int64_t visited, keys;                               // so far, and in all
#endif
    alignas(128) lane_int lane[ROW_AXES][QUERIES];  // i, then the folded batch axes
};

template <class... Filters>
INLINE void visit(Tile& t, int64_t lo, int64_t hi, int64_t from, int64_t to, Filters... filters) {
    Span& s = t.span[t.spans];
    s = {lo < from ? from : lo, hi > to ? to : hi, 0, 0, {}, {}};
    (add(s, filters), ...);
    if (s.hi <= s.lo) return;
    t.lo = s.lo < t.lo ? s.lo : t.lo;
    t.hi = s.hi > t.hi ? s.hi : t.hi;
    ++t.spans;
}
template <class... Filters> INLINE void hide(Tile& t, int64_t lo, int64_t hi, int64_t keys, Filters... filters) {
    Span& s = t.hidden[t.hides];
    s = {lo < 0 ? 0 : lo, hi < keys ? hi : keys, 0, 0, {}, {}};
    (add(s, filters), ...);
    t.hides += s.hi > s.lo;
}

INLINE bool lies_in_rows(const Tile& t) { return MOST_FEW > 0 && t.few; }

// The first key from `j` on that the tile visits, or its end; and the end of the run that begins there, gaps too small
// to gain by taken in.
INLINE int64_t first_key(const Tile& t, int64_t j) {
    int64_t first = t.hi > j ? t.hi : j;
    for (int64_t s = 0; s < t.spans; ++s)
        if (t.span[s].hi > j) {
            const int64_t x = first_key(t.span[s], j);
            first = x < t.span[s].hi && x < first ? x : first;
        }
    return first;
}
INLINE int64_t run_end(const Tile& t, int64_t j, int64_t most) {
    for (int64_t end = j;;) {
        const int64_t next = first_key(t, end);
        if (end >= most || next >= most || next >= t.hi || (end > j && next - end >= LEAST_GAP)) return end < most ? end : most;
        end = next + 1;
        for (int64_t s = 0; s < t.spans; ++s)
            if (t.span[s].lo <= next && next < t.span[s].hi && first_key(t.span[s], next) == next) {
                const int64_t x = run_end(t.span[s], next);
                end = x > end ? x : end;
            }
    }
}

// The longest run of keys of the block that every row of the tile sees, of the first few.
INLINE void full_run(const Tile& t, int64_t j0, int64_t count, int64_t& from, int64_t& to) {
    const int64_t end = j0 + count;
    from = to = count;
    int64_t j = j0;
    for (int round = 0; round < 2 * ROUNDS && j < end; ++round) {
        int64_t next = end, past = j;
        for (int64_t n = 0; n < t.hides; ++n) {
            const Span& s = t.hidden[n];
            if (s.hi <= j) continue;
            const int64_t first = first_key(s, j);
            if (first == j) past = run_end(s, j) > past ? run_end(s, j) : past;
            else if (first < s.hi && first < next) next = first;
        }
        if (past == j && next - j > to - from) from = j - j0, to = next - j0;
        j = past == j ? next : past;
    }
}

// Axis `n` of the rows (0 is i) at LANES lanes from `at` on.
INLINE vint lane_values(const Tile& t, int n, int64_t at) { return *(const vint*)&t.lane[n][at]; }
