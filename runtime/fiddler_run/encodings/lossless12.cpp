// Encodes weights as lossless12, and decodes them. lossless12.py uses the plain C interface through
// ctypes.
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

// Vectors of bytes and of weights; GCC and Clang turn them into what the CPU has.
constexpr int LANES = 32;
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef uint16_t Weights __attribute__((vector_size(2 * LANES)));
typedef uint64_t Quads __attribute__((vector_size(LANES)));

// Counts the pairs in high[0..size) from `first` to `last` - 1. `size` is a multiple of LANES.
FOR_EACH_CPU uint32_t count_of(const uint8_t* high, int size, int first, int last) {
    const auto start = static_cast<uint8_t>(first), length = static_cast<uint8_t>(last - first);
    uint32_t total = 0;
    for (int i = 0; i < size;) {
        Bytes found = {};
        const int stop = std::min(size, i + 255 * LANES);
        for (; i < stop; i += LANES) {
            Bytes pairs;
            std::memcpy(&pairs, high + i, sizeof pairs);
            found -= (Bytes)(pairs - start < length);  // a comparison gives -1 where it is true
        }
        for (int lane = 0; lane < LANES; ++lane) total += found[lane];
    }
    return total;
}

// high[i] = the exponent pair of weight i. Returns the largest.
FOR_EACH_CPU int exponent_pairs(const uint16_t* row, int width, uint8_t* high) {
    Bytes most = {};
    for (int first = 0; first < width; first += LANES) {
        Weights weights;
        std::memcpy(&weights, row + first, sizeof weights);
        const Bytes pairs = __builtin_convertvector(weights >> 8 & 0x7f, Bytes);
        std::memcpy(high + first, &pairs, sizeof pairs);
        most = pairs > most ? pairs : most;
    }
    int largest = 0;
    for (int lane = 0; lane < LANES; ++lane) largest = std::max<int>(largest, most[lane]);
    return largest;
}

// The base whose pairs hold most of the row's weights. Pair 0 (zeros and subnormals) always has a
// code. `high` has room for the row.
int choose_base(const uint16_t* row, int width, uint8_t* high) {
    const int largest = exponent_pairs(row, width, high);
    uint32_t above = 0, fewest = UINT32_MAX;
    int best = 0;
    // `top` is the last pair of a window. Usually, the first or the second window is the best.
    for (int top = largest; top > 0 && above < fewest; --top) {
        const int base = std::max(0, top - PAIRS);
        const uint32_t outside = above + count_of(high, width, 1, base + 1);
        if (outside < fewest) fewest = outside, best = base;
        above += count_of(high, width, top, top + 1);
    }
    return best;
}

// Packs `width` weights, whose exponent pairs are `high`. Sets `escapes[i]` to 1 if any weight of
// group i has no code, else to 0.
FOR_EACH_CPU void pack_row(const uint16_t* row, const uint8_t* high, int width, int base,
                           uint8_t* to, uint8_t* escapes) {
    uint8_t *lows = to, *codes = to + width;
    for (int group = 0; group < width; group += GROUP) {
        Quads low[2], code[2];
        Bytes missing = {};
        for (int half = 0; half < 2; ++half) {
            const int first = group + half * LANES;
            Weights weights;
            Bytes pairs;
            std::memcpy(&weights, row + first, sizeof weights);
            std::memcpy(&pairs, high + first, sizeof pairs);
            const Bytes index = pairs - static_cast<uint8_t>(base);
            const Bytes inside = (Bytes)(index - 1 < PAIRS);
            const Bytes known = inside | (Bytes)(pairs == 0);
            const Bytes sign = __builtin_convertvector(weights >> 12 & 8, Bytes);
            low[half] = (Quads)(__builtin_convertvector(weights & 0xff, Bytes) & known);
            code[half] = (Quads)((sign & known) | (index & inside));
            missing |= ~known;
        }
        // Eight weights of one half, then eight of the other.
        const Quads first_lows = __builtin_shufflevector(low[0], low[1], 0, 4, 1, 5);
        const Quads last_lows = __builtin_shufflevector(low[0], low[1], 2, 6, 3, 7);
        const Quads lower = __builtin_shufflevector(code[0], code[1], 0, 4, 1, 5);
        const Quads upper = __builtin_shufflevector(code[0], code[1], 2, 6, 3, 7);
        const Quads both = lower | upper << 4;  // a code has four bits: nothing crosses a byte
        std::memcpy(lows + group, &first_lows, LANES);
        std::memcpy(lows + group + LANES, &last_lows, LANES);
        std::memcpy(codes + group / 2, &both, LANES);
        const Quads any = (Quads)missing;
        escapes[group / GROUP] = (any[0] | any[1] | any[2] | any[3]) != 0;
    }
}

