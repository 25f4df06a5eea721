// Included by cpu.cpp: cuts a job into the units that threads claim.

inline int padded(const Call& call) {
    return call.tiled ? call.groups() * TILE_TOKENS : call.tokens;
}

inline void* room(std::vector<char>& buffer, size_t elements, const Variant& variant) {
    size_t bytes = elements * variant.packed_bytes + 64;
    if (buffer.size() < bytes) buffer.resize(bytes);
    return buffer.data() + (64 - reinterpret_cast<uintptr_t>(buffer.data()) % 64) % 64;
}

// Assigns places to packed activations. First come all tokens, for calls that are not tiled, unless
// their activations need no packing.
inline void plan_states(Job& job, const Variant& variant) {
    job.pack_units.clear();
    size_t elements = 0;
    bool any_tiled = false, all_tiled = true;
    for (Call& call : job.calls) {
        call.tiled = variant.tiled_from_tokens && call.tokens >= variant.tiled_from_tokens;
        any_tiled |= call.tiled;
        all_tiled &= call.tiled;
    }
    if (variant.packed_bytes == sizeof(uint16_t) && !any_tiled) {
        job.packed_states = const_cast<uint16_t*>(job.states);
        return;
    }
    if (!all_tiled) {
        elements = static_cast<size_t>(job.tokens) * job.layout.hidden;
        for (int token = 0; token < job.tokens; ++token) job.pack_units.push_back({-1, token});
    }
    for (int c = 0; c < static_cast<int>(job.calls.size()); ++c) {
        Call& call = job.calls[c];
        if (!call.tiled) continue;
        call.first_state = elements;
        for (int group = 0; group < call.groups(); ++group) job.pack_units.push_back({c, group});
        elements += static_cast<size_t>(padded(call)) * job.layout.hidden;
    }
    job.packed_states = room(job.state_buffer, elements, variant);
}

inline void plan_blocks(Job& job, const Variant& variant) {
    job.gate_up_units.clear(), job.down_pieces.clear(), job.down_units.clear();
    size_t products = 0;
    for (int c = 0; c < static_cast<int>(job.calls.size()); ++c) {
        Call& call = job.calls[c];
        call.first_product = products;
        products += padded(call) * call.neurons(job);
        for (int b = 0; b < call.num_blocks; ++b) {
            const char* block = job.layout.block(call.blocks, b);
            for (int n = 0; n < job.layout.neurons; n += UNIT_NEURONS)
                job.gate_up_units.push_back({block, c, b, n});
            job.down_pieces.push_back({block, c, b});
        }
    }
    for (int row = 0; row < job.layout.hidden; row += UNIT_ROWS) job.down_units.push_back({row});
    job.products = room(job.product_buffer, products, variant);
}

inline void cut_into_units(Job& job, const Variant& variant) {
    plan_states(job, variant);
    plan_blocks(job, variant);
}
