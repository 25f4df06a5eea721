"""What a machine profile says of the device: its name, its memory, and what a process that uses it takes of that."""

import os
import subprocess
import sys

import torch

from fiddler_run.host import available_memory_bytes


def describe_device(device: torch.device) -> dict:
    """The fields of `machine.Device`."""
    if device.type == "cpu":
        memory, free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), available_memory_bytes()
        return {"kind": "host", "name": "the CPU (no CUDA device)", "memory_bytes": memory, "free_bytes": free, "context_bytes": 0}
    free, total = torch.cuda.mem_get_info(device)
    name, context = torch.cuda.get_device_name(device), context_bytes(device)
    return {"kind": "cuda", "name": name, "memory_bytes": total, "free_bytes": free, "context_bytes": context}


def context_bytes(device: torch.device) -> int:
    """GPU memory that one process takes besides PyTorch's allocator: seen from here while another process starts to use it."""
    program = (
        "import sys, torch; torch.cuda.set_device(int(sys.argv[1])); x = torch.ones(64, 64, device='cuda', dtype=torch.bfloat16); "
        "torch.nn.functional.silu(x @ x).sum().item(); print(torch.cuda.memory_reserved(), flush=True); sys.stdin.read()"
    )
    before, _ = torch.cuda.mem_get_info(device)
    # -P: a torch.py in the working directory is not PyTorch.
    command = [sys.executable, "-P", "-c", program, str(device.index)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        allocated = int(other.stdout.readline())
        after, _ = torch.cuda.mem_get_info(device)
        other.stdin.close()
    return max(0, before - after - allocated)
