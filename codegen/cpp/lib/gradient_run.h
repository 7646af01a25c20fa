// ---- work: an item is a batch point with every `splits`-th of its tiles of keys --------------------------------------
// Its tiles follow each other in one thread, which adds what they give the same queries: nothing is added by two threads, and
// the order of every sum is the same in each run. Items are handed out as threads become free, so that what is visible is
// shared evenly. Where there are fewer points than threads, several items share one, and their parts are added in order.
struct Plan {
    int64_t points, group, tiles, splits, threads;
    int64_t items() const { return points * splits; }
};
static Plan plan(const Call& c, int64_t threads) {
    Plan p = {held_count(c), shared_count(c), (c.N + QUERIES - 1) / QUERIES, 1, threads};
    if (threads > 1 && p.points < 4 * threads && p.points % threads != 0) {
        p.splits = (2 * threads + p.points - 1) / p.points;
        const int64_t most = (p.tiles + 1) / 2;
        p.splits = p.splits > most ? most : p.splits;
        if (p.splits < 1) p.splits = 1;
    }
    return p;
}

static size_t lines(size_t n) { return (n + 127) / 128 * 128 + 128; }
INLINE int64_t sums_of_term(const Call& c, int term) {
    return OVER[term] == ALL ? 1 : OVER[term] == QUERY ? c.M : OVER[term] == DISTANCE ? distances(c) : 0;
}
static size_t part_size(const Call& c, const Plan& p) {
    size_t size = WANTS_Q ? lines(p.group * dq_member(c) * sizeof(real)) : 0;
    for (int n = 0; n < TERMS; ++n) size += lines((p.group * sums_of_term(c, n) + QUERIES) * sizeof(real));
    return size;
}
static Part part_at(const Call& c, const Plan& p, char* at) {
    Part x = {};
    auto take = [&](size_t count) { char* from = at; at += lines(count * sizeof(real)); return (real*)from; };
    if (WANTS_Q) x.dq = take(p.group * dq_member(c));
    for (int n = 0; n < TERMS; ++n) x.sums[n] = take(p.group * sums_of_term(c, n) + QUERIES);
    return x;
}

// One thread's working memory, given back when its items are done with.
struct Room {
    char* memory = nullptr;
    ~Room() { free(memory); }
    Work w;
    bool reserve(const Call& c, const Plan& p) {
        const size_t rows = p.group * c.M * sizeof(real), block = QUERIES * KEYS * sizeof(real), column = QUERIES * sizeof(real);
        void** const places[] = {(void**)&w.scores, (void**)&w.slopes, (void**)&w.dk, (void**)&w.dv, (void**)&w.near,
                                 (void**)&w.key_sums, (void**)&w.diagonals, (void**)&w.slants.at, (void**)&w.bases, (void**)&w.deltas,
                                 (void**)&w.shares, &w.k, &w.v, &w.k_rows, &w.q, &w.g, &w.turned, &w.packed, (void**)&w.part};
        const size_t sizes[] = {block, block, column * dk_rows(c), column * dv_rows(c),
                                (STAGED * KEYS * LANES + LANES) * sizeof(real), (TERMS + 1) * column,
                                BY_DISTANCE ? TERMS * LANES * DIAGONALS * sizeof(real) : 0, slanted_size(), rows, rows, rows,
                                k_room(c), v_room(c), k_rows_room(c), q_room(c), g_room(c), turned_room(c, p.group), packed_room(),
                                p.splits > 1 ? 0 : part_size(c, p)};
        size_t total = 0;
        for (size_t n : sizes) total += lines(n);
        memory = (char*)aligned_alloc(128, lines(total));
        if (!memory) return false;
        char* at = memory;
        for (size_t n = 0; n < sizeof sizes / sizeof *sizes; ++n) *places[n] = at, at += lines(sizes[n]);
        return true;
    }
};

// Everything that one tile of keys and one block of query rows of member `t.g0` of the group give; or what the weights of
// these rows sum to. One code for both: most of it is the products.
static void add_block(const Call& c, const Batch& b, Tile& t, const Rows& at, const Part& part, Work& w, bool sums) {
    score_products(c, t, at, w);
    int64_t from, to;
    full_run(t, at.j0, at.count, from, to);
    if (t.rows < t.columns * LANES) from = to = at.count;
    Uniform u = uniform(c, b, t);
    u.near = w.near;
    u.j0 = at.j0;
    vreal whole[TERMS + 1];
    for (int x = 0; x < TERMS; ++x) whole[x] = vreal{};
    if (BY_DISTANCE) memset(w.diagonals, 0, TERMS * LANES * DIAGONALS * sizeof(real));
    for (int64_t column = 0; column < t.columns; ++column) {
        if (STAGED) bring_near(c, u, t.values[column], at.count, w.near);
        if (SLANTED) bring_slanted(c, b, u, t, column * LANES, at.count, w.slants);
        if (HAS_SINK == 0 && sums) {
            sum_rows<true>(c, t, u, column, 0, from, w);
            sum_rows<false>(c, t, u, column, from, to, w);
            sum_rows<true>(c, t, u, column, to, at.count, w);
            continue;
        }
        derive_rows<true>(c, b, t, u, column, 0, from, part, w, whole);
        derive_rows<false>(c, b, t, u, column, from, to, part, w, whole);
        derive_rows<true>(c, b, t, u, column, to, at.count, part, w, whole);
        pack_column(at, column, w);
    }
    if (sums) return;
    for (int x = 0; x < TERMS; ++x)
        if (OVER[x] == ALL) part.sums[x][t.g0] += sum_of_lanes(whole[x]);
        else if (OVER[x] == DISTANCE) add_diagonals(c, t, at.j0, x, part, w);
    gradient_products(c, t, at, part, w);
}

