// Included by cpu.cpp once for each instruction set, inside a namespace that defines
//   Packed        the type of stored activations
//   GROUP         weights of a row consumed by one step
//   MAX_TOKENS    tokens whose sums for ROWS rows fit the registers
//   Sum           partial sums of one row and token: zero(), total()
//   Weights       GROUP weights: load(), and dot(sum, packed activations), which adds to a Sum

constexpr int ROWS = 4;             // rows of weights that share each load of an activation
constexpr int AHEAD_BYTES = 32768;  // distance of the prefetch ahead of its use

// Prefetch window, in address order: prefetching rows side by side costs 20% of the bandwidth or
// more.
struct Ahead {
    const uint16_t* from = nullptr;
    int weights = 0;

    // One part of the window for each part of a computation, to keep the memory busy throughout.
    Ahead part(int number, int parts) const {
        int start = static_cast<int64_t>(weights) * number / parts,
            stop = static_cast<int64_t>(weights) * (number + 1) / parts;
        return {from + start, stop - start};
    }
};

// Address of group `g` of the `groups` of a unit's rows, continuing into the next unit.
// `rows(unit, g)` is the address of a group.
template <class Unit, class Rows>
inline Ahead ahead_of(int g, int groups, const Unit& unit, const Unit* next, Rows&& rows,
                      int weights) {
    if (g < groups) return {rows(unit, g), weights};
    return next && g < 2 * groups ? Ahead{rows(*next, g - groups), weights} : Ahead{};
}

// ROWS consecutive rows of `weights` [., width] times `tokens` rows of activations.
template <int TOKENS>
inline void multiply_rows(const uint16_t* weights, int width, const Packed* const* x, Ahead ahead,
                          float (*result)[MAX_TOKENS]) {
    Sum sums[ROWS][TOKENS];
    for (auto& row : sums)
        for (auto& sum : row) sum = Sum::zero();
    int steps = width / GROUP, per_step = (ahead.weights + steps - 1) / steps, asked = 0, due = 0;
    for (int i = 0; i < width; i += GROUP) {
        for (due += per_step; asked < due; asked += 32)
            __builtin_prefetch(ahead.from + asked, 0, 2);
        for (int row = 0; row < ROWS; ++row) {
            Weights w = Weights::load(weights + static_cast<size_t>(row) * width + i);
            for (int token = 0; token < TOKENS; ++token) w.dot(sums[row][token], x[token] + i);
        }
    }
    for (int row = 0; row < ROWS; ++row)
        for (int token = 0; token < TOKENS; ++token) result[row][token] = sums[row][token].total();
}

template <int TOKENS = 1>
inline void multiply(int tokens, const uint16_t* weights, int width, const Packed* const* x,
                     Ahead ahead, float (*result)[MAX_TOKENS]) {
    if constexpr (TOKENS < MAX_TOKENS)
        if (tokens > TOKENS) return multiply<TOKENS + 1>(tokens, weights, width, x, ahead, result);
    multiply_rows<TOKENS>(weights, width, x, ahead, result);
}

// Splits the tokens of a call evenly into parts of at most MAX_TOKENS: 8 are 4 + 4 rather than
// 6 + 2. Calls f(part, parts, first token, count).
template <class F>
inline void each_part(int tokens, F&& f) {
    int parts = (tokens + MAX_TOKENS - 1) / MAX_TOKENS;
    for (int part = 0, first = 0; part < parts; ++part) {
        int count = (tokens - first + parts - part - 1) / (parts - part);
        f(part, parts, first, count);
        first += count;
    }
}

// Stores activation `i` of a row where dot() expects it. Floats of even index come first in each
// GROUP, because a shift and a mask turn a pair of bfloat16 weights into two floats.
inline void pack(float value, int i, Packed* to) {
    if constexpr (std::is_same_v<Packed, uint16_t>) to[i] = bfloat16_of(value);
    else to[i / GROUP * GROUP + i % 2 * (GROUP / 2) + i % GROUP / 2] = value;
}

inline const Packed* state(const Job& job, const Call& call, int token) {
    return static_cast<const Packed*>(job.packed_states) +
           static_cast<size_t>(call.rows[token]) * job.layout.hidden;
}

void pack_state(const Job& job, int token) {
    size_t first = static_cast<size_t>(token) * job.layout.hidden;
    auto packed = static_cast<Packed*>(job.packed_states) + first;
    for (int i = 0; i < job.layout.hidden; ++i) pack(float_of(job.states[first + i]), i, packed);
}

