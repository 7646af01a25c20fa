// ---- products in the matrix unit (AMX): 16 x 16 tiles of sums, 16 x 32 bfloat16 of `a`, 16 x 16 pairs of `b` --------
#define TILE_ZERO(n) asm volatile("tilezero %%tmm" #n ::)
#define TILE_LOAD(n, at, stride) \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #n ::"r"((const char*)(at)), "r"((int64_t)(stride)) : "memory")
#define TILE_STORE(n, at, stride) \
    asm volatile("tilestored %%tmm" #n ", (%0,%1,1)" ::"r"((char*)(at)), "r"((int64_t)(stride)) : "memory")
#define TILE_DOT(sum, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::)

// R x C tiles of out: sums in 0..3, `a` in 4 and 5, `b` in 6 and 7. Strides of a in bytes: between rows, between tiles
// along out's rows, between tiles along the sum; b's tiles follow each other along the sum.
template <int R, int C>
INLINE void tile_block(const char* a, int64_t a_row, int64_t a_next, int64_t a_step, const real* b, int64_t b_next,
                       int64_t depth, real* out, int64_t out_next, bool add) {
    const int64_t line = LANES * sizeof(real);
    real* const o01 = out + out_next;
    real* const o10 = out + 16 * LANES;
    real* const o11 = o01 + 16 * LANES;
    if (add) {
        TILE_LOAD(0, out, line);
        if (C > 1) TILE_LOAD(1, o01, line);
        if (R > 1) TILE_LOAD(2, o10, line);
        if (R > 1 && C > 1) TILE_LOAD(3, o11, line);
    } else {
        TILE_ZERO(0);
        if (C > 1) TILE_ZERO(1);
        if (R > 1) TILE_ZERO(2);
        if (R > 1 && C > 1) TILE_ZERO(3);
    }
    for (int64_t k = 0; k < depth; ++k, a += a_step, b += 16 * LANES) {
        TILE_LOAD(6, b, line);
        TILE_LOAD(4, a, a_row);
        TILE_DOT(0, 4, 6);
        if (C > 1) TILE_LOAD(7, b + b_next, line);
        if (C > 1) TILE_DOT(1, 4, 7);
        if (R > 1) TILE_LOAD(5, a + a_next, a_row);
        if (R > 1) TILE_DOT(2, 5, 6);
        if (R > 1 && C > 1) TILE_DOT(3, 5, 7);
    }
    TILE_STORE(0, out, line);
    if (C > 1) TILE_STORE(1, o01, line);
    if (R > 1) TILE_STORE(2, o10, line);
    if (R > 1 && C > 1) TILE_STORE(3, o11, line);
}

static void tile_product(int64_t rows, int64_t columns, const void* a_at, int64_t a_row, int64_t a_next, int64_t a_step,
                         const real* b, int64_t b_next, int64_t depth, real* out, int64_t out_next, bool add) {
    const char* const start = (const char*)a_at;
    for (int64_t c = 0; c < columns; c += 2, b += 2 * b_next, out += 2 * out_next) {
        const char* a = start;
        real* o = out;
        int64_t r = 0;
        if (c + 1 < columns) {
            for (; r + 2 <= rows; r += 2, a += 2 * a_next, o += 32 * LANES)
                tile_block<2, 2>(a, a_row, a_next, a_step, b, b_next, depth, o, out_next, add);
            if (r < rows) tile_block<1, 2>(a, a_row, a_next, a_step, b, b_next, depth, o, out_next, add);
        } else {
            for (; r + 2 <= rows; r += 2, a += 2 * a_next, o += 32 * LANES)
                tile_block<2, 1>(a, a_row, a_next, a_step, b, b_next, depth, o, out_next, add);
            if (r < rows) tile_block<1, 1>(a, a_row, a_next, a_step, b, b_next, depth, o, out_next, add);
        }
    }
}

// The kernel asks Linux once a process for the unit; each thread says how it cuts its tiles.
static bool allow_matrix_unit() {
    static const long denied = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */);
    return denied == 0;
}
// It takes numbers that are not normal for zero; so do the vectors beside it, which else spend an assist on each.
constexpr uint32_t FLUSH_TO_ZERO = 0x8000;
INLINE uint32_t enter_products() {
    alignas(64) struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    asm volatile("ldtilecfg %0" ::"m"(shape));
    const uint32_t before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before | FLUSH_TO_ZERO);
    return before;
}
INLINE void leave_products(uint32_t before) {
    __builtin_ia32_ldmxcsr(before);
    asm volatile("tilerelease" ::);
}
