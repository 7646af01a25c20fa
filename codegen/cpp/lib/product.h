// ---- products: out[r][query] = sum_k a[r, k] * b[k][query], queries in lanes, `a` broadcast from where it lies ------
// b and out are columns of LANES queries, `b_next` and `out_next` apart, each with its rows one after the other.
#if PAIRS
// Pairs of bfloat16 along k: `a` broadcasts two neighbours at once, b holds pairs in the bits of its lanes. With `onto`, sums
// go on from what out holds.
typedef uint16_t a_element;
typedef bool Onto;
INLINE vreal spread(const a_element* a) { uint32_t x; memcpy(&x, a, 4); return (vreal)(x + vword{}); }
INLINE vreal multiply_add(vreal sum, vreal x, vreal y) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
    return sum;
}
// It takes numbers that are not normal for zero; so do the vectors beside it.
constexpr uint32_t FLUSH_TO_ZERO = 0x8000;
INLINE uint32_t enter_products() {
    const uint32_t before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before | FLUSH_TO_ZERO);
    return before;
}
INLINE void leave_products(uint32_t before) { __builtin_ia32_ldmxcsr(before); }
constexpr bool GOES_ON = true;
INLINE vreal last_of(const real*, Onto, vreal sum) { return sum; }
INLINE Onto column_of(Onto onto, int64_t) { return onto; }
#else
// With `onto`, out = out * onto[query] + sum: sums that begin anew keep rounding errors from growing with the number of keys.
typedef real a_element;
typedef const real* Onto;
INLINE vreal spread(const a_element* a) { return splat(*a); }
INLINE vreal multiply_add(vreal sum, vreal x, vreal y) { return sum + x * y; }
constexpr bool GOES_ON = false;
INLINE vreal last_of(const real* out, Onto onto, vreal sum) { return onto ? load(out) * load(onto) + sum : sum; }
INLINE Onto column_of(Onto onto, int64_t c) { return onto ? onto + c * LANES : onto; }
#endif

// Numbers one inside the other: of an array whose elements live across a loop gcc keeps a copy in memory.
template <int C> struct Line {
    vreal x;
    Line<C - 1> next;
};
template <> struct Line<0> {};
template <int R, int C> struct Lines {
    Line<C> line;
    Lines<R - 1, C> next;
};
template <int C> struct Lines<0, C> {};

INLINE void clear(Line<0>&) {}
template <int C> INLINE void clear(Line<C>& to) { to.x = vreal{}, clear(to.next); }
INLINE void load_line(Line<0>&, const real*, int64_t) {}
template <int C> INLINE void load_line(Line<C>& to, const real* at, int64_t step) {
    to.x = load(at), load_line(to.next, at + step, step);
}
INLINE void store_line(const Line<0>&, real*, int64_t, Onto) {}
template <int C> INLINE void store_line(const Line<C>& sum, real* at, int64_t step, Onto onto) {
    store(at, last_of(at, onto, sum.x)), store_line(sum.next, at + step, step, column_of(onto, 1));
}
INLINE void add_line(Line<0>&, vreal, const Line<0>&) {}
template <int C> INLINE void add_line(Line<C>& sum, vreal x, const Line<C>& y) {
    sum.x = multiply_add(sum.x, x, y.x), add_line(sum.next, x, y.next);
}
template <int C> INLINE void clear(Lines<0, C>&) {}
template <int R, int C> INLINE void clear(Lines<R, C>& to) { clear(to.line), clear(to.next); }
template <int C> INLINE void load_lines(Lines<0, C>&, const real*, int64_t) {}
template <int R, int C> INLINE void load_lines(Lines<R, C>& to, const real* at, int64_t step) {
    load_line(to.line, at, step), load_lines(to.next, at + LANES, step);
}
template <int C> INLINE void store_lines(const Lines<0, C>&, real*, int64_t, Onto) {}
template <int R, int C> INLINE void store_lines(const Lines<R, C>& sum, real* at, int64_t step, Onto onto) {
    store_line(sum.line, at, step, onto), store_lines(sum.next, at + LANES, step, onto);
}
template <int C> INLINE void add_lines(Lines<0, C>&, const a_element*, int64_t, const Line<C>&) {}
template <int R, int C> INLINE void add_lines(Lines<R, C>& sum, const a_element* a, int64_t ar, const Line<C>& y) {
    add_line(sum.line, spread(a), y), add_lines(sum.next, a + ar, ar, y);
}

template <int R, int C>
INLINE void product_tile(const a_element* a, int64_t ar, int64_t ak, const real* b, int64_t b_next, int64_t depth,
                         real* out, int64_t out_next, Onto onto) {
    Lines<R, C> sum;
    if (GOES_ON && onto) load_lines(sum, out, out_next);
    else clear(sum);
    for (int64_t k = 0; k < depth; ++k, a += ak, b += LANES) {
        Line<C> column;
        load_line(column, b, b_next);
        add_lines(sum, a, ar, column);
    }
    store_lines(sum, out, out_next, onto);
}

template <int C>
static void product_columns(int64_t rows, const a_element* a, int64_t ar, int64_t ak, const real* b, int64_t b_next,
                            int64_t depth, real* out, int64_t out_next, Onto onto) {
    int64_t r = 0;
    for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
        product_tile<TILE_ROWS, C>(a + r * ar, ar, ak, b, b_next, depth, out + r * LANES, out_next, onto);
    for (; r + 4 <= rows; r += 4)
        product_tile<4, C>(a + r * ar, ar, ak, b, b_next, depth, out + r * LANES, out_next, onto);
    for (; r + 2 <= rows; r += 2)
        product_tile<2, C>(a + r * ar, ar, ak, b, b_next, depth, out + r * LANES, out_next, onto);
    if (r < rows) product_tile<1, C>(a + r * ar, ar, ak, b, b_next, depth, out + r * LANES, out_next, onto);
}

static void product(int64_t rows, int64_t columns, const a_element* a, int64_t ar, int64_t ak, const real* b,
                    int64_t b_next, int64_t depth, real* out, int64_t out_next, Onto onto) {
    int64_t c = 0;
    auto some = [&](auto f, int64_t n) {
        f(rows, a, ar, ak, b + c * b_next, b_next, depth, out + c * out_next, out_next, column_of(onto, c));
        c += n;
    };
    while (c + TILE_VECTORS <= columns) some(product_columns<TILE_VECTORS>, TILE_VECTORS);
    while (c + 2 <= columns) some(product_columns<2>, 2);
    if (c < columns) some(product_columns<1>, 1);
}
