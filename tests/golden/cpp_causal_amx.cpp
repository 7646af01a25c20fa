// attncc: a C++ kernel for amx
//
// out[i, e] = sum_j weight(softmax_j(score(s)) where mask) * v[j, e],  s = sum_d q[i, d] * k[j, d]
//
// attention
// size   B, N
// batch  b = B, hk = 2, g = 4
// axis   i = N, j = N, d = 64, e = 64
// tensor q: bf16[B, N, 8, 64]
// tensor k: bf16[B, N, 2, 64]
// tensor v: bf16[B, N, 2, 64]
// tensor slope: f32[8]
// tensor doc: i32[B, N]
// q      q[b, i, hk * 4 + g, d]
// k      k[b, j, hk, d]
// v      v[b, j, hk, e]
// score  s * 0.125 - slope[hk * 4 + g] * float(i - j)
// mask   j <= i and doc[b, i] == doc[b, j]
// norm   softmax
// empty  zero
// weight w
// give   out, lse
// dtype  bf16
// layout b, i, hk, g, e
//
// visit  0 <= j < i1
// hidden 0 <= j < N

#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#define LANES 16
#define QUERIES 64
#define KEYS 512
#define GROUP_TILES 8
#define SLANT_ROOM 8192
#define TILE_ROWS 6
#define TILE_VECTORS 4
#define PAIRS 1
#define TILES 1
#define COARSE 1
#define REAL_IS_DOUBLE 0
#define BIAS 127
#define MANTISSA 23
#define LARGEST __FLT_MAX__
#define LN2 0.69314718055994530942f
#define LN2_HIGH 0.693359375f
#define LN2_LOW -2.12194440e-4f
#define FN(name) name##f
#define F16_ROW 512
#define F16_SCALAR _Float16
#define ZIP_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZIP_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define EVERY_LANE 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#define WIDE_512 1
#define WIDE_INTS 0
#define STAGED 0
#define SLANTED 1
#define STAGED_BY_SCORE 0
#define MAX_SPANS 1
#define MAX_HIDDEN 1
#define MAX_STRIPES 0
#define MAX_BITS 0
#define ROW_AXES 2
#define HAS_OUT 1
#define HAS_LSE 1
#define HAS_SINK 0
#define IS_SOFTMAX 1
#define NORMALIZED_EARLY 0
#define EMPTY_ZERO 0
#define EMPTY_MEAN 1
#define EMPTY_NAN 2
#define EMPTY EMPTY_ZERO
#define SCALE 1.4426950408889634f
#define LOG2E 1.4426950408889634f
#define HAS_NEAR 0
#define MAY_DROP 0
#define MOST_FEW 16
#define FEW_ALONE 0
#define SUMS_ROUNDED 0
#define CAN_SPLIT 1
#define EVEN_AREA 0
#define OUT_OF_MEMORY 1
#define TOO_LARGE 2
#define NO_MATRIX_UNIT 3
typedef float real;  // the compute type
typedef int32_t mask_int;
typedef int32_t lane_int;  // what every integer of a lane fits

/* lib/vector.h */

/* lib/integers.h */

/* lib/convert.h */

/* lib/layout.h */

/* lib/matrix_unit.h */

// ---- this attention ------------------------------------------------------------------------------------------------

// What a call passes: pointers, strides in elements, sizes.
struct Call {
    const bf16* t_q;  // bf16[B, N, 8, 64]
    int64_t s_q[4];
    const bf16* t_k;  // bf16[B, N, 2, 64]
    int64_t s_k[4];
    const bf16* t_v;  // bf16[B, N, 2, 64]
    int64_t s_v[4];
    const float* t_slope;  // f32[8]
    int64_t s_slope[1];
    const int32_t* t_doc;  // i32[B, N]
    int64_t s_doc[2];
    int64_t z_B;
    int64_t z_N;
    int64_t N;
    int64_t M;
    static constexpr int64_t D = 64;
    static constexpr int64_t E = 64;
    int64_t q_d, q_i, k_j, k_d, v_j, v_e, out_e;
    bf16* out;
    int64_t s_out[5];
    real* lse;
    int64_t s_lse[4];
};
typedef bf16 q_element;
typedef bf16 k_element;
typedef bf16 v_element;
typedef bf16 out_element;

