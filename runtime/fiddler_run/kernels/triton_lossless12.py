"""The GPU kernels of the decode path that read blocks, for blocks in lossless12.

Weights are unpacked in registers. encodings/lossless12.h has the layout of a block. Places 0 to 31
and 32 to 63 of a group become two operands of a product, because a byte of codes serves one of
each; the activations are loaded in the same order.
"""

import triton
import triton.language as tl

from fiddler_run.kernels.triton_kernels import _tile


@triton.jit
def _decoded(low, code, base):
    """bfloat16 weights [rows, n] from their low bytes, codes, and the rows' bases [rows]."""
    index = (code & 7).to(tl.int32)
    pair = tl.where(index == 0, 0, index + base[:, None])
    bits = ((code & 8).to(tl.int32) << 12) | (pair << 8) | low.to(tl.int32)
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _columns(WIDTH: tl.constexpr):
    """The weights of WIDTH that are at places 0 to 31 of their group. The others are 16 further."""
    at = tl.arange(0, WIDTH // 2)
    place = at % 32
    return at // 32 * 64 + place // 8 % 2 * 32 + place // 16 * 8 + place % 8


@triton.jit
def _multiplied(total, rows, base, x, exists, LENGTH: tl.constexpr, WIDTH: tl.constexpr,
                TILE: tl.constexpr):  # fmt: skip
    """Adds rows [TILE] of packed weights times activations, without escapes, to `total`.

    `rows` are the rows' addresses, `x` [TOKENS] the tokens' activations.
    """
    low_at = rows[:, None] + tl.arange(0, WIDTH)[None, :]
    code_at = rows[:, None] + LENGTH + tl.arange(0, WIDTH // 2)[None, :]
    x_at = x[None, :] + _columns(WIDTH)[:, None]
    for start in range(0, LENGTH, WIDTH):
        lows = tl.load(tl.multiple_of(low_at + start, [16, 16]))
        codes = tl.load(tl.multiple_of(code_at + start // 2, [16, 16]))
        lows = tl.permute(tl.reshape(lows, (TILE, WIDTH // 64, 2, 32)), (0, 1, 3, 2))
        first, second = tl.split(lows)
        first = tl.reshape(first, (TILE, WIDTH // 2))
        second = tl.reshape(second, (TILE, WIDTH // 2))
        near = tl.load(x_at + start, mask=exists[None, :], other=0.0)
        far = tl.load(x_at + start + 16, mask=exists[None, :], other=0.0)
        total = tl.dot(_decoded(first, codes & 15, base), near, total)
        total = tl.dot(_decoded(second, codes >> 4, base), far, total)
    return total


@triton.jit
def _with_escapes(total, block, row, x, exists, FIRSTS: tl.constexpr, ESCAPES: tl.constexpr,
                  CHUNK: tl.constexpr):  # fmt: skip
    """Adds the escapes of rows `row` [TILE], numbered over gate, up and down, to `total`."""
    firsts = (block + FIRSTS).to(tl.pointer_type(tl.int32))
    first = tl.load(firsts + row)
    stop = tl.load(firsts + row + 1)
    overflow = tl.load(block.to(tl.pointer_type(tl.int64)))
    inside = (block + ESCAPES).to(tl.int64)
    escapes = tl.where(overflow == 0, inside, overflow).to(tl.pointer_type(tl.int16))
    last = tl.max(stop, axis=0)
    for start in range(tl.min(first, axis=0), last, CHUNK):
        number = start + tl.arange(0, CHUNK)
        column = tl.load(escapes + 2 * number, mask=number < last, other=0).to(tl.int32) & 0xFFFF
        value = tl.load(escapes + 2 * number + 1, mask=number < last, other=0)
        own = (number[None, :] >= first[:, None]) & (number[None, :] < stop[:, None])
        bits = tl.where(own, value[None, :], tl.zeros_like(value)[None, :])
        activations = tl.load(x[None, :] + column[:, None], mask=exists[None, :], other=0.0)
        total = tl.dot(bits.to(tl.bfloat16, bitcast=True), activations, total)
    return total


@triton.jit(do_not_specialize=["max_blocks", "num_experts"])
def gate_up(
    table, max_blocks, num_experts, states, products,
    HIDDEN: tl.constexpr, NEURONS: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr, BASES: tl.constexpr, FIRSTS: tl.constexpr,
    ESCAPES: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """As triton_kernels.gate_up."""
    number = tl.program_id(0) // (NEURONS // TILE)
    tile = tl.program_id(1)
    if number < tl.load(table):
        neuron = tl.program_id(0) % (NEURONS // TILE) * TILE + tl.arange(0, TILE)
        expert = tl.load(table + 1 + max_blocks + number)
        choice, exists, any_exists = _tile(table, max_blocks, num_experts, expert, tile, TOKENS)
        if any_exists:
            block = tl.load(table + 1 + number).to(tl.pointer_type(tl.uint8))
            x = states + choice // TOP_K * HIDDEN
            rows = block + WEIGHTS + neuron * (HIDDEN // 2 * 3)
            base = tl.load(block + BASES + neuron).to(tl.int32)
            gate = tl.zeros((TILE, TOKENS), tl.float32)
            gate = _multiplied(gate, rows, base, x, exists, HIDDEN, WIDTH, TILE)
            gate = _with_escapes(gate, block, neuron, x, exists, FIRSTS, ESCAPES, 16)
            base = tl.load(block + BASES + NEURONS + neuron).to(tl.int32)
            rows += NEURONS * (HIDDEN // 2 * 3)
            up = tl.zeros((TILE, TOKENS), tl.float32)
            up = _multiplied(up, rows, base, x, exists, HIDDEN, WIDTH, TILE)
            up = _with_escapes(up, block, NEURONS + neuron, x, exists, FIRSTS, ESCAPES, 16)
            product = gate * tl.sigmoid(gate) * up
            row = (number * tl.num_programs(1) + tile) * TOKENS + tl.arange(0, TOKENS)
            tl.store(
                products + row[None, :] * NEURONS + neuron[:, None],
                product.to(products.dtype.element_ty),
            )


@triton.jit(do_not_specialize=["max_blocks", "num_experts"])
def down(
    table, max_blocks, num_experts, products, router_weights, results,
    HIDDEN: tl.constexpr, NEURONS: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr, BASES: tl.constexpr, FIRSTS: tl.constexpr,
    ESCAPES: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """As triton_kernels.down."""
    expert = tl.program_id(1)
    tile = tl.program_id(2)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    choice, exists, any_exists = _tile(table, max_blocks, num_experts, expert, tile, TOKENS)
    if any_exists:
        first_block = table + 1 + 2 * max_blocks
        total = tl.zeros((TILE, TOKENS), tl.float32)
        for number in range(tl.load(first_block + expert), tl.load(first_block + expert + 1)):
            block = tl.load(table + 1 + number).to(tl.pointer_type(tl.uint8))
            token = (number * tl.num_programs(2) + tile) * TOKENS + tl.arange(0, TOKENS)
            x = products + token * NEURONS
            rows = block + WEIGHTS + 3 * NEURONS * HIDDEN + row * (NEURONS // 2 * 3)
            base = tl.load(block + BASES + 2 * NEURONS + row).to(tl.int32)
            total = _multiplied(total, rows, base, x, exists, NEURONS, WIDTH, TILE)
            total = _with_escapes(total, block, 2 * NEURONS + row, x, exists, FIRSTS, ESCAPES, 16)
        total *= tl.load(router_weights + choice, mask=exists, other=0.0)[None, :]
        tl.store(results + choice[None, :] * HIDDEN + row[:, None], total, mask=exists[None, :])


@triton.jit
def unpack(
    blocks, plain, BLOCK_BYTES: tl.constexpr, FIRST_ROW: tl.constexpr, ROWS: tl.constexpr,
    LENGTH: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, BASES: tl.constexpr,
    FIRSTS: tl.constexpr, ESCAPES: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """plain[block, row, column] in bfloat16, for TILE of ROWS consecutive rows of LENGTH weights.

    `FIRST_ROW` is the number of the first row over gate, up and down, `WEIGHTS` its place.
    """
    number = tl.program_id(1).to(tl.int64)
    block = blocks + number * BLOCK_BYTES
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    to = plain + (number * ROWS + row) * LENGTH
    rows = block + WEIGHTS + row * (LENGTH // 2 * 3)
    base = tl.load(block + BASES + FIRST_ROW + row).to(tl.int32)
    for start in range(0, LENGTH, WIDTH):
        lows = tl.load(rows[:, None] + start + tl.arange(0, WIDTH)[None, :])
        codes = tl.load(rows[:, None] + LENGTH + start // 2 + tl.arange(0, WIDTH // 2)[None, :])
        lows = tl.permute(tl.reshape(lows, (TILE, WIDTH // 64, 2, 32)), (0, 1, 3, 2))
        first, second = tl.split(lows)
        at = to[:, None] + start + _columns(WIDTH)[None, :]
        first = tl.reshape(first, (TILE, WIDTH // 2))
        second = tl.reshape(second, (TILE, WIDTH // 2))
        tl.store(at, _decoded(first, codes & 15, base))
        tl.store(at + 16, _decoded(second, codes >> 4, base))
    tl.debug_barrier()  # escapes overwrite zeros
    firsts = (block + FIRSTS).to(tl.pointer_type(tl.int32)) + FIRST_ROW
    stop = tl.load(firsts + row + 1)
    last = tl.max(stop, axis=0)
    overflow = tl.load(block.to(tl.pointer_type(tl.int64)))
    inside = (block + ESCAPES).to(tl.int64)
    escapes = tl.where(overflow == 0, inside, overflow).to(tl.pointer_type(tl.int16))
    for start in range(tl.min(tl.load(firsts + row), axis=0), last, 32):
        entry = start + tl.arange(0, 32)
        exists = entry < last
        column = tl.load(escapes + 2 * entry, mask=exists, other=0).to(tl.int32) & 0xFFFF
        value = tl.load(escapes + 2 * entry + 1, mask=exists, other=0)
        own = tl.sum((entry[:, None] >= stop[None, :]).to(tl.int32), axis=1)  # rows before it
        own += tl.program_id(0) * TILE
        at = plain + (number * ROWS + own) * LENGTH + column
        tl.store(at, value.to(tl.bfloat16, bitcast=True), mask=exists)
