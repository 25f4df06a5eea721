// Included by cpu.cpp: rows of lossless12. Each instruction set has an `each_of_group`, which turns
// the low bytes and codes of a group into weights; see lossless12.h.

// By code, the high bytes of a row's weights: exponent pairs without and with sign.
struct alignas(16) HighBytes {
    uint64_t plain, negative;

    explicit HighBytes(uint8_t base)
        : plain((base * 0x0101010101010101u + 0x0706050403020100u) & ~uint64_t{0xff}),
          negative(plain | 0x8080808080808080u) {}
};

struct PackedRows {
    const uint8_t *weights, *bases;
    const uint32_t* firsts;
    const lossless12::Escape* escapes;

    PackedRows(const BlockLayout& layout, const Rows& rows)
        : weights(reinterpret_cast<const uint8_t*>(rows.weights)) {
        const auto parts = layout.lossless();
        const char* block = rows.block;
        bases = reinterpret_cast<const uint8_t*>(block + parts.bases()) + rows.number;
        firsts = reinterpret_cast<const uint32_t*>(block + parts.firsts()) + rows.number;
        int64_t overflow;
        std::memcpy(&overflow, block, sizeof overflow);
        escapes = overflow ? reinterpret_cast<const lossless12::Escape*>(overflow)
                           : reinterpret_cast<const lossless12::Escape*>(block + parts.escapes());
        __builtin_prefetch(escapes + firsts[0]);  // needed after the weights
    }

    const uint8_t* lows(int row, int width) const {
        return weights + row * lossless12::Layout::row_bytes(width);
    }

    // Calls f(column, value as bfloat16) for each escape of a row.
    template <class F>
    void each_escape(int row, F&& f) const {
        for (uint32_t e = firsts[row]; e < firsts[row + 1]; ++e)
            f(escapes[e].column, escapes[e].value);
    }
};

// Prefetches what PackedRows reads besides the weights.
inline void prefetch_header(const BlockLayout& layout, const Rows& rows) {
    const auto parts = layout.lossless();
    __builtin_prefetch(rows.block);
    __builtin_prefetch(rows.block + parts.bases() + rows.number);
    __builtin_prefetch(rows.block + parts.firsts() + sizeof(uint32_t) * rows.number);
}

// Memory of this thread for `weights` unpacked weights.
inline uint16_t* scratch(size_t weights) {
    thread_local std::vector<uint16_t> buffer;
    if (buffer.size() < weights + 32) buffer.resize(weights + 32);
    auto address = reinterpret_cast<uintptr_t>(buffer.data());
    return buffer.data() + (64 - address % 64) % 64 / sizeof(uint16_t);
}
