// Included by cpu.cpp once for each instruction set, inside a namespace that defines
//   Packed        the type of stored activations
//   GROUP         weights of a row consumed by one step
//   MAX_TOKENS    tokens whose sums for ROWS rows fit the registers
//   Sum           partial sums of one row and token: zero(), total()
//   Weights       GROUP weights: load(), of(register), and dot(sum, packed activations), which adds
//                 to a Sum
//   each_of_group unpacks one of PARTS parts of 64 weights of lossless12 (low bytes, codes,
//                 HighBytes, f) into registers: calls f(first weight, GROUP weights in bfloat16)

#include "multiply.h"

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
    const size_t group_bytes = ROWS * job.layout.row_bytes(job.layout.hidden);
    int groups = 2 * UNIT_NEURONS / ROWS,
        distance = std::max(1, AHEAD_BYTES / static_cast<int>(group_bytes));
    if (!job.layout.gated) distance *= 2;  // without a gate, both groups of a pair are the same
    // Group g of ROWS rows: gate and up in turn.
    auto rows = [&](const GateUpUnit& of, int g) {
        int neuron = of.first_neuron + g / 2 * ROWS;
        return g % 2 ? job.layout.up(of.block, neuron) : job.layout.gate(of.block, neuron);
    };
    auto beyond = [&](int g) {
        return ahead_of(job.layout, g + distance, groups, unit, next, rows, group_bytes);
    };
    uint16_t* memory = scratch(2 * ROWS * static_cast<size_t>(job.layout.hidden));
    // The rows of group g, in their own half of the memory.
    auto with_group = [&](int g, auto&& f) {
        with_rows(job.layout, rows(unit, g), job.layout.hidden, call.tokens, beyond(g),
                  memory + g % 2 * ROWS * static_cast<size_t>(job.layout.hidden), f);
    };
    for (int g = 0; g < groups; g += 2) {
        with_group(g, [&](const auto& gate_rows, Ahead beyond_gate) {
            with_group(g + 1, [&](const auto& up_rows, Ahead beyond_up) {
                each_part(call.tokens, [&](int part, int parts, int first, int count) {
                    const Packed* x[MAX_TOKENS];
                    for (int t = 0; t < count; ++t) x[t] = state(job, call, first + t);
                    float gate[ROWS][MAX_TOKENS], up[ROWS][MAX_TOKENS];
                    multiply(count, gate_rows, x, beyond_gate.part(part, parts), gate);
                    if (job.layout.gated)
                        multiply(count, up_rows, x, beyond_up.part(part, parts), up);
                    else std::memcpy(up, gate, sizeof up);
                    job.activation.select([&](const auto& glu) {
                        for (int t = 0; t < count; ++t)
                            for (int row = 0; row < ROWS; ++row)
                                pack(glu(gate[row][t], up[row][t]),
                                     unit.first_neuron + g / 2 * ROWS + row,
                                     products + (first + t) * neurons);
                    });
                });
            });
        });
    }
}

// `piece` is an element of job.down_pieces: the unit's rows of one block. `beyond(g)` is the window
// to prefetch during group g of these rows.
template <class F>
void run_down(const Job& job, const DownUnit& unit, const DownPiece& piece, F&& beyond) {
    const Call& call = job.calls[piece.call];
    size_t neurons = call.neurons(job);
    size_t first_product =
        call.first_product + static_cast<size_t>(piece.index) * job.layout.neurons;
    const Packed* products = static_cast<const Packed*>(job.products) + first_product;
    uint16_t* memory = scratch(ROWS * static_cast<size_t>(job.layout.neurons));
    for (int g = 0; g < UNIT_ROWS / ROWS; ++g) {
        Rows rows = job.layout.down(piece.block, unit.first_row + g * ROWS);
        auto add = [&](const auto& from, Ahead ahead) {
            each_part(call.tokens, [&](int part, int parts, int first, int count) {
                const Packed* x[MAX_TOKENS];
                for (int t = 0; t < count; ++t) x[t] = products + (first + t) * neurons;
                float result[ROWS][MAX_TOKENS];
                multiply(count, from, x, ahead.part(part, parts), result);
                for (int t = 0; t < count; ++t) {
                    float* output = job.output +
                                    static_cast<size_t>(call.rows[first + t]) * job.layout.hidden +
                                    unit.first_row + g * ROWS;
                    for (int row = 0; row < ROWS; ++row)
                        output[row] += call.weights[first + t] * result[row][t];
                }
            });
        };
        with_rows(job.layout, rows, job.layout.neurons, call.tokens, beyond(g), memory, add);
    }
}

void run_down(const Job& job, const DownUnit& unit, const DownUnit* next) {
    job.clear_output(unit);
    constexpr int GROUPS = UNIT_ROWS / ROWS;
    int pieces = static_cast<int>(job.down_pieces.size()), groups = GROUPS * pieces;
    const size_t group_bytes = ROWS * job.layout.row_bytes(job.layout.neurons);
    int distance = std::max(1, AHEAD_BYTES / static_cast<int>(group_bytes));
    auto rows = [&](const DownUnit& of, int g) {
        return job.layout.down(job.down_pieces[g / GROUPS].block, of.first_row + g % GROUPS * ROWS);
    };
    for (int i = 0; i < pieces; ++i)
        run_down(job, unit, job.down_pieces[i], [&](int g) {
            return ahead_of(job.layout, i * GROUPS + g + distance, groups, unit, next, rows,
                            group_bytes);
        });
}

constexpr Variant variant{
    sizeof(Packed),
    0,
    [](const Job& job, const PackUnit& unit) { pack_state(job, unit.index); },
    run_gate_up,
    run_down,
};
