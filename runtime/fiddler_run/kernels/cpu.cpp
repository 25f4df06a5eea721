// Experts' blocks on the CPU: bfloat16 weights, float32 sums, any number of tokens; a pool of threads that outlives the calls.
//
// A block of b neurons is gate [b, hidden], up [b, hidden] and down [hidden, b], row-major, one after the other. A job computes
//     output[row] = sum over its calls that hold `row` of weight * sum over the call's blocks of down (silu(gate x) * (up x))
// in phases, each cut into units that the threads claim from a counter, so that a thread that is slowed takes fewer:
//   pack:    activations into the order that the instructions want
//   gate/up: UNIT_NEURONS neurons of one block -> their products silu(gate x) * (up x)
//   down:    UNIT_ROWS rows of every block's down matrix -> these elements of the output
// Each element is summed by one thread in one order: the same input gives the same bits, whatever the threads do.
//
// job.h says what a job is, rows.h and tiles.h compute it with one instruction set each time they are included, route.h lets a GPU
// say what there is to compute, pool.h has the threads. Plain C interface, used through ctypes by cpu.py. Build: g++ -O3 -std=c++20 -shared -fPIC -pthread cpu.cpp

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <thread>
#include <type_traits>
#include <vector>
#if defined(__linux__)
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#include "job.h"

// The compiler vectorises this one for whatever it builds for.
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
    static Weights load(const uint16_t* from) {
        Weights w;
        for (int i = 0; i < GROUP / 2; ++i) w.even[i] = float_of(from[2 * i]), w.odd[i] = float_of(from[2 * i + 1]);
        return w;
    }
    void dot(Sum& sum, const float* x) const {
        for (int i = 0; i < GROUP / 2; ++i) sum.lanes[i] += even[i] * x[i] + odd[i] * x[GROUP / 2 + i];
    }
};
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
    static Weights load(const uint16_t* from) {
        __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
                _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))))};
    }
    void dot(Sum& sum, const float* x) const {
        sum.lanes = _mm256_fmadd_ps(even, _mm256_loadu_ps(x), sum.lanes);
        sum.lanes = _mm256_fmadd_ps(odd, _mm256_loadu_ps(x + 8), sum.lanes);
    }
};
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
    static Weights load(const uint16_t* from) {
        __m512i pairs = _mm512_loadu_si512(from);
        return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
                _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
    }
    void dot(Sum& sum, const float* x) const {
        sum.lanes = _mm512_fmadd_ps(even, _mm512_loadu_ps(x), sum.lanes);
        sum.lanes = _mm512_fmadd_ps(odd, _mm512_loadu_ps(x + 16), sum.lanes);
    }
};
#include "rows.h"
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
namespace avx512bf16 {
using Packed = uint16_t;
constexpr int GROUP = 32, MAX_TOKENS = 6;
using avx512::Sum;
struct Weights {
    __m512i pairs;
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
    if (std::none_of(job.calls.begin(), job.calls.end(), [](const Call& call) { return call.tiled; }))
        return avx512bf16::run_down(job, unit, next);
    job.clear_output(unit);
    for (int i = 0; i < static_cast<int>(job.down_pieces.size());) {
        const DownPiece& piece = job.down_pieces[i];
        const Call& call = job.calls[piece.call];
        if (call.tiled) tiles::run_down(job, unit, call, i), i += call.num_blocks;
        else avx512bf16::run_down(job, unit, piece, [](int) { return avx512bf16::Ahead{}; }), ++i;
    }
}

constexpr Variant variant{sizeof(uint16_t), 5, pack, run_gate_up, run_down};

bool permitted() {  // the kernel gives a process the tiles' registers on demand
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
    bool avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (is("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2::variant;
    if (is("avx512") && avx512) return &avx512::variant;
    bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (is("avx512bf16") && bf16) return &avx512bf16::variant;
    if (is("amx") && bf16 && __builtin_cpu_supports("amx-bf16") && amx::permitted()) return &amx::variant;
#endif
    return nullptr;
}

#include "wait.h"
#include "route.h"
#include "pool.h"

}  // namespace

extern "C" {

int fiddler_supports(const char* variant) { return find_variant(variant) != nullptr; }

// `threads` counts the one that calls `fiddler_wait`, which takes part; the others sleep after `spin_us` without work.
void* fiddler_pool_create(const char* variant, int threads, int spin_us, const int* cpus) {
    return new Pool(*find_variant(variant), threads, int64_t{1000} * spin_us, cpus);
}

void fiddler_pool_destroy(void* pool) { delete static_cast<Pool*>(pool); }

void fiddler_submit(void* pool, int hidden, int block_neurons, const uint16_t* states, int tokens, const CallArguments* calls,
                    int num_calls, float* output, int64_t* finished, int64_t number) {
    static_cast<Pool*>(pool)->submit(hidden, block_neurons, states, tokens, calls, num_calls, output, finished, number);
}

void fiddler_submit_routed(void* pool, int hidden, int block_neurons, const uint16_t* states, int tokens, const RouteArguments* route,
                           float* output, int64_t* finished, int64_t number) {
    static_cast<Pool*>(pool)->submit_routed(hidden, block_neurons, states, tokens, *route, output, finished, number);
}

// Helps until all jobs but the last `but` are finished, for about `most_ns`. 0: they are not yet.
int fiddler_wait(void* pool, int but, int64_t most_ns) { return static_cast<Pool*>(pool)->wait(but, most_ns); }

void fiddler_abandon(void* pool, const int64_t* finished) { static_cast<Pool*>(pool)->abandon(finished); }

// When the last job that was waited for began and was finished, on the monotonic clock.
int64_t fiddler_started_ns(void* pool) { return static_cast<Pool*>(pool)->started_ns(); }
int64_t fiddler_finished_ns(void* pool) { return static_cast<Pool*>(pool)->finished_ns(); }

uint64_t fiddler_read(void* pool, const char* data, uint64_t bytes) { return static_cast<Pool*>(pool)->read(data, bytes); }
}
