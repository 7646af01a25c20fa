// ---- keys that weigh next to nothing: their values are not read ------------------------------------------------------
// Of each row a share of its weights may be left out. What the weights of a block sum to is known before its values are read:
//     dropped + sum < share * (the sum of those kept so far) * (keys visited so far) / (keys that the tile visits)
// Sums only grow while the maximum stays, so what holds against the sum so far holds against the whole; the last factor
// leaves some of the share to later blocks. Every row of a column must agree. A tile's first block is always kept, and blocks
// are taken from the last to the second, as the first and the nearest keys weigh most.
#if MAY_DROP
constexpr bool DROPS = true;
// Weights are cut to bfloat16 before they are summed, by less than this.
constexpr real CUT = (real)0.98;

INLINE void begin_dropping(const Call& c, const Batch& b, const Uniform& u, Tile& t, int64_t v) {
    if (v == 0) {
        t.visited = t.keys = 0;
        for (int64_t s = 0; s < t.spans; ++s) t.keys += keys_in(t.span[s]);
    }
    store(t.dropped + v, vreal{});
    store(t.share + v, spare_share(c, b, u, t, v) * CUT);
    for (int64_t n = v; n < v + LANES; ++n)
        if (n >= t.rows) t.share[n] = INFINITY;
}
INLINE void note_visit(Tile& t, int64_t keys) { t.visited += keys; }
INLINE real visited_part(const Tile& t) { return t.visited < t.keys ? (real)t.visited / (real)t.keys : (real)1; }

// Whether the rows at LANES lanes can spare weights of `sum`; where they can, that is noted.
INLINE bool spares(Tile& t, int64_t lane, vreal sum) {
    const vreal dropped = load(t.dropped + lane) + sum;
    const vreal most = load(t.share + lane) * load(t.l + lane) * visited_part(t);
    if (t.fresh || t.lifted || !none(~((dropped < most) & *(const vmask*)(t.seen + lane)))) return false;
    store(t.dropped + lane, dropped);
    return true;
}
INLINE void rescale_dropped(Tile& t, int64_t lane, vreal factor) { store(t.dropped + lane, load(t.dropped + lane) * factor); }

// The same for a few rows in lanes, whose maxima may have grown by it.
INLINE bool few_spare(Tile& t, vreal factor, vreal sum, int64_t rows) {
    alignas(64) real factors[LANES], sums[LANES];
    store(factors, factor);
    store(sums, sum);
    const real part = visited_part(t);
    bool fine = !t.fresh;
    for (int64_t r = 0; r < rows; ++r)
        fine &= factors[r] == 1 && t.seen[r] && t.dropped[r] + sums[r] < t.share[r] * t.l[r] * part;
    for (int64_t r = 0; r < rows; ++r) t.dropped[r] = fine ? t.dropped[r] + sums[r] : t.dropped[r] * factors[r];
    return fine;
}
#else
constexpr bool DROPS = false;
INLINE void begin_dropping(const Call&, const Batch&, const Uniform&, Tile&, int64_t) {}
INLINE void note_visit(Tile&, int64_t) {}
INLINE bool spares(Tile&, int64_t, vreal) { return false; }
INLINE void rescale_dropped(Tile&, int64_t, vreal) {}
INLINE bool few_spare(Tile&, vreal, vreal, int64_t) { return false; }
#endif
