"""The expert engine of a model: the shared resources and the two paths that use them."""

import torch

from fiddler_run.encodings.base import Encoding
from fiddler_run.engine.decode_path import DecodePath
from fiddler_run.engine.prefill_path import PrefillPath
from fiddler_run.engine.resources import Resources
from fiddler_run.kernels.table import Kernels, kernels_for
from fiddler_run.plan.activation import SILU, Activation


class ExpertEngine:
    """Runs each layer's experts on CPU, link and device at the same time.

    `decode` serves small batches on a GPU, `prefill` everything else.
    """

    def __init__(
        self,
        block_format: Encoding,
        kernels: Kernels,
        device: torch.device,
        slots: int,
        output_dtype: torch.dtype | None = None,
    ):
        """Takes the arguments of `Resources`."""
        self.resources = Resources(block_format, kernels, device, slots, output_dtype)
        self.decode = DecodePath(self.resources)
        self.prefill = PrefillPath(self.resources)


def make_engine(
    block_format: Encoding,
    device: torch.device,
    threads: int,
    slots: int,
    pinned: bool = False,
    activation: Activation = SILU,
    output_dtype: torch.dtype | None = None,
) -> ExpertEngine:
    """The engine with the fastest kernels for these blocks.

    Args:
        device: holds the resident blocks.
        threads: number of CPU threads.
        slots: blocks of device memory to stream through. 0 if nothing is streamed.
        pinned: keep each thread on its own core.
        activation: of the experts.
        output_dtype: of a layer's output. None: the experts' dtype.
    """
    kernels = kernels_for(block_format, device, threads, pinned, activation)
    return ExpertEngine(block_format, kernels, device, slots, output_dtype)
