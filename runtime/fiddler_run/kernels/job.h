// Included by cpu.cpp: a job and its parts, and what an instruction set must provide.

constexpr int UNIT_NEURONS = 16,
              UNIT_ROWS = 16;    // hidden and block_neurons must be multiples of twice that
constexpr int TILE_TOKENS = 16;  // that tiles.h computes at once

float float_of(uint16_t bfloat16) {
    return std::bit_cast<float>(static_cast<uint32_t>(bfloat16) << 16);
}

uint16_t bfloat16_of(float value) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits = std::bit_cast<uint32_t>(value);
    if (value != value) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float swiglu(float gate, float up) { return gate / (1.0f + std::exp(-gate)) * up; }

struct Job;

struct CallArguments {
    const uint16_t* blocks;  // [num_blocks], one after the other
    const int64_t* rows;     // [tokens] into the states
    const float* weights;    // [tokens] of the router
    int num_blocks, tokens;
};

struct Call : CallArguments {
    bool tiled;  // computed by tiles.h
    size_t first_state, first_product;

    inline size_t neurons(const Job& job) const;
    int groups() const {
        return (tokens + TILE_TOKENS - 1) / TILE_TOKENS;
    }  // of TILE_TOKENS tokens, the last one padded
};

struct PackUnit {
    int call,
        index;  // a group of the tokens of a tiled call, or, with no call, one token for all others
};

struct GateUpUnit {
    const uint16_t* block;
    int call, index, first_neuron;  // index: of the block in its call
};

struct DownUnit {
    int first_row;
};

struct DownPiece {
    const uint16_t* block;
    int call, index;
};

struct Job {
    BlockLayout layout;
    int tokens;
    const uint16_t* states;  // [tokens, hidden]
    float* output;           // [tokens, hidden]
    std::vector<Call> calls;
    std::vector<PackUnit> pack_units;
    std::vector<GateUpUnit> gate_up_units;
    std::vector<DownPiece> down_pieces;  // of every down unit: block after block, call after call
    std::vector<DownUnit> down_units;
    void *packed_states, *products;
    std::vector<char> state_buffer, product_buffer;

    void clear_output(const DownUnit& unit) const {
        for (int t = 0; t < tokens; ++t)
            std::memset(output + static_cast<size_t>(t) * layout.hidden + unit.first_row, 0,
                        UNIT_ROWS * sizeof(float));
    }
};

size_t Call::neurons(const Job& job) const {
    return static_cast<size_t>(num_blocks) * job.layout.neurons;
}

struct Variant {
    size_t packed_bytes;    // of one activation
    int tiled_from_tokens;  // of a call; 0: never
    void (*pack)(const Job&, const PackUnit&);
    void (*run_gate_up)(const Job&, const GateUpUnit&, const GateUpUnit* next);
    void (*run_down)(const Job&, const DownUnit&, const DownUnit* next);
};