struct Batch { int64_t x_b; int64_t x_hk; };
static int64_t batch_count(const Call& c) { (void)c; return c.z_B * 2; }
static Batch batch_at(const Call& c, int64_t n) {
    Batch at;
    (void)c; (void)n;
    at.x_hk = n % 2;
    n /= 2;
    at.x_b = n;
    return at;
}
struct Group { int64_t x_g; };
static int64_t group_count(const Call& c) { (void)c; return 4; }
static Group group_at(const Call& c, int64_t n) {
    Group at;
    (void)c; (void)n;
    at.x_g = n;
    return at;
}

// Scalars of a tile, and vectors of its rows, that no key changes. For a block of keys from j0 on, `near`
// holds what is loaded by row and key, transposed; `slanted` what their distance gives, `slant` apart.
struct Uniform {
    int64_t u0; int64_t u1;
    const real *near, *slanted;
    int64_t j0, slant;
};
struct RowValues { vint r0; vint r1; };
struct Tile;

/* lib/spans.h */

/* lib/tile.h */

/* lib/peak.h */

static Uniform uniform(const Call& c, const Batch& b, const Tile& t) {
    (void)c; (void)b; (void)t;
    Uniform u;
    u.u0 = b.x_b;
    u.u1 = (b.x_hk * 4);
    return u;
}
static RowValues row_values(const Call& c, const Batch& b, const Uniform& u, const Tile& t, int64_t at) {
    (void)c; (void)b; (void)t;
    (void)u; (void)at;
    RowValues r;
    r.r0 = lane_values(t, 0, at);
    r.r1 = gather_int(c.t_doc + u.u0 * c.s_doc[0], to_long(lane_values(t, 0, at)) * c.s_doc[1]);
    return r;
}

static void find_spans(const Call& c, const Batch& b, Tile& t, int64_t from, int64_t to) {
    (void)c; (void)b;
    visit(t, 0, t.i1, from, to);
    hide(t, 0, c.z_N, c.M);
}

template <bool MASKED, bool NEAR>
INLINE vreal logit(const Call& c, const Uniform& u, const RowValues& r, int64_t j, vreal s, vmask& visible, vreal& reach) {
    (void)c; (void)u; (void)r; (void)j;
    (void)s; (void)visible; (void)reach;
    if (MASKED) {
        const vmask seen = (narrow(splat_int(j) <= r.r0) & narrow(r.r1 == splat_int(value(c.t_doc[u.u0 * c.s_doc[0] + j * c.s_doc[1]]))));
        visible = seen;
    }
    const vreal x = ((s * splat(0.125f)) - load(u.slanted + 0 * SLANT_ROOM + (j - u.j0) * u.slant));
    return x;
}

INLINE vreal linear_weight(const Call& c, const Uniform& u, const RowValues& r, int64_t j, vreal w) {
    (void)c; (void)u; (void)r; (void)j;
    return w;
}
INLINE vreal weight(const Call& c, const Uniform& u, const RowValues& r, int64_t j, vreal s, vreal w) {
    (void)c; (void)u; (void)r; (void)j;
    (void)s; (void)w;
    const vreal x = w;
    return x;
}
INLINE vreal empty_weight(const Call& c, const Uniform& u, const RowValues& r, int64_t j, vreal s) {
    (void)c; (void)u; (void)r; (void)j;
    (void)s;
    const vreal x = splat(1.0f);
    return x;
}

static vreal first_logit(const Call& c, const Batch& b, const Uniform& u, const Tile& t, int64_t at) {
    (void)c; (void)b; (void)u; (void)t; (void)at;
    return splat(-INFINITY);
}

INLINE void slanted_at(const Call& c, const Batch& b, const Uniform& u, const Tile& t, int64_t at,
                       vint distance, real* to) {
    (void)c; (void)b; (void)u; (void)t; (void)at; (void)distance; (void)to;
    const vreal x0 = (gather_real(c.t_slope, to_long((splat_int(u.u1) + lane_values(t, 1, at))) * c.s_slope[0]) * to_real(distance));
    store(to + 0 * SLANT_ROOM, x0);
}

static void bring_near(const Call& c, const Uniform& u, const RowValues& r, int64_t count, real* near) {
    (void)c; (void)u; (void)r; (void)count; (void)near;
}

