// Included by cpu.cpp inside a namespace with AMX: computes calls of many tokens, 16 rows of
// weights by 16 or 32 tokens at a time.
//
// The weights are the left matrix of a product, in their stored order. The right matrix must hold
// pairs of consecutive values of each token, so states and products are stored in groups of 16
// tokens: [width / 2][16 tokens][2].

constexpr int TOKENS = TILE_TOKENS,
              STEP = 32;  // of one group; weights of a row per instruction
static_assert(UNIT_NEURONS == 16 && UNIT_ROWS == 16 && TOKENS == 16, "a unit is one tile");

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void configure() {
    static const TileShapes shapes;
    _tile_loadconfig(&shapes);
}

// Prefetches part `step` of `steps` equal parts of two ranges of `bytes` each.
inline void ask(const void* first, const void* second, size_t bytes, int step, int steps) {
    for (size_t at = bytes * step / steps & ~size_t{63}; at < bytes * (step + 1) / steps;
         at += 64) {
        __builtin_prefetch(static_cast<const char*>(first) + at, 0, 2);
        __builtin_prefetch(static_cast<const char*>(second) + at, 0, 2);
    }
}

void pack_group(const Job& job, const Call& call, int group) {
    size_t first = call.first_state + static_cast<size_t>(group) * TOKENS * job.layout.hidden;
    auto to = reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(job.packed_states) + first);
    for (int t = 0; t < TOKENS; ++t) {
        int token = group * TOKENS + t;
        auto from = token < call.tokens
                        ? job.states + static_cast<size_t>(call.rows[token]) * job.layout.hidden
                        : nullptr;
        for (int pair = 0; pair < job.layout.hidden / 2; ++pair) {
            uint32_t values = 0;
            if (from) std::memcpy(&values, from + 2 * pair, sizeof values);
            to[pair * TOKENS + t] = values;
        }
    }
}

// The 16 rows as bfloat16: in place or, if they are packed, unpacked into `memory`. Unpacking takes
// so long that the 16 rows at `ahead`, if any, are prefetched meanwhile.
inline const uint16_t* plain(const BlockLayout& layout, const Rows& rows, int width,
                             const Rows* ahead, uint16_t* memory) {
    if (layout.encoding == BF16) return reinterpret_cast<const uint16_t*>(rows.weights);
    avx512bf16::Ahead window;
    if (ahead) window = avx512bf16::window(layout, *ahead, TOKENS * layout.row_bytes(width));
    avx512bf16::unpack_rows(layout, rows, TOKENS, width, window, memory);
    return memory;
}