// The bases of weights, in powers of two, and what weighted gradients of a row's weights sum to.
static void prepare_rows(const Call& c, const Batch& b, real* bases, real* deltas) {
    const grad_element* g = grad_at(c, b);
    const grad_element* o = out_at(c, b);
    for (int64_t j = 0; j < c.M; ++j) {
        const real lse = lse_at(c, b)[j * c.lse_j];
        bases[j] = lse == -INFINITY ? INFINITY : lse * LOG2E;
        const grad_element *x = g + j * c.k_grad_j, *y = o + j * c.out_j;
        int64_t e = 0;
        vreal sum = {};
        if (c.grad_e == 1 && c.out_e == 1)
            for (; e + LANES <= c.E; e += LANES) sum += row(x + e) * row(y + e);
        real rest = sum_of_lanes(sum);
        for (; e < c.E; ++e) rest += value(x[e * c.grad_e]) * value(y[e * c.out_e]);
        deltas[j] = rest - grad_lse_at(c, b)[j * c.grad_lse_j];
    }
}

// Rows of columns of lanes to where they belong.
template <class T>
static void put_columns(const Tile& t, const real* in, int64_t rows_in, int64_t width, T* out, int64_t row, int64_t step) {
    for (int64_t n = 0; n < t.columns; ++n) {
        T* rows[LANES];
        for (int64_t l = 0; l < LANES; ++l) rows[l] = n * LANES + l < t.rows ? out + (t.i0 + n * LANES + l) * row : nullptr;
        from_lanes(in + n * rows_in * LANES, splat(1), splat_mask(true), rows, step, width);
    }
}

// A tile of keys with all the blocks of query rows, of each member, that see any of them.
static void visit_tile(const Call& c, const Plan& p, int64_t point, int64_t number, Work& w, const Part& part, bool sums) {
    Tile& t = w.tile;
    t.i0 = number * QUERIES;
    t.i1 = t.i0 + QUERIES < c.N ? t.i0 + QUERIES : c.N;
    t.rows = t.i1 - t.i0;
    t.columns = (t.rows + LANES - 1) / LANES;
    t.few = false;
    load_keys(c, batch_of(c, point, 0), t, w);
    for (int64_t m = 0; m < p.group; ++m) {
        const Batch b = batch_of(c, point, m);
        t.g0 = m;
        t.spans = t.hides = 0;
        t.lo = c.M;
        t.hi = 0;
        find_spans(c, b, t, 0, c.M);
        const Uniform u = uniform(c, b, t);
        for (int64_t n = 0; n < t.columns; ++n) t.values[n] = row_values(c, b, u, t, n * LANES);
        if (TERMS) memset(w.key_sums, 0, TERMS * QUERIES * sizeof(real));
        w.slants.group = -1;
        for (int64_t j = t.lo; (j = first_key(t, j)) < t.hi;) {
            const int64_t j0 = j / BLOCK_STEP * BLOCK_STEP, most = j0 + KEYS < t.hi ? j0 + KEYS : t.hi, end = run_end(t, j, most);
            add_block(c, b, t, rows_at(c, b, j0, end - j0, w), part, w, sums);
            j = end;
        }
        for (int n = 0; n < TERMS && !sums; ++n)
            if (OVER[n] == KEY)
                for (int64_t l = 0; l < t.rows; ++l) sums_at(c, b, n)[(t.i0 + l) * sums_step(c, n)] = w.key_sums[n * QUERIES + l];
    }
}

static void run_tile(const Call& c, const Plan& p, int64_t point, int64_t number, Work& w, const Part& part) {
    if (WANTS_K) memset(w.dk, 0, QUERIES * dk_rows(c) * sizeof(real));
    if (WANTS_V) memset(w.dv, 0, QUERIES * dv_rows(c) * sizeof(real));
    visit_tile(c, p, point, number, w, part, false);
    const Batch b = batch_of(c, point, 0);
    if (WANTS_K) put_columns(w.tile, w.dk, dk_rows(c), c.D, dk_at(c, b), c.dk_i, c.dk_d);
    if (WANTS_V) put_columns(w.tile, w.dv, dv_rows(c), c.E, dv_at(c, b), c.dv_i, c.dv_e);
}