INLINE const q_element* query_at(const Call& c, const Batch& b, const Group& g, int64_t i) {
    (void)b; (void)g;
    return c.t_q + b.x_b * c.s_q[0] + (g.x_g + (b.x_hk * 4)) * c.s_q[2] + i * c.q_i;
}

INLINE const k_element* key_at(const Call& c, const Batch& b) {
    (void)b;
    return c.t_k + b.x_b * c.s_k[0] + b.x_hk * c.s_k[2];
}

INLINE const v_element* value_at(const Call& c, const Batch& b) {
    (void)b;
    return c.t_v + b.x_b * c.s_v[0] + b.x_hk * c.s_v[2];
}

INLINE out_element* out_at(const Call& c, const Batch& b, const Group& g, int64_t i) {
    (void)c; (void)b; (void)g; (void)i;
    return c.out + b.x_b * c.s_out[0] + b.x_hk * c.s_out[1] + g.x_g * c.s_out[2] + i * c.s_out[3];
}

INLINE real* lse_at(const Call& c, const Batch& b, const Group& g, int64_t i) {
    (void)c; (void)b; (void)g; (void)i;
    return c.lse + b.x_b * c.s_lse[0] + b.x_hk * c.s_lse[1] + g.x_g * c.s_lse[2] + i * c.s_lse[3];
}

INLINE void set_lane(Tile& t, int64_t lane, const Group& g, int64_t i) {
    (void)g;
    t.lane[0][lane] = (lane_int)i;
    t.lane[1][lane] = (lane_int)g.x_g;
}

/* lib/dropped.h */

/* lib/pairs.h */

/* lib/few.h */

/* lib/few_tiles.h */

/* lib/few_attend.h */

/* lib/begin.h */

/* lib/slanted.h */

/* lib/attend.h */

/* lib/run.h */

// ---- entry: 0, OUT_OF_MEMORY or TOO_LARGE
extern "C" __attribute__((visibility("default"))) int32_t attncc_run(
    const void* const* tensors, const int64_t* const* strides, const int64_t* sizes,
    void* const* outputs, const int64_t* const* out_strides) {
    (void)sizes; (void)outputs; (void)out_strides;
    Call c;
    if (sizes[0] > 16777216) return TOO_LARGE;
    c.z_B = sizes[0];
    if (sizes[1] > 16777216) return TOO_LARGE;
    c.z_N = sizes[1];
    c.t_q = (const bf16*)tensors[0];
    c.s_q[0] = strides[0][0];
    c.s_q[1] = strides[0][1];
    c.s_q[2] = strides[0][2];
    c.s_q[3] = strides[0][3];
    c.t_k = (const bf16*)tensors[1];
    c.s_k[0] = strides[1][0];
    c.s_k[1] = strides[1][1];
    c.s_k[2] = strides[1][2];
    c.s_k[3] = strides[1][3];
    c.t_v = (const bf16*)tensors[2];
    c.s_v[0] = strides[2][0];
    c.s_v[1] = strides[2][1];
    c.s_v[2] = strides[2][2];
    c.s_v[3] = strides[2][3];
    c.t_slope = (const float*)tensors[3];
    c.s_slope[0] = strides[3][0];
    c.t_doc = (const int32_t*)tensors[4];
    c.s_doc[0] = strides[4][0];
    c.s_doc[1] = strides[4][1];
    c.N = c.z_N;
    c.M = c.z_N;
    c.q_i = 1 * c.s_q[1];
    c.q_d = 1 * c.s_q[3];
    c.k_j = 1 * c.s_k[1];
    c.k_d = 1 * c.s_k[3];
    c.v_j = 1 * c.s_v[1];
    c.v_e = 1 * c.s_v[3];
    c.out_e = 1;
    c.out = (bf16*)outputs[0];
    c.s_out[0] = out_strides[0][0];
    c.s_out[1] = out_strides[0][1];
    c.s_out[2] = out_strides[0][2];
    c.s_out[3] = out_strides[0][3];
    c.s_out[4] = out_strides[0][4];
    c.out_e = c.s_out[4];
    c.lse = (real*)outputs[1];
    c.s_lse[0] = out_strides[1][0];
    c.s_lse[1] = out_strides[1][1];
    c.s_lse[2] = out_strides[1][2];
    c.s_lse[3] = out_strides[1][3];
    return run(c);
}
