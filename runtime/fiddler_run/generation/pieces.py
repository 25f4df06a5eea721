"""The pieces of a tape."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from fiddler_run.engine.cuda_graphs import Capture


class UnrecordableError(Exception):
    """The forward pass does something that a replay would not repeat."""


class Step(NamedTuple):
    """What differs between steps besides the inputs: the cache, and masks by type of layer.

    A mask that is no dict is for all layers; None masks nothing.
    """

    cache: Cache
    masks: dict[str, Tensor | None] | Tensor | None


Border = Callable[[Step], None]
Call = Callable[[], None]


class Piece(NamedTuple):
    """Captured work, what to call before and after it is launched, and the borders that follow."""

    before: list[Call]
    capture: Capture
    after: list[Call]
    borders: list[Border]

    def replay(self, step: Step) -> None:
        for call in self.before:
            call()
        self.capture.replay()
        for call in self.after:
            call()
        for border in self.borders:
            border(step)


def kept(tensor: Tensor) -> Tensor:
    """A copy in memory of its own, which can be written to in and outside inference mode."""
    with torch.inference_mode(False):
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)
