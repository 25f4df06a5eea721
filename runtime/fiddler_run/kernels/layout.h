// Included by cpu.cpp: where the weights of a block are.

enum Encoding : int { BF16, LOSSLESS12 };  // as NUMBERED in cpu.py

// Consecutive rows of one matrix of a block. `number` is the first one's, over gate, up and down.
struct Rows {
    const char *block, *weights;
    int number;
};

// bf16 is row-major and consecutive: gate [neurons, hidden], up [neurons, hidden], down [hidden,
// neurons]. lossless12.h has the layout of lossless12. Without a gate, up is in its place, too.
struct BlockLayout {
    int hidden = 0, neurons = 0;
    Encoding encoding = BF16;
    bool gated = true;
    size_t gate_at = 0, up_at = 0, down_at = 0, bytes = 0;

    BlockLayout() = default;
    BlockLayout(int hidden, int neurons, Encoding encoding, bool gated)
        : hidden(hidden), neurons(neurons), encoding(encoding), gated(gated) {
        if (encoding == LOSSLESS12) {
            auto layout = lossless();
            gate_at = layout.gate(), up_at = layout.up(), down_at = layout.down();
            bytes = layout.bytes();
        } else {
            size_t matrix = row_bytes(hidden) * neurons;
            up_at = gated ? matrix : 0, down_at = up_at + matrix, bytes = down_at + matrix;
        }
    }

    int first_up() const { return gated ? neurons : 0; }
    lossless12::Layout lossless() const { return {hidden, neurons, gated}; }
    size_t row_bytes(int width) const {
        return encoding == LOSSLESS12 ? lossless12::Layout::row_bytes(width)
                                      : width * sizeof(uint16_t);
    }
    const char* block(const char* blocks, int number) const { return blocks + number * bytes; }
    Rows gate(const char* block, int neuron) const {
        return {block, block + gate_at + neuron * row_bytes(hidden), neuron};
    }
    Rows up(const char* block, int neuron) const {
        return {block, block + up_at + neuron * row_bytes(hidden), first_up() + neuron};
    }
    Rows down(const char* block, int row) const {
        return {block, block + down_at + row * row_bytes(neurons), first_up() + neurons + row};
    }
};
