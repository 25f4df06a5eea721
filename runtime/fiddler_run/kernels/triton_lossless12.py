"""The GPU kernels of the decode path that read blocks, for blocks in lossless12.

Weights are unpacked in registers. encodings/lossless12.h has the layout of a block. Weights are
multiplied in the order of their places, and the activations are loaded in that order.
"""

import triton
import triton.language as tl

from fiddler_run.kernels.triton_activation import glu
from fiddler_run.kernels.triton_kernels import _store, _tile


@triton.jit
def _bytes(rows, start, LENGTH: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH bytes of rows of LENGTH bytes from `start` on, and zeros after their ends."""
    place = start + tl.arange(0, WIDTH)
    at = tl.multiple_of(rows[:, None] + place[None, :], [16, 16])
    if LENGTH % WIDTH == 0:
        loaded = tl.load(at)
    else:
        loaded = tl.load(at, mask=place[None, :] < LENGTH, other=0)
    return loaded


@triton.jit
def _bits(rows, base, start, LENGTH: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """The bits of WIDTH weights of rows [TILE] from `start` on, by place, without escapes.

    `rows` are the rows' addresses. Each byte is loaded once, also over a link.
    """
    lows = _bytes(rows, start, LENGTH, WIDTH)
    codes = _bytes(rows + LENGTH, start // 2, LENGTH // 2, WIDTH // 2)
    codes = tl.reshape(codes, (TILE, WIDTH // 64, 1, 32))
    codes = tl.broadcast_to(codes, (TILE, WIDTH // 64, 2, 32))
    codes = tl.reshape(codes, (TILE, WIDTH)).to(tl.int32)
    codes = codes >> (tl.arange(0, WIDTH) // 32 % 2 * 4)[None, :]
    index = codes & 7
    pair = tl.where(index == 0, 0, index + base[:, None])
    return ((codes & 8) << 12) | (pair << 8) | lows.to(tl.int32)


@triton.jit
def _columns(WIDTH: tl.constexpr):
    """The weights at WIDTH places."""
    place = tl.arange(0, WIDTH)
    columns = place // 64 * 64 + place // 8 % 2 * 32 + place // 16 % 4 * 8 + place % 8
    return tl.max_contiguous(tl.multiple_of(columns, 8), 8)


@triton.jit
def _multiplied(total, rows, base, x, exists, LENGTH: tl.constexpr, WIDTH: tl.constexpr,
                TILE: tl.constexpr):  # fmt: skip
    """Adds rows [TILE] of packed weights times activations, without escapes, to `total`.

    `rows` are the rows' addresses, `x` [TOKENS] the tokens' activations.
    """
    x_at = x[None, :] + _columns(WIDTH)[:, None]
    place = tl.arange(0, WIDTH)
    for start in range(0, LENGTH, WIDTH):
        bits = _bits(rows, base, start, LENGTH, WIDTH, TILE)
        weights = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
        needed = exists[None, :]
        if LENGTH % WIDTH != 0:
            needed = needed & (start + place < LENGTH)[:, None]
        total = tl.dot(weights, tl.load(x_at + start, mask=needed, other=0.0), total)
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


@triton.jit(do_not_specialize=["max_blocks", "max_groups", "first_block", "top_k"])
def gate_up(
    table, max_blocks, max_groups, first_block, states, top_k, products,
    HIDDEN: tl.constexpr, NEURONS: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr, BASES: tl.constexpr, FIRSTS: tl.constexpr, ESCAPES: tl.constexpr,
    WEIGHTS: tl.constexpr, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, OFFSET: tl.constexpr,
    LIMIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """As triton_kernels.gate_up."""
    place = tl.program_id(0) // (NEURONS // TILE)
    tile = tl.program_id(1)
    number = first_block + place
    if number < tl.load(table):
        neuron = tl.program_id(0) % (NEURONS // TILE) * TILE + tl.arange(0, TILE)
        group = tl.load(table + 1 + max_blocks + number)
        choice, exists, any_exists = _tile(table, max_blocks, max_groups, group, tile, TOKENS)
        if any_exists:
            block = tl.load(table + 1 + number).to(tl.pointer_type(tl.uint8))
            x = states + choice.to(tl.int32) // top_k * HIDDEN
            rows = block + WEIGHTS + neuron * (HIDDEN // 2 * 3)
            base = tl.load(block + BASES + neuron).to(tl.int32)
            gate = tl.zeros((TILE, TOKENS), tl.float32)
            gate = _multiplied(gate, rows, base, x, exists, HIDDEN, WIDTH, TILE)
            gate = _with_escapes(gate, block, neuron, x, exists, FIRSTS, ESCAPES, 16)
            if ROWS == 2:
                base = tl.load(block + BASES + NEURONS + neuron).to(tl.int32)
                rows += NEURONS * (HIDDEN // 2 * 3)
                up = tl.zeros((TILE, TOKENS), tl.float32)
                up = _multiplied(up, rows, base, x, exists, HIDDEN, WIDTH, TILE)
                up = _with_escapes(up, block, NEURONS + neuron, x, exists, FIRSTS, ESCAPES, 16)
            else:
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
    WIDTH: tl.constexpr, ADD: tl.constexpr, BASES: tl.constexpr, FIRSTS: tl.constexpr,
    ESCAPES: tl.constexpr, WEIGHTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """As triton_kernels.down."""
    group = first_group + tl.program_id(1)
    tile = tl.program_id(2)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    choice, exists, any_exists = _tile(table, max_blocks, max_groups, group, tile, TOKENS)
    if any_exists:
        of_group = table + 1 + 2 * max_blocks + 4 * group
        FIRST_DOWN: tl.constexpr = ROWS * NEURONS
        total = tl.zeros((TILE, TOKENS), tl.float32)
        for number in range(tl.load(of_group), tl.load(of_group + 1)):
            block = tl.load(table + 1 + number).to(tl.pointer_type(tl.uint8))
            place = (number - first_block) * tl.num_programs(2) + tile
            x = products + (place * TOKENS + tl.arange(0, TOKENS)) * NEURONS
            rows = block + WEIGHTS + FIRST_DOWN * (HIDDEN // 2 * 3) + row * (NEURONS // 2 * 3)
            base = tl.load(block + BASES + FIRST_DOWN + row).to(tl.int32)
            total = _multiplied(total, rows, base, x, exists, NEURONS, WIDTH, TILE)
            total = _with_escapes(total, block, FIRST_DOWN + row, x, exists, FIRSTS, ESCAPES, 16)
        _store(results, total, router_weights, choice, exists, row, HIDDEN, ADD)


@triton.jit
def unpack(
    blocks, gate_up, down, BLOCK_BYTES: tl.constexpr, HIDDEN: tl.constexpr, NEURONS: tl.constexpr,
    TILE: tl.constexpr, HIDDEN_WIDTH: tl.constexpr, NEURONS_WIDTH: tl.constexpr,
    BASES: tl.constexpr, FIRSTS: tl.constexpr, ESCAPES: tl.constexpr, WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """gate_up[block, row, column] and down[row, block, column] in bfloat16, for TILE rows."""
    number = tl.program_id(1).to(tl.int64)
    block = blocks + number * BLOCK_BYTES
    row = tl.program_id(0) * TILE
    FIRST_DOWN: tl.constexpr = ROWS * NEURONS
    if row < FIRST_DOWN:
        to = gate_up + (number * FIRST_DOWN + row) * HIDDEN
        _unpack_rows(block, WEIGHTS, row, row, to, HIDDEN, HIDDEN, TILE, HIDDEN_WIDTH, BASES,
                     FIRSTS, ESCAPES)  # fmt: skip
    else:
        of_down = row - FIRST_DOWN
        stride = tl.num_programs(1) * NEURONS
        to = down + of_down * stride + number * NEURONS
        _unpack_rows(block, WEIGHTS + FIRST_DOWN * (HIDDEN // 2 * 3), of_down, row, to, stride,
                     NEURONS, TILE, NEURONS_WIDTH, BASES, FIRSTS, ESCAPES)  # fmt: skip


@triton.jit
def _unpack_rows(
    block, weights, first_row, number, to, stride, LENGTH: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr, BASES: tl.constexpr, FIRSTS: tl.constexpr, ESCAPES: tl.constexpr,
):  # fmt: skip
    """Unpacks TILE rows to `to`, `stride` apart: of a matrix at `weights`, from `first_row` on.
    `number` is the first one's over gate, up and down.
    """
    tile = tl.arange(0, TILE)
    rows = block + weights + (first_row + tile) * (LENGTH // 2 * 3)
    base = tl.load(block + BASES + number + tile).to(tl.int32)
    for start in range(0, LENGTH, WIDTH):
        bits = _bits(rows, base, start, LENGTH, WIDTH, TILE)
        at = to + tile[:, None] * stride + start + _columns(WIDTH)[None, :]
        tl.store(at, bits.to(tl.int16).to(tl.bfloat16, bitcast=True))
    tl.debug_barrier()  # escapes overwrite zeros
    firsts = (block + FIRSTS).to(tl.pointer_type(tl.int32)) + number
    stop = tl.load(firsts + tile + 1)
    last = tl.max(stop, axis=0)
    overflow = tl.load(block.to(tl.pointer_type(tl.int64)))
    inside = (block + ESCAPES).to(tl.int64)
    escapes = tl.where(overflow == 0, inside, overflow).to(tl.pointer_type(tl.int16))
    for start in range(tl.load(firsts), last, 32):
        entry = start + tl.arange(0, 32)
        exists = entry < last
        column = tl.load(escapes + 2 * entry, mask=exists, other=0).to(tl.int32) & 0xFFFF
        value = tl.load(escapes + 2 * entry + 1, mask=exists, other=0)
        row = tl.sum((entry[:, None] >= stop[None, :]).to(tl.int32), axis=1)  # rows before it
        at = to + row * stride + column
        tl.store(at, value.to(tl.bfloat16, bitcast=True), mask=exists)
