"""The interface of an encoding. It operates on tensors but does not import torch.

An expert's neurons are cut into blocks of `block_neurons` consecutive neurons. A block holds their
gate rows, up rows and down columns, so it is a small dense expert and one contiguous copy over the
link. Experts without a gate have only up rows. Only an encoding knows what the bytes of a block
mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


class Encoding(ABC):
    """How blocks of experts of `hidden_size` are stored.

    Class attributes: `name` identifies the encoding in plans. `dtype` is the dtype of the weights
    that it represents exactly. Both sizes must be multiples of `multiple`, and at most `max_row`.
    """

    name: ClassVar[str]
    dtype: ClassVar[str]
    multiple: ClassVar[int] = 1
    max_row: ClassVar[int] = 2**31

    def __init__(self, hidden_size: int, block_neurons: int, gated: bool = True):
        self.hidden_size = hidden_size
        self.block_neurons = block_neurons
        self.gated = gated

    def __eq__(self, other: object) -> bool:
        """True if blocks of the other encoding have the same layout."""
        return isinstance(other, Encoding) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[str, int, int, bool]:
        return self.name, self.hidden_size, self.block_neurons, self.gated

    @property
    def rows_per_neuron(self) -> int:
        """2: gate and up, or 1: up alone."""
        return 2 if self.gated else 1

    @property
    def block_weights(self) -> int:
        """Number of weights of a block."""
        return (self.rows_per_neuron + 1) * self.block_neurons * self.hidden_size

    @property
    @abstractmethod
    def block_bytes(self) -> int:
        """Bytes of one block. All blocks of an encoding have the same size."""

    @property
    def decoded_bytes(self) -> int:
        """Bytes of a block's weights as returned by `decode`. 0 if they are views of the block."""
        return 0

    @abstractmethod
    def encode(
        self, blocks: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, first_neuron: int
    ) -> list[Tensor]:
        """Encodes the expert's neurons from `first_neuron` on into `blocks`.

        Neurons past the last one are stored as zeros, which add nothing to the output.

        Args:
            blocks: uint8 [count, block_bytes] in host memory, overwritten.
            gate, up: [intermediate, hidden], of a dtype that converts to `dtype` without loss.
                Without a gate, `gate` is ignored.
            down: [hidden, intermediate].

        Returns:
            Memory that the blocks refer to, to be kept as long as they are used. Usually empty.
        """

    @abstractmethod
    def decode(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Decodes `blocks`, uint8 [count, block_bytes], on their device.

        Returns:
            Gate rows above up rows [count, rows_per_neuron * block_neurons, hidden], and down
            columns [count, hidden, block_neurons]. Views of `blocks` if the encoding allows it.
        """

    @classmethod
    def size_problem(cls, size: int) -> str | None:
        """Why neither `hidden_size` nor `block_neurons` can be `size`. None if they can."""
        if size % cls.multiple:
            return f"{size} is not a multiple of {cls.multiple}"
        return None if size <= cls.max_row else f"{size} is not at most {cls.max_row}"

    @classmethod
    def available(cls) -> bool:
        """True if blocks can be encoded here."""
        return True

    def blocks_per_expert(self, intermediate_size: int) -> int:
        return -(-intermediate_size // self.block_neurons)

    def expert_bytes(self, intermediate_size: int) -> int:
        """Bytes of one expert. The last block is padded if the expert does not fill it."""
        return self.blocks_per_expert(intermediate_size) * self.block_bytes
