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
