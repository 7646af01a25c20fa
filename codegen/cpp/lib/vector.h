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
    const float most = COARSE ? 5.5f : 7.90531110763549805f;
    const vreal c = high(splat(-most), low(splat(most), x));
    const vreal y = c * c;
#if COARSE
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
    if (!COARSE) r *= 2 - q * r;  // one Newton step: division would take longer than all the rest
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
#if COARSE
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
#if PAIRS
    return ldexp_of(p, x);  // flushes what is not normal: see enter_products
#else
    return __builtin_ia32_scalefps512_mask(p, x, vreal{}, __builtin_ia32_cmpps512_mask(x, splat(-100), 5, -1, 4), 4);
#endif
#else
    const float shift = 12582912.0f + 127;  // 1.5 * 2^23 + BIAS: adding it rounds to an integer in the low bits, an exponent
    const vreal c = low(splat(126), high(splat(-125), x));  // p may be less than 1, and 2^-126 of it not normal
    const vreal n = c + shift;
    const vreal f = c - (n - shift);
#if COARSE
    vreal p = splat(0.0551716690926f);  // the same degree 3 from -1/2 on
    p = p * f + 0.242611122224f;
    p = p * f + 0.693260985454f;
    p = p * f + 0.999928073535f;
#else
    const vreal p = exp2_small(f);
#endif
    return x < -100 ? vreal{} : p * (vreal)((vmask)n << 23);  // a product, which keeps every NaN
#endif
}

INLINE bool none(vmask m) {
    mask_int any = 0;
    EACH_LANE(any |= m[l])
    return !any;
}