// What divides the weights of each row: one, or what they sum to where the row's lse is far.
static void find_shares(const Call& c, const Plan& p, int64_t point, Work& w, const Part& part) {
    bool any = false;
    for (int64_t m = 0; m < p.group; ++m) {
        const real* lse = lse_at(c, batch_of(c, point, m));
        for (int64_t j = 0; j < c.M; ++j) any |= is_far(lse[j * c.lse_j]);
    }
    for (int64_t j = 0; j < p.group * c.M; ++j) w.shares[j] = any ? 0 : 1;
    if (!any) return;
    for (int64_t n = 0; n < p.tiles; ++n) visit_tile(c, p, point, n, w, part, true);
    for (int64_t m = 0; m < p.group; ++m) {
        const real* lse = lse_at(c, batch_of(c, point, m));
        real* shares = w.shares + m * c.M;
        for (int64_t j = 0; j < c.M; ++j) shares[j] = is_far(lse[j * c.lse_j]) && shares[j] > 0 ? 1 / shares[j] : 1;
    }
}

// What the items of a point add up to, written where it belongs.
static void put_part(const Call& c, const Plan& p, int64_t point, const Part& part) {
    for (int64_t m = 0; m < p.group; ++m) {
        const Batch b = batch_of(c, point, m);
        for (int64_t j = 0; j < c.M && WANTS_Q; ++j) {
            const real* from = part.dq + m * dq_member(c) + j * dq_row(c);
            real* to = dq_at(c, b) + j * c.dq_j;
            int64_t d = 0;
            for (; d + LANES <= c.D && c.dq_d == 1; d += LANES, from += dq_next(c)) store(to + d, load(from));
            for (; d < c.D; from += dq_next(c))
                for (int64_t l = 0; l < LANES && d < c.D; ++l, ++d) to[d * c.dq_d] = from[l];
        }
        for (int n = 0; n < TERMS; ++n)
            for (int64_t x = 0; x < sums_of_term(c, n); ++x)
                sums_at(c, b, n)[x * sums_step(c, n)] = part.sums[n][m * sums_of_term(c, n) + x];
    }
}

static void run_item(const Call& c, const Plan& p, int64_t item, Work& w, char* parts) {
    const int64_t point = item / p.splits, split = item % p.splits;
    char* const own = p.splits > 1 ? parts + item * part_size(c, p) : w.part;
    memset(own, 0, part_size(c, p));
    const Part part = part_at(c, p, own);
    for (int64_t m = 0; m < p.group; ++m) {
        prepare_rows(c, batch_of(c, point, m), w.bases + m * c.M, w.deltas + m * c.M);
        prepare_member(c, batch_of(c, point, m), m, w);
    }
    find_shares(c, p, point, w, part);
    for (int64_t n = split; n < p.tiles; n += p.splits) run_tile(c, p, point, n, w, part);
    if (p.splits == 1) put_part(c, p, point, part);
}

static void join(const Call& c, const Plan& p, int64_t point, char* parts) {
    const size_t size = part_size(c, p);
    real* first = (real*)(parts + point * p.splits * size);
    for (int64_t s = 1; s < p.splits; ++s) {
        const real* more = (const real*)(parts + (point * p.splits + s) * size);
        for (size_t n = 0; n < size / sizeof(real); ++n) first[n] += more[n];
    }
    put_part(c, p, point, part_at(c, p, (char*)first));
}

static_assert(LEAST_GAP >= BLOCK_STEP, "a block that begins early meets the one before it");

static int32_t run(const Call& c) {
#if TILES
    if (!allow_matrix_unit()) return NO_MATRIX_UNIT;
#endif
    const Plan p = plan(c, omp_get_max_threads());
    const int64_t items = p.items(), team = p.threads < items ? p.threads : items;
    if (items == 0) return 0;
    char* parts = p.splits > 1 ? (char*)aligned_alloc(128, lines(items * part_size(c, p))) : nullptr;
    int32_t failed = p.splits > 1 && !parts ? OUT_OF_MEMORY : 0;
    if (!failed)
#pragma omp parallel num_threads(team) if (team > 1)
    {
        Room r;
        const bool ready = r.reserve(c, p);
        if (!ready) {
#pragma omp atomic write
            failed = OUT_OF_MEMORY;
        }
#if TILES
        const uint32_t before = enter_products();
#endif
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < items; ++n)
            if (ready) run_item(c, p, n, r.w, parts);
#if TILES
        leave_products(before);
#endif
        if (p.splits > 1) {
#pragma omp for schedule(static)
            for (int64_t n = 0; n < p.points; ++n)
                if (ready) join(c, p, n, parts);
        }
    }
    free(parts);
    return failed;
}
