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

// rows[lane][column] = in[column][lane] * scale[lane] for the rows that are not null; the lanes where all are finite.
template <class T>
static vmask from_lanes(const real* in, vreal scale, vmask keep, T* const (&rows)[LANES], int64_t stride,
                        int64_t columns) {
    int64_t n = 0;
    vreal finite = {};
    if (stride == 1)
        for (; n + LANES <= columns; n += LANES) {
            vreal x[LANES];
            for (int l = 0; l < LANES; ++l) x[l] = pick(keep, load(in + (n + l) * LANES) * scale, vreal{});
            for (int l = 0; l < LANES; ++l) finite += x[l] * 0;
            transpose(x);
            for (int l = 0; l < LANES; ++l)
                if (rows[l]) put_row(rows[l] + n, x[l]);
        }
    for (; n < columns; ++n) {
        const vreal x = pick(keep, load(in + n * LANES) * scale, vreal{});
        finite += x * 0;
        for (int l = 0; l < LANES; ++l)
            if (rows[l]) put(rows[l] + n * stride, x[l]);
    }
    return finite == 0;
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
