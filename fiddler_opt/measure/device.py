"""Describes the device in a machine profile: its name, its memory, and a process's share of it."""

import os
import subprocess
import sys

import torch

from fiddler_run.system.gpu import current_gpu
from fiddler_run.system.host import available_memory_bytes


def describe_device(device: torch.device) -> dict:
    """The fields of `machine_parts.Device`."""
    if device.type == "cpu":
        return {
            "kind": "cpu",
            "name": "the CPU (no CUDA device)",
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "free_bytes": available_memory_bytes(),
            "context_bytes": 0,
        }
    gpu = current_gpu()
    return {
        "kind": "cuda",
        "name": gpu.name,
        "memory_bytes": gpu.total_bytes,
        "free_bytes": gpu.free_bytes,
        "context_bytes": context_bytes(device),
    }


def context_bytes(device: torch.device) -> int:
    """GPU memory that a process takes besides PyTorch's allocator.

    Measured from this process while another one starts to use the GPU.
    """
    program = (
        "import sys, torch; torch.cuda.set_device(int(sys.argv[1])); x = torch.ones(64, 64,"
        " device='cuda', dtype=torch.bfloat16); torch.nn.functional.silu(x @ x).sum().item();"
        " print(torch.cuda.memory_reserved(), flush=True); sys.stdin.read()"
    )
    before, _ = torch.cuda.mem_get_info(device)
    # -P: a torch.py in the working directory must not shadow PyTorch.
    command = [sys.executable, "-P", "-c", program, str(device.index)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        allocated = int(other.stdout.readline())
        after, _ = torch.cuda.mem_get_info(device)
        other.stdin.close()
    return max(0, before - after - allocated)
