"""What every encoding provides. It works on tensors that it is given, and imports no torch.

An expert's neurons are cut into blocks of `block_neurons` consecutive ones. A block holds their
gate rows, up rows and down columns, so it is a small dense expert of its own, and one contiguous
copy over the link. Only an encoding knows what a block's bytes mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


class Encoding(ABC):
    """The stored form of blocks for experts of `hidden_size`.

    Class attributes: `name` in plans; `dtype`, of the weights that it represents exactly.
    """

    name: ClassVar[str]
    dtype: ClassVar[str]

    def __init__(self, hidden_size: int, block_neurons: int):
        self.hidden_size = hidden_size
        self.block_neurons = block_neurons

    @property
    @abstractmethod
    def block_bytes(self) -> int:
        """Bytes of one block; all blocks of an encoding have the same size."""

    @abstractmethod
    def encode(
        self, blocks: Tensor, gate: Tensor, up: Tensor, down: Tensor, first_neuron: int
    ) -> None:
        """Stores an expert's neurons from `first_neuron` on.

        Neurons past the expert's last one are zeros, which add nothing to its output.

        Args:
            blocks: uint8 [count, block_bytes] in host memory, to be written.
            gate, up: [intermediate, hidden], of a dtype that the encoding's holds without loss.
            down: [hidden, intermediate].
        """

    @abstractmethod
    def decode(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of `blocks`, uint8 [count, block_bytes], on their device.

        Returns:
            Gate rows above up rows [count, 2 * block_neurons, hidden], and down columns [count,
            hidden, block_neurons]; views of `blocks` where the encoding allows that.
        """

    def blocks_per_expert(self, intermediate_size: int) -> int:
        return -(-intermediate_size // self.block_neurons)

    def expert_bytes(self, intermediate_size: int) -> int:
        """Bytes of one expert. Its last block is padded where the block does not divide it."""
        return self.blocks_per_expert(intermediate_size) * self.block_bytes
