"""Describes the GPU that this process uses. Imports PyTorch on demand."""

from __future__ import annotations

from dataclasses import dataclass

from fiddler_run.errors import FiddlerError
from fiddler_run.system.host import read


@dataclass(frozen=True)
class Gpu:
    """A GPU. `bus_id` is like `0000:01:00.0`; `free_bytes` is available to this process."""

    name: str
    bus_id: str
    total_bytes: int
    free_bytes: int


def current_gpu() -> Gpu | None:
    """The current CUDA device. None if there is none."""
    import torch

    return gpu_at(torch.cuda.current_device()) if torch.cuda.is_available() else None


def gpu_at(number: int) -> Gpu:
    """The CUDA device with this number. Takes some of its memory until the process ends.

    Raises:
        FiddlerError: the device cannot be used.
    """
    import torch

    try:
        free, total = torch.cuda.mem_get_info(number)
    except RuntimeError as error:  # other programs use all of it, or it is theirs alone
        reason = str(error).splitlines()[0]
        raise FiddlerError(
            f"GPU {number} cannot be used: {reason}; end the programs that use it"
        ) from None
    cached = torch.cuda.memory_reserved(number) - torch.cuda.memory_allocated(number)
    name = torch.cuda.get_device_properties(number).name
    return Gpu(name, _bus_id(number), total, free + cached)


def num_gpus() -> int:
    """The number of GPUs that this process may use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_numa_nodes() -> list[int]:
    """The NUMA node of each GPU. 0 if unknown."""
    numbers = range(num_gpus())
    found = (read(f"sys/bus/pci/devices/{_bus_id(number)}/numa_node") for number in numbers)
    return [int(node) if node.isdigit() else 0 for node in found]


def _bus_id(number: int) -> str:
    import torch

    device = torch.cuda.get_device_properties(number)
    return f"{device.pci_domain_id:04x}:{device.pci_bus_id:02x}:{device.pci_device_id:02x}.0"
