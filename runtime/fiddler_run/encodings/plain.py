"""Plain weights: gate rows, up rows and down columns, row-major, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from fiddler_run.encodings.base import Encoding

if TYPE_CHECKING:
    from torch import Tensor


class Plain(Encoding):
    """Base of the encodings that store each weight in its own dtype."""

    weight_bytes: ClassVar[int]

    @property
    def block_bytes(self) -> int:
        return self.block_weights * self.weight_bytes

    def encode(
        self, blocks: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, first_neuron: int
    ) -> list[Tensor]:
        count = len(blocks)
        size = self.block_neurons
        whole = min(count, max(0, len(up) - first_neuron) // size)
        stop = first_neuron + whole * size
        rows, down_columns = self._views(blocks)
        matrices = list(
            zip(rows.split(size, dim=1), (gate, up)[-self.rows_per_neuron :], strict=True)
        )
        for stored, matrix in matrices:
            stored[:whole] = matrix[first_neuron:stop].view(whole, size, self.hidden_size)
        columns = down[:, first_neuron:stop].unflatten(1, (whole, size))
        down_columns[:whole] = columns.transpose(0, 1)
        if whole < count:
            rest = max(0, len(up) - stop)
            blocks[whole:].zero_()
            for stored, matrix in matrices:
                stored[whole, :rest] = matrix[stop:]
            down_columns[whole, :, :rest] = down[:, stop:]
        return []

    def decode(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        return self._views(blocks)

    def _views(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        matrix = self.block_neurons * self.hidden_size
        weights = blocks.view(getattr(torch, self.dtype))
        gate_up, down = weights.split((self.rows_per_neuron * matrix, matrix), dim=1)
        gate_up_rows = gate_up.unflatten(1, (-1, self.hidden_size))
        down_columns = down.unflatten(1, (self.hidden_size, -1))
        return gate_up_rows, down_columns


class Bf16(Plain):
    name = "bf16"
    dtype = "bfloat16"
    weight_bytes = 2


class Fp16(Plain):
    name = "fp16"
    dtype = "float16"
    weight_bytes = 2


class Fp32(Plain):
    name = "fp32"
    dtype = "float32"
    weight_bytes = 4