// Unpacks `width` weights without escapes.
FOR_EACH_CPU void unpack_row(const uint8_t* lows, int width, int base, uint16_t* to) {
    constexpr int RUN = 8;  // consecutive places that hold consecutive weights
    const uint8_t* codes = lows + width;
    for (int group = 0; group < width; group += GROUP)
        for (int place = 0; place < GROUP; place += RUN) {
            const uint8_t* low = lows + group + place;
            const uint8_t* code = codes + group / 2 + place % (GROUP / 2);
            const int shift = place / (GROUP / 2) * 4;
            uint16_t* weights = to + group + place / 8 % 2 * 32 + place / 16 * 8;
            for (int i = 0; i < RUN; ++i) {
                const int own = code[i] >> shift & 15, index = own & 7;
                const int pair = index ? index + base : 0;
                weights[i] = static_cast<uint16_t>((own & 8) << 12 | pair << 8 | low[i]);
            }
        }
}

}  // namespace

extern "C" {

int64_t lossless12_bytes(int hidden, int neurons, int gated) {
    return static_cast<int64_t>(Layout{hidden, neurons, gated != 0}.bytes());
}

// Encodes the expert's neurons from `first_neuron` on into one block; neurons past the last one are
// zeros. gate, up: [intermediate, hidden], down: [hidden, intermediate]. `scratch`: four times as
// many bytes as the longest row has weights. Returns the number of escapes. Those beyond the
// block's capacity are lost unless `overflow` has room for all of them.
int64_t lossless12_encode(int hidden, int neurons, const uint16_t* gate, const uint16_t* up,
                          const uint16_t* down, int intermediate, int first_neuron, char* block,
                          Escape* overflow, uint8_t* scratch, int gated) {
    const Layout layout{hidden, neurons, gated != 0};
    const int here = std::clamp(intermediate - first_neuron, 0, neurons);
    auto bases = reinterpret_cast<uint8_t*>(block + layout.bases());
    auto firsts = reinterpret_cast<uint32_t*>(block + layout.firsts());
    auto inside = reinterpret_cast<Escape*>(block + layout.escapes());
    Escape* escapes = overflow ? overflow : inside;
    const uint32_t room = overflow ? UINT32_MAX : static_cast<uint32_t>(layout.capacity());
    const auto address = static_cast<int64_t>(reinterpret_cast<intptr_t>(overflow));
    std::memset(block, 0, layout.gate());
    std::memcpy(block, &address, sizeof address);
    const size_t longest = std::max(hidden, neurons);
    auto padded = reinterpret_cast<uint16_t*>(scratch);
    uint8_t *high = scratch + 2 * longest, *flags = high + longest;
    uint32_t row_number = 0, found = 0;

    auto add = [&](const uint16_t* row, int width, char* to) {
        const int base = choose_base(row, width, high);
        bases[row_number] = static_cast<uint8_t>(base);
        firsts[row_number++] = found;
        pack_row(row, high, width, base, reinterpret_cast<uint8_t*>(to), flags);
        for (int i = 0; i < width; ++i) {
            if (i % GROUP == 0 && !flags[i / GROUP]) {
                i += GROUP - 1;
                continue;
            }
            const int index = high[i] - base;
            if (high[i] == 0 || (index > 0 && index <= PAIRS)) continue;
            if (found < room) escapes[found] = {static_cast<uint16_t>(i), row[i]};
            ++found;
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
    if (gated) add_rows(gate, block + layout.gate());
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

// Decodes a block: gate rows above up rows [2 neurons, hidden], or only up rows, and down [hidden,
// neurons].
void lossless12_decode(int hidden, int neurons, const char* block, uint16_t* gate_up,
                       uint16_t* down, int gated) {
    const Layout layout{hidden, neurons, gated != 0};
    auto bases = reinterpret_cast<const uint8_t*>(block + layout.bases());
    auto firsts = reinterpret_cast<const uint32_t*>(block + layout.firsts());
    int64_t overflow;
    std::memcpy(&overflow, block, sizeof overflow);
    auto escapes = overflow ? reinterpret_cast<const Escape*>(static_cast<intptr_t>(overflow))
                            : reinterpret_cast<const Escape*>(block + layout.escapes());
    auto from = reinterpret_cast<const uint8_t*>(block + layout.gate());
    const int rows = static_cast<int>(layout.rows());
    for (int number = 0; number < rows; ++number) {
        const bool in_down = number >= static_cast<int>(layout.first_down());
        const int width = in_down ? neurons : hidden;
        uint16_t*& to = in_down ? down : gate_up;
        unpack_row(from, width, bases[number], to);
        for (uint32_t e = firsts[number]; e < firsts[number + 1]; ++e)
            to[escapes[e].column] = escapes[e].value;
        from += Layout::row_bytes(width);
        to += width;
    }
}
}
