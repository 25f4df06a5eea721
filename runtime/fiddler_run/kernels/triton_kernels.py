"""The GPU kernels of the decode path, for blocks in bf16. gpu.py launches them."""

import triton
import triton.language as tl

from fiddler_run.kernels.triton_activation import glu


@triton.jit(do_not_specialize=["number", "top_k"])
def publish_inputs(
    states, index, weights, host_states, host_index, host_weights, inputs_ready, before, number,
    top_k, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """Copies one token's inputs, then sets its flag to the job. Copies CHOICES choices at once.

    The job is `number` more than the number at `before`.
    """
    token = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    for start in range(0, HIDDEN, WIDTH):
        at = token * HIDDEN + start + column
        tl.store(host_states + at, tl.load(states + at))
    for start in range(0, top_k, CHOICES):
        choice = start + tl.arange(0, CHOICES)
        exists = choice < top_k
        choice += token * top_k
        tl.store(host_index + choice, tl.load(index + choice, mask=exists), mask=exists)
        tl.store(host_weights + choice, tl.load(weights + choice, mask=exists), mask=exists)
    tl.debug_barrier()  # all threads have written
    _mark(inputs_ready + token, tl.load(before) + number)


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
def _tile(table, max_blocks, max_groups, group, tile, TOKENS: tl.constexpr):
    """One tile of a group's choices [TOKENS], a mask of those that exist, and whether any does."""
    of_group = table + 1 + 2 * max_blocks + 4 * group
    start = tl.load(of_group + 2) + tile * TOKENS
    stop = tl.load(of_group + 3)
    position = start + tl.arange(0, TOKENS)
    exists = position < stop
    choices = table + 1 + 2 * max_blocks + 4 * max_groups
    return tl.load(choices + position, mask=exists, other=0), exists, start < stop


@triton.jit(do_not_specialize=["max_blocks", "max_groups", "first_block", "top_k"])
def gate_up(
    table, max_blocks, max_groups, first_block, states, top_k, products,
    HIDDEN: tl.constexpr, NEURONS: tl.constexpr, TOKENS: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr, FUNCTION: tl.constexpr, ALPHA: tl.constexpr,
    OFFSET: tl.constexpr, LIMIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """products[block, token, neuron] = glu(gate x, up x), for TILE neurons and TOKENS tokens.

    `products` begins with the table's block `first_block`. `ROWS` of a neuron: 2, or 1 without a
    gate.
    """
    place = tl.program_id(0) // (NEURONS // TILE)
    tile = tl.program_id(1)
    block = first_block + place
    if block < tl.load(table):
        neuron = tl.program_id(0) % (NEURONS // TILE) * TILE + tl.arange(0, TILE)
        group = tl.load(table + 1 + max_blocks + block)
        choice, exists, any_exists = _tile(table, max_blocks, max_groups, group, tile, TOKENS)
        if any_exists:
            weights = tl.load(table + 1 + block).to(tl.pointer_type(products.dtype.element_ty))
            column = tl.arange(0, WIDTH)
            gate_rows = weights + neuron[:, None] * HIDDEN + column[None, :]
            token = choice.to(tl.int32) // top_k
            state_columns = states + token[None, :] * HIDDEN + column[:, None]
            gate = tl.zeros((TILE, TOKENS), tl.float32)
            up = tl.zeros((TILE, TOKENS), tl.float32)
            for start in range(0, HIDDEN, WIDTH):
                x = tl.load(state_columns + start, mask=exists[None, :], other=0.0)
                gate_pointers = tl.multiple_of(gate_rows + start, [16, 16])
                up_pointers = tl.multiple_of(gate_rows + NEURONS * HIDDEN + start, [16, 16])
                gate = tl.dot(tl.load(gate_pointers), x, gate)
                if ROWS == 2:
                    up = tl.dot(tl.load(up_pointers), x, up)
            if ROWS == 1:
                up = gate
            product = glu(gate, up, FUNCTION, ALPHA, OFFSET, LIMIT)
            row = (place * tl.num_programs(1) + tile) * TOKENS + tl.arange(0, TOKENS)
            tl.store(
                products + row[None, :] * NEURONS + neuron[:, None],
                product.to(products.dtype.element_ty),
            )


@triton.jit(do_not_specialize=["max_blocks", "max_groups", "first_block", "first_group"])
def down(
    table, max_blocks, max_groups, first_block, first_group, products, router_weights, results,
    HIDDEN: tl.constexpr, NEURONS: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """results[choice, row] = router weight * sum over the group's blocks of down * products.

    For TILE rows of one group and TOKENS tokens. ADD: adds to the results.
    """
    group = first_group + tl.program_id(1)
    tile = tl.program_id(2)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    choice, exists, any_exists = _tile(table, max_blocks, max_groups, group, tile, TOKENS)
    if any_exists:
        of_group = table + 1 + 2 * max_blocks + 4 * group
        column = tl.arange(0, WIDTH)
        total = tl.zeros((TILE, TOKENS), tl.float32)
        # one loop, so that the loads of the next block do not wait for the end of this one
        steps = NEURONS // WIDTH
        for step in range(tl.load(of_group) * steps, tl.load(of_group + 1) * steps):
            block = step // steps
            start = step % steps * WIDTH
            weights = tl.load(table + 1 + block).to(tl.pointer_type(products.dtype.element_ty))
            weights += ROWS * NEURONS * HIDDEN + start
            down_rows = weights + row[:, None] * NEURONS + column[None, :]
            place = (block - first_block) * tl.num_programs(2) + tile
            token = place * TOKENS + tl.arange(0, TOKENS)
            product_columns = products + start + token[None, :] * NEURONS + column[:, None]
            down_pointers = tl.multiple_of(down_rows, [16, 16])
            total = tl.dot(tl.load(down_pointers), tl.load(product_columns), total)
        _store(results, total, router_weights, choice, exists, row, HIDDEN, ADD)


@triton.jit
def _store(results, total, router_weights, choice, exists, row, HIDDEN: tl.constexpr,
           ADD: tl.constexpr):  # fmt: skip
    """Weights the rows `row` of choices, [TILE, TOKENS], and stores or adds them."""
    total *= tl.load(router_weights + choice, mask=exists, other=0.0)[None, :]
    at = results + choice[None, :] * HIDDEN + row[:, None]
    if ADD:
        total += tl.load(at, mask=exists[None, :], other=0.0)
    tl.store(at, total, mask=exists[None, :])


@triton.jit(do_not_specialize=["number", "patience_ns"])
def wait(flag, gave_up, before, number, patience_ns):
    """Waits until `flag` is at least a job's number, or sets `gave_up` to it after `patience_ns`.

    The job is `number` more than the number at `before`.

    A separate kernel: one program polls, and the kernel boundary makes later loads see fresh
    memory.
    """
    job = tl.load(before) + number
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


@triton.jit(do_not_specialize=["num_experts", "top_k"])
def combine(
    results, index, num_experts, top_k, cpu_output, output,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """output[token, column] = sum of its choices' results and the CPU's, for WIDTH columns.

    Loads CHOICES choices at once. `cpu_output`: None if the CPU has no part.
    """
    token = tl.program_id(0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    if cpu_output is not None:
        total += tl.load(cpu_output + token * HIDDEN + column, volatile=True)
    for start in range(0, top_k, CHOICES):
        choice = start + tl.arange(0, CHOICES)
        chosen = token.to(tl.int64) * top_k + choice
        expert = tl.load(index + chosen, mask=choice < top_k, other=-1)
        exists = (expert >= 0) & (expert < num_experts)
        at = results + chosen[:, None] * HIDDEN + column[None, :]
        total += tl.sum(tl.load(at, mask=exists[:, None], other=0.0), axis=0)
    tl.store(output + token * HIDDEN + column, total.to(output.dtype.element_ty))