template <int GROUPS>
void gate_up_groups(const Job& job, const GateUpUnit& unit, const GateUpUnit* next,
                    const Call& call, int group, const uint16_t* gate_rows,
                    const uint16_t* up_rows) {
    const size_t width = job.layout.hidden;
    const GateUpUnit& ahead = next ? *next : unit;
    const char* next_gate = job.layout.gate(ahead.block, ahead.first_neuron).weights;
    const char* next_up = job.layout.up(ahead.block, ahead.first_neuron).weights;
    const bool in_place = job.layout.encoding == BF16;  // otherwise, unpacking has prefetched
    const size_t unit_bytes =
        in_place ? UNIT_NEURONS * job.layout.row_bytes(job.layout.hidden) : 0;
    const uint16_t* x =
        static_cast<const uint16_t*>(job.packed_states) + call.first_state + group * TOKENS * width;
    const int passes = (call.groups() + 1) / 2, steps = job.layout.hidden / STEP;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int i = 0; i < job.layout.hidden; i += STEP) {
        ask(next_gate, next_up, unit_bytes, group / 2 * steps + i / STEP, passes * steps);
        _tile_loadd(4, gate_rows + i, width * 2);
        _tile_loadd(5, up_rows + i, width * 2);
        _tile_loadd(6, x + i * TOKENS, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if constexpr (GROUPS == 2) {
            _tile_loadd(7, x + TOKENS * width + i * TOKENS, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    float gate[2][UNIT_NEURONS][TOKENS], up[2][UNIT_NEURONS][TOKENS];
    _tile_stored(0, gate[0], 64);
    _tile_stored(1, up[0], 64);
    if constexpr (GROUPS == 2) {
        _tile_stored(2, gate[1], 64);
        _tile_stored(3, up[1], 64);
    }
    job.activation.select([&](const auto& glu) {
        for (int g = 0; g < GROUPS; ++g) {
            uint16_t* products = static_cast<uint16_t*>(job.products) + call.first_product +
                                 (group + g) * TOKENS * call.neurons(job);
            for (int n = 0; n < UNIT_NEURONS; ++n) {
                size_t neuron =
                    static_cast<size_t>(unit.index) * job.layout.neurons + unit.first_neuron + n;
                for (int t = 0; t < TOKENS; ++t)
                    products[neuron / 2 * 2 * TOKENS + t * 2 + neuron % 2] =
                        bfloat16_of(glu(gate[g][n][t], up[g][n][t]));
            }
        }
    });
}

void run_gate_up(const Job& job, const GateUpUnit& unit, const GateUpUnit* next) {
    const Call& call = job.calls[unit.call];
    const int width = job.layout.hidden;
    uint16_t* memory = scratch(2 * UNIT_NEURONS * static_cast<size_t>(width));
    const GateUpUnit& ahead = next ? *next : unit;
    const Rows next_gate = job.layout.gate(ahead.block, ahead.first_neuron);
    const Rows next_up = job.layout.up(ahead.block, ahead.first_neuron);
    const uint16_t* gate = plain(job.layout, job.layout.gate(unit.block, unit.first_neuron), width,
                                 next ? &next_gate : nullptr, memory);
    const uint16_t* up = gate;
    if (job.layout.gated)
        up = plain(job.layout, job.layout.up(unit.block, unit.first_neuron), width,
                   next ? &next_up : nullptr, memory + UNIT_NEURONS * width);
    configure();
    for (int group = 0, groups = call.groups(); group < groups; group += 2)
        if (group + 1 < groups) gate_up_groups<2>(job, unit, next, call, group, gate, up);
        else gate_up_groups<1>(job, unit, next, call, group, gate, up);
    _tile_release();
}

// The unit's rows of all blocks of one call, whose pieces start at `first`. `rows_of(block)` are
// those of one block, as bfloat16.
template <int GROUPS, class F>
void down_groups(const Job& job, const DownUnit& unit, const Call& call, int first, int group,
                 F&& rows_of) {
    const size_t width = job.layout.neurons,
                 half = UNIT_ROWS / 2 * job.layout.row_bytes(job.layout.neurons);
    const int pieces = static_cast<int>(job.down_pieces.size());
    const bool in_place = job.layout.encoding == BF16;  // otherwise, unpacking has prefetched
    const uint16_t* x = static_cast<const uint16_t*>(job.products) + call.first_product +
                        group * TOKENS * call.neurons(job);
    _tile_zero(0);
    _tile_zero(1);
    for (int block = 0; block < call.num_blocks; ++block) {
        const uint16_t* rows = rows_of(block);
        const DownPiece& later = job.down_pieces[std::min(pieces - 1, first + block + 2)];
        const char* ahead = job.layout.down(later.block, unit.first_row).weights;
        for (int i = 0; i < job.layout.neurons; i += STEP, x += STEP * TOKENS) {
            if (group == 0 && in_place)
                ask(ahead, ahead + half, half, i / STEP, job.layout.neurons / STEP);
            _tile_loadd(4, rows + i, width * 2);
            _tile_loadd(6, x, 64);
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (GROUPS == 2) {
                _tile_loadd(7, x + TOKENS * call.neurons(job), 64);
                _tile_dpbf16ps(1, 4, 7);
            }
        }
    }
    float sums[2][UNIT_ROWS][TOKENS];
    _tile_stored(0, sums[0], 64);
    if constexpr (GROUPS == 2) {
        _tile_stored(1, sums[1], 64);
    }
    for (int t = group * TOKENS; t < std::min(call.tokens, (group + GROUPS) * TOKENS); ++t) {
        float* output =
            job.output + static_cast<size_t>(call.rows[t]) * job.layout.hidden + unit.first_row;
        for (int row = 0; row < UNIT_ROWS; ++row)
            output[row] += call.weights[t] * sums[t / TOKENS - group][row][t % TOKENS];
    }
}

void run_down(const Job& job, const DownUnit& unit, const DownUnit* next, const Call& call,
              int first) {
    const int width = job.layout.neurons;
    const size_t unit_weights = UNIT_ROWS * static_cast<size_t>(width);
    auto rows = [&](int block) {
        return job.layout.down(job.down_pieces[first + block].block, unit.first_row);
    };
    const int pieces = static_cast<int>(job.down_pieces.size());
    // Unpacks the rows of a block of the call, and prefetches those two pieces later, which may be
    // the next unit's.
    auto unpack = [&](int block, uint16_t* to) {
        const int later = first + block + 2;
        const DownUnit* of = later < pieces ? &unit : next;
        const Rows ahead = job.layout.down(job.down_pieces[later % pieces].block,
                                           of ? of->first_row : unit.first_row);
        plain(job.layout, rows(block), width, of ? &ahead : nullptr, to);
    };
    uint16_t* memory = nullptr;
    if (job.layout.encoding != BF16) {
        memory = scratch(call.num_blocks * unit_weights);
        for (int block = 0; block < call.num_blocks; ++block)
            unpack(block, memory + block * unit_weights);
    }
    auto rows_of = [&](int block) {
        return memory ? memory + block * unit_weights
                      : reinterpret_cast<const uint16_t*>(rows(block).weights);
    };
    configure();
    for (int group = 0, groups = call.groups(); group < groups; group += 2)
        if (group + 1 < groups) down_groups<2>(job, unit, call, first, group, rows_of);
        else down_groups<1>(job, unit, call, first, group, rows_of);
    _tile_release();
}
