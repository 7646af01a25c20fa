// ---- the running maximum of a row ------------------------------------------------------------------------------------
// A logit x weighs 2^(x * SCALE - m): one fused multiply-add, exact but for the rounding of the difference. It is not 1 for
// the maximum, as m is its rounded product, which does no harm while that rounding is small. Beyond, a row is far: from the
// logit its maximum is subtracted first, which is exact for those that count.
constexpr real FAR_FROM = 1048576;
// What weights are multiplied by where the sum of weighted values would leave the range.
constexpr real LIFTED = 1 / 18446744073709551616.0;
INLINE vmask is_far(vreal m) { return ~(absolute(m) < splat(FAR_FROM)); }

// In powers of two, finite where the logit is, and as a logit, which is looked at in far rows alone.
struct Peak {
    vreal m, top;
};
INLINE Peak peak_of(const Tile& t, int64_t lane) { return {load(t.m + lane), load(t.top + lane)}; }
INLINE vreal limited(vreal y, vreal x) {
    return pick(absolute(x) == splat(INFINITY), y, low(splat(LARGEST), high(splat(-LARGEST), y)));
}
INLINE vmask is_above(const Peak& a, const Peak& b) {
    return (a.m > b.m) | ((a.m == b.m) & is_far(a.m) & (a.top > b.top));
}
INLINE Peak highest_of(const Peak& a, const Peak& b) {
    const vmask above = is_above(b, a);
    return {pick(above, b.m, a.m), pick(above, b.top, a.top)};
}
INLINE Peak higher(const Peak& a, vreal top) { return highest_of(a, {limited(top * SCALE, top), top}); }

// Rounds: nothing that follows is fused with what x came from.
INLINE vreal settled(vreal x) {
#if defined(__aarch64__)
    __asm__("" : "+w"(x));
#else
    __asm__("" : "+v"(x));
#endif
    return x;
}

// What weights are taken against: 2^((x - first) * SCALE - then).
struct Base {
    vreal first, then;
};
INLINE Base base_of(const Peak& x) {
    const vmask far = is_far(x.m), none_yet = x.m == splat(-INFINITY);
    return {pick(far & ~none_yet, x.top, vreal{}), pick(far, vreal{}, x.m)};
}
INLINE vreal exponent(vreal x, const Base& b) { return (x - b.first) * SCALE - b.then; }
// By how much sums against `x` change where they are against `b`.
INLINE vreal factor_of(const Peak& x, const Base& b) {
    const vreal y = pick(is_far(x.m), exponent(x.top, b), (x.m - b.then) - b.first * SCALE);
    return pick(y < splat(-100), vreal{}, exp2_of(y));
}
