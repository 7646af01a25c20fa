// ---- products of a backward: out[r][n] (+)= sum_k a[r, k] * b[k][n], columns n in lanes, `a` broadcast from where it lies
// A column is LANES wide. Of b and of out: elements from row to row, and from column to column.
struct Left { const real* at; int64_t row, step; };
struct Lanes { const real* at; int64_t row, next; };
struct Sums { real* at; int64_t row, next; };

template <int R, int C, bool ADD>
INLINE void gradient_tile(Left a, Lanes b, int64_t depth, Sums out) {
    vreal sum[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = ADD ? load(out.at + r * out.row + c * out.next) : vreal{};
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k, a.at += a.step, b.at += b.row) {
        vreal column[C];
        for (int c = 0; c < C; ++c) column[c] = load(b.at + c * b.next);
        for (int r = 0; r < R; ++r) {
            const vreal x = splat(a.at[r * a.row]);
            for (int c = 0; c < C; ++c) sum[r][c] += x * column[c];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(out.at + r * out.row + c * out.next, sum[r][c]);
}

template <int C, bool ADD>
static void gradient_columns(int64_t rows, Left a, Lanes b, int64_t depth, Sums out) {
    auto step = [&](auto tile, int n) {
        tile(a, b, depth, out);
        a.at += n * a.row;
        out.at += n * out.row;
        rows -= n;
    };
    while (rows >= TILE_ROWS) step(gradient_tile<TILE_ROWS, C, ADD>, TILE_ROWS);
    if (rows >= 4) step(gradient_tile<4, C, ADD>, 4);
    if (rows >= 2) step(gradient_tile<2, C, ADD>, 2);
    if (rows) step(gradient_tile<1, C, ADD>, 1);
}

template <bool ADD>
static void gradient_product(int64_t rows, int64_t columns, Left a, Lanes b, int64_t depth, Sums out) {
    auto some = [&](auto f, int n) {
        f(rows, a, b, depth, out);
        b.at += n * b.next;
        out.at += n * out.next;
        columns -= n;
    };
    while (columns >= TILE_VECTORS) some(gradient_columns<TILE_VECTORS, ADD>, TILE_VECTORS);
    while (columns >= 2) some(gradient_columns<2, ADD>, 2);
    if (columns) some(gradient_columns<1, ADD>, 1);
}
