// Included by cpu.cpp: time, and waiting for what another thread or a GPU writes.

constexpr int SPINS = 2000;  // looks at a flag before a thread lets others of its core run

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
