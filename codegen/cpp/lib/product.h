// ---- products: out[r][query] = sum_k a[r, k] * b[k][query], queries in lanes, `a` broadcast from where it lies ------
// Rows of b and out are `ld` apart. With `keep`, out = out * keep[query] + sum; otherwise out = sum.
template <int R, int C>
INLINE void product_tile(const real* a, int64_t ar, int64_t ak, const real* b, int64_t ld, int64_t depth, real* out,
                         const real* keep) {
    vreal sum[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = vreal{};
    for (int64_t k = 0; k < depth; ++k, a += ak, b += ld) {
        vreal column[C];
        for (int c = 0; c < C; ++c) column[c] = load(b + c * LANES);
        for (int r = 0; r < R; ++r) {
            const vreal x = splat(a[r * ar]);
            for (int c = 0; c < C; ++c) sum[r][c] += x * column[c];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
            real* at = out + r * ld + c * LANES;
            store(at, keep ? load(at) * load(keep + c * LANES) + sum[r][c] : sum[r][c]);
        }
}

template <int C>
static void product_columns(int64_t rows, const real* a, int64_t ar, int64_t ak, const real* b, int64_t ld,
                            int64_t depth, real* out, const real* keep) {
    int64_t r = 0;
    for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
        product_tile<TILE_ROWS, C>(a + r * ar, ar, ak, b, ld, depth, out + r * ld, keep);
    for (; r + 2 <= rows; r += 2) product_tile<2, C>(a + r * ar, ar, ak, b, ld, depth, out + r * ld, keep);
    if (r < rows) product_tile<1, C>(a + r * ar, ar, ak, b, ld, depth, out + r * ld, keep);
}

static void product(int64_t rows, const real* a, int64_t ar, int64_t ak, const real* b, int64_t ld, int64_t depth,
                    real* out, const real* keep) {
    int64_t c = 0;
    for (; c + TILE_VECTORS * LANES <= ld; c += TILE_VECTORS * LANES)
        product_columns<TILE_VECTORS>(rows, a, ar, ak, b + c, ld, depth, out + c, keep ? keep + c : keep);
    for (; c + 2 * LANES <= ld; c += 2 * LANES)
        product_columns<2>(rows, a, ar, ak, b + c, ld, depth, out + c, keep ? keep + c : keep);
    if (c < ld) product_columns<1>(rows, a, ar, ak, b + c, ld, depth, out + c, keep ? keep + c : keep);
}
