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
// Plain C interface, used through ctypes by cpu.py. Build: g++ -O3 -std=c++20 -shared -fPIC -pthread cpu.cpp

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int UNIT_NEURONS = 16, UNIT_ROWS = 16;  // hidden and block_neurons must be multiples of twice that
constexpr int TILE_TOKENS = 16;  // that tiles.h computes at once
constexpr int SPINS = 2000;  // looks at a flag between two others, before a thread lets others of its core run

float float_of(uint16_t bfloat16) { return std::bit_cast<float>(static_cast<uint32_t>(bfloat16) << 16); }

uint16_t bfloat16_of(float value) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits = std::bit_cast<uint32_t>(value);
    if (value != value) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float swiglu(float gate, float up) { return gate / (1.0f + std::exp(-gate)) * up; }

struct Job;

struct CallArguments {
    const uint16_t* blocks;  // [num_blocks, 3 * block_neurons * hidden]
    const int64_t* rows;     // [tokens] into the states
    const float* weights;    // [tokens] of the router
    int num_blocks, tokens;
};

struct Call : CallArguments {
    bool tiled;  // computed by tiles.h
    size_t first_state, first_product;

    inline size_t neurons(const Job& job) const;
};

struct PackUnit {
    int call, index;  // a group of the tokens of a tiled call, or, with no call, one token for all others
};

struct GateUpUnit {
    const uint16_t* block;
    int call, index, first_neuron;  // index: of the block in its call
};

struct DownUnit {
    int first_row;
};

struct DownPiece {
    const uint16_t* weights;  // of one block
    int call, index;
};

struct Job {
    int hidden, block_neurons, tokens;
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
            std::memset(output + static_cast<size_t>(t) * hidden + unit.first_row, 0, UNIT_ROWS * sizeof(float));
    }
};

size_t Call::neurons(const Job& job) const { return static_cast<size_t>(num_blocks) * job.block_neurons; }

struct Variant {
    size_t packed_bytes;   // of one activation
    int tiled_from_tokens;  // of a call; 0: never
    void (*pack)(const Job&, const PackUnit&);
    void (*run_gate_up)(const Job&, const GateUpUnit&, const GateUpUnit* next);
    void (*run_down)(const Job&, const DownUnit&, const DownUnit* next);
};

