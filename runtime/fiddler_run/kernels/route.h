// Included by cpu.cpp: jobs that are submitted before the router has chosen. The GPU sends each
// token's state and choices to the waiting CPU threads. One thread groups the choices by expert,
// splits the experts' blocks, and writes the GPU's part to a table. So nothing between two layers
// waits for Python.

struct ExpertPlaces {
    const char* host;      // [num_host, block]: blocks in host memory
    int64_t resident;      // GPU address of its other blocks
    int num_host, num_resident;
};

// Flags hold job numbers and only grow, so waiting for a job also accepts any later one.
struct RouteArguments {
    const ExpertPlaces* experts;
    const double* shares;  // [tokens + 1], by tokens of a call: the share of host
                           // blocks that the GPU reads
    const int64_t* index;  // [tokens, top_k] experts, from the GPU
    const float* weights;  // [tokens, top_k] of the router, from the GPU
    const int64_t* inputs_ready;  // [tokens] flags of the GPU: the token's inputs are complete
    int64_t* table;               // for the GPU; see block_table.py
    int64_t* table_ready;         // flag for the GPU: the table is complete
    int64_t* timed_out;           // flag for Python: the job's inputs did not arrive in time
    int64_t* traffic;             // running counts of blocks: resident, streamed, on the CPU
    int64_t* calls;               // [num_experts] running counts of tokens
    int64_t patience_ns;          // timeout for the GPU's inputs
    int num_experts, top_k, max_blocks, max_groups;
};

class Route {
   public:
    RouteArguments arguments;

    // Waits until the inputs of every token are ready. False after `patience_ns` or once
    // `given_up()`.
    template <class F>
    bool wait(int tokens, int64_t number, int64_t spin_ns, F&& given_up) const {
        int64_t started = now_ns(), until = started + arguments.patience_ns;
        for (int token = 0; token < tokens; ++token) {
            std::atomic_ref ready(const_cast<int64_t&>(arguments.inputs_ready[token]));
            auto here = [&] { return ready.load(std::memory_order_acquire) >= number; };
            while (!spin_until([&] { return here() || given_up(); }, started + spin_ns)) {
                bool late = now_ns() > until;  // read first: after SIGSTOP, the timeout has
                                               // passed although the inputs are ready
                if (here()) break;
                if (late) return false;
                std::this_thread::sleep_for(NAP);  // no GPU can wake a thread
            }
            if (!here()) return false;
        }
        return true;
    }

    // Splits the calls and appends the CPU's, by expert. Carries the rounding remainder from expert
    // to expert. The same rule as plan/split.py.
    void divide(int tokens, const BlockLayout& layout, std::vector<Call>& calls) {
        const RouteArguments& a = arguments;
        group(tokens);
        int64_t num_blocks = 0, num_groups = 0;
        int64_t *addresses = a.table + 1, *group_of_block = addresses + a.max_blocks,
                *groups = group_of_block + a.max_blocks, *choices = groups + 4 * a.max_groups;
        auto add = [&](int64_t address, int count) {
            for (int i = 0; i < count; ++i, ++num_blocks) {
                addresses[num_blocks] = address + i * static_cast<int64_t>(layout.bytes);
                group_of_block[num_blocks] = num_groups;
            }
        };
        double remainder = 0;
        for (int e = 0; e < a.num_experts; ++e) {
            int called_by = first_[e + 1] - first_[e];
            if (!called_by) continue;
            a.calls[e] += called_by;
            const ExpertPlaces& expert = a.experts[e];
            remainder += a.shares[called_by] * expert.num_host;
            int streamed =
                std::clamp(static_cast<int>(std::floor(remainder + 0.5)), 0, expert.num_host);
            remainder -= streamed;
            int64_t first_block = num_blocks;
            add(reinterpret_cast<int64_t>(expert.host), streamed);
            add(expert.resident, expert.num_resident);
            int64_t group[] = {first_block, num_blocks, first_[e], first_[e + 1]};
            std::copy_n(group, 4, groups + 4 * num_groups++);
            a.traffic[0] += expert.num_resident, a.traffic[1] += streamed,
                a.traffic[2] += expert.num_host - streamed;
            if (streamed == expert.num_host) continue;
            const char* rest = layout.block(expert.host, streamed);
            calls.push_back({{rest, &rows_[first_[e]], &weights_[first_[e]],
                              expert.num_host - streamed, called_by},
                             false,
                             0,
                             0});
        }
        std::fill(groups + 4 * num_groups, choices, 0);
        std::copy(choices_.begin(), choices_.end(), choices);
        a.table[0] = num_blocks;
    }

    // Replaces `divide` after a timeout.
    void divide_nothing() const {
        const RouteArguments& a = arguments;
        std::fill_n(a.table, 1 + 2 * a.max_blocks + 4 * a.max_groups, 0);
    }

    void time_out(int64_t number) const {
        std::atomic_ref(*arguments.timed_out).store(number, std::memory_order_release);
    }

    void publish(int64_t number) const {
        std::atomic_ref(*arguments.table_ready).store(number, std::memory_order_release);
    }

   private:
    // Sorts the choices by expert: those of expert e are `first_[e]` to `first_[e + 1]`. Ignores
    // choices of nonexistent experts: transformers uses the index `num_experts` for experts that
    // other processes compute.
    void group(int tokens) {
        const RouteArguments& a = arguments;
        int num_choices = tokens * a.top_k;
        auto exists = [&](int i) { return a.index[i] >= 0 && a.index[i] < a.num_experts; };
        first_.assign(a.num_experts + 2, 0);
        for (int i = 0; i < num_choices; ++i)
            if (exists(i)) ++first_[a.index[i] + 2];
        std::partial_sum(first_.begin(), first_.end(), first_.begin());
        int num_existing = first_.back();
        choices_.resize(num_existing), rows_.resize(num_existing), weights_.resize(num_existing);
        for (int i = 0; i < num_choices; ++i) {
            if (!exists(i)) continue;
            int at = first_[a.index[i] + 1]++;
            choices_[at] = i, rows_[at] = i / a.top_k, weights_[at] = a.weights[i];
        }
    }

    std::vector<int> first_;
    std::vector<int64_t> choices_, rows_;
    std::vector<float> weights_;
};
