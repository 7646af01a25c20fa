// ---- work: items of neighbouring tiles that share their keys, balanced over threads by visible area -----------------
struct Plan {
    Tiling tiling;
    int64_t batches, group, items_each, splits, split_keys;  // `group` tiles an item; `splits` parts of the key range
    int64_t items() const { return batches * items_each * splits; }
};

// Keys of a split part at least, and what their number is a multiple of.
constexpr int64_t LEAST_SPLIT = 512, SPLIT_STEP = 128;

static Plan plan(const Call& c, int64_t threads) {
    Plan p;
    p.tiling = tiling(c);
    p.batches = batch_count(c);
    const int64_t tiles = p.batches * p.tiling.count;
    p.group = tiles / (4 * threads);
    p.group = p.group < 1 ? 1 : p.group > GROUP_TILES ? GROUP_TILES : p.group;
    if (p.group > p.tiling.count) p.group = p.tiling.count ? p.tiling.count : 1;
    p.items_each = (p.tiling.count + p.group - 1) / p.group;
    const int64_t items = p.batches * p.items_each;
    p.splits = 1;
    if (CAN_SPLIT && threads > 1 && items > 0 && items < 4 * threads) {
        p.splits = (4 * threads + items - 1) / items;
        const int64_t most = c.M / LEAST_SPLIT;
        p.splits = p.splits > most ? most : p.splits;
        if (p.splits < 1) p.splits = 1;
    }
    p.split_keys = ((c.M + p.splits - 1) / p.splits + SPLIT_STEP - 1) / SPLIT_STEP * SPLIT_STEP;
    return p;
}

struct Item {
    Batch b;
    int64_t batch, first, last, from, to, split;
};
static Item item_at(const Call& c, const Plan& p, int64_t n) {
    Item x;
    x.split = n % p.splits;
    n /= p.splits;
    x.batch = n / p.items_each;
    x.b = batch_at(c, x.batch);
    x.first = n % p.items_each * p.group;
    x.last = x.first + p.group < p.tiling.count ? x.first + p.group : p.tiling.count;
    x.from = x.split * p.split_keys;
    x.to = x.from + p.split_keys < c.M ? x.from + p.split_keys : c.M;
    return x;
}

// Lanes times visited keys, and a little for the item itself.
static int64_t area(const Call& c, const Plan& p, int64_t n) {
    const Item x = item_at(c, p, n);
    int64_t sum = 64 * LANES;
    Tile t;
    for (int64_t at = x.first; at < x.last; ++at) {
        place(c, p.tiling, x.b, at, x.from, x.to, t);
        for (int64_t s = 0; s < t.spans; ++s) sum += t.columns * LANES * keys_in(t.span[s]);
    }
    return sum;
}

// One thread's working memory, kept between calls and given back when the thread ends.
struct Held {
    char* memory = nullptr;
    size_t size = 0;
    ~Held() { free(memory); }
};
struct Scratch {
    Tile* tiles;
    real *scores, *weights, *k, *v, *q, *o;
    Slants slants;
};
static size_t round_up(size_t n) { return (n + 127) / 128 * 128; }
static bool reserve(const Call& c, Scratch& s) {
    static thread_local Held held;
    const size_t column = GROUP_TILES * QUERIES * sizeof(real);
    const size_t sizes[] = {GROUP_TILES * sizeof(Tile), KEYS * QUERIES * sizeof(real), p_scratch(), k_scratch(c),
                            v_scratch(c), column * q_rows(c), column * o_rows(c), slanted_size()};
    size_t total = 0;
    for (size_t n : sizes) total += round_up(n) + 128;
    if (total > held.size) {
        free(held.memory);
        held.memory = (char*)aligned_alloc(4096, (total + 4095) / 4096 * 4096);
        held.size = held.memory ? total : 0;
        if (!held.memory) return false;
    }
    char* at = held.memory;
    auto take = [&](size_t n) { char* p = at; at += round_up(n) + 128; return p; };
    s.tiles = (Tile*)take(sizes[0]);
    s.scores = (real*)take(sizes[1]);
    s.weights = (real*)take(sizes[2]);
    s.k = (real*)take(sizes[3]);
    s.v = (real*)take(sizes[4]);
    s.q = (real*)take(sizes[5]);
    s.o = (real*)take(sizes[6]);
    s.slants.at = (real*)take(sizes[7]);
    return true;
}

static_assert(LEAST_GAP >= KEY_STEP, "a part that begins early meets the one before it");

// Keys that are converted or packed together, once a tile visits one of them.
constexpr int64_t UNIT = 32;
static_assert(UNIT % KEY_STEP == 0, "a part of a block begins within what was brought for it");

