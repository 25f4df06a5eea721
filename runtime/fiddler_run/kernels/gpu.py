"""A layer's experts for a few tokens, by GPU kernels that take their orders from the CPU's threads.

`send` gives those threads the tokens and the router's choices; they answer with a table (`fetch`; routed.py says what is in it), on
which the GPU works (`apply`) while they compute the other blocks; `add_up` waits for their result. The GPU waits for flags in
page-locked memory, so that all of this, and the next layer's work, can be queued long before.

A block in page-locked host memory is read by the kernel itself, over the link, just as one in GPU memory is: no copy, no staging,
no wait between the two. Every weight is read once for each tile of an expert's tokens: usually there is one.
"""

import torch
import triton
import triton.language as tl

from fiddler_run.kernels.routed import PATIENCE_S

TILE_NEURONS, TILE_ROWS, TILE_WIDTH = 32, 16, 128
STAGES = {16: 4, 32: 3, 64: 2}  # by tokens of a tile, loads under way: so many that 99 KB of shared memory suffice
PIECE = 512  # of a table


def supports(dtype: torch.dtype, hidden: int, block_neurons: int) -> bool:
    """Of other dtypes the CPU's part is not computed by threads that could take part in this."""
    return dtype == torch.bfloat16 and hidden % 64 == 0 and block_neurons % TILE_NEURONS == 0


def compile_all(dtype: torch.dtype, hidden: int, block_neurons: int) -> None:
    """Compiles what few tokens with two experts each will need, in any placement; takes seconds the first time.

    Later it would interrupt decode.

    Raises:
        Exception: of many types, where Triton does not work.
    """
    flag = torch.zeros(max(STAGES), dtype=torch.int64, pin_memory=True)
    gave_up = torch.zeros(1, dtype=torch.int64, pin_memory=True)
    for tokens in STAGES:
        states = torch.zeros((tokens, hidden), dtype=dtype, device="cuda")
        index = torch.zeros((tokens, 2), dtype=torch.int64, device="cuda")
        weights = torch.zeros((tokens, 2), device="cuda")
        host = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in (states, index, weights)]
        send((states, index, weights), host, flag, 0)
        block = torch.zeros((1, 3 * block_neurons * hidden), dtype=dtype, device="cuda")
        table = torch.tensor([1, block.data_ptr(), 0, 0, 1, 0, 2 * tokens, *range(2 * tokens)])
        table = fetch(table.pin_memory(), flag, gave_up, 0, states.device)
        results = apply(table, 1, 1, states, weights, block_neurons)
        add_up(results, index, 1, torch.zeros((tokens, hidden), pin_memory=True), flag, gave_up, 0, states)
    torch.cuda.synchronize()


def send(tensors: tuple[torch.Tensor, ...], host: list[torch.Tensor], arrived: torch.Tensor, job: int) -> None:
    """Copies a layer's states [tokens, hidden], index [tokens, k] int64 and weights [tokens, k] float32, contiguous, to tensors in
    page-locked host memory, and then marks each token in `arrived` with the job's number."""
    (tokens, hidden), top_k = tensors[0].shape, tensors[1].shape[1]
    width = _width(hidden, most=1024)
    _send[tokens,](
        *tensors, *host, arrived, job,
        HIDDEN=hidden, WIDTH=width, TOP_K=top_k, CHOICES=triton.next_power_of_2(top_k), num_warps=4,
    )  # fmt: skip


def wait(flag: torch.Tensor, gave_up: torch.Tensor, job: int) -> None:
    """Lets the GPU wait until a page-locked flag holds the job's number, but no longer than `PATIENCE_S`: a process may be stopped,
    and a waiting kernel blocks the display. `gave_up` [1] int64, page-locked, is then set to the job's number."""
    _wait[1,](flag, gave_up, job, int(PATIENCE_S * 1e9))


