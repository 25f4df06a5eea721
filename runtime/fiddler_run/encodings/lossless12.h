// The layout of a block in the encoding lossless12; see lossless12.py for its idea.
//
//   int64    overflow          address of the escapes, if they do not fit below; else 0
//   uint8    base[rows]        by row: the exponent pairs base + 1 to base + 7 have codes 1 to 7
//   uint32   first[rows + 1]   by row: its first escape
//   Escape   escapes[capacity]
//   char     gate[neurons][3/2 hidden], up[neurons][3/2 hidden], down[hidden][3/2 neurons]
//
// Experts without a gate have only up and down.
//
// Each part starts at a multiple of 64 bytes. The rows are numbered in this order: gate, up, down.
// A row of `width` weights is `width` low bytes, then `width` / 2 bytes of codes. It is cut into
// groups of 64 weights. Place 16 i + j of a group holds weight 8 i + j, and place 16 i + 8 + j
// holds weight 32 + 8 i + j, for i < 4 and j < 8. So the instructions that interleave low and high
// bytes within lanes of 16 bytes return the weights in order. Byte k of a group's codes holds the
// codes of places k (lower half) and k + 32.

#include <cstddef>
#include <cstdint>

namespace lossless12 {

constexpr int GROUP = 64;           // hidden and neurons are multiples of it
constexpr int PAIRS = 7;            // consecutive exponent pairs with codes of their own
constexpr int WEIGHTS_PER_ESCAPE = 512;  // of a block; real models need one in 2,000 to 10,000

struct Escape {
    uint16_t column, value;  // the weight in a row, and its bfloat16
};

constexpr size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

struct Layout {
    int hidden, neurons;
    bool gated;

    size_t first_down() const { return static_cast<size_t>(gated ? 2 : 1) * neurons; }
    size_t rows() const { return first_down() + hidden; }
    size_t weights() const { return (first_down() + neurons) * hidden; }
    size_t capacity() const { return weights() / WEIGHTS_PER_ESCAPE; }

    static size_t row_bytes(int width) { return static_cast<size_t>(width) / 2 * 3; }
    size_t bases() const { return 64; }
    size_t firsts() const { return bases() + aligned(rows()); }
    size_t escapes() const { return firsts() + aligned((rows() + 1) * sizeof(uint32_t)); }
    size_t gate() const { return escapes() + aligned(capacity() * sizeof(Escape)); }
    size_t up() const { return gate() + (gated ? neurons * row_bytes(hidden) : 0); }
    size_t down() const { return up() + neurons * row_bytes(hidden); }
    size_t bytes() const { return aligned(down() + hidden * row_bytes(neurons)); }
};

}  // namespace lossless12