// Every tile of [first, last) over the keys it visits, block by block, so that a block of keys serves all of them.
static void sweep(const Call& c, const Item& x, Tile* tiles, int64_t count, Stage stage, Scratch& w) {
    int64_t lo = x.to, hi = x.from;
    for (int64_t n = 0; n < count; ++n) {
        lo = tiles[n].lo < lo ? tiles[n].lo : lo;
        hi = tiles[n].hi > hi ? tiles[n].hi : hi;
    }
    if (stage == EMPTIES) lo = 0, hi = c.M;
    const auto* k = key_at(c, x.b);
    const auto* v = value_at(c, x.b);
    const int64_t blocks = (hi - lo + KEYS - 1) / KEYS;
    for (int64_t j0 = lo, j1, number = 0; DROPS || j0 < hi; j0 = j1) {
        if (DROPS && stage != EMPTIES) {
            if (number == blocks) return;
            j0 = lo + (number > 0 ? blocks - number : 0) * KEYS;
            ++number;
        } else if (stage != EMPTIES) {
            int64_t next = hi;
            for (int64_t n = 0; n < count && next > j0; ++n) {
                const int64_t x = first_key(tiles[n], j0);
                next = x < next ? x : next;
            }
            j0 = next;
        }
        if (j0 >= hi) return;
        j1 = j0 + KEYS < hi ? j0 + KEYS : hi;
        const Block whole = block_of(c, k, v, j0, j1 - j0, w.k, w.v);
        bool brought[(KEYS + UNIT - 1) / UNIT] = {};
        for (int64_t n = 0; n < count; ++n) {
            Tile& t = tiles[n];
            for (int64_t from = j0, to; from < j1; from = to) {
                to = j1;
                if (stage != EMPTIES) {
                    from = first_key(t, from);
                    if (from >= j1 || from >= t.hi) break;
                    to = run_end(t, from, j1);
                }
                if (lies_in_rows(t)) {
                    Block raw = {};
                    raw.j0 = from;
                    raw.count = to - from;
                    attend(c, x.b, t, raw, stage, w.scores, w.weights, w.slants);
                    continue;
                }
                for (int64_t n = (from - j0) / UNIT, at = n * UNIT; at < to - j0; ++n, at += UNIT) {
                    if (!brought[n]) bring(c, k, v, whole, at, at + UNIT < whole.count ? at + UNIT : whole.count, w.k, w.v);
                    brought[n] = true;
                }
                const int64_t begin = (from - j0) / KEY_STEP * KEY_STEP;
                attend(c, x.b, t, part_of(c, whole, begin, to - j0), stage, w.scores, w.weights,
                       w.slants);
            }
        }
    }
}

// Rows without keys that take the mean of all values.
static void add_empties(const Call& c, const Item& x, Tile* tiles, int64_t count, Scratch& w) {
    if (!IS_SOFTMAX || EMPTY != EMPTY_MEAN || HAS_SINK) return;
    bool any = false;
    for (int64_t n = 0; n < count; ++n)
        for (int64_t r = 0; r < tiles[n].rows; ++r) any |= !tiles[n].seen[r];
    if (any) sweep(c, x, tiles, count, EMPTIES, w);
}

// Once more for a tile whose sums of weighted values were too large.
static __attribute__((noinline, cold)) void run_lifted(const Call& c, const Item& x, Tile& t, Scratch& w) {
    begin(c, x.b, t, true, true);
    sweep(c, x, &t, 1, ONLINE, w);
    add_empties(c, x, &t, 1, w);
    if (lies_in_rows(t) && !t.fresh) end_few(c, t);
    finish(c, x.b, t);
}

static void run_item(const Call& c, const Plan& p, int64_t number, Scratch& w, char* parts) {
    const Item x = item_at(c, p, number);
    const int64_t count = x.last - x.first;
    w.slants.group = -1;
    for (int64_t n = 0; n < count; ++n) {
        Tile& t = w.tiles[n];
        t.q = w.q + n * QUERIES * q_rows(c);
        t.o = w.o + n * QUERIES * o_rows(c);
        place(c, p.tiling, x.b, x.first + n, x.from, x.to, t);
        begin(c, x.b, t, x.split == 0, false);
    }
    if (NORMALIZED_EARLY) sweep(c, x, w.tiles, count, SUMS, w);
    sweep(c, x, w.tiles, count, NORMALIZED_EARLY ? WEIGHTS : ONLINE, w);
    add_empties(c, x, w.tiles, count, w);
    for (int64_t n = 0; n < count; ++n) {
        Tile& t = w.tiles[n];
        if (lies_in_rows(t) && !t.fresh) end_few(c, t);
        if (p.splits == 1) {
            if (!finish(c, x.b, t)) run_lifted(c, x, t, w);
            continue;
        }
        char* part = parts + ((x.batch * p.tiling.count + x.first + n) * p.splits + x.split) * part_size(c);
        if (t.fresh) memset(t.o, 0, o_rows(c) * t.columns * LANES * sizeof(real));
        memcpy(part, t.m, sizeof t.m);
        memcpy(part += sizeof t.m, t.l, sizeof t.l);
        memcpy(part += sizeof t.l, t.top, sizeof t.top);
        memcpy(part += sizeof t.top, t.seen, sizeof t.seen);
        memcpy(part + sizeof t.seen, t.o, o_rows(c) * t.columns * LANES * sizeof(real));
    }
}

