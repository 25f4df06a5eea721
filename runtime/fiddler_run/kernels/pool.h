// Included by cpu.cpp: a persistent pool of threads, which share each job.

// Does nothing on systems without thread affinity.
inline void pin([[maybe_unused]] std::thread& thread, [[maybe_unused]] int cpu) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);
#endif
}

class Pool {
   public:
    // Worker i is pinned to CPU cpus[i - 1]; null: not pinned. The caller of `wait` counts as the
    // first thread.
    Pool(const Variant& variant, int threads, int64_t spin_ns, const int* cpus)
        : variant_(variant), spin_ns_(spin_ns) {
        for (int i = 1; i < threads; ++i) {
            workers_.emplace_back([this] { serve(); });
            if (cpus) pin(workers_.back(), cpus[i - 1]);
        }
    }

    ~Pool() {
        stop_ = true;        // jobs stop waiting for a GPU
        finish(0, FOREVER);  // a GPU may still wait for a job
        submitted_signal_.notify();
        for (auto& worker : workers_) worker.join();
    }

    // Starts a job, or queues it behind an unfinished one; at most one may precede it, so older
    // ones are finished first. Arguments must stay valid until the job is finished. Then
    // `*output_ready`, if not null, becomes `number`.
    void submit(const ExpertArguments& experts, const uint16_t* states, int tokens,
                const CallArguments* calls, int num_calls, float* output, int64_t* output_ready,
                int64_t number) {
        Slot& slot = describe(experts, states, tokens, output, output_ready, number);
        for (int i = 0; i < num_calls; ++i) slot.job.calls.push_back({calls[i], false, 0, 0});
        plan(slot);
        open(slot);
    }

    // Like `submit`, for calls that the GPU will name; see `route`.
    void submit_routed(const ExpertArguments& experts, const uint16_t* states, int tokens,
                       const RouteArguments& route, float* output, int64_t* output_ready,
                       int64_t number) {
        Slot& slot = describe(experts, states, tokens, output, output_ready, number);
        slot.route.arguments = route;
        slot.phases[PREPARE].set_units(1);
        open(slot);
    }

    // Reads `bytes` bytes with all threads and plain loads, to measure memory bandwidth. Returns a
    // checksum.
    uint64_t read(const char* data, size_t bytes) {
        finish(0, FOREVER);
        Slot& slot = next_slot();
        slot.data = data, slot.bytes = bytes, slot.output_ready = nullptr;
        slot.phases[READ].set_units(static_cast<int>((bytes + READ_UNIT - 1) / READ_UNIT));
        checksum_ = 0;
        open(slot);
        finish(0, FOREVER);
        return checksum_;
    }

    // Helps until at most `max_pending` jobs are unfinished. False if that takes longer than about
    // `max_ns`.
    bool wait(uint64_t max_pending, int64_t max_ns) {
        return finish(max_pending, now_ns() + max_ns);
    }

    // Ends the unfinished jobs that would set this flag, without a result. They still set the flag.
    void abandon(const int64_t* output_ready) {
        for (uint64_t job = waited_ + 1; job <= submitted_; ++job)
            if (slots_[job % SLOTS].output_ready == output_ready)
                slots_[job % SLOTS].abandoned = true;
    }

    // Start of the last job that was waited for.
    int64_t started_ns() const { return started_ns_; }
    int64_t finished_ns() const { return finished_ns_; }

   private:
    static constexpr size_t READ_UNIT = 1 << 18;
    static constexpr uint64_t SLOTS = 2;

    // As `wait`, until a point in time.
    bool finish(uint64_t max_pending, int64_t until_ns) {
        while (waited_ + max_pending < submitted_) {
            Slot& slot = slots_[(waited_ + 1) % SLOTS];
            if (!run(slot, until_ns)) return false;
            ++waited_;
            // A worker that wakes late cannot enter a closed slot; those inside find no units left.
            slot.state.fetch_add(CLOSED);
            slot.left.wait([&] { return slot.state.load() % CLOSED == 0; }, BARRIER_SPIN_NS);
            started_ns_ = slot.started_ns, finished_ns_ = slot.finished_ns;
        }
        return true;
    }

    Slot& next_slot() {
        finish(SLOTS - 1, FOREVER);
        Slot& slot = slots_[(submitted_ + 1) % SLOTS];
        slot.abandoned = false;
        for (Phase& phase : slot.phases) phase.set_units(0);
        return slot;
    }

    Slot& describe(const ExpertArguments& experts, const uint16_t* states, int tokens,
                   float* output, int64_t* output_ready, int64_t number) {
        Slot& slot = next_slot();
        slot.output_ready = output_ready, slot.number = number;
        const bool gated = experts.activation.function != RELU2;
        slot.job.layout = {experts.hidden, experts.neurons, experts.encoding, gated};
        slot.job.activation = experts.activation;
        slot.job.states = states, slot.job.tokens = tokens, slot.job.output = output;
        slot.job.calls.clear();
        return slot;
    }

