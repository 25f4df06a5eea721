"""Describes PyTorch on this machine, in a separate process.

`python -m fiddler_opt.insight.probe ENCODING HIDDEN_SIZE BLOCK_NEURONS` prints one line of JSON.
With a GPU, it then copies to the GPU until stdin ends and prints the bytes per second.
"""

import json
import resource
import sys
import threading
import time

import torch

from fiddler_run.encodings.base import Encoding
from fiddler_run.encodings.table import ENCODINGS
from fiddler_run.kernels.library import library, supported_variants
from fiddler_run.kernels.table import GPU
from fiddler_run.system.gpu import current_gpu, num_gpus

COPIED_BYTES = 2**26


def main() -> None:
    encoding, hidden_size, block_neurons = sys.argv[1:]
    block_format = ENCODINGS[encoding](int(hidden_size), int(block_neurons))
    answer = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "refusal": None,
        "gpu": None,
    }
    answer["variants"] = supported_variants() if library() else None
    try:
        torch.cuda.init()
    except Exception as error:  # PyTorch raises AssertionError, RuntimeError and others
        answer["refusal"] = str(error)
        print(json.dumps(answer))
        return
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8)
    answer["gpu"] = describe_gpu(source, block_format)
    print(json.dumps(answer), flush=True)
    print(copy_until_stdin_ends(source))


def describe_gpu(source: torch.Tensor, block_format: Encoding) -> dict:
    """The current GPU's entry in the answer.

    Compiles the decode kernels, and tries to page-lock `source`, which is in host memory. The
    caller then copies from it.
    """
    gpu = current_gpu()
    return {
        "name": gpu.name,
        "bus_id": gpu.bus_id,
        "memory_bytes": gpu.total_bytes,
        "count": num_gpus(),
        **kernels(block_format),
        "locks_freely": locks_freely(source),
    }


def kernels(block_format: Encoding) -> dict:
    """The state of the GPU kernels.

    `kernels_suit`: true if they support such blocks. `kernel_error`: why they cannot be compiled,
    or None.
    """
    suit = block_format.name in GPU
    error = None
    try:
        if suit:
            from fiddler_run.kernels import gpu

            suit = gpu.supports(block_format)
            if suit:
                gpu.GpuKernels(block_format).compile()
    except Exception as caught:  # Triton raises many types
        error = str(caught).strip() or type(caught).__name__
    return {"kernels_suit": suit, "kernel_error": error}


def locks_freely(source: torch.Tensor) -> bool:
    """Sets `ulimit -l` to 0 and tries to page-lock `source`. True if that succeeds."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, hard_limit))
    return int(torch.cuda.cudart().cudaHostRegister(source.data_ptr(), source.nbytes, 0)) == 0


def copy_until_stdin_ends(source: torch.Tensor) -> float:
    """Copies to the GPU until stdin ends. Returns bytes per second."""
    target = torch.empty_like(source, device="cuda")
    listener = threading.Thread(target=sys.stdin.read)
    listener.start()
    started = time.perf_counter()
    copies = 0
    while listener.is_alive():
        target.copy_(source)
        copies += 1
    return copies * source.nbytes / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
