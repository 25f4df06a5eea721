// Included by cpu.cpp: the layout of a block's weights in the encoding bf16.

// Row-major and consecutive: gate [neurons, hidden], up [neurons, hidden], down [hidden, neurons].
struct BlockLayout {
    int hidden, neurons;

    size_t matrix() const { return static_cast<size_t>(hidden) * neurons; }
    size_t bytes() const { return 3 * matrix() * sizeof(uint16_t); }

    const uint16_t* block(const uint16_t* blocks, int number) const {
        return blocks + number * 3 * matrix();
    }
    const uint16_t* gate(const uint16_t* block, int neuron) const {
        return block + static_cast<size_t>(neuron) * hidden;
    }
    const uint16_t* up(const uint16_t* block, int neuron) const {
        return gate(block, neuron) + matrix();
    }
    const uint16_t* down(const uint16_t* block, int row) const {
        return block + 2 * matrix() + static_cast<size_t>(row) * neurons;
    }
};
