"""How the decode path's GPU kernels are launched: sizes of tiles, and loads in flight."""

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
WARPS = 4


def tile_tokens(tokens: int) -> int:
    """Tokens of a tile: a key of STAGES."""
    return min(max(STAGES), max(min(STAGES), triton.next_power_of_2(tokens)))


def gate_up_options(block_format: Encoding, tokens: int) -> dict[str, int]:
    """Options of `gate_up` for tiles of `tokens` tokens."""
    most = PACKED_WIDTH if isinstance(block_format, Lossless12) else TILE_WIDTH
    return {
        "TILE": TILE_NEURONS,
        "WIDTH": width_of(block_format.hidden_size, most),
        "num_warps": WARPS,
        "num_stages": STAGES[tokens],
    }


def down_options(block_format: Encoding, tokens: int) -> dict[str, int]:
    """Options of `down` for tiles of `tokens` tokens."""
    width = width_of(block_format.block_neurons)
    stages = STAGES[tokens]
    if isinstance(block_format, Lossless12) and tokens == min(STAGES):
        width = min(PACKED_ROW, triton.next_power_of_2(block_format.block_neurons))
        stages = 1  # usually there is one load
    return {"TILE": TILE_ROWS, "WIDTH": width, "num_warps": WARPS, "num_stages": stages}


def width_of(length: int, most: int = TILE_WIDTH) -> int:
    """The largest power of two up to `most` that divides `length`."""
    return min(most, length & -length)
