// Included by cpu.cpp once for each instruction set, inside a namespace that defines
//   Packed        what activations are stored as
//   GROUP         weights that one step consumes from a row
//   MAX_TOKENS    tokens whose sums fit the registers together with those of ROWS rows
//   Sum           partial sums of one row and token: zero(), total()
//   Weights       GROUP weights: load(), and dot(sum, packed activations) which adds their products to a Sum
//   pack(from, i, to)  stores activation i of a row where dot() expects it

constexpr int ROWS = 4;           // rows of weights that share each load of an activation
constexpr int AHEAD_BYTES = 32768;  // how far ahead of their use weights are asked from memory

// ROWS consecutive rows of `weights` [., width] times `tokens` rows of activations. Meanwhile asks for the ROWS rows at `ahead`,
// in the order of their addresses: read row beside row, memory is slower by a fifth and more.
template <int TOKENS>
inline void multiply_rows(const uint16_t* weights, int width, const Packed* const* x, const char* ahead, float (*result)[MAX_TOKENS]) {
    Sum sums[ROWS][TOKENS];
    for (auto& row : sums)
        for (auto& sum : row) sum = Sum::zero();
    for (int i = 0; i < width; i += GROUP) {
        if (ahead)
            for (int line = 0; line < ROWS * GROUP * 2; line += 64) __builtin_prefetch(ahead + i * ROWS * 2 + line, 0, 2);
        for (int row = 0; row < ROWS; ++row) {
            Weights w = Weights::load(weights + static_cast<size_t>(row) * width + i);
            for (int token = 0; token < TOKENS; ++token) w.dot(sums[row][token], x[token] + i);
        }
    }
    for (int row = 0; row < ROWS; ++row)
        for (int token = 0; token < TOKENS; ++token) result[row][token] = sums[row][token].total();
}

template <int TOKENS = 1>
inline void multiply(int tokens, const uint16_t* weights, int width, const Packed* const* x, const char* ahead,
                     float (*result)[MAX_TOKENS]) {
    if constexpr (TOKENS < MAX_TOKENS)
        if (tokens > TOKENS) return multiply<TOKENS + 1>(tokens, weights, width, x, ahead, result);
    multiply_rows<TOKENS>(weights, width, x, ahead, result);
}

// Tokens of a call in even parts of at most MAX_TOKENS: 8 are 4 + 4 rather than 6 + 2.
template <class F>
inline void each_part(int tokens, F&& f) {
    int parts = (tokens + MAX_TOKENS - 1) / MAX_TOKENS;
    for (int part = 0, first = 0; part < parts; ++part) {
        int count = (tokens - first + parts - part - 1) / (parts - part);
        f(first, count);
        first += count;
    }
}

inline const Packed* state(const Job& job, const Call& call, int token) {
    return static_cast<const Packed*>(job.packed_states) + static_cast<size_t>(call.rows[token]) * job.hidden;
}

// Where group `g` of ROWS rows of a gate/up unit lies: gate and up in turn.
inline const uint16_t* gate_up_rows(const Job& job, const GateUpUnit& unit, int g) {
    size_t row = unit.first_neuron + static_cast<size_t>(g / 2) * ROWS + (g % 2 ? job.block_neurons : 0);
    return unit.block + row * job.hidden;
}

