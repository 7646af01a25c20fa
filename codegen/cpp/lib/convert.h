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

