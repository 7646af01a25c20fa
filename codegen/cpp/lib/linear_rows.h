// ---- rows of operands and of what is given --------------------------------------------------------------------------
// A row of an operand in the compute type, zeros behind its end.
template <class E> INLINE void take(const E* p, int64_t step, int64_t count, int64_t room, real* to) {
    int64_t n = 0;
    if (step == 1) {
        for (; n + LANES <= count; n += LANES) store(to + n, row(p + n));
        for (; n < count; ++n) to[n] = value(p[n]);
    } else {
        for (; n < count; ++n) to[n] = value(p[n * step]);
    }
    for (; n < room; ++n) to[n] = 0;
}
template <class E> INLINE void give(const real* from, int64_t count, E* p, int64_t step) {
    int64_t n = 0;
    if (step == 1)
        for (; n + LANES <= count; n += LANES) put_row(p + n, load(from + n));
    for (; n < count; ++n) put(p + n * step, from[n]);
}
