"""How the kernels that apply blocks are launched: sizes of tiles, and loads in flight."""

import triton

from fiddler_run.encodings.base import Encoding
from fiddler_run.encodings.lossless12 import Lossless12

TILE_NEURONS = 32
TILE_ROWS = 16
TILE_WIDTH = 128  # weights of a row
# The codes of lossless12 are half as many bytes as weights. A link carries reads of 128 bytes
# faster than shorter ones.
PACKED_WIDTH = 256
# For few tokens, whole rows of down are read at once: a row may start in the middle of 128 bytes.
PACKED_ROW = 1024
# Loads in flight by tokens of a tile; these fit 99 KB of shared memory.
STAGES = {16: 4, 32: 3, 64: 2}
# Prefill: neurons, rows and columns of a tile. The tensor cores multiply 64 rows at once.
WIDE_TILE = 64
WIDE_STAGES = {16: 4, 64: 3}
WARPS = 4


def tile_tokens(tokens: int) -> int:
    """Tokens of a tile: a key of STAGES."""
    return min(max(STAGES), max(min(STAGES), triton.next_power_of_2(tokens)))


def gate_up_options(block_format: Encoding, tokens: int) -> dict[str, int]:
    """Options of `gate_up` for tiles of `tokens` tokens."""
    most = PACKED_WIDTH if isinstance(block_format, Lossless12) else TILE_WIDTH
    width = width_of(block_format.hidden_size, most)
    return _options(TILE_NEURONS, width, STAGES[tokens])


def down_options(block_format: Encoding, tokens: int) -> dict[str, int]:
    """Options of `down` for tiles of `tokens` tokens."""
    neurons = block_format.block_neurons
    if isinstance(block_format, Lossless12) and tokens == min(STAGES):
        whole = min(PACKED_ROW, triton.next_power_of_2(neurons))
        return _options(TILE_ROWS, whole, 1)  # usually there is one load
    return _options(TILE_ROWS, width_of(neurons), _down_stages(block_format, STAGES[tokens]))


def wide_gate_up_options(block_format: Encoding, tokens: int) -> dict[str, int]:
    """Options of `gate_up` for groups of up to `tokens` choices."""
    width = width_of(block_format.hidden_size, WIDE_TILE)
    return _options(width_of(block_format.block_neurons, WIDE_TILE), width, WIDE_STAGES[tokens])


def wide_down_options(block_format: Encoding, tokens: int) -> dict[str, int]:
    """Options of `down` for groups of up to `tokens` choices."""
    width = width_of(block_format.block_neurons, WIDE_TILE)
    return _options(WIDE_TILE, width, _down_stages(block_format, WIDE_STAGES[tokens]))


def width_of(length: int, most: int = TILE_WIDTH) -> int:
    """The largest power of two up to `most` that divides `length`."""
    return min(most, length & -length)


def _options(tile: int, width: int, stages: int) -> dict[str, int]:
    return {"TILE": tile, "WIDTH": width, "num_warps": WARPS, "num_stages": stages}


def _down_stages(block_format: Encoding, stages: int) -> int:
    """Stages of the pipeline that keep as many loads in flight in `down` as in `gate_up`.

    In bf16, half of them load the addresses of the blocks.
    """
    return stages if isinstance(block_format, Lossless12) else 2 * stages - 1