    void prepare(Slot& slot) {
        auto given_up = [&] { return stop_.load() || slot.abandoned.load(); };
        bool complete = slot.route.wait(slot.job.tokens, slot.number, spin_ns_, given_up);
        if (complete) slot.route.divide(slot.job.tokens, slot.job.layout, slot.job.calls);
        else slot.route.divide_nothing();
        if (!complete && !given_up()) slot.route.time_out(slot.number);
        slot.route.publish(slot.number);
        plan(slot);
    }

    void plan(Slot& slot) const {
        slot.started_ns = now_ns();
        cut_into_units(slot.job, variant_);
        auto count = [](const auto& units) { return static_cast<int>(units.size()); };
        slot.phases[PACK].set_units(count(slot.job.pack_units));
        slot.phases[GATE_UP].set_units(count(slot.job.gate_up_units));
        slot.phases[DOWN].set_units(count(slot.job.down_units));
    }

    void open(Slot& slot) {
        uint64_t job = submitted_ + 1;
        slot.state = job * JOB;
        submitted_ = job;
        submitted_signal_.notify();
    }

    void serve() {
        for (uint64_t job = 1; await(job); ++job) {
            Slot& slot = slots_[job % SLOTS];
            uint64_t state = slot.state.load();
            bool is_open = true;
            do is_open = state / CLOSED == job * JOB / CLOSED;
            while (is_open && !slot.state.compare_exchange_weak(state, state + 1));
            if (!is_open) continue;
            run(slot, FOREVER);
            slot.state.fetch_sub(1);
            slot.left.notify();
        }
    }

    // Waits until the job is submitted. False if the pool stops.
    bool await(uint64_t job) {
        submitted_signal_.wait([&] { return stop_ || submitted_.load() >= job; }, spin_ns_);
        return !stop_;
    }

    // Helps with a job until it is finished. False on timeout, after which it can be called again.
    bool run(Slot& slot, int64_t until_ns) {
        Job& job = slot.job;
        const auto& first = job.gate_up_units;
        const auto& second = job.down_units;
        // One thread waits for the GPU. It is a worker if there is one, so that the caller can
        // return in time.
        bool prepares = until_ns == FOREVER || workers_.empty();
        return (prepares ? run_phase(slot, PREPARE, until_ns, [&](int, int) { prepare(slot); })
                         : complete(slot.phases[PREPARE], spin_ns_, until_ns)) &&
               run_phase(slot, READ, until_ns, [&](int unit, int) { read_unit(slot, unit); }) &&
               run_phase(slot, PACK, until_ns,
                         [&](int unit, int) { variant_.pack(job, job.pack_units[unit]); }) &&
               run_phase(slot, GATE_UP, until_ns,
                         [&](int unit, int next) {
                             variant_.run_gate_up(job, first[unit],
                                                  next < 0 ? nullptr : &first[next]);
                         }) &&
               run_phase(slot, DOWN, until_ns, [&](int unit, int next) {
                   variant_.run_down(job, second[unit], next < 0 ? nullptr : &second[next]);
               });
    }

    // Runs units until all are done. A thread claims its next unit early, to prefetch its weights,
    // except near the end, where a claimed unit would wait while other threads are idle.
    template <class F>
    bool run_phase(Slot& slot, int number, int64_t until_ns, F&& run_unit) {
        Phase& phase = slot.phases[number];
        int units = phase.units, tail = units - 2 * static_cast<int>(workers_.size() + 1);
        bool late = false;
        for (int unit = phase.next.fetch_add(1); unit < units;) {
            bool early = unit < tail && !late;
            int next = early ? phase.next.fetch_add(1) : -1;
            if (number == PREPARE || !slot.abandoned) run_unit(unit, next < units ? next : -1);
            int64_t now = now_ns();
            slot.finished_ns = now;
            if (phase.unfinished.fetch_sub(1) == 1) {
                if (number == DOWN && slot.output_ready)
                    std::atomic_ref(*slot.output_ready)
                        .store(slot.number, std::memory_order_release);
                phase.complete.notify();
            }
            late = now >= until_ns;
            if (late && !early) return false;  // no unit is claimed
            unit = early ? next : phase.next.fetch_add(1);
        }
        return complete(phase, number == PREPARE ? spin_ns_ : BARRIER_SPIN_NS, until_ns);
    }

    static bool complete(Phase& phase, int64_t spin_ns, int64_t until_ns) {
        return phase.complete.wait([&] { return phase.unfinished.load() == 0; }, spin_ns, until_ns);
    }

    void read_unit(const Slot& slot, int unit) {
        const char* from = slot.data + unit * READ_UNIT;
        size_t words = std::min(READ_UNIT, slot.bytes - unit * READ_UNIT) / 8;
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
    Slot slots_[SLOTS];
    std::atomic<uint64_t> submitted_{0};  // jobs so far
    uint64_t waited_ = 0;                 // of these, jobs that were waited for
    int64_t started_ns_ = 0, finished_ns_ = 0;
    Signal submitted_signal_;
    std::atomic<uint64_t> checksum_{0};
    std::atomic<bool> stop_{false};
    std::vector<std::thread> workers_;  // last, because they use all of the above
};
