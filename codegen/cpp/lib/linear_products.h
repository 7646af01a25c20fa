// ---- small products of matrices in rows, whole tiles: out[m][n] (+)= sum_k a[m am + k ak] b[k][n] --------------------
// `m` comes in multiples of ROWS, `n` of LANES; `a` is read element by element, so that it may lie transposed. Of a
// triangle that is zero above its diagonal, or below it where it is read transposed, only what is not zero is read.
constexpr int64_t ROWS = 4;
enum Part { ALL, LOWER, UPPER };

// Numbers one inside the other: of an array whose elements live across a loop gcc keeps a copy in memory.
template <int V> struct Row {
    vreal x;
    Row<V - 1> next;
};
template <> struct Row<0> {};
INLINE void load_row(Row<0>&, const real*) {}
template <int V> INLINE void load_row(Row<V>& to, const real* p) { to.x = load(p), load_row(to.next, p + LANES); }
INLINE void clear_row(Row<0>&) {}
template <int V> INLINE void clear_row(Row<V>& to) { to.x = vreal{}, clear_row(to.next); }
INLINE void store_row(const Row<0>&, real*) {}
template <int V> INLINE void store_row(const Row<V>& x, real* p) { store(p, x.x), store_row(x.next, p + LANES); }
INLINE void add_row(Row<0>&, real, const Row<0>&) {}
template <int V> INLINE void add_row(Row<V>& sum, real a, const Row<V>& b) {
    sum.x += b.x * a, add_row(sum.next, a, b.next);
}

template <int V>
static void tile(const real* a, int64_t am, int64_t ak, const real* b, int64_t b_row, int64_t from, int64_t to, real* out,
                 int64_t out_row, bool onto) {
    Row<V> s0, s1, s2, s3;
    if (onto) {
        load_row(s0, out), load_row(s1, out + out_row), load_row(s2, out + 2 * out_row), load_row(s3, out + 3 * out_row);
    } else {
        clear_row(s0), clear_row(s1), clear_row(s2), clear_row(s3);
    }
    for (int64_t k = from; k < to; ++k) {
        Row<V> x;
        load_row(x, b + k * b_row);
        const real* at = a + k * ak;
        add_row(s0, at[0], x), add_row(s1, at[am], x), add_row(s2, at[2 * am], x), add_row(s3, at[3 * am], x);
    }
    store_row(s0, out), store_row(s1, out + out_row), store_row(s2, out + 2 * out_row), store_row(s3, out + 3 * out_row);
}

// `m` rows from the first one of `a`, of K terms; the rows stand at `first` in a triangle.
static void multiply(Part part, int64_t m, int64_t n, int64_t K, const real* a, int64_t am, int64_t ak, const real* b,
                     int64_t b_row, real* out, int64_t out_row, bool onto) {
    auto columns = [&](auto f, int64_t at) {
        for (int64_t r = 0; r < m; r += ROWS) {
            const int64_t from = part == UPPER ? r : 0, to = part == LOWER && r + ROWS < K ? r + ROWS : K;
            f(a + r * am, am, ak, b + at, b_row, from, to, out + r * out_row + at, out_row, onto);
        }
    };
    int64_t at = 0;
    for (; at + TILE_VECTORS * LANES <= n; at += TILE_VECTORS * LANES) columns(tile<TILE_VECTORS>, at);
    for (; at + 2 * LANES <= n; at += 2 * LANES) columns(tile<2>, at);
    for (; at < n; at += LANES) columns(tile<1>, at);
}

static void transpose(const real* from, int64_t from_row, int64_t rows, int64_t columns, real* to, int64_t to_row) {
    for (int64_t c = 0; c < columns; c += ROWS)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t x = 0; x < ROWS; ++x) to[(c + x) * to_row + r] = from[r * from_row + c + x];
}
