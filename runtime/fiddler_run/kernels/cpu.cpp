// Computes experts' blocks on the CPU, with a persistent pool of threads: bfloat16 weights, float32
// sums, any number of tokens.
//
// A block of b neurons holds the rows of gate [b, hidden], up [b, hidden] and down [hidden, b]. A
// job computes
//     output[row] = sum over its calls that hold `row` of weight * sum over the call's blocks of
//     down glu(gate x, up x)
// in phases. Each phase is cut into units that the threads claim from a counter, so that a slower
// thread takes fewer:
//   prepare: wait for the GPU and split the blocks (route.h), in jobs that a GPU describes
//   pack:    reorder activations for the instructions
//   gate/up: UNIT_NEURONS neurons of one block -> their products glu(gate x, up x)
//   down:    UNIT_ROWS rows of every block's down matrix -> these elements of the output
// Each element is summed by one thread in one order, so the same input gives the same bits.
//
// layout.h defines the layout of weights; unpack.h unpacks lossless12. activation.h has glu, the
// activation. job.h defines a job, units.h its units. rows.h and tiles.h compute them; variants.h
// includes both once for each instruction set. route.h handles jobs that a GPU describes. pool.h
// holds the threads. library.py and pool.py use the plain C interface through ctypes.
//
// Build: g++ -O3 -std=c++20 -shared -fPIC -pthread cpu.cpp

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

#include "../encodings/lossless12.h"

namespace {

#include "layout.h"
#include "activation.h"
#include "job.h"
#include "unpack.h"

#include "variants.h"
#include "wait.h"
#include "route.h"
#include "units.h"
#include "slot.h"
#include "pool.h"

}  // namespace

extern "C" {

// Raised whenever this interface changes.
int fiddler_version() { return 4; }

int fiddler_supports(const char* variant) { return find_variant(variant) != nullptr; }

// `threads` includes the caller of `fiddler_wait`, which helps. The others sleep after `spin_us`
// without work.
void* fiddler_pool_create(const char* variant, int threads, int spin_us, const int* cpus) {
    return new Pool(*find_variant(variant), threads, int64_t{1000} * spin_us, cpus);
}

void fiddler_pool_destroy(void* pool) { delete static_cast<Pool*>(pool); }

void fiddler_submit(void* pool, const ExpertArguments* experts, const uint16_t* states, int tokens,
                    const CallArguments* calls, int num_calls, float* output, int64_t* output_ready,
                    int64_t number) {
    static_cast<Pool*>(pool)->submit(*experts, states, tokens, calls, num_calls, output,
                                     output_ready, number);
}

void fiddler_submit_routed(void* pool, const ExpertArguments* experts, const uint16_t* states,
                           int tokens, const RouteArguments* route, float* output,
                           int64_t* output_ready, int64_t number) {
    static_cast<Pool*>(pool)->submit_routed(*experts, states, tokens, *route, output, output_ready,
                                            number);
}

// Helps until at most `max_pending` jobs are unfinished, for about `max_ns`. 0: not finished yet.
int fiddler_wait(void* pool, int max_pending, int64_t max_ns) {
    return static_cast<Pool*>(pool)->wait(max_pending, max_ns);
}

void fiddler_abandon(void* pool, const int64_t* output_ready) {
    static_cast<Pool*>(pool)->abandon(output_ready);
}

// When the last job that was waited for started and finished, on the monotonic clock.
int64_t fiddler_started_ns(void* pool) { return static_cast<Pool*>(pool)->started_ns(); }
int64_t fiddler_finished_ns(void* pool) { return static_cast<Pool*>(pool)->finished_ns(); }

uint64_t fiddler_read(void* pool, const char* data, uint64_t bytes) {
    return static_cast<Pool*>(pool)->read(data, bytes);
}
}