def fetch(table: torch.Tensor, described: torch.Tensor, gave_up: torch.Tensor, job: int, device: torch.device) -> torch.Tensor:
    """The page-locked table on the GPU, which waits until it is complete: when `described` holds the job's number.

    If it gave up waiting, the table is one of no blocks.
    """
    fetched = torch.empty(table.shape, dtype=table.dtype, device=device)
    wait(described, gave_up, job)
    _fetch[triton.cdiv(len(table), PIECE),](table, fetched, gave_up, len(table), PIECE=PIECE)
    return fetched


def apply(
    table: torch.Tensor, max_blocks: int, num_experts: int, hidden_states: torch.Tensor, weights: torch.Tensor, block_neurons: int
) -> torch.Tensor:
    """The blocks of a table applied: weighted results of each choice, [tokens, k, hidden] float32.

    Args:
        table: on the GPU.
        hidden_states: [tokens, hidden].
        weights: of the router, [tokens, k] float32, contiguous.
    """
    (tokens, hidden), top_k = hidden_states.shape, weights.shape[1]
    tile_tokens = min(max(STAGES), max(min(STAGES), triton.next_power_of_2(tokens)))
    tiles = triton.cdiv(tokens, tile_tokens)
    products = hidden_states.new_empty((max_blocks, tiles * tile_tokens, block_neurons))
    results = torch.empty((tokens, top_k, hidden), dtype=torch.float32, device=hidden_states.device)
    shape = {"HIDDEN": hidden, "NEURONS": block_neurons, "TOP_K": top_k, "TOKENS": tile_tokens}
    _gate_up[max_blocks * (block_neurons // TILE_NEURONS), tiles](
        table, max_blocks, num_experts, hidden_states, products, **shape,
        TILE=TILE_NEURONS, WIDTH=_width(hidden), num_warps=4, num_stages=STAGES[tile_tokens],
    )  # fmt: skip
    _down[hidden // TILE_ROWS, num_experts, tiles](
        table, max_blocks, num_experts, products, weights, results, **shape,
        TILE=TILE_ROWS, WIDTH=_width(block_neurons), num_warps=4, num_stages=STAGES[tile_tokens],
    )  # fmt: skip
    return results


def add_up(
    results: torch.Tensor,
    index: torch.Tensor,
    num_experts: int,
    cpu_output: torch.Tensor,
    finished: torch.Tensor,
    gave_up: torch.Tensor,
    job: int,
    like: torch.Tensor,
) -> torch.Tensor:
    """The layer's output [tokens, hidden], of dtype and device of `like`, whose shape it has too.

    Args:
        results: [tokens, k, hidden] float32 of the GPU's blocks, for choices of experts that exist.
        index: the router's choices [tokens, k] int64.
        cpu_output: [tokens, hidden] float32, page-locked; complete when `finished` holds the job's number. The GPU waits for that,
            not Python.
    """
    output = torch.empty_like(like)
    tokens, hidden = like.shape
    width = _width(hidden, most=1024)
    wait(finished, gave_up, job)
    _add_up[tokens, hidden // width](
        results, index, num_experts, cpu_output, output, HIDDEN=hidden, WIDTH=width, CHOICES=results.shape[1]
    )
    return output


def _width(length: int, most: int = TILE_WIDTH) -> int:
    """The largest power of two up to `most`, one itself, that divides `length`."""
    return min(most, length & -length)


@triton.jit(do_not_specialize=["job"])
def _send(
    states, index, weights, host_states, host_index, host_weights, arrived, job,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """One token's row of everything; then its flag."""
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
    _mark(arrived + token, job)


@triton.jit
def _mark(flag, job):
    """Sets a flag in host memory for the CPU: whoever sees it sees also what was written before."""
    tl.inline_asm_elementwise(
        "fence.acq_rel.sys; st.relaxed.sys.global.s64 [$1], $2; mov.b32 $0, 0;", "=r,l,l", [flag.to(tl.int64), job.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["size"])
def _fetch(table, fetched, gave_up, size, PIECE: tl.constexpr):
    at = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    complete = tl.load(gave_up, volatile=True) == 0
    content = tl.load(table + at, mask=(at < size) & complete, other=0, volatile=True)
    tl.store(fetched + at, content, mask=at < size)


@triton.jit
def _tile(table, max_blocks, num_experts, expert, tile, TOKENS: tl.constexpr):
    """A tile of an expert's choices [TOKENS], which of them exist, and whether any does."""
    first_choice = table + 1 + 2 * max_blocks + num_experts + 1
    start, stop = tl.load(first_choice + expert) + tile * TOKENS, tl.load(first_choice + expert + 1)
    position = start + tl.arange(0, TOKENS)
    exists = position < stop
    return tl.load(first_choice + num_experts + 1 + position, mask=exists, other=0), exists, start < stop


@triton.jit(do_not_specialize=["max_blocks", "num_experts"])
def _gate_up(
    table, max_blocks, num_experts, states, products,
    HIDDEN: tl.constexpr, NEURONS: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """products[block, token, neuron] = silu(gate x) * (up x), for TILE neurons of one block and TOKENS tokens."""
    block, tile = tl.program_id(0) // (NEURONS // TILE), tl.program_id(1)
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
            tl.store(products + row[None, :] * NEURONS + neuron[:, None], product.to(products.dtype.element_ty))


@triton.jit(do_not_specialize=["max_blocks", "num_experts"])
def _down(
    table, max_blocks, num_experts, products, router_weights, results,
    HIDDEN: tl.constexpr, NEURONS: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """results[choice, row] = router weight * sum over the expert's blocks of down * products, for TILE rows of one expert and
    TOKENS tokens."""
    expert, tile = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    choice, exists, any_exists = _tile(table, max_blocks, num_experts, expert, tile, TOKENS)
    if any_exists:
        first_block = table + 1 + 2 * max_blocks
        column = tl.arange(0, WIDTH)
        total = tl.zeros((TILE, TOKENS), tl.float32)
        for block in range(tl.load(first_block + expert), tl.load(first_block + expert + 1)):
            weights = tl.load(table + 1 + block).to(tl.pointer_type(products.dtype.element_ty)) + 2 * NEURONS * HIDDEN
            down_rows = weights + row[:, None] * NEURONS + column[None, :]
            token = (block * tl.num_programs(2) + tile) * TOKENS + tl.arange(0, TOKENS)
            product_columns = products + token[None, :] * NEURONS + column[:, None]
            for start in range(0, NEURONS, WIDTH):
                down_pointers = tl.multiple_of(down_rows + start, [16, 16])
                total = tl.dot(tl.load(down_pointers), tl.load(product_columns + start), total)
        total *= tl.load(router_weights + choice, mask=exists, other=0.0)[None, :]
        tl.store(results + choice[None, :] * HIDDEN + row[:, None], total, mask=exists[None, :])


@triton.jit(do_not_specialize=["job", "patience_ns"])
def _wait(flag, gave_up, job, patience_ns):
    """A kernel of its own, so that one program looks, and what follows reads memory anew."""
    last = tl.load(flag, volatile=True)
    waiting = (last < job) & (tl.load(gave_up, volatile=True) == 0)  # once is enough: nothing that follows can be right
    until = _now_ns() + patience_ns
    while waiting:
        late = _now_ns() > until  # before the look: after a time in which nothing ran, the flag may be there
        last = tl.load(flag, volatile=True)
        waiting = (last < job) & (late == 0)
    if last < job:
        tl.store(gave_up, job)


@triton.jit
def _now_ns():
    """The GPU's clock, after a nap that leaves the others of its multiprocessor more of it."""
    return tl.inline_asm_elementwise(
        "nanosleep.u32 100; mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["num_experts"])
def _add_up(
    results, index, num_experts, cpu_output, output,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """output[token, column] = sum of its choices' results and of the CPU's, for WIDTH columns of one token."""
    token = tl.program_id(0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.load(cpu_output + token * HIDDEN + column, volatile=True)
    for choice in tl.static_range(CHOICES):
        expert = tl.load(index + token * CHOICES + choice)
        exists = (expert >= 0) & (expert < num_experts)
        total += tl.load(results + (token * CHOICES + choice) * HIDDEN + column, mask=exists, other=0.0)
    tl.store(output + token * HIDDEN + column, total.to(output.dtype.element_ty))
