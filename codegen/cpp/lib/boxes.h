// ---- boxes of a cache's pages: those that changed are made anew, then the bounds of products with their keys ---------
// q[b, h, g, d]  k[b, h, j, d]  seen[b, h, j]  shift[b, h]  written[w]      page of j: (j + shift) / SIZE
// least, largest[b, h, p, d]  was[b, h, j], at[b, h]: seen and shift as they were  dirty[b, h, p]: room  out[b, h, g, p]
// whole: all pages are made, whatever they are.
struct Call {
    const float* q; const element* k; const bool* seen; const int64_t* shift; const int64_t* written;
    float* least; float* largest; bool* was; int64_t* at; bool* dirty; float* out;
    const int64_t *sq, *sk, *ss, *sh, *sw, *sl, *sm, *so, *sa, *sd, *st;
    int64_t B, H, G, M, D, P, SIZE, W; bool whole;
};

static void mark(const Call& c, int64_t b, int64_t h) {
    bool* dirty = c.dirty + b * c.sd[0] + h * c.sd[1];
    const int64_t shift = c.shift[b * c.sh[0] + h * c.sh[1]];
    const bool whole = c.whole || shift != c.at[b * c.sa[0] + h * c.sa[1]];
    for (int64_t p = 0; p < c.P; ++p) dirty[p] = whole;
    if (whole) return;
    const bool* seen = c.seen + b * c.ss[0] + h * c.ss[1];
    const bool* was = c.was + b * c.so[0] + h * c.so[1];
    for (int64_t p = 0; p < c.P; ++p) {
        const int64_t first = p * c.SIZE - shift, lo = first > 0 ? first : 0;
        const int64_t end = first + c.SIZE < c.M ? first + c.SIZE : c.M;
        if (c.ss[2] == 1 && c.so[2] == 1) {
            dirty[p] = lo < end && memcmp(seen + lo, was + lo, (size_t)(end - lo)) != 0;
        } else {
            for (int64_t j = lo; j < end; ++j) dirty[p] |= seen[j * c.ss[2]] != was[j * c.so[2]];
        }
    }
    for (int64_t n = 0; n < c.W; ++n) {
        int64_t j = c.written[n * c.sw[0]];
        j = j < 0 ? j + c.M : j;
        const int64_t p = (j + shift) / c.SIZE;
        if (j >= 0 && j < c.M && p >= 0 && p < c.P) dirty[p] = true;
    }
}

// A box takes a key in; what is no number stays one.
static inline __attribute__((always_inline)) void widen(
    const element* k, int64_t stride, int64_t width, float* __restrict least, float* __restrict largest) {
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) {
        const float x = value(k[d * stride]), l = least[d], m = largest[d];
        least[d] = x < l || x != x ? x : l;
        largest[d] = x > m || x != x ? x : m;
    }
}

static void make(const Call& c, int64_t b, int64_t h, int64_t p) {
    const int64_t first = p * c.SIZE - c.shift[b * c.sh[0] + h * c.sh[1]];
    const int64_t lo = first > 0 ? first : 0, end = first + c.SIZE < c.M ? first + c.SIZE : c.M;
    float* least = c.least + b * c.sl[0] + h * c.sl[1] + p * c.sl[2];
    float* largest = c.largest + b * c.sm[0] + h * c.sm[1] + p * c.sm[2];
    const bool* seen = c.seen + b * c.ss[0] + h * c.ss[1];
    bool any = false;
    for (int64_t d = 0; d < c.D; ++d) least[d] = __FLT_MAX__, largest[d] = -__FLT_MAX__;
    for (int64_t j = lo; j < end; ++j) {
        if (!seen[j * c.ss[2]]) continue;
        const element* k = c.k + b * c.sk[0] + h * c.sk[1] + j * c.sk[2];
        if (c.sk[3] == 1) widen(k, 1, c.D, least, largest);
        else widen(k, c.sk[3], c.D, least, largest);
        any = true;
    }
    if (!any) for (int64_t d = 0; d < c.D; ++d) least[d] = largest[d] = 0;
}

// Four sums at a time: each waits for itself alone.
typedef float vector __attribute__((vector_size(32)));
typedef float loose __attribute__((vector_size(32), aligned(4), may_alias));
static inline float total(const vector* parts) {
    const vector all = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    return ((all[0] + all[1]) + (all[2] + all[3])) + ((all[4] + all[5]) + (all[6] + all[7]));
}

static void bound(const Call& c, int64_t b, int64_t h, int64_t p) {
    const float* least = c.least + b * c.sl[0] + h * c.sl[1] + p * c.sl[2];
    const float* largest = c.largest + b * c.sm[0] + h * c.sm[1] + p * c.sm[2];
    for (int64_t g = 0; g < c.G; ++g) {
        const float* q = c.q + b * c.sq[0] + h * c.sq[1] + g * c.sq[2];
        int64_t d = 0;
        vector parts[4] = {};
        for (; d + 32 <= c.D; d += 32) {
            for (int n = 0; n < 4; ++n) {
                const vector a = *(const loose*)(q + d + 8 * n);
                const vector x = a * *(const loose*)(least + d + 8 * n), y = a * *(const loose*)(largest + d + 8 * n);
                parts[n] += x > y ? x : y;
            }
        }
        float sum = total(parts);
        for (; d < c.D; ++d) {
            const float x = q[d] * least[d], y = q[d] * largest[d];
            sum += x > y ? x : y;
        }
        c.out[b * c.st[0] + h * c.st[1] + g * c.st[2] + p] = sum;
    }
}

static void run(const Call& c) {
    const int64_t points = c.B * c.H;
    for (int64_t n = 0; n < points; ++n) mark(c, n / c.H, n % c.H);
    for (int64_t n = 0; n < points; ++n) {
        const bool* seen = c.seen + n / c.H * c.ss[0] + n % c.H * c.ss[1];
        bool* was = c.was + n / c.H * c.so[0] + n % c.H * c.so[1];
        c.at[n / c.H * c.sa[0] + n % c.H * c.sa[1]] = c.shift[n / c.H * c.sh[0] + n % c.H * c.sh[1]];
        for (int64_t p = 0; p < c.P; ++p) {
            if (!c.dirty[n / c.H * c.sd[0] + n % c.H * c.sd[1] + p]) continue;
            const int64_t first = p * c.SIZE - c.shift[n / c.H * c.sh[0] + n % c.H * c.sh[1]];
            for (int64_t j = first > 0 ? first : 0; j < first + c.SIZE && j < c.M; ++j) was[j * c.so[2]] = seen[j * c.ss[2]];
        }
    }
    const int64_t all = points * c.P;
#pragma omp parallel for schedule(static) if (all * c.D * c.G > (int64_t)1 << 21)
    for (int64_t n = 0; n < all; ++n) {
        const int64_t b = n / c.P / c.H, h = n / c.P % c.H, p = n % c.P;
        if (c.dirty[b * c.sd[0] + h * c.sd[1] + p]) make(c, b, h, p);
        bound(c, b, h, p);
    }
}
