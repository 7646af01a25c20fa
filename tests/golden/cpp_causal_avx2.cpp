// attncc: a C++ kernel for avx2
//
// out[i, e] = sum_j weight(softmax_j(score(s)) where mask) * v[j, e],  s = sum_d q[i, d] * k[j, d]
//
// attention
// size   B, N
// batch  b = B, hk = 2, g = 4
// axis   i = N, j = N, d = 64, e = 64
// tensor q: f32[B, N, 8, 64]
// tensor k: f32[B, N, 2, 64]
// tensor v: f32[B, N, 2, 64]
// tensor slope: f32[8]
// tensor doc: i32[B, N]
// q      q[b, i, hk * 4 + g, d]
// k      k[b, j, hk, d]
// v      v[b, j, hk, e]
// score  s * 0.125 - slope[hk * 4 + g] * float(i - j)
// mask   j <= i and doc[b, i] == doc[b, j]
// norm   softmax
// empty  zero
// weight w
// give   out, lse
// dtype  f32
// layout b, i, hk, g, e
//
// visit  0 <= j < i1
// hidden 0 <= j < N

#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#define LANES 8
#define QUERIES 64
#define KEYS 96
#define GROUP_TILES 8
#define SLANT_ROOM 768
#define TILE_ROWS 6
#define TILE_VECTORS 2
#define PAIRS 0
#define TILES 0
#define LAZY 0
#define REAL_IS_DOUBLE 0
#define BIAS 127
#define MANTISSA 23
#define LN2 0.69314718055994530942f
#define LN2_HIGH 0.693359375f
#define LN2_LOW -2.12194440e-4f
#define FN(name) name##f
#define F16_ROW 256
#define F16_SCALAR _Float16
#define ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#define EVERY_LANE 0, 1, 2, 3, 4, 5, 6, 7
#define WIDE_INTS 0
#define STAGED 0
#define SLANTED 1
#define STAGED_BY_SCORE 0
#define MAX_SPANS 1
#define MAX_HIDDEN 1
#define MAX_STRIPES 0
#define MAX_BITS 0
#define ROW_AXES 2
#define HAS_OUT 1
#define HAS_LSE 1
#define HAS_SINK 0
#define IS_SOFTMAX 1
#define NORMALIZED_EARLY 0
#define EMPTY_ZERO 0
#define EMPTY_MEAN 1
#define EMPTY_NAN 2
#define EMPTY EMPTY_ZERO
#define PLAIN 0
#define SCALE 1.0f
#define MAY_BE_HUGE 1
#define HAS_NEAR 0
#define MOST_FEW 16
#define FEW_ALONE 0
#define SUMS_ROUNDED 0
#define CAN_SPLIT 1
#define EVEN_AREA 0
#define OUT_OF_MEMORY 1
#define TOO_LARGE 2
#define NO_MATRIX_UNIT 3
typedef float real;  // the compute type
typedef int32_t mask_int;
typedef int32_t lane_int;  // what every integer of a lane fits

// ---- vectors: LANES numbers of the compute type, with masks and integers of as many lanes ---------------------------
typedef real vreal __attribute__((vector_size(LANES * sizeof(real))));
typedef real vreal_any __attribute__((vector_size(LANES * sizeof(real)), aligned(sizeof(real)), may_alias));
typedef mask_int vmask __attribute__((vector_size(LANES * sizeof(mask_int))));  // 0 or -1 a lane
typedef uint16_t vhalf __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint32_t vword __attribute__((vector_size(LANES * 4)));

#define INLINE static inline __attribute__((always_inline))
#define EACH_LANE(expression) for (int l = 0; l < LANES; ++l) { expression; }

INLINE vreal splat(real x) { return x - (vreal){}; }
INLINE vmask splat_mask(bool x) { return (mask_int)-(int)x - (vmask){}; }
INLINE vreal load(const real* p) { return *(const vreal_any*)p; }
INLINE void store(real* p, vreal x) { *(vreal_any*)p = x; }
INLINE vreal pick(vmask m, vreal a, vreal b) { return m ? a : b; }
INLINE vmask pick_mask(vmask m, vmask a, vmask b) { return (m & a) | (~m & b); }
INLINE vreal mask_to_real(vmask m) { return pick(m, splat(1), splat(0)); }

