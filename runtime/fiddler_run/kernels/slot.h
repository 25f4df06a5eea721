// Included by cpu.cpp: an unfinished job and its phases.

enum { PREPARE, READ, PACK, GATE_UP, DOWN, PHASES };

// The bits of a slot's state: job number, closed, number of threads inside.
constexpr uint64_t CLOSED = 1 << 16;
constexpr uint64_t JOB = 2 * CLOSED;

struct Phase {
    int units = 0;
    alignas(64) std::atomic<int> next{0};
    alignas(64) std::atomic<int> unfinished{0};
    Signal complete;

    void set_units(int number) { next = 0, units = unfinished = number; }
};

struct Slot {
    Job job;
    Route route;
    const char* data;
    size_t bytes;
    int64_t *output_ready, number, started_ns;
    std::atomic<bool> abandoned{false};
    alignas(64) std::atomic<int64_t> finished_ns{0};
    Phase phases[PHASES];
    alignas(64) std::atomic<uint64_t> state{0};
    Signal left;  // when a thread leaves
};
