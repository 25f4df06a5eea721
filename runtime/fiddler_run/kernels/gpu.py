"""Blocks of several experts applied to a few tokens by two GPU kernels, wherever the blocks lie.

A block in page-locked host memory is read by the kernel itself, over the link, just as one in GPU memory is: no copy, no staging,
no wait between the two. Every weight is read once, so this serves as many tokens of an expert as fit one tile.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from fiddler_run.dispatch import ExpertCall

MAX_TOKENS = 64  # of one expert
TILE_NEURONS, TILE_ROWS, TILE_WIDTH = 32, 16, 128
STAGES = {16: 4, 32: 3, 64: 2}  # loads under way; by tokens of a tile, so that 99 KB of shared memory suffice
DTYPES = (torch.bfloat16, torch.float16)


def supports(dtype: torch.dtype, hidden: int, block_neurons: int) -> bool:
    return dtype in DTYPES and hidden % 64 == 0 and block_neurons % TILE_NEURONS == 0


def table_size(calls: list[ExpertCall], order: np.ndarray) -> int:
    num_blocks = sum(call.expert.num_resident + call.num_streamed for call in calls)
    return 2 * num_blocks + 2 * (len(calls) + 1) + len(order)


def fill_table(table: np.ndarray, calls: list[ExpertCall], block_bytes: int, order: np.ndarray) -> int:
    """Describes the calls to the kernels: the number of blocks.

    Args:
        table: int64, room for `table_size`.
        calls: of one layer.
        block_bytes: size of a block.
        order: the layer's choices [tokens * k] sorted by expert, which is the order of the calls.
    """
    addresses, call_of_block, first_block, first_choice = [], [], [0], [0]
    for number, call in enumerate(calls):
        expert = call.expert
        for address, count in (expert.absent_address, call.num_streamed), (expert.resident_address, expert.num_resident):
            addresses.extend(range(address, address + count * block_bytes, block_bytes))
            call_of_block.extend([number] * count)
        first_block.append(len(addresses))
        first_choice.append(first_choice[-1] + len(call.rows))
    entries = addresses + call_of_block + first_block + first_choice
    table[: len(entries)] = entries
    table[len(entries) :] = order
    return len(addresses)


def compile_all(dtype: torch.dtype, hidden: int, block_neurons: int) -> None:
    """Compiles what few tokens with two experts each will need, in any placement; takes seconds the first time.

    Later it would interrupt decode.

    Raises:
        Exception: of many types, where Triton does not work.
    """
    finished = torch.zeros(1, dtype=torch.int64, pin_memory=True)
    cpu_output = torch.zeros((1, hidden), pin_memory=True)
    for tokens in STAGES:
        states = torch.zeros((tokens, hidden), dtype=dtype, device="cuda")
        block = torch.zeros((1, 3 * block_neurons * hidden), dtype=dtype, device="cuda")
        weights = torch.zeros((tokens, 2), device="cuda")
        table = torch.tensor([block.data_ptr(), 0, 0, 1, 0, tokens, *range(tokens)], device="cuda")
        results = apply_calls(table, 1, 1, tokens, states, weights, block_neurons)
        for on_cpu in (None, cpu_output):
            add_up(results[:1], on_cpu, finished, 0, states[:1])
    add_up(None, cpu_output, finished, 0, states[:1])
    torch.cuda.synchronize()


def apply_calls(
    table: torch.Tensor,
    num_blocks: int,
    num_calls: int,
    most_tokens: int,
    hidden_states: torch.Tensor,
    weights: torch.Tensor,
    block_neurons: int,
) -> torch.Tensor:
    """The calls that `fill_table` described: weighted results of each choice, [tokens, k, hidden] float32.

    Args:
        table: on the GPU.
        most_tokens: of any call; at most MAX_TOKENS.
        hidden_states: [tokens, hidden].
        weights: of the router, [tokens, k] float32, contiguous.
    """
    (tokens, hidden), top_k = hidden_states.shape, weights.shape[1]
    tile_tokens = max(16, triton.next_power_of_2(most_tokens))
    products = hidden_states.new_empty((max(1, num_blocks), tile_tokens, block_neurons))
    results = torch.empty((tokens, top_k, hidden), dtype=torch.float32, device=hidden_states.device)
    shape = {"HIDDEN": hidden, "NEURONS": block_neurons, "TOP_K": top_k, "TOKENS": tile_tokens}
    if num_blocks:
        _gate_up[num_blocks * (block_neurons // TILE_NEURONS),](
            table, num_blocks, num_calls, hidden_states, products, **shape,
            TILE=TILE_NEURONS, WIDTH=_width(hidden), num_warps=4, num_stages=STAGES[tile_tokens],
        )  # fmt: skip
    _down[hidden // TILE_ROWS, num_calls](
        table, num_blocks, num_calls, products, weights, results, **shape,
        TILE=TILE_ROWS, WIDTH=_width(block_neurons), num_warps=4, num_stages=STAGES[tile_tokens],
    )  # fmt: skip
    return results


def add_up(
    results: torch.Tensor | None, cpu_output: torch.Tensor | None, finished: torch.Tensor, job: int, like: torch.Tensor
) -> torch.Tensor:
    """The layer's output [tokens, hidden], of dtype and device of `like`, whose shape it has too.

    Args:
        results: [tokens, k, hidden] float32 of the device's blocks, or None.
        cpu_output: [tokens, hidden] float32, page-locked, or None; complete when `finished`, int64, page-locked, is `job`. The
            device waits for that, not the host.
    """
    output = torch.empty_like(like)
    tokens, hidden = like.shape
    width = min(1024, hidden & -hidden)
    if cpu_output is not None:
        _wait[1,](finished, job)
    _add_up[tokens, hidden // width](
        output if results is None else results, output if cpu_output is None else cpu_output, output,
        HIDDEN=hidden, WIDTH=width, CHOICES=0 if results is None else results.shape[1], ON_CPU=cpu_output is not None,
    )  # fmt: skip
    return output


def _width(length: int) -> int:
    """The largest power of two up to TILE_WIDTH that divides `length`."""
    return min(TILE_WIDTH, length & -length)


@triton.jit
def _call(table, num_blocks, num_calls, call, TOKENS: tl.constexpr):
    """A call's choices [TOKENS], and which of them exist."""
    first_choice = table + 2 * num_blocks + num_calls + 1
    start, stop = tl.load(first_choice + call), tl.load(first_choice + call + 1)
    position = start + tl.arange(0, TOKENS)
    exists = position < stop
    return tl.load(first_choice + num_calls + 1 + position, mask=exists, other=0), exists


