// Included by cpu.cpp: threads that outlive the jobs, and how they share one.

constexpr int SPINS = 2000;  // looks at a flag before a thread lets others of its core run

int64_t now_ns() { return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Where the system knows no such thing, the thread stays free.
inline void pin([[maybe_unused]] std::thread& thread, [[maybe_unused]] int cpu) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);
#endif
}

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
    // Worker i stays on CPU cpus[i - 1]; null: wherever the system puts it. The caller of `wait` is the first of the threads.
    Pool(const Variant& variant, int threads, int64_t spin_ns, const int* cpus) : variant_(variant), spin_ns_(spin_ns) {
        for (int i = 1; i < threads; ++i) {
            workers_.emplace_back([this] { serve(); });
            if (cpus) pin(workers_.back(), cpus[i - 1]);
        }
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
            for (int group = 0; group < call.groups(); ++group) job_.pack_units.push_back({c, group});
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
        return call.tiled ? call.groups() * TILE_TOKENS : call.tokens;
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
