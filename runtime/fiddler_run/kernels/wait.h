// Included by cpu.cpp: the clock, and waiting for writes of another thread or a GPU.
//
// Waiters spin briefly, then sleep. Spinning avoids a wake-up, which takes as long as a small unit
// of work. Sleeping frees the core for the awaited thread.

constexpr int64_t FOREVER = std::numeric_limits<int64_t>::max();  // never reached
constexpr int64_t BARRIER_SPIN_NS = 100'000;  // about the time to wake a thread
constexpr int LOOKS = 32;                     // polls of memory between two readings of the clock
constexpr auto NAP = std::chrono::microseconds(50);

int64_t now_ns() {
    return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

// Polls until `ready()` or a point in time. True if it was ready.
template <class F>
bool spin_until(F&& ready, int64_t until_ns) {
    while (true) {
        for (int i = 0; i < LOOKS; ++i) {
            if (ready()) return true;
            relax();
        }
        if (now_ns() >= until_ns) return ready();
    }
}

// A condition to sleep on. Signalling it is free while nobody sleeps.
class Signal {
   public:
    // Call after changing what `ready` reads.
    void notify() {
        changes_.fetch_add(1);
        if (sleepers_.load()) wake();
    }

    // Spins for `spin_ns`, then sleeps, until `ready()` or a point in time. True if it was ready.
    template <class F>
    bool wait(F&& ready, int64_t spin_ns, int64_t until_ns = FOREVER) {
        if (spin_until(ready, std::min(until_ns, now_ns() + spin_ns))) return true;
        sleepers_.fetch_add(1);
        bool is_ready = false;
        while (true) {
            uint32_t seen = changes_.load();
            is_ready = ready();
            int64_t left_ns = until_ns - now_ns();
            if (is_ready || left_ns <= 0) break;
            sleep(seen, left_ns);
        }
        sleepers_.fetch_sub(1);
        return is_ready;
    }

   private:
#if defined(__linux__)
    void sleep(uint32_t seen, int64_t max_ns) {
        timespec limit{static_cast<time_t>(max_ns / 1'000'000'000),
                       static_cast<long>(max_ns % 1'000'000'000)};
        syscall(SYS_futex, &changes_, FUTEX_WAIT_PRIVATE, seen, &limit, nullptr, 0);
    }
    void wake() {
        syscall(SYS_futex, &changes_, FUTEX_WAKE_PRIVATE, std::numeric_limits<int>::max(), nullptr,
                nullptr, 0);
    }
#else
    void sleep(uint32_t, int64_t) { std::this_thread::sleep_for(NAP); }
    void wake() {}
#endif

    alignas(64) std::atomic<uint32_t> changes_{0};
    std::atomic<int> sleepers_{0};
};
