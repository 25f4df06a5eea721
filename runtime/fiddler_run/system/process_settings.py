"""What the runtime sets for the whole process: set while it is needed, and put back afterwards."""

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DIVIDED_BYTES = 1_000_000  # a tenth of a millisecond of one core's memory bandwidth
_lock = threading.Lock()
_turns = 0  # under way, of all models
_before: tuple[int, bool] | None = None  # what was set before the first of them
_caps: dict[int, dict[int, int]] = {}  # by GPU: bytes that each loaded model may take


@contextmanager
def while_running(cpu_threads: int | None) -> Iterator[None]:
    """Sets PyTorch's number of threads, unless it is None, and switches cuDNN's attention off.

    cuDNN's attention, which PyTorch prefers on some GPUs, makes a new plan for each length of the
    cache: 0.05 to 0.14 s a token on an H100.
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
            # The number of the calling thread, as it was before the first of the turns under way.
            torch.set_num_threads(threads)
        with _lock:
            _turns -= 1
            if _turns == 0:
                torch.backends.cuda.enable_cudnn_sdp(cudnn)


def _after_fork() -> None:
    """A thread that held the lock, or had its turn, is not there any more."""
    global _lock, _turns
    _lock = threading.Lock()
    _turns = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def dense_threads(cpu_threads: int, layer_bytes: int) -> int:
    """PyTorch's threads for a model with `layer_bytes` of weights outside the experts in each
    layer.

    Splitting little work over threads costs as much as it saves, and far more where other programs
    use the cores.
    """
    return cpu_threads if layer_bytes >= DIVIDED_BYTES else 1


def allow_gpu_memory(owner: object, device: torch.device, num_bytes: int) -> None:
    """Lets PyTorch's allocator take `num_bytes` for `owner` on `device`, as long as `owner` lives.

    The allocator has one limit for a process: the sum for all owners; none once they are gone.
    """
    _caps.setdefault(device.index, {})[id(owner)] = num_bytes
    _apply_cap(device)
    weakref.finalize(owner, _forget, device, id(owner), os.getpid()).atexit = False


def allowed_gpu_bytes(device: torch.device) -> int | None:
    """What PyTorch's allocator may take on `device`; None if nothing limits it."""
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