// Both give b where a or b is NaN.
#ifdef WIDE_512
INLINE vreal high(vreal a, vreal b) { return __builtin_ia32_maxps512_mask(a, b, a, -1, 4); }
INLINE vreal low(vreal a, vreal b) { return __builtin_ia32_minps512_mask(a, b, a, -1, 4); }
#else
INLINE vreal high(vreal a, vreal b) { return a > b ? a : b; }
INLINE vreal low(vreal a, vreal b) { return a < b ? a : b; }
#endif
// Both give NaN where a or b is NaN, as torch does.
INLINE vreal maximum(vreal a, vreal b) { return a != a ? a : high(a, b); }
INLINE vreal minimum(vreal a, vreal b) { return a != a ? a : low(a, b); }
INLINE real maximum(real a, real b) { return a != a || a > b ? a : b; }
INLINE real minimum(real a, real b) { return a != a || a < b ? a : b; }
INLINE int64_t maximum_int(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t minimum_int(int64_t a, int64_t b) { return a < b ? a : b; }

// Integer division that floors, as Python's does.
INLINE int64_t floordiv(int64_t a, int64_t b) { int64_t q = a / b; return q - (a % b != 0 && (a < 0) != (b < 0)); }
INLINE int64_t mod(int64_t a, int64_t b) { int64_t r = a % b; return r + (r != 0 && (r < 0) != (b < 0) ? b : 0); }
INLINE int64_t truncdiv(int64_t a, int64_t b) { return a / b; }
INLINE vreal absolute(vreal x) { return x < 0 ? -x : x + 0; }
INLINE real absolute(real x) { return x < 0 ? -x : x + 0; }
INLINE int64_t absolute_int(int64_t x) { return x < 0 ? -x : x; }

#ifdef WIDE_512
INLINE vreal floor_of(vreal x) { return __builtin_ia32_rndscaleps_mask(x, 1, x, -1, 4); }
INLINE vreal ceil_of(vreal x) { return __builtin_ia32_rndscaleps_mask(x, 2, x, -1, 4); }
INLINE vreal round_of(vreal x) { return __builtin_ia32_rndscaleps_mask(x, 0, x, -1, 4); }
INLINE vreal sqrt_of(vreal x) { return __builtin_ia32_sqrtps512_mask(x, x, -1, 4); }
#else
INLINE vreal floor_of(vreal x) { vreal r; EACH_LANE(r[l] = FN(__builtin_floor)(x[l])) return r; }
INLINE vreal ceil_of(vreal x) { vreal r; EACH_LANE(r[l] = FN(__builtin_ceil)(x[l])) return r; }
INLINE vreal round_of(vreal x) { vreal r; EACH_LANE(r[l] = FN(__builtin_rint)(x[l])) return r; }
INLINE vreal sqrt_of(vreal x) { vreal r; EACH_LANE(r[l] = FN(__builtin_sqrt)(x[l])) return r; }
#endif
INLINE real floor_of(real x) { return FN(__builtin_floor)(x); }
INLINE real ceil_of(real x) { return FN(__builtin_ceil)(x); }
INLINE real round_of(real x) { return FN(__builtin_rint)(x); }
INLINE real sqrt_of(real x) { return FN(__builtin_sqrt)(x); }
INLINE vreal rsqrt_of(vreal x) { return 1 / sqrt_of(x); }
INLINE real rsqrt_of(real x) { return 1 / sqrt_of(x); }

// p * 2^n for integral n of any size: two steps, so that results in the denormals and beyond the largest come out right.
INLINE vreal ldexp_of(vreal p, vreal n) {
#ifdef WIDE_512
    return __builtin_ia32_scalefps512_mask(p, n, p, -1, 4);
#else
    const vreal edge = splat(2 * BIAS);
    const vmask i = __builtin_convertvector(high(-edge, low(edge, n)), vmask);
    const vmask a = i >> 1, b = i - a;
    return p * (vreal)((a + BIAS) << MANTISSA) * (vreal)((b + BIAS) << MANTISSA);
#endif
}

// 2^f for f in [-1/2, 1/2]: minimax, relative error 1.9e-9 (float) and 3e-18 (double) before rounding.
INLINE vreal exp2_small(vreal f) {
#if REAL_IS_DOUBLE
    vreal p = splat(4.4352809446103361611e-10);
    p = p * f + 7.0741056262456593708e-9;
    p = p * f + 1.0178198033328527662e-7;
    p = p * f + 1.3215433089594629037e-6;
    p = p * f + 1.52527334899608046e-5;
    p = p * f + 1.5403530462514613026e-4;
    p = p * f + 1.3333558146789950323e-3;
    p = p * f + 9.6181291075883350833e-3;
    p = p * f + 5.5504108664819921483e-2;
    p = p * f + 2.4022650695910156205e-1;
    p = p * f + 6.9314718055994533046e-1;
#else
    vreal p = splat(1.53458121587e-4f);
    p = p * f + 1.33999312095e-3f;
    p = p * f + 9.61848895652e-3f;
    p = p * f + 5.550328777e-2f;
    p = p * f + 2.40226468906e-1f;
    p = p * f + 6.93147205737e-1f;
#endif
    return p * f + 1;
}

// 2^x, exactly 0 for x = -inf, NaN for NaN.
INLINE vreal exp2_of(vreal x) {
    const vreal c = high(splat(-2 * BIAS), low(splat(2 * BIAS), x));
    const vreal n = round_of(c);
    return ldexp_of(exp2_small(c - n), n);
}

INLINE vreal exp_of(vreal x) {
    const vreal c = high(splat(-2 * BIAS), low(splat(2 * BIAS), x));
    const vreal n = round_of(c * (real)1.4426950408889634074);
    const vreal r = (c - n * LN2_HIGH) - n * LN2_LOW;
    return ldexp_of(exp2_small(r * (real)1.4426950408889634074), n);
}
INLINE real exp_of(real x) { return FN(__builtin_exp)(x); }

// tanh as x P(x^2) / Q(x^2) up to where it rounds to 1. In float the rational minimax that Eigen uses, within 3 ulp; for
// bfloat16 operands one of relative error 4e-6, 6e-5 with the division.
INLINE vreal tanh_of(vreal x) {
#if REAL_IS_DOUBLE
    vreal r; EACH_LANE(r[l] = __builtin_tanh(x[l])) return r;
#else
    const float most = PAIRS ? 5.5f : 7.90531110763549805f;
    const vreal c = high(splat(-most), low(splat(most), x));
    const vreal y = c * c;
#if PAIRS
    vreal p = splat(1.57599814e-03f);
    p = p * y + 1.15749677e-01f;
    p = p * y + 9.99995963e-01f;
    vreal q = splat(6.02850406e-05f);
    q = q * y + 1.79640346e-02f;
    q = q * y + 4.49053360e-01f;
    q = q * y + 1.0f;
#else
    vreal p = splat(-2.76076847742355e-16f);
    p = p * y + 2.00018790482477e-13f;
    p = p * y + -8.60467152213735e-11f;
    p = p * y + 5.12229709037114e-08f;
    p = p * y + 1.48572235717979e-05f;
    p = p * y + 6.37261928875436e-04f;
    p = p * y + 4.89352455891786e-03f;
    vreal q = splat(1.19825839466702e-06f);
    q = q * y + 1.18534705686654e-04f;
    q = q * y + 2.26843463243900e-03f;
    q = q * y + 4.89352518554385e-03f;
#endif
#ifdef WIDE_512
    vreal r;
    asm("vrcp14ps %1, %0" : "=v"(r) : "v"(q));
    if (!PAIRS) r *= 2 - q * r;  // one Newton step: division would take longer than all the rest
    return c * p * r;
#else
    return c * p / q;
#endif
#endif
}
// The same up to 3/4, relative error 1e-5, in a third of the time; `reach` becomes the highest square of an argument.
constexpr real NEAR_REACH = 0.5625f;
template <bool NEAR> INLINE vreal tanh_in(vreal x, vreal& reach) {
    if (!NEAR) return tanh_of(x);
    const vreal y = x * x;
    reach = high(y, reach);
    vreal p = splat(-3.54526787e-02f);
    p = p * y + 1.27426892e-01f;
    p = p * y + -3.32696697e-01f;
    p = p * y + 9.99988984e-01f;
    return x * p;
}
INLINE real tanh_of(real x) { return FN(__builtin_tanh)(x); }
INLINE vreal sigmoid_of(vreal x) {
#ifdef WIDE_512
    const vreal q = 1 + exp_of(-high(splat(-87), x));
    vreal r;
    asm("vrcp14ps %1, %0" : "=v"(r) : "v"(q));
    return r * (2 - q * r);
#else
    return 1 / (1 + exp_of(-x));
#endif
}
INLINE real sigmoid_of(real x) { return 1 / (1 + FN(__builtin_exp)(-x)); }

#define BY_LANE(name, f) \
    INLINE vreal name(vreal x) { vreal r; EACH_LANE(r[l] = FN(f)(x[l])) return r; } \
    INLINE real name(real x) { return FN(f)(x); }
BY_LANE(log_of, __builtin_log)
BY_LANE(log1p_of, __builtin_log1p)
BY_LANE(erf_of, __builtin_erf)
BY_LANE(sin_of, __builtin_sin)
BY_LANE(cos_of, __builtin_cos)
INLINE vreal pow_of(vreal x, vreal y) { vreal r; EACH_LANE(r[l] = FN(__builtin_pow)(x[l], y[l])) return r; }
INLINE real pow_of(real x, real y) { return FN(__builtin_pow)(x, y); }

// 2^x as the softmax needs it: exactly 0 below 2^-100, as what is smaller would make products that are not normal and cost
// an assist each; anything from 2^126 on may come out where it is larger.
INLINE vreal exp2_weight(vreal x) {
#if REAL_IS_DOUBLE
    return exp2_of(x);
#elif defined(WIDE_512)
    // Against floor(x), which scalef takes of x by itself: no clamp is needed, since reduce gives 0 for -inf. Degree 5 on
    // [0, 1), relative error 7.5e-8; degree 3, 7.5e-5, where the result rounds to bfloat16.
    vreal f;
    asm("vreduceps $1, %1, %0" : "=v"(f) : "v"(x));
#if PAIRS
    vreal p = splat(0.0780245226895f);
    p = p * f + 0.226067155397f;
    p = p * f + 0.695833540479f;
    p = p * f + 0.999925218566f;
#else
    vreal p = splat(0.00187757670002f);
    p = p * f + 0.00898934002358f;
    p = p * f + 0.0558263181162f;
    p = p * f + 0.240153617021f;
    p = p * f + 0.693153073203f;
    p = p * f + 0.999999925064f;
#endif
#if TILES
    return ldexp_of(p, x);  // flushes what is not normal: see enter_matrix_unit
#else
    return __builtin_ia32_scalefps512_mask(p, x, vreal{}, __builtin_ia32_cmpps512_mask(x, splat(-100), 5, -1, 4), 4);
#endif
#else
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const vreal c = low(splat(126), high(splat(-126), x));
    const vreal n = c + shift;
    const vreal f = c - (n - shift);
    const vreal p = exp2_small(f);
    return x < -100 ? vreal{} : (vreal)((vmask)p + ((vmask)n << 23));
#endif
}

INLINE bool none(vmask m) {
    mask_int any = 0;
    EACH_LANE(any |= m[l])
    return !any;
}

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

// ---- element types: every load gives the compute type, integers as they are, booleans as masks ----------------------
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

INLINE float from_bf16(uint16_t x) { uint32_t u = (uint32_t)x << 16; float f; memcpy(&f, &u, 4); return f; }
INLINE uint16_t to_bf16(float f) {
    uint32_t u; memcpy(&u, &f, 4);
    return f != f ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
INLINE float from_f16(uint16_t x) { F16_SCALAR h; memcpy(&h, &x, 2); return (float)h; }
INLINE uint16_t to_f16(float f) { F16_SCALAR h = (F16_SCALAR)f; uint16_t x; memcpy(&x, &h, 2); return x; }

INLINE real value(float x) { return (real)x; }
INLINE real value(double x) { return (real)x; }
INLINE real value(bf16 x) { return (real)from_bf16(x.bits); }
INLINE real value(f16 x) { return (real)from_f16(x.bits); }
INLINE int64_t value(int64_t x) { return x; }
INLINE int64_t value(int32_t x) { return x; }
INLINE int64_t value(int16_t x) { return x; }
INLINE int64_t value(int8_t x) { return x; }
INLINE int64_t value(uint8_t x) { return x; }
INLINE bool value(bool x) { return x; }

INLINE void put(float* p, real x) { *p = (float)x; }
INLINE void put(double* p, real x) { *p = (double)x; }
INLINE void put(bf16* p, real x) { p->bits = to_bf16((float)x); }
INLINE void put(f16* p, real x) { p->bits = to_f16((float)x); }

// LANES consecutive elements; booleans as 0 and 1.
INLINE vreal row(const bool* p) {
    typedef uint8_t v __attribute__((vector_size(LANES), aligned(1), may_alias));
    return __builtin_convertvector(__builtin_convertvector(*(const v*)p, vmask), vreal);
}
INLINE vreal row(const float* p) {
    typedef float v __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
    return __builtin_convertvector(*(const v*)p, vreal);
}
INLINE vreal row(const double* p) {
    typedef double v __attribute__((vector_size(LANES * 8), aligned(8), may_alias));
    return __builtin_convertvector(*(const v*)p, vreal);
}
#ifdef WIDE_512
INLINE vreal row(const bf16* p) {
    vword x;
    asm("vpmovzxwd %1, %0" : "=v"(x) : "m"(*(const vhalf*)p));
    return (vreal)(x << 16);
}
#else
INLINE vreal row(const bf16* p) {
    typedef float v __attribute__((vector_size(LANES * 4)));
    return __builtin_convertvector((v)(__builtin_convertvector(*(const vhalf*)p, vword) << 16), vreal);
}
#endif
#if F16_ROW == 512
INLINE vreal row(const f16* p) {
    typedef short v __attribute__((vector_size(32), aligned(2), may_alias));
    return __builtin_ia32_vcvtph2ps512_mask(*(const v*)p, vreal{}, -1, 4);
}
#elif F16_ROW == 256
INLINE vreal row(const f16* p) {
    typedef short v __attribute__((vector_size(16), aligned(2), may_alias));
    return __builtin_ia32_vcvtph2ps256(*(const v*)p);
}
#else
INLINE vreal row(const f16* p) { vreal r; EACH_LANE(r[l] = value(p[l])) return r; }
#endif
INLINE void put_row(float* p, vreal x) {
    typedef float v __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
    *(v*)p = __builtin_convertvector(x, v);
}
INLINE void put_row(double* p, vreal x) {
    typedef double v __attribute__((vector_size(LANES * 8), aligned(8), may_alias));
    *(v*)p = __builtin_convertvector(x, v);
}
#if PAIRS
INLINE void put_row(bf16* p, vreal x) {
    typedef short v __attribute__((vector_size(32)));
    v low;
    asm("vcvtneps2bf16 %1, %t0" : "=v"(low) : "v"(x));
    memcpy(p, &low, 32);
}
#else
INLINE void put_row(bf16* p, vreal x) {
    typedef float v __attribute__((vector_size(LANES * 4)));
    const v f = __builtin_convertvector(x, v);
    const vword u = (vword)f;
    const vword rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    *(vhalf*)p = __builtin_convertvector(f != f ? vword{} + 0x7fc0 : rounded, vhalf);
}
#endif
#if F16_ROW == 512
INLINE void put_row(f16* p, vreal x) {
    typedef short v __attribute__((vector_size(32)));
    typedef short v_any __attribute__((vector_size(32), aligned(2), may_alias));
    *(v_any*)p = __builtin_ia32_vcvtps2ph512_mask(x, 0, v{}, -1);
}
#elif F16_ROW == 256
INLINE void put_row(f16* p, vreal x) {
    typedef short v_any __attribute__((vector_size(16), aligned(2), may_alias));
    *(v_any*)p = __builtin_ia32_vcvtps2ph256(x, 0);
}
#else
INLINE void put_row(f16* p, vreal x) { EACH_LANE(put(p + l, x[l])) }
#endif

template <class T> INLINE void foresee(const T* from, const T* to) {
    for (const char* at = (const char*)from; at < (const char*)to; at += 64) __builtin_prefetch(at, 0, 2);
}

// The same for what is used sooner, in the nearest cache.
template <class T> INLINE void foresee_near(const T* from, int64_t count) {
    for (int64_t n = 0; n < count * (int64_t)sizeof(T); n += 64) __builtin_prefetch((const char*)from + n, 0, 3);
}

// One element a lane, at offsets in elements.
template <class T> INLINE vreal gather_real(const T* p, vlong at) { vreal r; EACH_LANE(r[l] = value(p[at[l]])) return r; }
template <class T> INLINE vint gather_int(const T* p, vlong at) {
    alignas(64) lane_int x[LANES];
    EACH_LANE(x[l] = (lane_int)value(p[at[l]]))
    vint r;
    memcpy(&r, x, sizeof r);
    return r;
}
template <class T> INLINE vmask gather_mask(const T* p, vlong at) {
    vmask r; EACH_LANE(r[l] = -(mask_int)(value(p[at[l]]) != 0)) return r;
}


// ---- layout: rows of elements into columns of lanes and back --------------------------------------------------------
// A LANES x LANES transpose in registers: log2(LANES) rounds of interleaving row n with row n + LANES / 2.
template <class V> INLINE void transpose(V (&x)[LANES]) {
#pragma GCC unroll 8
    for (int step = 1; step < LANES; step *= 2) {
        V y[LANES];
#pragma GCC unroll 16
        for (int n = 0; n < LANES / 2; ++n) {
            y[2 * n] = __builtin_shufflevector(x[n], x[n + LANES / 2], ZIP_LOW);
            y[2 * n + 1] = __builtin_shufflevector(x[n], x[n + LANES / 2], ZIP_HIGH);
        }
#pragma GCC unroll 16
        for (int n = 0; n < LANES; ++n) x[n] = y[n];
    }
}

// out[column][lane] = rows[lane][column], `columns` elements `stride` apart; a null row gives zeros.
template <class T>
static void to_lanes(const T* const (&rows)[LANES], int64_t stride, int64_t columns, real* out) {
    int64_t n = 0;
    if (stride == 1)
        for (; n + LANES <= columns; n += LANES) {
            vreal x[LANES];
            for (int l = 0; l < LANES; ++l) x[l] = rows[l] ? row(rows[l] + n) : vreal{};
            transpose(x);
            for (int l = 0; l < LANES; ++l) store(out + (n + l) * LANES, x[l]);
        }
    for (; n < columns; ++n)
        for (int l = 0; l < LANES; ++l) out[n * LANES + l] = rows[l] ? value(rows[l][n * stride]) : 0;
}

// rows[lane][column] = in[column][lane] * scale[lane] for the rows that are not null.
template <class T>
static void from_lanes(const real* in, vreal scale, vmask keep, T* const (&rows)[LANES], int64_t stride,
                       int64_t columns) {
    int64_t n = 0;
    if (stride == 1)
        for (; n + LANES <= columns; n += LANES) {
            vreal x[LANES];
            for (int l = 0; l < LANES; ++l) x[l] = pick(keep, load(in + (n + l) * LANES) * scale, vreal{});
            transpose(x);
            for (int l = 0; l < LANES; ++l)
                if (rows[l]) put_row(rows[l] + n, x[l]);
        }
    for (; n < columns; ++n) {
        const vreal x = pick(keep, load(in + n * LANES) * scale, vreal{});
        for (int l = 0; l < LANES; ++l)
            if (rows[l]) put(rows[l] + n * stride, x[l]);
    }
}

// out[r][column], `columns` apart, as the compute type.
template <class T>
static const real* plain(const T* in, int64_t row_stride, int64_t stride, int64_t rows, int64_t columns, real* out) {
    for (int64_t r = 0; r < rows; ++r) {
        const T* p = in + r * row_stride;
        real* o = out + r * columns;
        int64_t n = 0;
        if (stride == 1)
            for (; n + LANES <= columns; n += LANES) store(o + n, row(p + n));
        for (; n < columns; ++n) o[n] = value(p[n * stride]);
    }
    return out;
}

// ---- products: out[r][query] = sum_k a[r, k] * b[k][query], queries in lanes, `a` broadcast from where it lies ------
// b and out are columns of LANES queries, `b_next` and `out_next` apart, each with its rows one after the other.
// With `keep`, out = out * keep[query] + sum; otherwise out = sum.
#if PAIRS
// Pairs of bfloat16 along k: `a` broadcasts two neighbours at once, b holds pairs in the bits of its lanes.
typedef uint16_t a_element;
INLINE vreal spread(const a_element* a) { uint32_t x; memcpy(&x, a, 4); return (vreal)(x + vword{}); }
INLINE vreal multiply_add(vreal sum, vreal x, vreal y) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
    return sum;
}
#else
typedef real a_element;
INLINE vreal spread(const a_element* a) { return splat(*a); }
INLINE vreal multiply_add(vreal sum, vreal x, vreal y) { return sum + x * y; }
#endif

template <int R, int C>
INLINE void product_tile(const a_element* a, int64_t ar, int64_t ak, const real* b, int64_t b_next, int64_t depth,
                         real* out, int64_t out_next, const real* keep) {
    vreal sum[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = vreal{};
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k, a += ak, b += LANES) {
        vreal column[C];
        for (int c = 0; c < C; ++c) column[c] = load(b + c * b_next);
        for (int r = 0; r < R; ++r) {
            const vreal x = spread(a + r * ar);
            for (int c = 0; c < C; ++c) sum[r][c] = multiply_add(sum[r][c], x, column[c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
            real* at = out + r * LANES + c * out_next;
            store(at, keep ? load(at) * load(keep + c * LANES) + sum[r][c] : sum[r][c]);
        }
}

template <int C>
static void product_columns(int64_t rows, const a_element* a, int64_t ar, int64_t ak, const real* b, int64_t b_next,
                            int64_t depth, real* out, int64_t out_next, const real* keep) {
    int64_t r = 0;
    for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
        product_tile<TILE_ROWS, C>(a + r * ar, ar, ak, b, b_next, depth, out + r * LANES, out_next, keep);
    for (; r + 4 <= rows; r += 4)
        product_tile<4, C>(a + r * ar, ar, ak, b, b_next, depth, out + r * LANES, out_next, keep);
    for (; r + 2 <= rows; r += 2)
        product_tile<2, C>(a + r * ar, ar, ak, b, b_next, depth, out + r * LANES, out_next, keep);
    if (r < rows) product_tile<1, C>(a + r * ar, ar, ak, b, b_next, depth, out + r * LANES, out_next, keep);
}

static void product(int64_t rows, int64_t columns, const a_element* a, int64_t ar, int64_t ak, const real* b,
                    int64_t b_next, int64_t depth, real* out, int64_t out_next, const real* keep) {
    int64_t c = 0;
    auto some = [&](auto f, int64_t n) {
        f(rows, a, ar, ak, b + c * b_next, b_next, depth, out + c * out_next, out_next, keep ? keep + c * LANES : keep);
        c += n;
    };
    while (c + TILE_VECTORS <= columns) some(product_columns<TILE_VECTORS>, TILE_VECTORS);
    while (c + 2 <= columns) some(product_columns<2>, 2);
    if (c < columns) some(product_columns<1>, 1);
}

// ---- this attention ------------------------------------------------------------------------------------------------

// What a call passes: pointers, strides in elements, sizes.
struct Call {
    const float* t_q;  // f32[B, N, 8, 64]
    int64_t s_q[4];
    const float* t_k;  // f32[B, N, 2, 64]
    int64_t s_k[4];
    const float* t_v;  // f32[B, N, 2, 64]
    int64_t s_v[4];
    const float* t_slope;  // f32[8]
    int64_t s_slope[1];
    const int32_t* t_doc;  // i32[B, N]
    int64_t s_doc[2];
    int64_t z_B;
    int64_t z_N;
    int64_t N;
    int64_t M;
    static constexpr int64_t D = 64;
    static constexpr int64_t E = 64;
    int64_t q_d, q_i, k_j, k_d, v_j, v_e, out_e;
    float* out;
    int64_t s_out[5];
    real* lse;
    int64_t s_lse[4];
};
typedef float q_element;
typedef float k_element;
typedef float v_element;
typedef float out_element;

struct Batch { int64_t x_b; int64_t x_hk; };
static int64_t batch_count(const Call& c) { (void)c; return c.z_B * 2; }
static Batch batch_at(const Call& c, int64_t n) {
    Batch at;
    (void)c; (void)n;
    at.x_hk = n % 2;
    n /= 2;
    at.x_b = n;
    return at;
}
struct Group { int64_t x_g; };
static int64_t group_count(const Call& c) { (void)c; return 4; }
static Group group_at(const Call& c, int64_t n) {
    Group at;
    (void)c; (void)n;
    at.x_g = n;
    return at;
}

// Scalars of a tile, and vectors of its rows, that no key changes. For a block of keys from j0 on, `near`
// holds what is loaded by row and key, transposed; `slanted` what their distance gives, `slant` apart.
struct Uniform {
    int64_t u0; int64_t u1;
    const real *near, *slanted;
    int64_t j0, slant;
};
struct RowValues { vint r0; vint r1; };
struct Tile;

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
    real *q, *o; // [columns][D][LANES] and [columns][E][LANES]
    RowValues values[QUERIES / LANES];
    alignas(128) real m[QUERIES], l[QUERIES];     // running maximum and sum, in powers of two
    alignas(128) real level[QUERIES], expected[QUERIES];  // of the logits of the last block and of the next, about
    alignas(128) mask_int seen[QUERIES];          // whether any key was visible
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

// Axis `n` of the rows (0 is i) at LANES lanes from `at` on.
INLINE vint lane_values(const Tile& t, int n, int64_t at) { return *(const vint*)&t.lane[n][at]; }

static Uniform uniform(const Call& c, const Batch& b, const Tile& t) {
    (void)c; (void)b; (void)t;
    Uniform u;
    u.u0 = b.x_b;
    u.u1 = (b.x_hk * 4);
    return u;
}
static RowValues row_values(const Call& c, const Batch& b, const Uniform& u, const Tile& t, int64_t at) {
    (void)c; (void)b; (void)t;
    (void)u; (void)at;
    RowValues r;
    r.r0 = lane_values(t, 0, at);
    r.r1 = gather_int(c.t_doc + u.u0 * c.s_doc[0], to_long(lane_values(t, 0, at)) * c.s_doc[1]);
    return r;
}

static void find_spans(const Call& c, const Batch& b, Tile& t, int64_t from, int64_t to) {
    (void)c; (void)b;
    visit(t, 0, t.i1, from, to);
    hide(t, 0, c.z_N, c.M);
}

template <bool MASKED, bool NEAR>
INLINE vreal logit(const Call& c, const Uniform& u, const RowValues& r, int64_t j, vreal s, vmask& visible, vreal& reach) {
    (void)c; (void)u; (void)r; (void)j;
    (void)s; (void)visible; (void)reach;
    if (MASKED) {
        const vmask seen = (narrow(splat_int(j) <= r.r0) & narrow(r.r1 == splat_int(value(c.t_doc[u.u0 * c.s_doc[0] + j * c.s_doc[1]]))));
        visible = seen;
    }
    const vreal x = ((s * splat(0.18033688011112042f)) - load(u.slanted + 0 * SLANT_ROOM + (j - u.j0) * u.slant));
    return x;
}

INLINE vreal linear_weight(const Call& c, const Uniform& u, const RowValues& r, int64_t j, vreal w) {
    (void)c; (void)u; (void)r; (void)j;
    return w;
}
INLINE vreal weight(const Call& c, const Uniform& u, const RowValues& r, int64_t j, vreal s, vreal w) {
    (void)c; (void)u; (void)r; (void)j;
    (void)s; (void)w;
    const vreal x = w;
    return x;
}
INLINE vreal empty_weight(const Call& c, const Uniform& u, const RowValues& r, int64_t j, vreal s) {
    (void)c; (void)u; (void)r; (void)j;
    (void)s;
    const vreal x = splat(1.0f);
    return x;
}

static vreal first_logit(const Call& c, const Batch& b, const Uniform& u, const Tile& t, int64_t at) {
    (void)c; (void)b; (void)u; (void)t; (void)at;
    return splat(-INFINITY);
}

INLINE void slanted_at(const Call& c, const Batch& b, const Uniform& u, const Tile& t, int64_t at,
                       vint distance, real* to) {
    (void)c; (void)b; (void)u; (void)t; (void)at; (void)distance; (void)to;
    const vreal y0 = (gather_real(c.t_slope, to_long((splat_int(u.u1) + lane_values(t, 1, at))) * c.s_slope[0]) * to_real(distance));
    const vreal x0 = pick((absolute(y0) == splat(real(INFINITY))), y0, maximum(minimum((y0 * splat(1.4426950408889634f)), splat(3.4028234663852886e+38f)), splat(-3.4028234663852886e+38f)));
    store(to + 0 * SLANT_ROOM, x0);
}

static void bring_near(const Call& c, const Uniform& u, const RowValues& r, int64_t count, real* near) {
    (void)c; (void)u; (void)r; (void)count; (void)near;
}

INLINE const q_element* query_at(const Call& c, const Batch& b, const Group& g, int64_t i) {
    (void)b; (void)g;
    return c.t_q + b.x_b * c.s_q[0] + (g.x_g + (b.x_hk * 4)) * c.s_q[2] + i * c.q_i;
}

INLINE const k_element* key_at(const Call& c, const Batch& b) {
    (void)b;
    return c.t_k + b.x_b * c.s_k[0] + b.x_hk * c.s_k[2];
}

INLINE const v_element* value_at(const Call& c, const Batch& b) {
    (void)b;
    return c.t_v + b.x_b * c.s_v[0] + b.x_hk * c.s_v[2];
}

INLINE out_element* out_at(const Call& c, const Batch& b, const Group& g, int64_t i) {
    (void)c; (void)b; (void)g; (void)i;
    return c.out + b.x_b * c.s_out[0] + b.x_hk * c.s_out[1] + g.x_g * c.s_out[2] + i * c.s_out[3];
}

INLINE real* lse_at(const Call& c, const Batch& b, const Group& g, int64_t i) {
    (void)c; (void)b; (void)g; (void)i;
    return c.lse + b.x_b * c.s_lse[0] + b.x_hk * c.s_lse[1] + g.x_g * c.s_lse[2] + i * c.s_lse[3];
}

INLINE void set_lane(Tile& t, int64_t lane, const Group& g, int64_t i) {
    (void)g;
    t.lane[0][lane] = (lane_int)i;
    t.lane[1][lane] = (lane_int)g.x_g;
}

// ---- operands in the compute type: queries in lanes, keys and values where they lie or converted --------------------
// Working memory holds columns of LANES queries, rows one after the other.
INLINE int64_t q_rows(const Call& c) { return c.D; }
INLINE int64_t o_rows(const Call& c) { return c.E; }
static size_t k_scratch(const Call& c) { return (size_t)c.D * KEYS * sizeof(real); }
static size_t v_scratch(const Call& c) { return (size_t)c.E * KEYS * sizeof(real); }
static size_t p_scratch() { return 0; }  // weights overwrite their scores
constexpr int64_t KEY_STEP = 1;                   // where a part of a block may begin

static void load_queries(const Call& c, const q_element* const (&rows)[LANES], real* column) {
    to_lanes(rows, c.q_d, c.D, column);
}

struct Block {
    int64_t j0, count;  // keys j0 <= j < j0 + count
    const real *k, *v;
    int64_t k_row, k_col, v_row, v_col;
};

INLINE const real* compute_type(const real* p) { return p; }
template <class T> INLINE const real* compute_type(const T*) { return nullptr; }

// Keys [j0, j0 + count) of a batch point whose first key is at k, first value at v.
static Block load_block(const Call& c, const k_element* k, const v_element* v, int64_t j0, int64_t count, real* k_at,
                        real* v_at) {
    k += j0 * c.k_j;
    v += j0 * c.v_j;
    Block x = {j0, count, compute_type(k), compute_type(v), c.k_j, c.k_d, c.v_j, c.v_e};
    if (!x.k) x.k = plain(k, c.k_j, c.k_d, count, c.D, k_at), x.k_row = c.D, x.k_col = 1;
    if (!x.v) x.v = plain(v, c.v_j, c.v_e, count, c.E, v_at), x.v_row = c.E, x.v_col = 1;
    return x;
}
// Its keys from `from` to `to`, counted from its first.
static Block part_of(const Call&, const Block& x, int64_t from, int64_t to) {
    return {x.j0 + from, to - from, x.k + from * x.k_row, x.v + from * x.v_row, x.k_row, x.k_col, x.v_row, x.v_col};
}

static void score_product(const Call& c, const Tile& t, int64_t v, int64_t columns, const Block& at, real* s) {
    product(at.count, columns, at.k, at.k_row, at.k_col, t.q + v * LANES * q_rows(c), q_rows(c) * LANES, c.D, s, KEYS * LANES, nullptr);
}
static void value_product(const Call& c, const Tile& t, int64_t v, int64_t columns, const Block& at, const real* p, const real* keep) {
    product(c.E, columns, at.v, at.v_col, at.v_row, p, KEYS * LANES, at.count, t.o + v * LANES * o_rows(c), o_rows(c) * LANES,
            t.fresh ? nullptr : keep + v * LANES);
}
INLINE real* weight_column(real* scores, real*, int64_t column) { return scores + column * KEYS * LANES; }
INLINE real weight_at(const real* p, int64_t k, int64_t lane) { return p[k * LANES + lane]; }
INLINE vreal rounded(vreal w) { return w; }
INLINE void put_weights(real* p, int64_t k, vreal w, vreal x) { store(p + k * LANES, w); store(p + (k + 1) * LANES, x); }
INLINE void end_weights(real*, int64_t) {}
#define WEIGHTS_OVERWRITE 1  // their scores
INLINE void rescale(const Call&, const Tile&, int64_t, vreal) {}
constexpr int64_t STRIP = TILE_VECTORS;  // columns that go through scores, weights and values together
#define PRODUCT_KEEPS 1  // the value product applies `keep`

// ---- few queries: lanes run along a key's or a value's row, which is read once, in order, as it lies ----------------
// Queries lie as [row][D up to LANES], sums of values as [row][E up to LANES], both in the order in which `two_rows` gives
// elements. Scores and weights of a block lie as [key][R]; where a mask or a bias has to look at them, as ever.
constexpr int64_t FEW = LANES < 8 ? LANES : 8;
// Bytes between what is read and what is asked for: the processor foresees no row beyond a page, and none in time.
constexpr int64_t KEYS_AHEAD = 3072, VALUES_AHEAD = 8192;
// Values that stay in the nearest cache while every column of theirs is summed. Their sums start anew, so that rounding
// errors do not grow with the number of keys.
constexpr int64_t FEW_STEP = 32;

INLINE int64_t few_width(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
INLINE real* few_sums(const Call& c, const Tile& t) { return t.o + o_rows(c) * LANES; }
INLINE bool few_in_rows(const Call& c, int64_t rows) {
    return rows <= FEW && c.N <= FEW && c.D >= 16 && c.E >= 16 && c.k_d == 1 && c.v_e == 1;
}

// Twice LANES elements. Of bfloat16 the even ones come first, then the odd ones: no shuffle takes them apart.
template <class T> INLINE void two_rows(const T* p, vreal& a, vreal& b) { a = row(p), b = row(p + LANES); }
template <class T> constexpr bool evens_first(const T*) { return false; }
#if !REAL_IS_DOUBLE
typedef uint32_t any_words __attribute__((vector_size(LANES * 4), aligned(2), may_alias));
INLINE void two_rows(const bf16* p, vreal& a, vreal& b) {
    const vword x = *(const any_words*)p;
    a = (vreal)(x << 16), b = (vreal)(x & 0xffff0000);
}
constexpr bool evens_first(const bf16*) { return true; }
#endif

// LANES elements of a row, zeros from `count` on.
template <class T> INLINE vreal row_up_to(const T* p, int64_t count) {
    if (count >= LANES) return row(p);
    vreal x = {};
    for (int64_t l = 0; l < count; ++l) x[l] = value(p[l]);
    return x;
}

// Two vectors of a row that ends after `count` elements.
template <class T> INLINE void two_rows_up_to(const T* p, int64_t count, vreal& a, vreal& b) {
    if (count >= 2 * LANES) return two_rows(p, a, b);
    a = row_up_to(p, count), b = count > LANES ? row_up_to(p + LANES, count - LANES) : vreal{};
}

static void load_rows(const Call& c, const q_element* const (&rows)[LANES], real* q) {
    for (int64_t r = 0; r < FEW; ++r, q += few_width(c.D)) {
        int64_t d = 0;
        if (!rows[r]) {
            memset(q, 0, few_width(c.D) * sizeof(real));
            continue;
        }
        if (evens_first((const k_element*)nullptr))
            for (; d + 2 * LANES <= c.D; d += 2 * LANES)
                for (int64_t l = 0; l < 2 * LANES; ++l) q[d + l % 2 * LANES + l / 2] = value(rows[r][(d + l) * c.q_d]);
        for (; d < few_width(c.D); ++d) q[d] = d < c.D ? value(rows[r][d * c.q_d]) : 0;
    }
}

// Puts the sums of a finished tile where every tile has them.
static void end_few(const Call& c, const Tile& t) {
    const real* rows[LANES];
    for (int64_t r = 0; r < LANES; ++r) {
        real* at = few_sums(c, t) + r * few_width(c.E);
        rows[r] = r < t.rows ? at : nullptr;
        if (r < t.rows && evens_first((const v_element*)nullptr))
            for (int64_t e = 0; e + 2 * LANES <= c.E; e += 2 * LANES) {
                const vreal a = load(at + e), b = load(at + e + LANES);
                store(at + e, __builtin_shufflevector(a, b, ZIP_LOW));
                store(at + e + LANES, __builtin_shufflevector(a, b, ZIP_HIGH));
            }
    }
    to_lanes(rows, 1, c.E, t.o);
}

// Lane n of the result is the sum over the lanes of x[n].
INLINE vreal sums_of(vreal (&x)[LANES]) {
#pragma GCC unroll 8
    for (int n = LANES / 2; n >= 1; n /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i)
            x[i] = __builtin_shufflevector(x[i], x[i + n], ZIP_LOW) + __builtin_shufflevector(x[i], x[i + n], ZIP_HIGH);
    return x[0];
}

// How many rows ahead lie `bytes` of them.
template <class T> INLINE int64_t rows_ahead(const T*, int64_t bytes, int64_t columns) {
    return (bytes + columns * (int64_t)sizeof(T) - 1) / (columns * (int64_t)sizeof(T));
}

// s[key][R], to whole vectors: the last key again where there are no more.
template <int R> static void few_scores(const Call& c, const real* q, const k_element* k, int64_t count, real* s) {
    constexpr int AT_ONCE = LANES / R;
    const int64_t ahead = rows_ahead(k, KEYS_AHEAD, c.D) * c.k_j;
    for (int64_t j = 0; j < count; j += AT_ONCE) {
        vreal sum[LANES];
#pragma GCC unroll 16
        for (int g = 0; g < AT_ONCE; ++g) {
            const k_element* at = k + (j + g < count ? j + g : count - 1) * c.k_j;
            vreal x[R];
            for (int r = 0; r < R; ++r) x[r] = vreal{};
            for (int64_t d = 0; d < c.D; d += 2 * LANES) {
                foresee_near(at + ahead + d, 2 * LANES);
                vreal a, b;
                two_rows_up_to(at + d, c.D - d, a, b);
                for (int r = 0; r < R; ++r) x[r] += a * load(q + r * few_width(c.D) + d);
                if (d + LANES >= c.D) break;
                for (int r = 0; r < R; ++r) x[r] += b * load(q + r * few_width(c.D) + d + LANES);
            }
            for (int r = 0; r < R; ++r) sum[g * R + r] = x[r];
        }
        store(s + j * R, sums_of(sum));
    }
}

// o[r][e] = o[r][e] * keep[r] + sum_j p[j][r] * v[j][e]; without `keep`, o = the sum.
template <int R>
static void few_values(const Call& c, const v_element* v, const real* p, int64_t count, real* o, const real* keep) {
    constexpr int WIDE = R > 4 ? 2 : R > 2 ? 4 : 8;
    const int64_t ahead = rows_ahead(v, VALUES_AHEAD, c.E) * c.v_j, width = few_width(c.E);
    for (int64_t j0 = 0; j0 < count; j0 += FEW_STEP, v += FEW_STEP * c.v_j, p += FEW_STEP * R) {
        const int64_t n = count - j0 < FEW_STEP ? count - j0 : FEW_STEP;
        for (int64_t e = 0; e < width; e += WIDE * LANES) {
            const int64_t columns = (width - e) / LANES;
            vreal sum[R][WIDE];
            for (int r = 0; r < R; ++r)
                for (int w = 0; w < WIDE; ++w) sum[r][w] = vreal{};
            auto add = [&](auto whole) {
                for (int64_t j = 0; j < n; ++j) {
                    const v_element* at = v + j * c.v_j + e;
                    foresee_near(at + ahead, WIDE * LANES);
#pragma GCC unroll 4
                    for (int w = 0; w < WIDE; w += 2) {
                        vreal a, b;
                        if (whole()) two_rows(at + w * LANES, a, b);
                        else if (e + w * LANES < c.E) two_rows_up_to(at + w * LANES, c.E - e - w * LANES, a, b);
                        else break;
                        for (int r = 0; r < R; ++r) sum[r][w] += splat(p[j * R + r]) * a;
                        for (int r = 0; r < R; ++r) sum[r][w + 1] += splat(p[j * R + r]) * b;
                    }
                }
            };
            if (e + WIDE * LANES <= c.E) add([] { return true; });
            else add([] { return false; });
            for (int r = 0; r < R; ++r)
                for (int w = 0; w < WIDE && w < columns; ++w) {
                    real* to = o + r * width + e + w * LANES;
                    if (j0 > 0) sum[r][w] += load(to);
                    else if (keep) sum[r][w] += load(to) * splat(keep[r]);
                    store(to, sum[r][w]);
                }
        }
    }
}

// ---- few queries: the attention of a block ---------------------------------------------------------------------------
// Keys that every row sees, with no score to work out but a multiple: lanes hold several keys of every row.
template <int R> static void attend_few(const Call& c, const Batch& b, Tile& t, const Block& at, real* s) {
    few_scores<R>(c, t.q, key_at(c, b) + at.j0 * c.k_j, at.count, s);
    const int64_t end = at.count * R;
    alignas(64) real flat[LANES], safe[LANES], keep[LANES];
    for (int64_t n = end; n % LANES; ++n) s[n] = -INFINITY;
    vreal top = splat(-INFINITY);
    for (int64_t n = 0; n < end; n += LANES) top = high(load(s + n), top);
    store(flat, top * SCALE);
    const vreal m_old = load(t.m);
    alignas(64) real m[LANES];
    store(m, m_old);
    for (int l = 0; l < LANES; ++l) m[l % R] = flat[l] > m[l % R] ? flat[l] : m[l % R];
    const vreal m_new = load(m), base = m_new == -INFINITY ? vreal{} : m_new;
    store(m, base);
    for (int l = 0; l < LANES; ++l) safe[l] = m[l % R];
    const vreal less = load(safe), factor = exp2_of(m_old - base);
    vreal sum[2] = {};
    for (int64_t n = 0; n < end; n += LANES) {
        const vreal w = exp2_weight(load(s + n) * SCALE - less);
        sum[n / LANES % 2] += w;
        store(s + n, w);
    }
    store(flat, sum[0] + sum[1]);
    alignas(64) real l_new[LANES];
    store(l_new, load(t.l) * factor);
    for (int l = 0; l < LANES; ++l) l_new[l % R] += flat[l];
    store(t.m, m_new);
    store(t.l, load(l_new));
    store(keep, factor);
    *(vmask*)t.seen = splat_mask(true);
    few_values<R>(c, value_at(c, b) + at.j0 * c.v_j, s, at.count, few_sums(c, t), t.fresh ? nullptr : keep);
    t.fresh = false;
}

template <int R>
static void score_few(const Call& c, const Batch& b, const Tile& t, const Block& at, real* s) {
    real packed[KEYS * R];
    few_scores<R>(c, t.q, key_at(c, b) + at.j0 * c.k_j, at.count, packed);
    for (int64_t j = 0; j < at.count; ++j)
        for (int r = 0; r < R; ++r) s[j * LANES + r] = packed[j * R + r];
}
template <int R>
static void value_few(const Call& c, const Batch& b, Tile& t, const Block& at, const real* p, const real* keep) {
    real packed[KEYS * R];
    for (int64_t j = 0; j < at.count; ++j)
        for (int r = 0; r < R; ++r) packed[j * R + r] = weight_at(p, j, r);
    few_values<R>(c, value_at(c, b) + at.j0 * c.v_j, packed, at.count, few_sums(c, t), t.fresh ? nullptr : keep);
}

// `f`, or `g` in the matrix unit, with the number of rows rounded up to one there is code for.
#define UP_TO(most) (MOST_FEW <= most || t.rows <= most)
#define IN_ROWS(f, ...) \
    (UP_TO(1) ? f<1>(__VA_ARGS__) : UP_TO(2) ? f<2>(__VA_ARGS__) : UP_TO(4) ? f<4>(__VA_ARGS__) : f<FEW>(__VA_ARGS__))
#if TILES
#define BY_ROWS(f, g, ...) \
    (!few_in_tiles(c, t.rows) ? IN_ROWS(f, __VA_ARGS__) : UP_TO(4) ? g<4>(__VA_ARGS__) \
     : UP_TO(8) ? g<8>(__VA_ARGS__) : g<16>(__VA_ARGS__))
#else
#define BY_ROWS(f, g, ...) IN_ROWS(f, __VA_ARGS__)
#endif
INLINE bool is_few(const Call& c, int64_t rows) {
#if TILES
    if (few_in_tiles(c, rows)) return true;
#endif
    return few_in_rows(c, rows);
}
// Rows that groups fold into one tile. Several tiles of few rows read a block of keys one after the other from the cache, which
// is still faster than lanes that stand empty.
static int64_t most_folded(const Call& c) {
    if (PAIRS || c.N * group_count(c) > 2 * FEW || !few_in_rows(c, c.N)) return QUERIES;
    return FEW;
}
static void load_few(const Call& c, const q_element* const (&rows)[LANES], real* q) {
#if TILES
    int64_t n = 0;
    while (n < LANES && rows[n]) ++n;
    if (few_in_tiles(c, n)) return load_queries(c, rows, q);
#endif
    load_rows(c, rows, q);
}
static void few_attention(const Call& c, const Batch& b, Tile& t, const Block& at, real* s) {
    BY_ROWS(attend_few, attend_in_tiles, c, b, t, at, s);
}
static void few_score_product(const Call& c, const Batch& b, const Tile& t, const Block& at, real* s) {
    BY_ROWS(score_few, score_in_tiles, c, b, t, at, s);
}
static void few_value_product(const Call& c, const Batch& b, Tile& t, const Block& at, const real* p,
                              const real* keep) {
    BY_ROWS(value_few, value_in_tiles, c, b, t, at, p, keep);
}

// ---- tiles: where their rows lie, what they begin with, what they give ---------------------------------------------
// The state of a tile, as the parts of a split key range leave it: m, l, seen, then o.
static size_t part_size(const Call& c) {
    return QUERIES * (2 * sizeof(real) + sizeof(mask_int) + o_rows(c) * sizeof(real));
}

// How the rows of one batch point fall into tiles: few rows a group are folded, several groups to a tile.
struct Tiling {
    int64_t per_group, folded, count;
};
static Tiling tiling(const Call& c) {
    const int64_t groups = group_count(c);
    const int64_t fit = c.N > 0 ? most_folded(c) / c.N : 1;
    if (groups > 1 && fit > 1) {
        const int64_t folded = fit < groups ? fit : groups;
        return {1, folded, (groups + folded - 1) / folded};
    }
    const int64_t per_group = (c.N + QUERIES - 1) / QUERIES;
    return {per_group, 1, per_group * groups};
}

// Places tile `n` of batch point `b`, with the keys it visits inside [from, to).
static void place(const Call& c, const Tiling& g, const Batch& b, int64_t n, int64_t from, int64_t to, Tile& t) {
    const int64_t groups = group_count(c);
    t.g0 = n / g.per_group * g.folded;
    t.i0 = n % g.per_group * QUERIES;
    t.i1 = t.i0 + QUERIES < c.N ? t.i0 + QUERIES : c.N;
    const int64_t taken = t.g0 + g.folded < groups ? g.folded : groups - t.g0;
    t.rows = (t.i1 - t.i0) * taken;
    t.columns = (t.rows + LANES - 1) / LANES;
    t.spans = t.hides = 0;
    t.lo = to;
    t.hi = from;
    find_spans(c, b, t, from, to);
}

// The rows of a tile in the order of its lanes.
struct Row {
    Group g;
    int64_t group, i;
};
static Row first_row(const Call& c, const Tile& t) { return {group_at(c, t.g0), t.g0, t.i0}; }
INLINE void next_row(const Call& c, const Tile& t, Row& r) {
    if (++r.i < t.i1) return;
    r.i = t.i0;
    if (t.rows > t.i1 - t.i0) r.g = group_at(c, ++r.group);
}

// Loads the queries of a placed tile and everything of its rows that no key changes.
static void begin(const Call& c, const Batch& b, Tile& t, bool with_sink) {
    t.fresh = t.near = true;
    t.few = MOST_FEW > 0 && is_few(c, t.rows);
    Row at = first_row(c, t);
    for (int64_t v = 0; v < t.columns * LANES; v += LANES) {
        const q_element* rows[LANES];
        for (int64_t l = 0; l < LANES; ++l) {
            const bool real_row = v + l < t.rows;
            rows[l] = real_row ? query_at(c, b, at.g, at.i) : nullptr;
            set_lane(t, v + l, at.g, at.i);
            if (v + l + 1 < t.rows) next_row(c, t, at);
        }
        if (lies_in_rows(t)) load_few(c, rows, t.q);
        else load_queries(c, rows, t.q + v * q_rows(c));
    }
    const Uniform u = uniform(c, b, t);
    for (int64_t v = 0; v < t.columns * LANES; v += LANES) {
        t.values[v / LANES] = row_values(c, b, u, t, v);
        const vreal sink = with_sink ? first_logit(c, b, u, t, v) : splat(-INFINITY);
        const vreal safe = sink == -INFINITY ? vreal{} : sink;
        store(t.m + v, sink);
        store(t.level + v, splat(NAN));
        store(t.expected + v, splat(NAN));
        store(t.l + v, exp2_of(sink - safe));
        *(vmask*)(t.seen + v) = vmask{};
    }
}

INLINE real log_of_sum(real m, real l) {
    if (!IS_SOFTMAX) return 0;
    return m == INFINITY ? m : (m + FN(__builtin_log2)(l)) * LN2;
}

// Writes what a finished tile gives: out and, if asked, the log of the sum.
static void finish(const Call& c, const Batch& b, Tile& t) {
    if (t.fresh) memset(t.o, 0, o_rows(c) * t.columns * LANES * sizeof(real));
    Row at = first_row(c, t);
    for (int64_t v = 0; v < t.columns * LANES; v += LANES) {
        const vmask seen = *(const vmask*)(t.seen + v);
        const vreal l = load(t.l + v), m = load(t.m + v);
        out_element* rows[LANES];
        for (int64_t n = 0; n < LANES; ++n) {
            rows[n] = nullptr;
            if (v + n >= t.rows) continue;
            if (HAS_OUT) rows[n] = out_at(c, b, at.g, at.i);
            if (HAS_LSE) *lse_at(c, b, at.g, at.i) = log_of_sum(m[n], l[n]);
            next_row(c, t, at);
        }
        vmask keep = splat_mask(true);
        vreal scale = splat(1);
        if (IS_SOFTMAX) {
            scale = NORMALIZED_EARLY ? splat(1) : 1 / l;
            if (EMPTY == EMPTY_ZERO || HAS_SINK) keep = seen;
            else if (c.M == 0) scale = splat(0);
            else if (EMPTY == EMPTY_NAN) scale = pick(seen, scale, splat(NAN));
            else scale = pick(seen, scale, splat(NORMALIZED_EARLY ? 1 : 1 / (real)c.M));
        }
        if (HAS_OUT) from_lanes(t.o + v * o_rows(c), scale, keep, rows, c.out_e, c.E);
    }
}

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

// ---- from the scores of a column of queries to their weights --------------------------------------------------------
// Stages: online softmax (or a pointwise normaliser) in one go; sums alone; weights from known sums; rows without keys.
enum Stage { ONLINE, SUMS, WEIGHTS, EMPTIES };

// Logits to base 2. A score that loads what stands for minus infinity may hold the lowest finite value: it stays finite,
// and is rounded before anything is subtracted, so that equal scores differ by nothing (a fused multiply-add would keep the
// rounding).
INLINE vreal scaled(vreal x) {
    if (PLAIN || SCALE == 1) return x;
    if (!MAY_BE_HUGE) return x * SCALE;
#ifdef WIDE_512
    return __builtin_ia32_mulps512_mask(x, splat(SCALE), x, -1, 11);  // towards zero: it saturates
#else
    x = pick(x == splat(-INFINITY), x, high(x, splat(REAL_IS_DOUBLE ? -1.2e308 : -2.3e38f))) * SCALE;
#if defined(__aarch64__)
    __asm__("" : "+w"(x));
#else
    __asm__("" : "+x"(x));
#endif
    return x;
#endif
}
static constexpr real LATE = PLAIN ? SCALE : 1;  // what `scaled` leaves to do

template <bool VALUE> struct Known {
    constexpr bool operator()() const { return VALUE; }
};

// What the matrix unit reads once a strip is weighed, asked for meanwhile: its sums, then the next strip's queries.
struct Soon {
    const char *at, *end, *next, *last;
    void ask(int64_t lines) {
        for (int64_t n = 0; n < lines && TILES; ++n, at += 64) {
            if (at >= end) at = next, end = last;
            if (at >= end) return;
            __builtin_prefetch(at, 0, 3);
        }
    }
};
static Soon soon_of(const Call& c, const Tile& t, int64_t v, int64_t columns) {
    const real *o = t.o + v * LANES * o_rows(c), *q = t.q + (v + columns) * LANES * q_rows(c);
    return {(const char*)o, (const char*)(o + columns * LANES * o_rows(c)), (const char*)q, (const char*)(q + columns * LANES * q_rows(c))};
}

// One column of queries against one block of keys: the first key, and the scores, a row a key.
struct Column {
    const Call& c;
    const Uniform& u;
    const RowValues& r;
    int64_t j0;
    const real* s;
};
template <bool MASKED, bool NEAR> INLINE vreal logit_at(const Column& x, int64_t k, vmask& seen, vreal& reach) {
    vmask visible = splat_mask(true);
    vreal y = scaled(logit<MASKED, NEAR>(x.c, x.u, x.r, x.j0 + k, load(x.s + k * LANES), visible, reach));
    if (!MASKED) return y;
    seen |= visible;
    return pick(visible, y, splat(-INFINITY));
}

// The highest logit of keys [from, to), -inf where none is visible.
template <bool MASKED> INLINE vreal highest(const Column& x, int64_t from, int64_t to, vreal most) {
    vmask seen;
    vreal reach;
    vreal top[4] = {most, most, most, most};
    int64_t k = from;
    for (; k + 4 <= to; k += 4)
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) top[n] = high(logit_at<MASKED, false>(x, k + n, seen, reach) * LATE, top[n]);
    for (; k < to; ++k) top[0] = high(logit_at<MASKED, false>(x, k, seen, reach) * LATE, top[0]);
    return high(high(top[0], top[1]), high(top[2], top[3]));
}

// Weights of keys [from, to) against the maximum m, and their sums. Only the last range of a block may end between fours.
struct Sums {
    vreal part[4], reach;
    vmask seen;
};
template <bool MASKED, bool NEAR> INLINE vreal weight_of(const Column& x, int64_t k, vreal m, vreal& sum, Sums& all) {
    vreal w = exp2_weight(logit_at<MASKED, NEAR>(x, k, all.seen, all.reach) * LATE - m);
    if (SUMS_ROUNDED) w = rounded(w);
    sum += w;
    return SUMS_ROUNDED ? w : rounded(linear_weight(x.c, x.u, x.r, x.j0 + k, w));
}
template <bool MASKED, bool NEAR>
INLINE void weigh(const Column& x, int64_t from, int64_t to, vreal m, real* p, Sums& sums, Soon& soon) {
    if (!MASKED && to > from) sums.seen = splat_mask(true);
    int64_t k = from;
    for (; k + 4 <= to; k += 4) {
        vreal w[4];
        soon.ask(4);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) w[n] = weight_of<MASKED, NEAR>(x, k + n, m, sums.part[n], sums);
        put_weights(p, k, w[0], w[1]);
        put_weights(p, k + 2, w[2], w[3]);
    }
    for (; k < to; k += 2) {
        const vreal w = weight_of<MASKED, NEAR>(x, k, m, sums.part[0], sums);
        put_weights(p, k, w, k + 1 < to ? weight_of<MASKED, NEAR>(x, k + 1, m, sums.part[1], sums) : vreal{});
    }
}

// Scores in `s` become weights where they need no running maximum: pointwise normalisers and known sums.
template <bool MASKED>
INLINE void weights(const Column& x, int64_t from, int64_t to, vreal m, vreal inverse, real* s) {
    for (int64_t k = from; k < to; ++k) {
        const vreal raw = load(s + k * LANES);
        vmask visible = splat_mask(true);
        vreal reach, w = logit<MASKED, false>(x.c, x.u, x.r, x.j0 + k, raw, visible, reach);
        if (IS_SOFTMAX) w = exp2_of(scaled(w) * LATE - m) * inverse;
        w = weight(x.c, x.u, x.r, x.j0 + k, raw, w);
        store(s + k * LANES, MASKED ? pick(visible, w, vreal{}) : w);
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

static void weigh_known(const Column& x, const Tile& t, int64_t from, int64_t to, int64_t n, int64_t v, Stage stage,
                        real* s, real* p) {
    const int64_t lane = v * LANES;
    const vreal m = load(t.m + lane);
    if (stage == EMPTIES) {
        // Finite additive masks make all keys of such a row equal: weight 1 / M each, here or in `finish`.
        const vmask seen = *(const vmask*)(t.seen + lane);
        for (int64_t k = 0; k < n; ++k) {
            real* at = s + k * LANES;
            store(at, pick(seen, vreal{}, empty_weight(x.c, x.u, x.r, x.j0 + k, load(at))));
        }
    } else {
        const vreal safe = m == -INFINITY ? vreal{} : m;
        const vreal inverse = 1 / load(t.l + lane);
        weights<true>(x, 0, from, safe, inverse, s);
        weights<false>(x, from, to, safe, inverse, s);
        weights<true>(x, to, n, safe, inverse, s);
    }
    int64_t k = 0;
    for (; k + 2 <= n; k += 2) put_weights(p, k, rounded(load(s + k * LANES)), rounded(load(s + (k + 1) * LANES)));
    if (k < n) put_weights(p, k, rounded(load(s + k * LANES)), vreal{});
}

// A maximum need not be one: weights are right against any number that keeps their sum in range. So the first block of a row
// is weighed against 0, which saves a pass over the scores; out of this range, or once a later sum is too large, the block
// is weighed again, against its own maximum. Scores that climb, as towards the diagonal, are foreseen: the sum of a block
// tells its level, which rises by as much to the next.
static constexpr real LARGE = 1048576, SMALL = 1 / LARGE, CLIMB = 10, STEEPEST = 4096;
INLINE vreal exponent_of(vreal x) { return __builtin_convertvector(((vmask)x >> MANTISSA) - BIAS, vreal); }

// Column v of a tile: scores in `s` become weights in `p`, and `keep` what its rows' earlier sums are worth now.
static void soften(const Call& c, const Batch& b, Tile& t, const Block& at, const Uniform& u, int64_t v, Stage stage,
                   int64_t from, int64_t to, real* s, real* p, real* keep, Soon& soon) {
    const int64_t n = at.count, lane = v * LANES;
    const Column x = {c, u, t.values[v], at.j0, s};
    if (!IS_SOFTMAX || stage == WEIGHTS || stage == EMPTIES) {
        weigh_known(x, t, from, to, n, v, stage, s, p);
        end_weights(p, n);
        store(keep, splat(1));
        return;
    }
    const vreal m_old = load(t.m + lane), l_old = load(t.l + lane);
    vreal m = pick(m_old == splat(-INFINITY), vreal{}, m_old), factor, sum;
    Sums sums;
    auto top = [&] { return highest<true>(x, to, n, highest<false>(x, from, to, highest<true>(x, 0, from, m_old))); };
    const vreal expected = load(t.expected + lane);
    const vmask climbing = expected - m > splat(CLIMB);
    bool again = false;
    if (!none(climbing)) {
        again = to - from < n;  // masked keys may be those it climbs to
        m = again ? top() : pick(climbing, expected, m);
    }
    for (;;) {
        for (int i = 0; i < 4; ++i) sums.part[i] = vreal{};
        sums.seen = *(const vmask*)(t.seen + lane);
        const vreal safe = pick(m == splat(-INFINITY), vreal{}, m);
        auto weigh_all = [&](auto near) {
            sums.reach = vreal{};
            weigh<true, near()>(x, 0, from, safe, p, sums, soon);
            weigh<false, near()>(x, from, to, safe, p, sums, soon);
            weigh<true, near()>(x, to, n, safe, p, sums, soon);
            if (near() && !none(sums.reach > splat(NEAR_REACH))) t.near = false;
        };
        if (HAS_NEAR && t.near) {
            weigh_all(Known<HAS_NEAR>{});
            if (!t.near) continue;
        } else weigh_all(Known<false>{});
        factor = pick(m_old - safe < splat(-100), vreal{}, exp2_of(m_old - safe));
        sum = (sums.part[0] + sums.part[1]) + (sums.part[2] + sums.part[3]);
        if (again || none((sum > splat(LARGE)) | (sums.seen & (l_old * factor + sum < splat(SMALL))))) break;
        if (WEIGHTS_OVERWRITE && lies_in_rows(t)) few_score_product(c, b, t, at, s);
        else if (WEIGHTS_OVERWRITE) score_product(c, t, v, 1, at, s);
        m = top();
        again = true;
    }
    end_weights(p, n);
    const vreal level = m + exponent_of(sum), risen = level - load(t.level + lane);
    store(t.level + lane, level);
    store(t.expected + lane, level + pick((risen > vreal{}) & (risen < splat(STEEPEST)), risen, vreal{}));
    m = pick(sums.seen | (m_old != splat(-INFINITY)), m, m_old);
    if (!PRODUCT_KEEPS && !lies_in_rows(t) && !t.fresh && !none(m != m_old)) rescale(c, t, v, factor);
    store(t.m + lane, m);
    store(t.l + lane, l_old * factor + sum);
    store(keep, factor);
    *(vmask*)(t.seen + lane) = sums.seen;
}

static void attend(const Call& c, const Batch& b, Tile& t, const Block& at, Stage stage, real* scores, real* spare,
                   Slants& slants) {
    int64_t from, to;
    full_run(t, at.j0, at.count, from, to);
    const bool all_seen = from == 0 && to == at.count;
    if (lies_in_rows(t) && FEW_ALONE && stage == ONLINE && all_seen) return few_attention(c, b, t, at, scores);
    // Ranges meet at multiples of four keys.
    from = (from + 3) / 4 * 4;
    to = to == at.count ? to : to / 4 * 4;
    if (from >= to) from = to = at.count;
    alignas(128) real keep[QUERIES];
    alignas(128) real near[STAGED * KEYS * LANES + 1];
    Uniform u = uniform(c, b, t);
    u.near = near;
    u.j0 = at.j0;
    real* const p = weight_column(scores, spare, 0);
    // A few columns at a time, so that their scores stay in the nearest cache until they are used.
    for (int64_t v = 0; v < t.columns; v += STRIP) {
        const int64_t columns = v + STRIP < t.columns ? STRIP : t.columns - v;
        if (lies_in_rows(t)) few_score_product(c, b, t, at, scores);
        else score_product(c, t, v, columns, at, scores);
        Soon soon = soon_of(c, t, v, columns);
        for (int64_t x = 0; x < columns; ++x) {
            if (STAGED && (STAGED_BY_SCORE || from > 0 || to < at.count))
                bring_near(c, u, t.values[v + x], at.count, near);
            if (SLANTED) bring_slanted(c, b, u, t, (v + x) * LANES, at.count, slants);
            soften(c, b, t, at, u, v + x, stage, from, to, scores + x * KEYS * LANES, weight_column(scores, spare, x),
                   keep + (v + x) * LANES, soon);
        }
        if (stage == SUMS || !HAS_OUT) continue;
        if (lies_in_rows(t)) few_value_product(c, b, t, at, p, keep);
        else value_product(c, t, v, columns, at, p, keep);
    }
    if (stage != SUMS && HAS_OUT) t.fresh = false;
}

// ---- work: items of neighbouring tiles that share their keys, balanced over threads by visible area -----------------
struct Plan {
    Tiling tiling;
    int64_t batches, group, items_each, splits, split_keys;  // `group` tiles an item; `splits` parts of the key range
    int64_t items() const { return batches * items_each * splits; }
};

static Plan plan(const Call& c, int64_t threads) {
    Plan p;
    p.tiling = tiling(c);
    p.batches = batch_count(c);
    const int64_t tiles = p.batches * p.tiling.count;
    p.group = tiles / (4 * threads);
    p.group = p.group < 1 ? 1 : p.group > GROUP_TILES ? GROUP_TILES : p.group;
    if (p.group > p.tiling.count) p.group = p.tiling.count ? p.tiling.count : 1;
    p.items_each = (p.tiling.count + p.group - 1) / p.group;
    const int64_t items = p.batches * p.items_each;
    p.splits = 1;
    if (CAN_SPLIT && threads > 1 && items > 0 && items < 4 * threads) {
        p.splits = (4 * threads + items - 1) / items;
        const int64_t most = c.M / (4 * KEYS);
        p.splits = p.splits > most ? most : p.splits;
        if (p.splits < 1) p.splits = 1;
    }
    p.split_keys = ((c.M + p.splits - 1) / p.splits + KEYS - 1) / KEYS * KEYS;
    return p;
}

struct Item {
    Batch b;
    int64_t batch, first, last, from, to, split;
};
static Item item_at(const Call& c, const Plan& p, int64_t n) {
    Item x;
    x.split = n % p.splits;
    n /= p.splits;
    x.batch = n / p.items_each;
    x.b = batch_at(c, x.batch);
    x.first = n % p.items_each * p.group;
    x.last = x.first + p.group < p.tiling.count ? x.first + p.group : p.tiling.count;
    x.from = x.split * p.split_keys;
    x.to = x.from + p.split_keys < c.M ? x.from + p.split_keys : c.M;
    return x;
}

// Lanes times visited keys, and a little for the item itself.
static int64_t area(const Call& c, const Plan& p, int64_t n) {
    const Item x = item_at(c, p, n);
    int64_t sum = 64 * LANES;
    Tile t;
    for (int64_t at = x.first; at < x.last; ++at) {
        place(c, p.tiling, x.b, at, x.from, x.to, t);
        for (int64_t s = 0; s < t.spans; ++s) sum += t.columns * LANES * keys_in(t.span[s]);
    }
    return sum;
}

// One thread's working memory, kept between calls.
struct Scratch {
    Tile* tiles;
    real *scores, *weights, *k, *v, *q, *o;
    Slants slants;
};
static size_t round_up(size_t n) { return (n + 127) / 128 * 128; }
static bool reserve(const Call& c, Scratch& s) {
    static thread_local char* memory = nullptr;
    static thread_local size_t held = 0;
    const size_t column = GROUP_TILES * QUERIES * sizeof(real);
    const size_t sizes[] = {GROUP_TILES * sizeof(Tile), KEYS * QUERIES * sizeof(real), p_scratch(), k_scratch(c),
                            v_scratch(c), column * q_rows(c), column * o_rows(c), slanted_size()};
    size_t total = 0;
    for (size_t n : sizes) total += round_up(n) + 128;
    if (total > held) {
        free(memory);
        memory = (char*)aligned_alloc(4096, (total + 4095) / 4096 * 4096);
        held = memory ? total : 0;
        if (!memory) return false;
    }
    char* at = memory;
    auto take = [&](size_t n) { char* p = at; at += round_up(n) + 128; return p; };
    s.tiles = (Tile*)take(sizes[0]);
    s.scores = (real*)take(sizes[1]);
    s.weights = (real*)take(sizes[2]);
    s.k = (real*)take(sizes[3]);
    s.v = (real*)take(sizes[4]);
    s.q = (real*)take(sizes[5]);
    s.o = (real*)take(sizes[6]);
    s.slants.at = (real*)take(sizes[7]);
    return true;
}

static_assert(LEAST_GAP >= KEY_STEP, "a part that begins early meets the one before it");

// Every tile of [first, last) over the keys it visits, block by block, so that a block of keys serves all of them.
static void sweep(const Call& c, const Item& x, Tile* tiles, int64_t count, Stage stage, Scratch& w) {
    int64_t lo = x.to, hi = x.from;
    for (int64_t n = 0; n < count; ++n) {
        lo = tiles[n].lo < lo ? tiles[n].lo : lo;
        hi = tiles[n].hi > hi ? tiles[n].hi : hi;
    }
    if (stage == EMPTIES) lo = 0, hi = c.M;
    const auto* k = key_at(c, x.b);
    const auto* v = value_at(c, x.b);
    for (int64_t j0 = lo, j1; j0 < hi; j0 = j1) {
        if (stage != EMPTIES) {
            int64_t next = hi;
            for (int64_t n = 0; n < count && next > j0; ++n) {
                const int64_t x = first_key(tiles[n], j0);
                next = x < next ? x : next;
            }
            j0 = next;
        }
        if (j0 >= hi) return;
        j1 = j0 + KEYS < hi ? j0 + KEYS : hi;
        Block whole;
        bool ready = false;
        for (int64_t n = 0; n < count; ++n) {
            Tile& t = tiles[n];
            for (int64_t from = j0, to; from < j1; from = to) {
                to = j1;
                if (stage != EMPTIES) {
                    from = first_key(t, from);
                    if (from >= j1 || from >= t.hi) break;
                    to = run_end(t, from, j1);
                }
                if (lies_in_rows(t)) {
                    Block raw = {};
                    raw.j0 = from;
                    raw.count = to - from;
                    attend(c, x.b, t, raw, stage, w.scores, w.weights, w.slants);
                    continue;
                }
                if (!ready) whole = load_block(c, k, v, j0, j1 - j0, w.k, w.v);
                ready = true;
                const int64_t begin = (from - j0) / KEY_STEP * KEY_STEP;
                attend(c, x.b, t, part_of(c, whole, begin, to - j0), stage, w.scores, w.weights,
                       w.slants);
            }
        }
    }
}

static void run_item(const Call& c, const Plan& p, int64_t number, Scratch& w, char* parts) {
    const Item x = item_at(c, p, number);
    const int64_t count = x.last - x.first;
    w.slants.group = -1;
    for (int64_t n = 0; n < count; ++n) {
        Tile& t = w.tiles[n];
        t.q = w.q + n * QUERIES * q_rows(c);
        t.o = w.o + n * QUERIES * o_rows(c);
        place(c, p.tiling, x.b, x.first + n, x.from, x.to, t);
        begin(c, x.b, t, x.split == 0);
    }
    if (NORMALIZED_EARLY) sweep(c, x, w.tiles, count, SUMS, w);
    sweep(c, x, w.tiles, count, NORMALIZED_EARLY ? WEIGHTS : ONLINE, w);
    if (IS_SOFTMAX && EMPTY == EMPTY_MEAN && !HAS_SINK) {
        bool any = false;
        for (int64_t n = 0; n < count; ++n)
            for (int64_t r = 0; r < w.tiles[n].rows; ++r) any |= !w.tiles[n].seen[r];
        if (any) sweep(c, x, w.tiles, count, EMPTIES, w);
    }
    for (int64_t n = 0; n < count; ++n) {
        Tile& t = w.tiles[n];
        if (lies_in_rows(t) && !t.fresh) end_few(c, t);
        if (p.splits == 1) {
            finish(c, x.b, t);
            continue;
        }
        char* part = parts + ((x.batch * p.tiling.count + x.first + n) * p.splits + x.split) * part_size(c);
        if (t.fresh) memset(t.o, 0, o_rows(c) * t.columns * LANES * sizeof(real));
        memcpy(part, t.m, sizeof t.m);
        memcpy(part += sizeof t.m, t.l, sizeof t.l);
        memcpy(part += sizeof t.l, t.seen, sizeof t.seen);
        memcpy(part + sizeof t.seen, t.o, o_rows(c) * t.columns * LANES * sizeof(real));
    }
}

// Joins the parts of a split tile: each is weighed by 2^(its maximum - the common maximum).
static void join(const Call& c, const Plan& p, int64_t number, Scratch& w, const char* parts) {
    const Batch b = batch_at(c, number / p.tiling.count);
    Tile& t = w.tiles[0];
    t.o = w.o;
    place(c, p.tiling, b, number % p.tiling.count, 0, c.M, t);
    t.fresh = false;
    parts += number * p.splits * part_size(c);
    for (int64_t lane = 0; lane < t.columns * LANES; lane += LANES) {
        vreal m = splat(-INFINITY), l = vreal{};
        vmask seen = vmask{};
        for (int64_t s = 0; s < p.splits; ++s) {
            const real* part = (const real*)(parts + s * part_size(c));
            m = high(load(part + lane), m);
            seen |= *(const vmask*)((const mask_int*)(part + 2 * QUERIES) + lane);
        }
        const vreal safe = m == -INFINITY ? vreal{} : m;
        for (int64_t s = 0; s < p.splits; ++s) {
            const real* part = (const real*)(parts + s * part_size(c));
            const vreal factor = exp2_of(load(part + lane) - safe);
            l += load(part + QUERIES + lane) * factor;
            const real* o = (const real*)((const mask_int*)(part + 2 * QUERIES) + QUERIES);
            for (int64_t n = lane * o_rows(c); n < (lane + LANES) * o_rows(c); n += LANES) {
                const vreal x = load(o + n) * factor;
                store(t.o + n, s ? load(t.o + n) + x : x);
            }
        }
        store(t.m + lane, m);
        store(t.l + lane, l);
        *(vmask*)(t.seen + lane) = seen;
    }
    finish(c, b, t);
}

static int32_t run(const Call& c) {
#if TILES
    if (!allow_matrix_unit()) return NO_MATRIX_UNIT;
#endif
    const int64_t threads = omp_get_max_threads();
    const Plan p = plan(c, threads);
    const int64_t items = p.items(), tiles = p.batches * p.tiling.count;
    if (items == 0) return 0;
    const int64_t team = threads < items ? threads : items;
    char* parts = p.splits > 1 ? (char*)aligned_alloc(128, round_up(tiles * p.splits * part_size(c))) : nullptr;
    int64_t* ends = team > 1 ? (int64_t*)malloc(items * sizeof(int64_t)) : nullptr;
    int32_t failed = (p.splits > 1 && !parts) || (team > 1 && !ends) ? OUT_OF_MEMORY : 0;
    if (!failed)
#pragma omp parallel num_threads(team) if (team > 1)
    {
        Scratch w;
        const bool ready = reserve(c, w);
        if (!ready) {
#pragma omp atomic write
            failed = OUT_OF_MEMORY;
        }
        const int64_t me = omp_get_thread_num(), us = omp_get_num_threads();
        int64_t from = 0, to = items;
        if (us > 1) {
            if (EVEN_AREA) {
                from = items * me / us;
                to = items * (me + 1) / us;
            } else {
#pragma omp for schedule(static)
                for (int64_t n = 0; n < items; ++n) ends[n] = area(c, p, n);
                // An item belongs to the thread in whose share of the whole area its middle lies.
                int64_t whole = 0, before = 0;
                for (int64_t n = 0; n < items; ++n) whole += ends[n];
                from = to = 0;
                for (int64_t n = 0; n < items; ++n) {
                    const int64_t owner = (int64_t)((double)(2 * before + ends[n]) / (2.0 * (double)whole) * (double)us);
                    from += owner < me;
                    to += owner <= me;
                    before += ends[n];
                }
            }
        }
#if TILES
        const uint32_t before = enter_matrix_unit();
#endif
        if (ready)
            for (int64_t n = from; n < to; ++n) run_item(c, p, n, w, parts);
#if TILES
        leave_matrix_unit(before);
#endif
        if (p.splits > 1) {
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t n = 0; n < tiles; ++n)
                if (ready) join(c, p, n, w, parts);
        }
    }
    free(ends);
    free(parts);
    return failed;
}

// ---- entry: 0, OUT_OF_MEMORY or TOO_LARGE
extern "C" __attribute__((visibility("default"))) int32_t attncc_run(
    const void* const* tensors, const int64_t* const* strides, const int64_t* sizes,
    void* const* outputs, const int64_t* const* out_strides) {
    (void)sizes; (void)outputs; (void)out_strides;
    Call c;
    if (sizes[0] > 16777216) return TOO_LARGE;
    c.z_B = sizes[0];
    if (sizes[1] > 16777216) return TOO_LARGE;
    c.z_N = sizes[1];
    c.t_q = (const float*)tensors[0];
    c.s_q[0] = strides[0][0];
    c.s_q[1] = strides[0][1];
    c.s_q[2] = strides[0][2];
    c.s_q[3] = strides[0][3];
    c.t_k = (const float*)tensors[1];
    c.s_k[0] = strides[1][0];
    c.s_k[1] = strides[1][1];
    c.s_k[2] = strides[1][2];
    c.s_k[3] = strides[1][3];
    c.t_v = (const float*)tensors[2];
    c.s_v[0] = strides[2][0];
    c.s_v[1] = strides[2][1];
    c.s_v[2] = strides[2][2];
    c.s_v[3] = strides[2][3];
    c.t_slope = (const float*)tensors[3];
    c.s_slope[0] = strides[3][0];
    c.t_doc = (const int32_t*)tensors[4];
    c.s_doc[0] = strides[4][0];
    c.s_doc[1] = strides[4][1];
    c.N = c.z_N;
    c.M = c.z_N;
    c.q_i = 1 * c.s_q[1];
    c.q_d = 1 * c.s_q[3];
    c.k_j = 1 * c.s_k[1];
    c.k_d = 1 * c.s_k[3];
    c.v_j = 1 * c.s_v[1];
    c.v_e = 1 * c.s_v[3];
    c.out_e = 1;
    c.out = (float*)outputs[0];
    c.s_out[0] = out_strides[0][0];
    c.s_out[1] = out_strides[0][1];
    c.s_out[2] = out_strides[0][2];
    c.s_out[3] = out_strides[0][3];
    c.s_out[4] = out_strides[0][4];
    c.out_e = c.s_out[4];
    c.lse = (real*)outputs[1];
    c.s_lse[0] = out_strides[1][0];
    c.s_lse[1] = out_strides[1][1];
    c.s_lse[2] = out_strides[1][2];
    c.s_lse[3] = out_strides[1][3];
    return run(c);
}