void run_gate_up(const Job& job, const GateUpUnit& unit, const GateUpUnit* next) {
    const Call& call = job.calls[unit.call];
    size_t neurons = static_cast<size_t>(call.num_blocks) * job.block_neurons;
    Packed* products = static_cast<Packed*>(job.products) + call.first_product + static_cast<size_t>(unit.index) * job.block_neurons;
    int groups = 2 * UNIT_NEURONS / ROWS, distance = std::max(1, AHEAD_BYTES / (ROWS * job.hidden * 2));
    for (int g = 0; g < groups; g += 2) {
        const char* ahead[2];
        for (int k = 0; k < 2; ++k) {
            int then = g + k + distance;
            ahead[k] = reinterpret_cast<const char*>(then < groups ? gate_up_rows(job, unit, then)
                                                     : next && then < 2 * groups ? gate_up_rows(job, *next, then - groups) : nullptr);
        }
        each_part(call.tokens, [&](int first, int count) {
            const Packed* x[MAX_TOKENS];
            for (int t = 0; t < count; ++t) x[t] = state(job, call, first + t);
            float gate[ROWS][MAX_TOKENS], up[ROWS][MAX_TOKENS];
            multiply(count, gate_up_rows(job, unit, g), job.hidden, x, first ? nullptr : ahead[0], gate);
            multiply(count, gate_up_rows(job, unit, g + 1), job.hidden, x, first ? nullptr : ahead[1], up);
            for (int t = 0; t < count; ++t)
                for (int row = 0; row < ROWS; ++row) {
                    float product = gate[row][t] / (1.0f + std::exp(-gate[row][t])) * up[row][t];
                    pack(product, unit.first_neuron + g / 2 * ROWS + row, products + (first + t) * neurons);
                }
        });
    }
}

// Where group `g` of ROWS rows of a down unit lies: the unit's rows of each block of each call, block after block.
inline const uint16_t* down_rows(const Job& job, const DownUnit& unit, int g) {
    constexpr int groups = UNIT_ROWS / ROWS;
    size_t row = unit.first_row + static_cast<size_t>(g % groups) * ROWS;
    return job.down_blocks[g / groups].weights + row * job.block_neurons;
}

void run_down(const Job& job, const DownUnit& unit, const DownUnit* next) {
    for (int t = 0; t < job.tokens; ++t)
        std::memset(job.output + static_cast<size_t>(t) * job.hidden + unit.first_row, 0, UNIT_ROWS * sizeof(float));
    int per_block = UNIT_ROWS / ROWS, groups = per_block * static_cast<int>(job.down_blocks.size());
    int distance = std::max(1, AHEAD_BYTES / (ROWS * job.block_neurons * 2));
    for (int g = 0; g < groups; ++g) {
        const DownBlock& block = job.down_blocks[g / per_block];
        const Call& call = job.calls[block.call];
        size_t neurons = static_cast<size_t>(call.num_blocks) * job.block_neurons;
        const Packed* products = static_cast<const Packed*>(job.products) + call.first_product + static_cast<size_t>(block.index) * job.block_neurons;
        int then = g + distance;
        auto ahead = reinterpret_cast<const char*>(then < groups ? down_rows(job, unit, then)
                                                   : next && then < 2 * groups ? down_rows(job, *next, then - groups) : nullptr);
        each_part(call.tokens, [&](int first, int count) {
            const Packed* x[MAX_TOKENS];
            for (int t = 0; t < count; ++t) x[t] = products + (first + t) * neurons;
            float result[ROWS][MAX_TOKENS];
            multiply(count, down_rows(job, unit, g), job.block_neurons, x, first ? nullptr : ahead, result);
            for (int t = 0; t < count; ++t) {
                float* output = job.output + static_cast<size_t>(call.rows[first + t]) * job.hidden + unit.first_row + g % per_block * ROWS;
                for (int row = 0; row < ROWS; ++row) output[row] += call.weights[first + t] * result[row][t];
            }
        });
    }
}

void pack_states(const uint16_t* states, Job& job) {
    if constexpr (std::is_same_v<Packed, uint16_t>) {
        job.packed_states = states;
    } else {
        size_t count = static_cast<size_t>(job.tokens) * job.hidden;
        job.state_buffer.resize(count * sizeof(Packed));
        auto packed = reinterpret_cast<Packed*>(job.state_buffer.data());
        for (size_t i = 0; i < count; ++i) pack(float_of(states[i]), static_cast<int>(i), packed);
        job.packed_states = packed;
    }
}

constexpr Variant variant{pack_states, run_gate_up, run_down, sizeof(Packed)};
