"""Describes the GPU that this process uses. Imports PyTorch on demand."""

from __future__ import annotations

from dataclasses import dataclass


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

    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info()
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    bus = f"{device.pci_domain_id:04x}:{device.pci_bus_id:02x}:{device.pci_device_id:02x}.0"
    return Gpu(device.name, bus, total, free + cached)
