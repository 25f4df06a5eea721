// Encodes weights as lossless12. lossless12.py uses the plain C interface through ctypes.
// Build: g++ -O3 -std=c++20 -shared -fPIC lossless12.cpp

#include "lossless12.h"

#include <algorithm>
#include <cstring>

// Needs ifunc, which musl has not.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define FOR_EACH_CPU __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_CPU
#endif

namespace {

using namespace lossless12;

constexpr int NUM_PAIRS = 128;

// The base whose pairs hold most of the row's weights. Pair 0 (zeros and subnormals) always has a
// code.
int choose_base(const uint16_t* row, int width) {
    uint32_t counts[4][NUM_PAIRS] = {};  // four, because equal weights follow each other
    for (int i = 0; i < width; i += 4)
        for (int k = 0; k < 4; ++k) ++counts[k][row[i + k] >> 8 & 0x7f];
    auto count = [&](int pair) {
        return counts[0][pair] + counts[1][pair] + counts[2][pair] + counts[3][pair];
    };
    uint32_t inside = 0;
    for (int pair = 1; pair <= PAIRS; ++pair) inside += count(pair);
    int best = 0;
    uint32_t most = inside;
    for (int base = 1; base + PAIRS < NUM_PAIRS; ++base) {
        inside += count(base + PAIRS) - count(base);
        if (inside > most) most = inside, best = base;
    }
    return best;
}

// Packs `width` weights. Sets `escapes[i]` to 1 where weight i has no code, else to 0.
FOR_EACH_CPU void pack_row(const uint16_t* row, int width, int base, uint8_t* to,
                           uint8_t* escapes) {
    uint8_t *lows = to, *codes = to + width;
    for (int group = 0; group < width; group += GROUP) {
        uint8_t low[GROUP], code[GROUP], placed[GROUP];
        for (int i = 0; i < GROUP; ++i) {
            uint16_t value = row[group + i];
            uint16_t pair = value >> 8 & 0x7f, index = pair - base;
            bool zero = pair == 0, inside = static_cast<uint16_t>(index - 1) < PAIRS;
            bool known = zero | inside;
            index = zero ? 0 : index;
            low[i] = known ? value & 0xff : 0;
            code[i] = known ? (value >> 12 & 8) | index : 0;
            escapes[group + i] = !known;
        }
        for (int i = 0; i < 4; ++i) {
            std::memcpy(lows + group + 16 * i, low + 8 * i, 8);
            std::memcpy(lows + group + 16 * i + 8, low + 32 + 8 * i, 8);
            std::memcpy(placed + 16 * i, code + 8 * i, 8);
            std::memcpy(placed + 16 * i + 8, code + 32 + 8 * i, 8);
        }
        for (int k = 0; k < GROUP / 2; ++k)
            codes[group / 2 + k] = placed[k] | placed[k + GROUP / 2] << 4;
    }
}

}  // namespace

extern "C" {

int64_t lossless12_bytes(int hidden, int neurons) {
    return static_cast<int64_t>(Layout{hidden, neurons}.bytes());
}

// Encodes the expert's neurons from `first_neuron` on into one block; neurons past the last one are
// zeros. gate, up: [intermediate, hidden], down: [hidden, intermediate]. `scratch`: three times as
// many bytes as the longest row has weights. Returns the number of escapes. Those beyond the
// block's capacity are lost unless `overflow` has room for all of them.
int64_t lossless12_encode(int hidden, int neurons, const uint16_t* gate, const uint16_t* up,
                          const uint16_t* down, int intermediate, int first_neuron, char* block,
                          Escape* overflow, uint8_t* scratch) {
    const Layout layout{hidden, neurons};
    const int here = std::clamp(intermediate - first_neuron, 0, neurons);
    auto bases = reinterpret_cast<uint8_t*>(block + layout.bases());
    auto firsts = reinterpret_cast<uint32_t*>(block + layout.firsts());
    auto inside = reinterpret_cast<Escape*>(block + layout.escapes());
    Escape* escapes = overflow ? overflow : inside;
    const uint32_t room = overflow ? UINT32_MAX : static_cast<uint32_t>(layout.capacity());
    const auto address = static_cast<int64_t>(reinterpret_cast<intptr_t>(overflow));
    std::memset(block, 0, layout.gate());
    std::memcpy(block, &address, sizeof address);
    uint8_t* flags = scratch;
    auto padded = reinterpret_cast<uint16_t*>(scratch + std::max(hidden, neurons));
    uint32_t row_number = 0, found = 0;

    auto add = [&](const uint16_t* row, int width, char* to) {
        const int base = choose_base(row, width);
        bases[row_number] = static_cast<uint8_t>(base);
        firsts[row_number++] = found;
        pack_row(row, width, base, reinterpret_cast<uint8_t*>(to), flags);
        for (int i = 0; i < width; i += 8) {
            uint64_t any;
            std::memcpy(&any, flags + i, sizeof any);
            if (!any) continue;
            for (int k = i; k < i + 8; ++k)
                if (flags[k]) {
                    if (found < room) escapes[found] = {static_cast<uint16_t>(k), row[k]};
                    ++found;
                }
        }
    };
    auto add_rows = [&](const uint16_t* matrix, char* to) {
        for (int n = 0; n < neurons; ++n, to += Layout::row_bytes(hidden)) {
            const uint16_t* row = padded;
            if (n < here) row = matrix + static_cast<size_t>(first_neuron + n) * hidden;
            else std::memset(padded, 0, hidden * sizeof(uint16_t));
            add(row, hidden, to);
        }
    };
    add_rows(gate, block + layout.gate());
    add_rows(up, block + layout.up());
    char* to = block + layout.down();
    for (int r = 0; r < hidden; ++r, to += Layout::row_bytes(neurons)) {
        const uint16_t* row = down + static_cast<size_t>(r) * intermediate + first_neuron;
        if (here < neurons) {
            std::memset(padded, 0, neurons * sizeof(uint16_t));
            if (here > 0) std::memcpy(padded, row, here * sizeof(uint16_t));
            row = padded;
        }
        add(row, neurons, to);
    }
    firsts[row_number] = found;
    return found;
}
}
