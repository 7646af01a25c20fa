// ---- tables of a block that the distance between row and key gives: see slanted_at ----------------------------------
// Where the lanes from `at` on hold neighbouring rows, one number a distance, and lanes of the next key begin one before;
// elsewhere a vector a key. Distances are those of some row and key, so that nothing is loaded that lies outside.
static void bring_slanted(const Call& c, const Batch& b, Uniform& u, const Tile& t, int64_t at, int64_t count, real* out) {
    const int64_t last = (at + LANES < t.rows ? at + LANES : t.rows) - 1;
    bool neighbours = t.lane[0][last] - t.lane[0][at] == last - at;
    for (int n = 1; n < ROW_AXES; ++n) neighbours = neighbours && t.lane[n][at] == t.lane[n][last];
    if (neighbours) {
        const int64_t least = t.lane[0][at] - (u.j0 + count - 1), most = t.lane[0][last] - u.j0;
        for (int64_t x = 0; x < count + LANES - 1; x += LANES) {
            alignas(64) lane_int lanes[LANES];
            EACH_LANE(lanes[l] = (lane_int)(least + x + l < most ? least + x + l : most))
            vint distance;
            memcpy(&distance, lanes, sizeof distance);
            slanted_at(c, b, u, t, at, distance, out + x);
        }
        u.slanted = out + count - 1;
        u.slant = -1;
    } else {
        for (int64_t k = 0; k < count; ++k)
            slanted_at(c, b, u, t, at, lane_values(t, 0, at) - splat_int(u.j0 + k), out + k * LANES);
        u.slanted = out;
        u.slant = LANES;
    }
}
