// ---- spans: keys lo <= j < hi, of which those in every stripe and all bits count ------------------------------------
struct Stripe {
    int64_t step, offset, width;  // (j - offset) % step < width
};
struct Bits {
    const int64_t* words;  // bit j / block says whether key j counts: it is set, or it is not
    int64_t block;
    bool set;
};
struct Span {
    int64_t lo, hi, stripes, tables;
    Stripe stripe[MAX_STRIPES + 1];
    Bits bits[MAX_BITS + 1];
};
// Gaps between keys that a tile visits that are worth a part of a block of their own.
constexpr int64_t LEAST_GAP = 32;
// Stripes narrow each other; after this many rounds what is left may hold a key more than it must.
constexpr int ROUNDS = 4;

INLINE void add(Span& s, Stripe x) {
    if (x.width <= 0) s.hi = s.lo;
    if (x.width < x.step) s.stripe[s.stripes++] = x;
}
INLINE void add(Span& s, Bits x) { s.bits[s.tables++] = x; }

// The first block from `b` on whose bit is `set`, or `end`.
INLINE int64_t next_bit(const int64_t* words, int64_t b, int64_t end, bool set) {
    for (; b < end; b = (b / 64 + 1) * 64) {
        const uint64_t word = (uint64_t)(set ? words[b / 64] : ~words[b / 64]) >> b % 64;
        if (word) return b + __builtin_ctzll(word) < end ? b + __builtin_ctzll(word) : end;
    }
    return end;
}

// The first key of the span from `j` on, or its end.
INLINE int64_t first_key(const Span& s, int64_t j) {
    if (j < s.lo) j = s.lo;
    for (int round = 0; round < ROUNDS && s.stripes + s.tables; ++round) {
        const int64_t before = j;
        for (int64_t n = 0; n < s.tables && j < s.hi; ++n) {
            const Bits& x = s.bits[n];
            const int64_t at = next_bit(x.words, j / x.block, (s.hi + x.block - 1) / x.block, x.set) * x.block;
            j = at > j ? at : j;
        }
        for (int64_t n = 0; n < s.stripes; ++n) {
            const Stripe& x = s.stripe[n];
            const int64_t at = mod(j - x.offset, x.step);
            if (at >= x.width) j += x.step - at;
        }
        if (j == before || j >= s.hi) break;
    }
    return j < s.hi ? j : s.hi;
}
// The end of the keys that follow `j` without a gap, where `j` is one that `first_key` gave.
INLINE int64_t run_end(const Span& s, int64_t j) {
    int64_t end = s.hi;
    for (int64_t n = 0; n < s.stripes; ++n) {
        const Stripe& x = s.stripe[n];
        const int64_t at = mod(j - x.offset, x.step);
        if (at < x.width && j - at + x.width < end) end = j - at + x.width;
    }
    for (int64_t n = 0; n < s.tables; ++n) {
        const Bits& x = s.bits[n];
        const int64_t at = next_bit(x.words, j / x.block, (s.hi + x.block - 1) / x.block, !x.set) * x.block;
        end = at < end ? at : end;
    }
    return end > j ? end : j + 1;
}
// About how many keys count.
INLINE int64_t keys_in(const Span& s) {
    double n = (double)(s.hi - s.lo);
    for (int64_t k = 0; k < s.stripes; ++k) n *= (double)s.stripe[k].width / (double)s.stripe[k].step;
    if (!s.tables) return (int64_t)n;
    int64_t found = 0;
    for (int64_t j = first_key(s, s.lo); j < s.hi;) {
        const int64_t end = run_end(s, j);
        found += end - j;
        j = first_key(s, end);
    }
    return found;
}