void run_gate_up(const Job& job, const GateUpUnit& unit, const GateUpUnit* next) {
    const Call& call = job.calls[unit.call];
    size_t neurons = call.neurons(job);
    size_t first_product =
        call.first_product + static_cast<size_t>(unit.index) * job.layout.neurons;
    Packed* products = static_cast<Packed*>(job.products) + first_product;
    int groups = 2 * UNIT_NEURONS / ROWS,
        distance = std::max(1, AHEAD_BYTES / (ROWS * job.layout.hidden * 2));
    // Group g of ROWS rows: gate and up in turn.
    auto rows = [&](const GateUpUnit& of, int g) {
        int neuron = of.first_neuron + g / 2 * ROWS;
        return g % 2 ? job.layout.up(of.block, neuron) : job.layout.gate(of.block, neuron);
    };
    auto beyond = [&](int g) {
        return ahead_of(g + distance, groups, unit, next, rows, ROWS * job.layout.hidden);
    };
    for (int g = 0; g < groups; g += 2) {
        Ahead beyond_gate = beyond(g), beyond_up = beyond(g + 1);
        each_part(call.tokens, [&](int part, int parts, int first, int count) {
            const Packed* x[MAX_TOKENS];
            for (int t = 0; t < count; ++t) x[t] = state(job, call, first + t);
            float gate[ROWS][MAX_TOKENS], up[ROWS][MAX_TOKENS];
            multiply(count, rows(unit, g), job.layout.hidden, x, beyond_gate.part(part, parts),
                     gate);
            multiply(count, rows(unit, g + 1), job.layout.hidden, x, beyond_up.part(part, parts),
                     up);
            for (int t = 0; t < count; ++t)
                for (int row = 0; row < ROWS; ++row) {
                    int neuron = unit.first_neuron + g / 2 * ROWS + row;
                    pack(swiglu(gate[row][t], up[row][t]), neuron,
                         products + (first + t) * neurons);
                }
        });
    }
}

// `piece` is an element of job.down_pieces: the unit's rows of one block. `beyond(g)` is the
// address of the weights after group g of these rows.
template <class F>
void run_down(const Job& job, const DownUnit& unit, const DownPiece& piece, F&& beyond) {
    const Call& call = job.calls[piece.call];
    size_t neurons = call.neurons(job);
    size_t first_product =
        call.first_product + static_cast<size_t>(piece.index) * job.layout.neurons;
    const Packed* products = static_cast<const Packed*>(job.products) + first_product;
    for (int g = 0; g < UNIT_ROWS / ROWS; ++g) {
        Ahead ahead = beyond(g);
        each_part(call.tokens, [&](int part, int parts, int first, int count) {
            const Packed* x[MAX_TOKENS];
            for (int t = 0; t < count; ++t) x[t] = products + (first + t) * neurons;
            float result[ROWS][MAX_TOKENS];
            const uint16_t* rows = job.layout.down(piece.block, unit.first_row + g * ROWS);
            multiply(count, rows, job.layout.neurons, x, ahead.part(part, parts), result);
            for (int t = 0; t < count; ++t) {
                float* output = job.output +
                                static_cast<size_t>(call.rows[first + t]) * job.layout.hidden +
                                unit.first_row + g * ROWS;
                for (int row = 0; row < ROWS; ++row)
                    output[row] += call.weights[first + t] * result[row][t];
            }
        });
    }
}

void run_down(const Job& job, const DownUnit& unit, const DownUnit* next) {
    job.clear_output(unit);
    constexpr int GROUPS = UNIT_ROWS / ROWS;
    int pieces = static_cast<int>(job.down_pieces.size()), groups = GROUPS * pieces;
    int distance = std::max(1, AHEAD_BYTES / (ROWS * job.layout.neurons * 2));
    auto rows = [&](const DownUnit& of, int g) {
        return job.layout.down(job.down_pieces[g / GROUPS].block, of.first_row + g % GROUPS * ROWS);
    };
    for (int i = 0; i < pieces; ++i)
        run_down(job, unit, job.down_pieces[i], [&](int g) {
            return ahead_of(i * GROUPS + g + distance, groups, unit, next, rows,
                            ROWS * job.layout.neurons);
        });
}

constexpr Variant variant{
    sizeof(Packed),
    0,
    [](const Job& job, const PackUnit& unit) { pack_state(job, unit.index); },
    run_gate_up,
    run_down,
};
