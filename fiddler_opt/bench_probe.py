"""What PyTorch finds on this machine, in a process of its own: `python -m fiddler_opt.bench_probe DTYPE HIDDEN BLOCK_NEURONS`.

One line of JSON on stdout; where there is a GPU, it then copies to it until its stdin ends, and prints the bytes per second.
"""

import json
import resource
import sys
import threading
import time

import torch

from fiddler_run.kernels.cpu import library, supported_variants

COPIED_BYTES = 2**26


def main() -> None:
    dtype, hidden, block_neurons = getattr(torch, sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    answer = {"version": torch.__version__, "cuda": torch.version.cuda, "refusal": None, "gpu": None}
    answer["variants"] = supported_variants() if library() else None
    try:
        torch.cuda.init()
    except Exception as error:  # AssertionError, RuntimeError or others: whatever PyTorch says against a GPU
        answer["refusal"] = str(error)
        print(json.dumps(answer))
        return
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8)
    answer["gpu"] = describe_gpu(source, dtype, hidden, block_neurons)
    print(json.dumps(answer), flush=True)
    print(copy_until_stdin_ends(source))


def describe_gpu(source: torch.Tensor, dtype: torch.dtype, hidden: int, block_neurons: int) -> dict:
    """The current GPU; `source` in host memory ends page-locked where that can be."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": device.name,
        "bus_id": bus_id(device),
        "memory_bytes": device.total_memory,
        **kernels(dtype, hidden, block_neurons),
        "locks_freely": locks_freely(source),
    }


def bus_id(device) -> str:
    """`0000:01:00.0`, of what `torch.cuda.get_device_properties` returns."""
    return f"{device.pci_domain_id:04x}:{device.pci_bus_id:02x}:{device.pci_device_id:02x}.0"


def kernels(dtype: torch.dtype, hidden: int, block_neurons: int) -> dict:
    """Whether the GPU kernels are for such blocks, and why they cannot be compiled; None: they can."""
    suit, error = True, None
    try:
        from fiddler_run.kernels import gpu

        suit = gpu.supports(dtype, hidden, block_neurons)
        if suit:
            gpu.compile_all(dtype, hidden, block_neurons)
    except Exception as caught:  # Triton raises what it likes
        error = str(caught).strip() or type(caught).__name__
    return {"kernels_suit": suit, "kernel_error": error}


def locks_freely(source: torch.Tensor) -> bool:
    """Whether memory can be page-locked although `ulimit -l` allows none."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, hard_limit))
    return int(torch.cuda.cudart().cudaHostRegister(source.data_ptr(), source.nbytes, 0)) == 0


def copy_until_stdin_ends(source: torch.Tensor) -> float:
    """Bytes per second to the GPU."""
    target = torch.empty_like(source, device="cuda")
    listener = threading.Thread(target=sys.stdin.read)
    listener.start()
    started, copies = time.perf_counter(), 0
    while listener.is_alive():
        target.copy_(source)
        copies += 1
    return copies * source.nbytes / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