// The compiler vectorises this one for whatever it builds for. Activations are stored as the other variants' are: in each
// GROUP those of even index first, because a pair of bfloat16 weights becomes two floats by a shift and a mask.
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
inline void pack(float value, int i, float* to) { to[i / GROUP * GROUP + i % 2 * (GROUP / 2) + i % GROUP / 2] = value; }
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
inline void pack(float value, int i, float* to) { to[i / GROUP * GROUP + i % 2 * (GROUP / 2) + i % GROUP / 2] = value; }
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
inline void pack(float value, int i, float* to) { to[i / GROUP * GROUP + i % 2 * (GROUP / 2) + i % GROUP / 2] = value; }
#include "rows.h"
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
namespace avx512bf16 {
using Packed = uint16_t;
constexpr int GROUP = 32, MAX_TOKENS = 6;
struct Sum {
    __m512 lanes;
    static Sum zero() { return {_mm512_setzero_ps()}; }
    float total() const { return _mm512_reduce_add_ps(lanes); }
};
struct Weights {
    __m512i pairs;
    static Weights load(const uint16_t* from) { return {_mm512_loadu_si512(from)}; }
    void dot(Sum& sum, const uint16_t* x) const {
        sum.lanes = _mm512_dpbf16_ps(sum.lanes, (__m512bh)pairs, (__m512bh)_mm512_loadu_si512(x));
    }
};
inline void pack(float value, int i, uint16_t* to) { to[i] = bfloat16_of(value); }
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

int64_t now_ns() { return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

// Until `ready()`: looks often at first, then lets other threads of this core run.
template <class F>
void spin_until(F&& ready) {
    for (int i = 0; !ready(); ++i)
        if (i < SPINS) relax();
        else std::this_thread::yield();
}

class Pool {
   public:
    Pool(const Variant& variant, int threads, int64_t spin_ns) : variant_(variant), spin_ns_(spin_ns) {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { serve(); });
    }

    ~Pool() {
        wait();  // a GPU may be waiting for the job
        stop_ = true;
        wake();
        for (auto& worker : workers_) worker.join();
    }

    // Starts a job; its arguments must stay until it is finished, when `*finished`, if there is one, becomes `number`.
    void submit(int hidden, int block_neurons, const uint16_t* states, int tokens, const CallArguments* calls, int num_calls,
                float* output, int64_t* finished, int64_t number) {
        wait();
        finished_ = finished, number_ = number;
        job_.hidden = hidden, job_.block_neurons = block_neurons;
        job_.states = states, job_.tokens = tokens, job_.output = output;
        job_.calls.clear();
        for (int i = 0; i < num_calls; ++i) job_.calls.push_back({calls[i], false, 0, 0});
        plan_states();
        plan_blocks();
        kind_ = Kind::experts;
        auto count = [](const auto& units) { return static_cast<int>(units.size()); };
        open({count(job_.pack_units), count(job_.gate_up_units), count(job_.down_units)});
    }

    // Reads `bytes` bytes with all threads, as fast as plain loads go: what the memory gives. Returns a checksum.
    uint64_t read(const char* data, size_t bytes) {
        wait();
        data_ = data, bytes_ = bytes, checksum_ = 0, finished_ = nullptr;
        kind_ = Kind::read;
        open({static_cast<int>((bytes + READ_UNIT - 1) / READ_UNIT), 0, 0});
        wait();
        return checksum_;
    }

    int64_t finished_ns() const { return finished_ns_; }

    // Helps with the job under way until it is finished.
    void wait() {
        if (!busy_) return;
        run();
        // Closed: a worker that wakes late finds nothing to enter, and those inside only look for units that are gone.
        state_.fetch_add(GENERATION);
        spin_until([this] { return state_.load() % GENERATION == 0; });
        busy_ = false;
    }

   private:
    enum class Kind { experts, read };
    static constexpr uint64_t GENERATION = uint64_t{1} << 32;  // below: workers inside; an odd generation is open
    static constexpr size_t READ_UNIT = 1 << 18;
    static constexpr int PHASES = 3;

    // Where packed activations go: in front those of all tokens, for calls that are not tiled, unless they serve as they are.
    void plan_states() {
        job_.pack_units.clear();
        size_t elements = 0;
        bool any_tiled = false, all_tiled = true;
        for (Call& call : job_.calls) {
            call.tiled = variant_.tiled_from_tokens && call.tokens >= variant_.tiled_from_tokens;
            any_tiled |= call.tiled;
            all_tiled &= call.tiled;
        }
        if (variant_.packed_bytes == sizeof(uint16_t) && !any_tiled) {
            job_.packed_states = const_cast<uint16_t*>(job_.states);
            return;
        }
        if (!all_tiled) {
            elements = static_cast<size_t>(job_.tokens) * job_.hidden;
            for (int token = 0; token < job_.tokens; ++token) job_.pack_units.push_back({-1, token});
        }
        for (int c = 0; c < static_cast<int>(job_.calls.size()); ++c) {
            Call& call = job_.calls[c];
            if (!call.tiled) continue;
            call.first_state = elements;
            for (int group = 0; group < padded(call) / TILE_TOKENS; ++group) job_.pack_units.push_back({c, group});
            elements += static_cast<size_t>(padded(call)) * job_.hidden;
        }
        job_.packed_states = room(job_.state_buffer, elements);
    }

    void plan_blocks() {
        job_.gate_up_units.clear(), job_.down_pieces.clear(), job_.down_units.clear();
        size_t third = static_cast<size_t>(job_.block_neurons) * job_.hidden, products = 0;
        for (int c = 0; c < static_cast<int>(job_.calls.size()); ++c) {
            Call& call = job_.calls[c];
            call.first_product = products;
            products += padded(call) * call.neurons(job_);
            for (int b = 0; b < call.num_blocks; ++b) {
                const uint16_t* block = call.blocks + b * 3 * third;
                for (int n = 0; n < job_.block_neurons; n += UNIT_NEURONS) job_.gate_up_units.push_back({block, c, b, n});
                job_.down_pieces.push_back({block + 2 * third, c, b});
            }
        }
        for (int row = 0; row < job_.hidden; row += UNIT_ROWS) job_.down_units.push_back({row});
        job_.products = room(job_.product_buffer, products);
    }

    static int padded(const Call& call) {
        return call.tiled ? (call.tokens + TILE_TOKENS - 1) / TILE_TOKENS * TILE_TOKENS : call.tokens;
    }

    void* room(std::vector<char>& buffer, size_t elements) {
        size_t bytes = elements * variant_.packed_bytes + 64;
        if (buffer.size() < bytes) buffer.resize(bytes);
        return buffer.data() + (64 - reinterpret_cast<uintptr_t>(buffer.data()) % 64) % 64;
    }

    void open(std::array<int, PHASES> units) {
        for (int phase = 0; phase < PHASES; ++phase) next_[phase] = 0, units_[phase] = unfinished_[phase] = units[phase];
        busy_ = true;
        state_.fetch_add(GENERATION);
        wake();
    }

    void wake() {
        signal_.fetch_add(1);
        signal_.notify_all();
    }

    void serve() {
        uint64_t last = 0;
        while (true) {
            uint32_t seen = signal_.load();
            uint64_t state = state_.load();
            uint64_t generation = state / GENERATION;
            if (stop_) return;
            if (generation % 2 == 0 || generation == last) {
                for (int64_t until = now_ns() + spin_ns_; signal_.load() == seen && now_ns() < until;)
                    for (int i = 0; i < 32; ++i) relax();
                signal_.wait(seen);
            } else if (state_.compare_exchange_weak(state, state + 1)) {
                last = generation;
                run();
                state_.fetch_sub(1);
            }
        }
    }

    void run() {
        if (kind_ == Kind::read) return run_phase(0, [this](int unit, int) { read_unit(unit); });
        const auto& first = job_.gate_up_units;
        const auto& second = job_.down_units;
        run_phase(0, [&](int unit, int) { variant_.pack(job_, job_.pack_units[unit]); });
        run_phase(1, [&](int unit, int next) { variant_.run_gate_up(job_, first[unit], next < 0 ? nullptr : &first[next]); });
        run_phase(2, [&](int unit, int next) { variant_.run_down(job_, second[unit], next < 0 ? nullptr : &second[next]); });
    }

    // Runs units until all are done. A thread claims its next one early, to ask for its weights in time; not near the end,
    // where a claimed unit would wait while other threads have nothing to do.
    template <class F>
    void run_phase(int phase, F&& run_unit) {
        int units = units_[phase], tail = units - 2 * static_cast<int>(workers_.size() + 1);
        for (int unit = next_[phase].fetch_add(1); unit < units;) {
            bool early = unit < tail;
            int next = early ? next_[phase].fetch_add(1) : -1;
            run_unit(unit, next < units ? next : -1);
            finished_ns_ = now_ns();
            if (unfinished_[phase].fetch_sub(1) == 1 && phase == PHASES - 1 && finished_)
                std::atomic_ref(*finished_).store(number_, std::memory_order_release);
            unit = early ? next : next_[phase].fetch_add(1);
        }
        spin_until([&] { return unfinished_[phase].load() == 0; });
    }

    void read_unit(int unit) {
        const char* from = data_ + unit * READ_UNIT;
        size_t words = std::min(READ_UNIT, bytes_ - unit * READ_UNIT) / 8;
        uint64_t sums[8] = {};
        for (size_t i = 0; i + 8 <= words; i += 8)
            for (size_t k = 0; k < 8; ++k) {
                uint64_t word;
                std::memcpy(&word, from + (i + k) * 8, 8);
                sums[k] += word;
            }
        uint64_t sum = 0;
        for (uint64_t part : sums) sum += part;
        checksum_.fetch_add(sum);
    }

    const Variant& variant_;
    const int64_t spin_ns_;
    Job job_;
    Kind kind_ = Kind::experts;
    const char* data_ = nullptr;
    size_t bytes_ = 0;
    int64_t* finished_ = nullptr;
    int64_t number_ = 0;
    bool busy_ = false;
    int units_[PHASES] = {};
    alignas(64) std::atomic<int> next_[PHASES] = {};
    alignas(64) std::atomic<int> unfinished_[PHASES] = {};
    alignas(64) std::atomic<uint64_t> state_{0};
    alignas(64) std::atomic<uint32_t> signal_{0};
    std::atomic<uint64_t> checksum_{0};
    std::atomic<int64_t> finished_ns_{0};
    std::atomic<bool> stop_{false};
    std::vector<std::thread> workers_;  // last: they use all of the above
};

}  // namespace

extern "C" {

int fiddler_supports(const char* variant) { return find_variant(variant) != nullptr; }

// `threads` counts the one that calls `fiddler_wait`, which takes part; the others sleep after `spin_us` without work.
void* fiddler_pool_create(const char* variant, int threads, int spin_us) {
    return new Pool(*find_variant(variant), threads, int64_t{1000} * spin_us);
}

void fiddler_pool_destroy(void* pool) { delete static_cast<Pool*>(pool); }

void fiddler_submit(void* pool, int hidden, int block_neurons, const uint16_t* states, int tokens, const CallArguments* calls,
                    int num_calls, float* output, int64_t* finished, int64_t number) {
    static_cast<Pool*>(pool)->submit(hidden, block_neurons, states, tokens, calls, num_calls, output, finished, number);
}

void fiddler_wait(void* pool) { static_cast<Pool*>(pool)->wait(); }

// When the last job was finished, on the monotonic clock.
int64_t fiddler_finished_ns(void* pool) { return static_cast<Pool*>(pool)->finished_ns(); }

uint64_t fiddler_read(void* pool, const char* data, uint64_t bytes) { return static_cast<Pool*>(pool)->read(data, bytes); }
}
