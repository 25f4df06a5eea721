"""Chooses the kernels by encoding. To add a set of kernels, add a line to each table.

An encoding without kernels of its own is decoded and computed by PyTorch: slow but correct.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from fiddler_run.encodings.base import Encoding
from fiddler_run.kernels.cpu import CompiledExperts, CpuExperts, PyTorchExperts
from fiddler_run.kernels.library import compiled
from fiddler_run.kernels.pool import shared_pool
from fiddler_run.kernels.pytorch import apply_blocks
from fiddler_run.plan.activation import SILU, Activation
from fiddler_run.system.files import reason

if TYPE_CHECKING:  # it imports triton
    from fiddler_run.kernels.gpu import GpuKernels

ALIGNMENT = 32  # of hidden size and block_neurons, required by cpu.cpp
SPIN_US = 1000  # longer than a GPU takes for the dense part of a layer
SPIN_BESIDE_PYTORCH_US = 20  # where PyTorch needs the same cores for the dense part


@dataclass(frozen=True)
class Kernels:
    """The kernels for blocks of one encoding.

    `cpu` serves blocks in host memory. `decode` serves small batches on a GPU, together with the
    CPU's threads, and large batches of small experts; None: the prefill path takes small batches
    too. `apply(blocks, states)` serves large batches on the device, one expert at a time.
    """

    cpu: CpuExperts
    decode: GpuKernels | None
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def kernels_for(
    block_format: Encoding,
    device: torch.device,
    threads: int,
    pinned: bool = False,
    activation: Activation = SILU,
) -> Kernels:
    """The fastest kernels for such blocks. Without a GPU, the CPU's kernels serve both parts.

    Args:
        device: holds the resident blocks.
        threads: number of CPU threads.
        pinned: keep each thread on its own core.
        activation: of the experts.
    """
    assert activation.gated == block_format.gated
    on_gpu = device.type == "cuda"
    spin_us = SPIN_US if on_gpu else SPIN_BESIDE_PYTORCH_US
    make_cpu = CPU.get(block_format.name, lambda *_: None)
    cpu = make_cpu(block_format, activation, threads, spin_us, pinned)
    cpu = cpu or PyTorchExperts(block_format, activation)
    if not on_gpu:
        return Kernels(cpu, None, cpu.apply)
    gpu = None
    # While the GPU waits for the CPU's threads, they must not depend on Python's.
    if cpu.finishes_alone or block_format.decoded_bytes:
        gpu = GPU.get(block_format.name, lambda *_: None)(block_format, activation)
    if not cpu.finishes_alone:
        _say_once(
            "decode will be slower: it needs the CPU kernel with at least two threads, and"
            " experts in bfloat16"
        )
    elif block_format.name not in GPU:
        _say_once(f"decode will be slower: there are no GPU kernels for {block_format.name}")
    decode = gpu.unpack if gpu and block_format.decoded_bytes else None
    apply = partial(apply_blocks, block_format, decode=decode, activation=activation)
    return Kernels(cpu, gpu if cpu.finishes_alone else None, apply)


def _compiled(
    block_format: Encoding, activation: Activation, threads: int, spin_us: int, pinned: bool
) -> CpuExperts | None:
    aligned = (
        block_format.hidden_size % ALIGNMENT == 0 and block_format.block_neurons % ALIGNMENT == 0
    )
    if not aligned or not compiled():
        return None
    return CompiledExperts(block_format, shared_pool(threads, spin_us, pinned), activation)


def _triton(block_format: Encoding, activation: Activation) -> GpuKernels | None:
    if not find_spec("triton"):  # included in PyTorch for CUDA on Linux
        return None
    from fiddler_run.kernels.gpu import GpuKernels, supports

    if not supports(block_format):
        return None
    kernels = GpuKernels(block_format, activation)
    try:
        kernels.compile()
    # Triton needs a C compiler and Python's headers, and raises any type
    except Exception as error:
        logging.getLogger("fiddler_run").warning(
            "the GPU kernels cannot be compiled; decode will be slower (%s)", reason(error)
        )
        return None
    return kernels


def has_kernels(block_format: Encoding, device: torch.device) -> bool:
    """True if such blocks have kernels of their own, on the CPU and on the device."""
    tables = (CPU, GPU) if device.type == "cuda" else (CPU,)
    listed = all(block_format.name in table for table in tables)
    return listed and compiled() and block_format.available()


@cache
def _say_once(warning: str) -> None:
    logging.getLogger("fiddler_run").warning(warning)


CPU = {"bf16": _compiled, "lossless12": _compiled}
GPU = {"bf16": _triton, "lossless12": _triton}
