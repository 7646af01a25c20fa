// ---- integers of a lane --------------------------------------------------------------------------------------------
// `vlong` has 64 bits a lane: beside a 32-bit compute type that takes two registers. `vint` is as narrow as the integers
// of this attention allow.
#if REAL_IS_DOUBLE
typedef int64_t vlong __attribute__((vector_size(LANES * 8)));
INLINE vlong splat_long(int64_t x) { return x - vlong{}; }
INLINE vmask narrow(vlong m) { return m; }
INLINE vlong widen_long(vmask m) { return m; }
INLINE vlong pick_long(vlong m, vlong a, vlong b) { return m ? a : b; }
INLINE vreal to_real(vlong x) { return __builtin_convertvector(x, vreal); }
INLINE vlong long_of(vreal x) { return __builtin_convertvector(x, vlong); }
#else
typedef int64_t half_long __attribute__((vector_size(LANES * 4)));
typedef mask_int half_mask __attribute__((vector_size(LANES * 2)));
typedef real half_real __attribute__((vector_size(LANES * 2)));
struct vlong {
    half_long low, high;
    int64_t operator[](int l) const { return l < LANES / 2 ? low[l] : high[l - LANES / 2]; }
};
#define BY_HALVES(op) \
    INLINE vlong operator op(vlong a, vlong b) { return {(half_long)(a.low op b.low), (half_long)(a.high op b.high)}; }
BY_HALVES(+)
BY_HALVES(-)
BY_HALVES(*)
BY_HALVES(&)
BY_HALVES(<)
BY_HALVES(<=)
BY_HALVES(>)
BY_HALVES(==)
BY_HALVES(!=)
INLINE vlong splat_long(int64_t x) { return {x - half_long{}, x - half_long{}}; }
INLINE vlong operator*(vlong a, int64_t b) { return a * splat_long(b); }
INLINE vlong operator&(vlong a, int b) { return a & splat_long(b); }
INLINE vlong operator<(vlong a, int b) { return a < splat_long(b); }
INLINE vlong operator-(vlong a) { return splat_long(0) - a; }
INLINE vlong pick_long(vlong m, vlong a, vlong b) { return {m.low ? a.low : b.low, m.high ? a.high : b.high}; }
template <class V, class H> INLINE V joined(H low, H high) { return (V)__builtin_shufflevector(low, high, EVERY_LANE); }
template <class H, class V> INLINE H half_of(V x, int n) { H r; memcpy(&r, (const char*)&x + n * sizeof r, sizeof r); return r; }
#ifdef WIDE_512
INLINE half_mask narrowed(half_long x) {
    half_mask r;
    asm("vpmovqd %1, %0" : "=v"(r) : "v"(x));
    return r;
}
#else
INLINE half_mask narrowed(half_long x) { return __builtin_convertvector(x, half_mask); }
#endif
INLINE vmask narrow(vlong m) { return joined<vmask>(narrowed(m.low), narrowed(m.high)); }
INLINE vlong widen_long(vmask m) {
    return {__builtin_convertvector(half_of<half_mask>(m, 0), half_long),
            __builtin_convertvector(half_of<half_mask>(m, 1), half_long)};
}
INLINE vreal to_real(vlong x) {
    return joined<vreal>(__builtin_convertvector(x.low, half_real), __builtin_convertvector(x.high, half_real));
}
INLINE vlong long_of(vreal x) {
    return {__builtin_convertvector(half_of<half_real>(x, 0), half_long),
            __builtin_convertvector(half_of<half_real>(x, 1), half_long)};
}
#endif

#if WIDE_INTS
typedef vlong vint;
INLINE vint splat_int(int64_t x) { return splat_long(x); }
INLINE vint widen(vmask m) { return widen_long(m); }
INLINE vint to_int(vreal x) { return long_of(x); }
INLINE vlong to_long(vint x) { return x; }
INLINE vint pick_wide(vint m, vint a, vint b) { return pick_long(m, a, b); }
#else
typedef vmask vint;
INLINE vint splat_int(int64_t x) { return (lane_int)x - vint{}; }
INLINE vint widen(vmask m) { return m; }
INLINE vmask narrow(vint m) { return m; }
INLINE vint to_int(vreal x) { return __builtin_convertvector(x, vint); }
INLINE vlong to_long(vint x) { return widen_long(x); }
INLINE vreal to_real(vint x) { return __builtin_convertvector(x, vreal); }
INLINE vint pick_wide(vint m, vint a, vint b) { return m ? a : b; }
#endif
INLINE vint pick_int(vmask m, vint a, vint b) { return pick_wide(widen(m), a, b); }
INLINE vint maximum_int(vint a, vint b) { return pick_wide(a > b, a, b); }
INLINE vint minimum_int(vint a, vint b) { return pick_wide(a < b, a, b); }
INLINE vint absolute_int(vint x) { return pick_wide(x < splat_int(0), -x, x); }

template <class F> INLINE vint lane_by_lane(vint a, vint b, F f) {
    alignas(64) lane_int x[LANES], y[LANES];
    memcpy(x, &a, sizeof x);
    memcpy(y, &b, sizeof y);
    EACH_LANE(x[l] = (lane_int)f((int64_t)x[l], (int64_t)y[l]))
    memcpy(&a, x, sizeof x);
    return a;
}
INLINE vint floordiv(vint a, vint b) { return lane_by_lane(a, b, [](int64_t x, int64_t y) { return floordiv(x, y); }); }
INLINE vint mod(vint a, vint b) { return lane_by_lane(a, b, [](int64_t x, int64_t y) { return mod(x, y); }); }
INLINE vint truncdiv(vint a, vint b) { return lane_by_lane(a, b, [](int64_t x, int64_t y) { return x / y; }); }

// 31 random bits of counter j under the key (a, b): attncc/ir/streams.py.
template <class U> INLINE U mixed(U a, U b, U j) {
    const U low = 0xffffffffu - U{};
    U x = ((j * 0x9e3779b9u + a) ^ b) & low;
    x ^= x >> 16;
    x = (x * 0x85ebca6bu) & low;
    x ^= x >> 13;
    x = (x * 0xc2b2ae35u) & low;
    return (x ^ (x >> 16)) >> 1;
}
INLINE int64_t mix(int64_t a, int64_t b, int64_t j) { return mixed<uint32_t>((uint32_t)a, (uint32_t)b, (uint32_t)j); }
#if WIDE_INTS && !REAL_IS_DOUBLE
typedef uint64_t half_word __attribute__((vector_size(LANES * 4)));
INLINE half_long mix(half_long a, half_long b, half_long j) { return (half_long)mixed((half_word)a, (half_word)b, (half_word)j); }
INLINE vint mix(vint a, vint b, vint j) { return {mix(a.low, b.low, j.low), mix(a.high, b.high, j.high)}; }
#else
#if REAL_IS_DOUBLE
typedef uint64_t lane_word __attribute__((vector_size(LANES * 8)));
#else
typedef uint32_t lane_word __attribute__((vector_size(LANES * 4)));
#endif
INLINE vint mix(vint a, vint b, vint j) { return (vint)mixed((lane_word)a, (lane_word)b, (lane_word)j); }
#endif
