// Included by rows.h: rows of weights, plain or packed, times activations.

constexpr int ROWS = 4;             // rows of weights that share each load of an activation
constexpr int AHEAD_BYTES = 32768;  // distance of the prefetch ahead of its use

// Prefetch window, in address order: prefetching rows side by side costs 20% of the bandwidth or
// more.
struct Ahead {
    const char* from = nullptr;
    int64_t bytes = 0;

    // One part of the window for each part of a computation, to keep the memory busy throughout.
    Ahead part(int number, int parts) const {
        int64_t start = bytes * number / parts, stop = bytes * (number + 1) / parts;
        return {from + start, stop - start};
    }
};

// The window of some rows, of `bytes` bytes.
inline Ahead window(const BlockLayout& layout, const Rows& rows, size_t bytes) {
    if (layout.encoding == LOSSLESS12) prefetch_header(layout, rows);
    return {rows.weights, static_cast<int64_t>(bytes)};
}

// Prefetches a window in `steps` equal steps.
struct Prefetch {
    Ahead ahead;
    int64_t per_step, asked = 0, due = 0;

    Prefetch(Ahead ahead, int steps)
        : ahead(ahead), per_step((ahead.bytes + steps - 1) / steps) {}

    void step() {
        for (due += per_step; asked < due; asked += 64)
            __builtin_prefetch(ahead.from + asked, 0, 2);
    }
};

// The window of group `g` of the `groups` of a unit's rows, continuing into the next unit.
// `rows(unit, g)` are the rows of a group, of `bytes` bytes.
template <class Unit, class F>
inline Ahead ahead_of(const BlockLayout& layout, int g, int groups, const Unit& unit,
                      const Unit* next, F&& rows, size_t bytes) {
    if (g < groups) return window(layout, rows(unit, g), bytes);
    return next && g < 2 * groups ? window(layout, rows(*next, g - groups), bytes) : Ahead{};
}

// Activation `i` of a row, as stored by `pack`.
inline float activation(const Packed* x, int i) {
    if constexpr (std::is_same_v<Packed, uint16_t>) return float_of(x[i]);
    else return x[i / GROUP * GROUP + i % 2 * (GROUP / 2) + i % GROUP / 2];
}

// Calls f for 0 to PARTS - 1 as constants.
template <int PARTS, class F>
inline void each_part_of(F&& f) {
    f(std::integral_constant<int, 0>());
    if constexpr (PARTS == 2) f(std::integral_constant<int, 1>());
}

// ROWS rows of bfloat16.
struct PlainWeights {
    static constexpr int STEP = GROUP, STEP_PARTS = 1;
    const uint16_t* weights;
    int width;

    // Calls f(column, Weights) for a part of the STEP weights from column `i` of a row on.
    template <int PART, class F>
    void each(int row, int i, F&& f) const {
        f(i, Weights::load(weights + static_cast<size_t>(row) * width + i));
    }
    template <int TOKENS>
    void add_escapes(const Packed* const*, float (*)[MAX_TOKENS]) const {}
};

// ROWS rows of lossless12.
struct PackedWeights {
    static constexpr int STEP = lossless12::GROUP, STEP_PARTS = PARTS;
    PackedRows rows;
    int width;
    HighBytes high[ROWS];

    PackedWeights(const PackedRows& rows, int width)
        : rows(rows),
          width(width),
          high{HighBytes(rows.bases[0]), HighBytes(rows.bases[1]), HighBytes(rows.bases[2]),
               HighBytes(rows.bases[3])} {}

    template <int PART, class F>
    void each(int row, int i, F&& f) const {
        const uint8_t* lows = rows.lows(row, width);
        each_of_group<PART>(lows + i, lows + width + i / 2, high[row],
                            [&](int k, const auto& bits) { f(i + k, Weights::of(bits)); });
    }
    template <int TOKENS>
    void add_escapes(const Packed* const* x, float (*result)[MAX_TOKENS]) const {
        for (int row = 0; row < ROWS; ++row)
            rows.each_escape(row, [&](int column, uint16_t value) {
                for (int token = 0; token < TOKENS; ++token)
                    result[row][token] += float_of(value) * activation(x[token], column);
            });
    }
};
static_assert(ROWS == 4, "PackedWeights lists the rows");

// Unpacks `count` rows of lossless12 into [count, width], and prefetches `ahead` meanwhile.
inline void unpack_rows(const BlockLayout& layout, const Rows& from, int count, int width,
                        Ahead ahead, uint16_t* to) {
    const PackedRows rows(layout, from);
    Prefetch prefetch(ahead, count * (width / lossless12::GROUP));
    for (int row = 0; row < count; ++row, to += width) {
        const uint8_t* lows = rows.lows(row, width);
        const HighBytes high(rows.bases[row]);
        for (int i = 0; i < width; i += lossless12::GROUP) {
            prefetch.step();
            each_part_of<PARTS>([&](auto part) {
                each_of_group<part>(
                    lows + i, lows + width + i / 2, high,
                    [&](int k, const auto& bits) { std::memcpy(to + i + k, &bits, sizeof bits); });
            });
        }
        rows.each_escape(row, [&](int column, uint16_t value) { to[column] = value; });
    }
}

// ROWS rows times `TOKENS` rows of activations.
template <int TOKENS, class Source>
inline void multiply_rows(const Source& weights, const Packed* const* x, Ahead ahead,
                          float (*result)[MAX_TOKENS]) {
    Sum sums[ROWS][TOKENS];
    for (auto& row : sums)
        for (auto& sum : row) sum = Sum::zero();
    Prefetch prefetch(ahead, weights.width / Source::STEP);
    for (int i = 0; i < weights.width; i += Source::STEP) {
        prefetch.step();
        each_part_of<Source::STEP_PARTS>([&](auto part) {
            for (int row = 0; row < ROWS; ++row)
                weights.template each<part>(row, i, [&](int column, const Weights& w) {
                    for (int token = 0; token < TOKENS; ++token)
                        w.dot(sums[row][token], x[token] + column);
                });
        });
    }
    for (int row = 0; row < ROWS; ++row)
        for (int token = 0; token < TOKENS; ++token) result[row][token] = sums[row][token].total();
    weights.template add_escapes<TOKENS>(x, result);
}

template <int TOKENS = 1, class Source>
inline void multiply(int tokens, const Source& weights, const Packed* const* x, Ahead ahead,
                     float (*result)[MAX_TOKENS]) {
    if constexpr (TOKENS < MAX_TOKENS)
        if (tokens > TOKENS) return multiply<TOKENS + 1>(tokens, weights, x, ahead, result);
    multiply_rows<TOKENS>(weights, x, ahead, result);
}

// Calls f(ROWS rows, what is left of `ahead` to prefetch) for a call of `tokens` tokens. Packed
// rows that several parts of the tokens need are unpacked once, into `memory`.
template <class F>
inline void with_rows(const BlockLayout& layout, const Rows& rows, int width, int tokens,
                      Ahead ahead, uint16_t* memory, F&& f) {
    if (layout.encoding == BF16)
        return f(PlainWeights{reinterpret_cast<const uint16_t*>(rows.weights), width}, ahead);
    if (tokens <= MAX_TOKENS) return f(PackedWeights(PackedRows(layout, rows), width), ahead);
    unpack_rows(layout, rows, ROWS, width, ahead.part(0, 2), memory);
    f(PlainWeights{memory, width}, ahead.part(1, 2));
}
