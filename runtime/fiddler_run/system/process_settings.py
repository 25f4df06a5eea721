"""Settings that affect the whole process. They are set while needed and restored afterwards."""

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DIVIDED_BYTES = 1_000_000  # 0.1 ms of one core's memory bandwidth
_lock = threading.Lock()
_turns = 0  # turns in progress, of all models
_before: tuple[int, bool] | None = None  # the settings before the first of these turns
_caps: dict[int, dict[int, int]] = {}  # by GPU: the bytes that each loaded model may allocate


@contextmanager
def while_running(cpu_threads: int | None) -> Iterator[None]:
    """Sets PyTorch's number of threads, unless None, and disables cuDNN attention.

    cuDNN attention, which PyTorch prefers on some GPUs, makes a new plan for each length of the
    cache. That takes 0.05 to 0.14 s per token on an H100.
    """
    global _turns, _before
    with _lock:
        if _turns == 0:
            _before = torch.get_num_threads(), torch.backends.cuda.cudnn_sdp_enabled()
        _turns += 1
        threads, cudnn = _before
    if cpu_threads not in (None, torch.get_num_threads()):
        torch.set_num_threads(cpu_threads)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        if cpu_threads is not None:
            # The calling thread's number, as it was before the first turn in progress.
            torch.set_num_threads(threads)
        with _lock:
            _turns -= 1
            if _turns == 0:
                torch.backends.cuda.enable_cudnn_sdp(cudnn)


def _after_fork() -> None:
    """Resets the state in a forked process, where the lock's holder no longer exists."""
    global _lock, _turns
    _lock = threading.Lock()
    _turns = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def dense_threads(
    cpu_threads: int, layer_bytes: int, on_gpu: bool = False, own_threads: bool = False
) -> int:
    """The number of PyTorch's threads for `layer_bytes` of dense weights per layer.

    Splitting little work over threads costs as much as it saves, and far more while others use the
    cores.

    Args:
        on_gpu: the dense weights are on a GPU.
        own_threads: experts are computed by other threads than PyTorch's.
    """
    if on_gpu and own_threads:
        return 1  # PyTorch has nothing to compute here
    return cpu_threads if layer_bytes >= DIVIDED_BYTES else 1


def allow_gpu_memory(owner: object, device: torch.device, num_bytes: int) -> None:
    """Lets PyTorch allocate `num_bytes` for `owner` on `device`, as long as `owner` lives.

    PyTorch has one limit per process: the sum over all owners, or none without owners.
    """
    _caps.setdefault(device.index, {})[id(owner)] = num_bytes
    _apply_cap(device)
    weakref.finalize(owner, _forget, device, id(owner), os.getpid()).atexit = False


def allowed_gpu_bytes(device: torch.device) -> int | None:
    """The bytes that PyTorch may allocate on `device`. None: unlimited."""
    return sum(_caps.get(device.index, {}).values()) or None


def _forget(device: torch.device, owner: int, pid: int) -> None:
    _caps[device.index].pop(owner, None)
    if os.getpid() == pid:  # a forked process has no CUDA
        _apply_cap(device)


def _apply_cap(device: torch.device) -> None:
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = allowed_gpu_bytes(device)
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, allowed / total) if allowed else 1.0, device
    )
