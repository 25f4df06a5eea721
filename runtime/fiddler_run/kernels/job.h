// Included by cpu.cpp: a job, its parts, and the interface of an instruction set.

constexpr int UNIT_NEURONS = 16,
              UNIT_ROWS = 16;    // hidden and block_neurons are multiples of twice this
constexpr int TILE_TOKENS = 16;  // computed at once by tiles.h

float float_of(uint16_t bfloat16) {
    return std::bit_cast<float>(static_cast<uint32_t>(bfloat16) << 16);
}

uint16_t bfloat16_of(float value) {  // rounds to nearest, ties to even; NaN stays NaN
    uint32_t bits = std::bit_cast<uint32_t>(value);
    if (value != value) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

struct Job;

struct ExpertArguments {
    int hidden, neurons;
    Encoding encoding;
    Activation activation;
};

struct CallArguments {
    const char* blocks;      // [num_blocks], one after the other
    const int64_t* rows;     // [tokens], indices of states
    const float* weights;    // [tokens], the router's
    int num_blocks, tokens;
};

struct Call : CallArguments {
    bool tiled;  // computed by tiles.h
    size_t first_state, first_product;

    inline size_t neurons(const Job& job) const;
    int groups() const {
        return (tokens + TILE_TOKENS - 1) / TILE_TOKENS;
    }  // groups of TILE_TOKENS tokens, the last one padded
};

struct PackUnit {
    int call,
        index;  // of a token group in a tiled call or, without a call, of a token
};

struct GateUpUnit {
    const char* block;
    int call, index, first_neuron;  // index: of the block in its call
};

struct DownUnit {
    int first_row;
};

struct DownPiece {
    const char* block;
    int call, index;
};

struct Job {
    BlockLayout layout;
    Activation activation;
    int tokens;
    const uint16_t* states;  // [tokens, hidden]
    float* output;           // [tokens, hidden]
    std::vector<Call> calls;
    std::vector<PackUnit> pack_units;
    std::vector<GateUpUnit> gate_up_units;
    std::vector<DownPiece> down_pieces;  // of each down unit, by call and block
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
    size_t packed_bytes;    // per activation
    int tiled_from_tokens;  // tokens of a call; 0: never
    void (*pack)(const Job&, const PackUnit&);
    void (*run_gate_up)(const Job&, const GateUpUnit&, const GateUpUnit* next);
    void (*run_down)(const Job&, const DownUnit&, const DownUnit* next);
};
