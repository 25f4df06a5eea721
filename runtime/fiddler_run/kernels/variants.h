// Included by cpu.cpp: the instruction sets, and whether this CPU has them.

// The compiler vectorises this variant for its target.
namespace portable {
using Packed = float;
constexpr int GROUP = 16, MAX_TOKENS = 2;
struct Sum {
    float lanes[GROUP / 2];
    static Sum zero() { return {}; }
    float total() const {
        float sum = 0;
        for (float lane : lanes) sum += lane;
        return sum;
    }
};
struct Weights {
    float even[GROUP / 2], odd[GROUP / 2];
    static Weights of(const std::array<uint16_t, GROUP>& bits) { return load(bits.data()); }
    static Weights load(const uint16_t* from) {
        Weights w;
        for (int i = 0; i < GROUP / 2; ++i)
            w.even[i] = float_of(from[2 * i]), w.odd[i] = float_of(from[2 * i + 1]);
        return w;
    }
    void dot(Sum& sum, const float* x) const {
        for (int i = 0; i < GROUP / 2; ++i)
            sum.lanes[i] += even[i] * x[i] + odd[i] * x[GROUP / 2 + i];
    }
};
constexpr int PARTS = 1;
template <int PART, class F>
inline void each_of_group(const uint8_t* lows, const uint8_t* codes, const HighBytes& high, F&& f) {
    uint8_t table[16];
    std::memcpy(table, &high, sizeof table);
    std::array<uint16_t, GROUP> weights[lossless12::GROUP / GROUP];
    for (int place = 0; place < lossless12::GROUP; ++place) {
        int code = codes[place % 32] >> place / 32 * 4 & 15;
        int weight = place / 8 % 2 * 32 + place / 16 * 8 + place % 8;
        weights[weight / GROUP][weight % GROUP] =
            static_cast<uint16_t>(table[code] << 8 | lows[place]);
    }
    for (int i = 0; i < lossless12::GROUP / GROUP; ++i) f(i * GROUP, weights[i]);
}
#include "rows.h"
}  // namespace portable

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
using Packed = float;
constexpr int GROUP = 16, MAX_TOKENS = 2;
struct Sum {
    __m256 lanes;
    static Sum zero() { return {_mm256_setzero_ps()}; }
    float total() const {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
};
struct Weights {
    __m256 even, odd;
    static Weights of(__m256i pairs) {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
                _mm256_castsi256_ps(
                    _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))))};
    }
    static Weights load(const uint16_t* from) {
        return of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    void dot(Sum& sum, const float* x) const {
        sum.lanes = _mm256_fmadd_ps(even, _mm256_loadu_ps(x), sum.lanes);
        sum.lanes = _mm256_fmadd_ps(odd, _mm256_loadu_ps(x + 8), sum.lanes);
    }
};
constexpr int PARTS = 2;
template <int PART, class F>
inline void each_of_group(const uint8_t* lows, const uint8_t* codes, const HighBytes& high, F&& f) {
    __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    __m256i table =
        _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(&high)));
    __m256i code = _mm256_and_si256(PART ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
    __m256i upper = _mm256_shuffle_epi8(table, code);
    __m256i lower = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lows + 32 * PART));
    f(16 * PART, _mm256_unpacklo_epi8(lower, upper));
    f(16 * PART + 32, _mm256_unpackhi_epi8(lower, upper));
}
#include "rows.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
namespace avx512 {
using Packed = float;
constexpr int GROUP = 32, MAX_TOKENS = 6;
struct Sum {
    __m512 lanes;
    static Sum zero() { return {_mm512_setzero_ps()}; }
    float total() const { return _mm512_reduce_add_ps(lanes); }
};
struct Weights {
    __m512 even, odd;
    static Weights of(__m512i pairs) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
                _mm512_castsi512_ps(
                    _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
    }
    static Weights load(const uint16_t* from) { return of(_mm512_loadu_si512(from)); }
    void dot(Sum& sum, const float* x) const {
        sum.lanes = _mm512_fmadd_ps(even, _mm512_loadu_ps(x), sum.lanes);
        sum.lanes = _mm512_fmadd_ps(odd, _mm512_loadu_ps(x + 16), sum.lanes);
    }
};
#include "groups512.h"
#include "rows.h"
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
namespace avx512bf16 {
using Packed = uint16_t;
constexpr int GROUP = 32, MAX_TOKENS = 6;
using avx512::Sum;
#include "groups512.h"
struct Weights {
    __m512i pairs;
    static Weights of(__m512i pairs) { return {pairs}; }
    static Weights load(const uint16_t* from) { return {_mm512_loadu_si512(from)}; }
    void dot(Sum& sum, const uint16_t* x) const {
        sum.lanes = _mm512_dpbf16_ps(sum.lanes, (__m512bh)pairs, (__m512bh)_mm512_loadu_si512(x));
    }
};
#include "rows.h"
}  // namespace avx512bf16
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,amx-tile,amx-bf16")
namespace amx {
namespace tiles {
#include "tiles.h"
}

void pack(const Job& job, const PackUnit& unit) {
    if (unit.call < 0) avx512bf16::pack_state(job, unit.index);
    else tiles::pack_group(job, job.calls[unit.call], unit.index);
}

void run_gate_up(const Job& job, const GateUpUnit& unit, const GateUpUnit* next) {
    (job.calls[unit.call].tiled ? tiles::run_gate_up : avx512bf16::run_gate_up)(job, unit, next);
}

void run_down(const Job& job, const DownUnit& unit, const DownUnit* next) {
    if (std::none_of(job.calls.begin(), job.calls.end(),
                     [](const Call& call) { return call.tiled; }))
        return avx512bf16::run_down(job, unit, next);
    job.clear_output(unit);
    for (int i = 0; i < static_cast<int>(job.down_pieces.size());) {
        const DownPiece& piece = job.down_pieces[i];
        const Call& call = job.calls[piece.call];
        if (call.tiled) tiles::run_down(job, unit, next, call, i), i += call.num_blocks;
        else avx512bf16::run_down(job, unit, piece, [](int) { return avx512bf16::Ahead{}; }), ++i;
    }
}

constexpr Variant variant{sizeof(uint16_t), 5, pack, run_gate_up, run_down};

bool permitted() {  // Linux grants a process the tile registers on request
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
}  // namespace amx
#pragma GCC pop_options
#endif

const Variant* find_variant(const char* name) {
    auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
    if (is("portable")) return &portable::variant;
#if defined(__x86_64__)
    bool avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512dq");
    if (is("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &avx2::variant;
    if (is("avx512") && avx512) return &avx512::variant;
    bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (is("avx512bf16") && bf16) return &avx512bf16::variant;
    if (is("amx") && bf16 && __builtin_cpu_supports("amx-bf16") && amx::permitted())
        return &amx::variant;
#endif
    return nullptr;
}