// Joins the parts of a split tile: each is weighed by 2^(its maximum - the common maximum).
static void join(const Call& c, const Plan& p, int64_t number, Scratch& w, const char* parts) {
    const Item whole = {batch_at(c, number / p.tiling.count), 0, 0, 1, 0, c.M, 0};
    Tile& t = w.tiles[0];
    w.slants.group = -1;
    t.q = w.q;
    t.o = w.o;
    place(c, p.tiling, whole.b, number % p.tiling.count, 0, c.M, t);
    t.fresh = t.lifted = false;
    parts += number * p.splits * part_size(c);
    for (int64_t lane = 0; lane < t.columns * LANES; lane += LANES) {
        auto part_at = [&](int64_t s) { return (const real*)(parts + s * part_size(c)); };
        auto peak_at = [&](int64_t s) { return Peak{load(part_at(s) + lane), load(part_at(s) + 2 * QUERIES + lane)}; };
        Peak peak = peak_at(0);
        vreal l = vreal{};
        vmask seen = vmask{};
        for (int64_t s = 0; s < p.splits; ++s) {
            peak = highest_of(peak, peak_at(s));
            seen |= *(const vmask*)((const mask_int*)(part_at(s) + 3 * QUERIES) + lane);
        }
        const Base base = base_of(peak);
        for (int64_t s = 0; s < p.splits; ++s) {
            const vreal factor = factor_of(peak_at(s), base);
            l += load(part_at(s) + QUERIES + lane) * factor;
            const real* o = (const real*)((const mask_int*)(part_at(s) + 3 * QUERIES) + QUERIES);
            for (int64_t n = lane * o_rows(c); n < (lane + LANES) * o_rows(c); n += LANES) {
                const vreal x = load(o + n) * factor;
                store(t.o + n, s ? load(t.o + n) + x : x);
            }
        }
        store(t.m + lane, peak.m);
        store(t.top + lane, peak.top);
        store(t.l + lane, l);
        *(vmask*)(t.seen + lane) = seen;
    }
    if (!finish(c, whole.b, t)) run_lifted(c, whole, t, w);
}

static int32_t run(const Call& c) {
#if TILES
    if (!allow_matrix_unit()) return NO_MATRIX_UNIT;
#endif
    const int64_t threads = omp_get_max_threads();
    const Plan p = plan(c, threads);
    const int64_t items = p.items(), tiles = p.batches * p.tiling.count;
    if (items == 0) return 0;
    const int64_t team = threads < items ? threads : items;
    char* parts = p.splits > 1 ? (char*)aligned_alloc(128, round_up(tiles * p.splits * part_size(c))) : nullptr;
    int64_t* ends = team > 1 ? (int64_t*)malloc(items * sizeof(int64_t)) : nullptr;
    int32_t failed = (p.splits > 1 && !parts) || (team > 1 && !ends) ? OUT_OF_MEMORY : 0;
    if (!failed)
#pragma omp parallel num_threads(team) if (team > 1)
    {
        Scratch w;
        const bool ready = reserve(c, w);
        if (!ready) {
#pragma omp atomic write
            failed = OUT_OF_MEMORY;
        }
        const int64_t me = omp_get_thread_num(), us = omp_get_num_threads();
        int64_t from = 0, to = items;
        if (us > 1) {
            if (EVEN_AREA) {
                from = items * me / us;
                to = items * (me + 1) / us;
            } else {
#pragma omp for schedule(static)
                for (int64_t n = 0; n < items; ++n) ends[n] = area(c, p, n);
                // An item belongs to the thread in whose share of the whole area its middle lies.
                int64_t whole = 0, before = 0;
                for (int64_t n = 0; n < items; ++n) whole += ends[n];
                from = to = 0;
                for (int64_t n = 0; n < items; ++n) {
                    const int64_t owner = (int64_t)((double)(2 * before + ends[n]) / (2.0 * (double)whole) * (double)us);
                    from += owner < me;
                    to += owner <= me;
                    before += ends[n];
                }
            }
        }
#if PAIRS
        const uint32_t before = enter_products();
#endif
        if (ready)
            for (int64_t n = from; n < to; ++n) run_item(c, p, n, w, parts);
#if PAIRS
        leave_products(before);
#endif
        if (p.splits > 1) {
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t n = 0; n < tiles; ++n)
                if (ready) join(c, p, n, w, parts);
        }
    }
    free(ends);
    free(parts);
    return failed;
}
