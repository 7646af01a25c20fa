// ---- rows of operands and of what is given --------------------------------------------------------------------------
// A row of an operand in the compute type, zeros behind its end.
template <class E> INLINE void take(const E* p, int64_t step, int64_t count, int64_t room, real* to) {
    int64_t n = 0;
    if (step == 1) {
        for (; n + LANES <= count; n += LANES) store(to + n, row(p + n));
        for (; n < count; ++n) to[n] = value(p[n]);
    } else {
        for (; n < count; ++n) to[n] = value(p[n * step]);
    }
    for (; n < room; ++n) to[n] = 0;
}
template <class E> INLINE void give(const real* from, int64_t count, E* p, int64_t step) {
    int64_t n = 0;
    if (step == 1)
        for (; n + LANES <= count; n += LANES) put_row(p + n, load(from + n));
    for (; n < count; ++n) put(p + n * step, from[n]);
}

// exp(x) - 1 to all its digits, also where x is near zero.
INLINE vreal expm1_of(vreal x) {
#if REAL_IS_DOUBLE
    vreal r; EACH_LANE(r[l] = __builtin_expm1(x[l])) return r;
#else
    vreal p = splat(1.0f / 9);
    for (int n = 8; n > 1; --n) p = (1 + p * x) * (1.0f / n);  // 1/2 (1 + x/3 (1 + x/4 (...)))
    const vreal near = x + x * x * p;
    return (x < 0.5f) & (x > -0.5f) ? near : exp_of(x) - 1;
#endif
}

// `task(room, n)` for every n below `tasks`, by a team of threads each of which has a room that `reserve(room)` made.
template <class Room, class Reserve, class Task>
static int32_t in_rooms(int64_t team, int64_t tasks, const Reserve& reserve, const Task& task) {
    int32_t failed = 0;
#pragma omp parallel num_threads(team) if (team > 1)
    {
        Room r;
        const bool ready = reserve(r);
        if (!ready) {
#pragma omp atomic write
            failed = OUT_OF_MEMORY;
        }
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < tasks; ++n)
            if (ready) task(r, n);
        if (ready) free(r.whole);
    }
    return failed;
}
