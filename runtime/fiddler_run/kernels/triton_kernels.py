"""The GPU kernels of the decode path, for blocks in bf16. gpu.py launches them."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["job"])
def publish_inputs(
    states, index, weights, host_states, host_index, host_weights, inputs_ready, job,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """Copies one token's inputs, then sets its flag."""
    token = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    for start in range(0, HIDDEN, WIDTH):
        at = token * HIDDEN + start + column
        tl.store(host_states + at, tl.load(states + at))
    choice = tl.arange(0, CHOICES)
    exists = choice < TOP_K
    choice += token * TOP_K
    tl.store(host_index + choice, tl.load(index + choice, mask=exists), mask=exists)
    tl.store(host_weights + choice, tl.load(weights + choice, mask=exists), mask=exists)
    tl.debug_barrier()  # all threads have written
    _mark(inputs_ready + token, job)


@triton.jit
def _mark(flag, job):
    """Sets a flag in host memory. Whoever sees it also sees everything written before."""
    tl.inline_asm_elementwise(
        "fence.acq_rel.sys; st.relaxed.sys.global.s64 [$1], $2; mov.b32 $0, 0;",
        "=r,l,l", [flag.to(tl.int64), job.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["size"])
def read_table(table, fetched, gave_up, size, PIECE: tl.constexpr):
    """Copies PIECE entries of the table to the GPU, or zeros if the GPU gave up."""
    at = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    complete = tl.load(gave_up, volatile=True) == 0
    content = tl.load(table + at, mask=(at < size) & complete, other=0, volatile=True)
    tl.store(fetched + at, content, mask=at < size)


@triton.jit
def _tile(table, max_blocks, num_experts, expert, tile, TOKENS: tl.constexpr):
    """One tile of an expert's choices [TOKENS], a mask of those that exist, and whether any
    exists.
    """
    first_choice = table + 1 + 2 * max_blocks + num_experts + 1
    start = tl.load(first_choice + expert) + tile * TOKENS
    stop = tl.load(first_choice + expert + 1)
    position = start + tl.arange(0, TOKENS)
    exists = position < stop
    return (
        tl.load(first_choice + num_experts + 1 + position, mask=exists, other=0),
        exists,
        start < stop,
    )


@triton.jit(do_not_specialize=["max_blocks", "num_experts"])
def gate_up(
    table, max_blocks, num_experts, states, products,
    HIDDEN: tl.constexpr, NEURONS: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """products[block, token, neuron] = silu(gate x) * (up x), for TILE neurons and TOKENS
    tokens.
    """
    block = tl.program_id(0) // (NEURONS // TILE)
    tile = tl.program_id(1)
    if block < tl.load(table):
        neuron = tl.program_id(0) % (NEURONS // TILE) * TILE + tl.arange(0, TILE)
        expert = tl.load(table + 1 + max_blocks + block)
        choice, exists, any_exists = _tile(table, max_blocks, num_experts, expert, tile, TOKENS)
        if any_exists:
            weights = tl.load(table + 1 + block).to(tl.pointer_type(products.dtype.element_ty))
            column = tl.arange(0, WIDTH)
            gate_rows = weights + neuron[:, None] * HIDDEN + column[None, :]
            state_columns = states + (choice // TOP_K)[None, :] * HIDDEN + column[:, None]
            gate = tl.zeros((TILE, TOKENS), tl.float32)
            up = tl.zeros((TILE, TOKENS), tl.float32)
            for start in range(0, HIDDEN, WIDTH):
                x = tl.load(state_columns + start, mask=exists[None, :], other=0.0)
                gate_pointers = tl.multiple_of(gate_rows + start, [16, 16])
                up_pointers = tl.multiple_of(gate_rows + NEURONS * HIDDEN + start, [16, 16])
                gate = tl.dot(tl.load(gate_pointers), x, gate)
                up = tl.dot(tl.load(up_pointers), x, up)
            product = gate * tl.sigmoid(gate) * up
            row = (block * tl.num_programs(1) + tile) * TOKENS + tl.arange(0, TOKENS)
            tl.store(
                products + row[None, :] * NEURONS + neuron[:, None],
                product.to(products.dtype.element_ty),
            )


@triton.jit(do_not_specialize=["max_blocks", "num_experts"])
def down(
    table, max_blocks, num_experts, products, router_weights, results,
    HIDDEN: tl.constexpr, NEURONS: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """results[choice, row] = router weight * sum over the expert's blocks of down * products.

    For TILE rows of one expert and TOKENS tokens.
    """
    expert = tl.program_id(1)
    tile = tl.program_id(2)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    choice, exists, any_exists = _tile(table, max_blocks, num_experts, expert, tile, TOKENS)
    if any_exists:
        first_block = table + 1 + 2 * max_blocks
        column = tl.arange(0, WIDTH)
        total = tl.zeros((TILE, TOKENS), tl.float32)
        for block in range(tl.load(first_block + expert), tl.load(first_block + expert + 1)):
            weights = (
                tl.load(table + 1 + block).to(tl.pointer_type(products.dtype.element_ty))
                + 2 * NEURONS * HIDDEN
            )
            down_rows = weights + row[:, None] * NEURONS + column[None, :]
            token = (block * tl.num_programs(2) + tile) * TOKENS + tl.arange(0, TOKENS)
            product_columns = products + token[None, :] * NEURONS + column[:, None]
            for start in range(0, NEURONS, WIDTH):
                down_pointers = tl.multiple_of(down_rows + start, [16, 16])
                total = tl.dot(tl.load(down_pointers), tl.load(product_columns + start), total)
        total *= tl.load(router_weights + choice, mask=exists, other=0.0)[None, :]
        tl.store(results + choice[None, :] * HIDDEN + row[:, None], total, mask=exists[None, :])


@triton.jit(do_not_specialize=["job", "patience_ns"])
def wait(flag, gave_up, job, patience_ns):
    """Waits until `flag` is at least `job`, or sets `gave_up` after `patience_ns`.

    A separate kernel: one program polls, and the kernel boundary makes later loads see fresh
    memory.
    """
    last = tl.load(flag, volatile=True)
    # one timeout is enough: nothing after it can be correct
    waiting = (last < job) & (tl.load(gave_up, volatile=True) == 0)
    until = _now_ns() + patience_ns
    while waiting:
        # read before the flag: after a time in which nothing ran, the flag may already be set
        late = _now_ns() > until
        last = tl.load(flag, volatile=True)
        waiting = (last < job) & (late == 0)
    if last < job:
        tl.store(gave_up, job)


@triton.jit
def _now_ns():
    """The GPU's clock, after a short sleep that leaves the multiprocessor to others."""
    return tl.inline_asm_elementwise(
        "nanosleep.u32 100; mov.u64 $0, %globaltimer;",
        "=l",
        [],
        dtype=tl.int64,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["num_experts"])
def combine(
    results, index, num_experts, cpu_output, output,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """output[token, column] = sum of its choices' results and the CPU's, for WIDTH columns."""
    token = tl.program_id(0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.load(cpu_output + token * HIDDEN + column, volatile=True)
    for choice in tl.static_range(CHOICES):
        expert = tl.load(index + token * CHOICES + choice)
        exists = (expert >= 0) & (expert < num_experts)
        total += tl.load(
            results + (token * CHOICES + choice) * HIDDEN + column, mask=exists, other=0.0
        )
    tl.store(output + token * HIDDEN + column, total.to(output.dtype.element_ty))