@triton.jit(do_not_specialize=["num_blocks", "num_calls"])
def _gate_up(
    table, num_blocks, num_calls, states, products,
    HIDDEN: tl.constexpr, NEURONS: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """products[block, token, neuron] = silu(gate x) * (up x), for TILE neurons of one block."""
    block = tl.program_id(0) // (NEURONS // TILE)
    neuron = tl.program_id(0) % (NEURONS // TILE) * TILE + tl.arange(0, TILE)
    choice, exists = _call(table, num_blocks, num_calls, tl.load(table + num_blocks + block), TOKENS)
    weights = tl.load(table + block).to(tl.pointer_type(products.dtype.element_ty))
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
    row = block * TOKENS + tl.arange(0, TOKENS)
    tl.store(products + row[None, :] * NEURONS + neuron[:, None], product.to(products.dtype.element_ty))


@triton.jit(do_not_specialize=["num_blocks", "num_calls"])
def _down(
    table, num_blocks, num_calls, products, router_weights, results,
    HIDDEN: tl.constexpr, NEURONS: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """results[choice, row] = router weight * sum over the call's blocks of down * products, for TILE rows of one call."""
    call = tl.program_id(1)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    choice, exists = _call(table, num_blocks, num_calls, call, TOKENS)
    first_block = table + 2 * num_blocks
    column = tl.arange(0, WIDTH)
    total = tl.zeros((TILE, TOKENS), tl.float32)
    for block in range(tl.load(first_block + call), tl.load(first_block + call + 1)):
        weights = tl.load(table + block).to(tl.pointer_type(products.dtype.element_ty)) + 2 * NEURONS * HIDDEN
        down_rows = weights + row[:, None] * NEURONS + column[None, :]
        token = block * TOKENS + tl.arange(0, TOKENS)
        product_columns = products + token[None, :] * NEURONS + column[:, None]
        for start in range(0, NEURONS, WIDTH):
            down_pointers = tl.multiple_of(down_rows + start, [16, 16])
            total = tl.dot(tl.load(down_pointers), tl.load(product_columns + start), total)
    total *= tl.load(router_weights + choice, mask=exists, other=0.0)[None, :]
    tl.store(results + choice[None, :] * HIDDEN + row[:, None], total, mask=exists[None, :])


@triton.jit(do_not_specialize=["job"])
def _wait(finished, job):
    """Until `finished` is `job`; a kernel of its own, so that one program looks, and what follows reads memory anew."""
    last = tl.load(finished, volatile=True)
    while last < job:
        last = tl.load(finished, volatile=True)


@triton.jit
def _add_up(
    results, cpu_output, output,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr, ON_CPU: tl.constexpr,
):  # fmt: skip
    """output[token, column] = sum of its choices' results and of the CPU's, for WIDTH columns of one token."""
    token = tl.program_id(0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for choice in tl.static_range(CHOICES):
        total += tl.load(results + (token * CHOICES + choice) * HIDDEN + column)
    if ON_CPU:
        total += tl.load(cpu_output + token * HIDDEN + column, volatile=True)
    tl.store(output + token * HIDDEN + column, total.to(output.dtype.element_ty))
