"""The kernels by encoding: the only place that chooses. A new set is a line in each table.

An encoding without kernels of its own is decoded by itself and computed by PyTorch: slow, and
right.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec

import torch

from fiddler_run.encodings.base import Encoding
from fiddler_run.kernels.cpu import CompiledExperts, CpuExperts, PyTorchExperts
from fiddler_run.kernels.library import compiled
from fiddler_run.kernels.pool import shared_pool
from fiddler_run.kernels.pytorch import apply_blocks
from fiddler_run.system.files import reason

ALIGNMENT = 32  # of hidden size and block_neurons, for cpu.cpp
SPIN_US = 1000  # longer than a GPU takes for the dense part of a layer
SPIN_BESIDE_PYTORCH_US = 20  # where PyTorch needs the same cores for the dense part


@dataclass(frozen=True)
class Kernels:
    """What computes blocks of one encoding.

    `cpu`: blocks in host memory. `decode`: small batches on a GPU, with the CPU's threads; None:
    the prefill path takes them too. `apply(blocks, states)`: large batches on the device.
    """

    cpu: CpuExperts
    decode: object | None
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def kernels_for(
    block_format: Encoding, device: torch.device, threads: int, pinned: bool = False
) -> Kernels:
    """The fastest kernels for such blocks. Without a GPU, the CPU's stand in for the device's.

    Args:
        device: where resident blocks are.
        threads: of the CPU; `pinned`: each stays on its own core.
    """
    on_gpu = device.type == "cuda"
    spin_us = SPIN_US if on_gpu else SPIN_BESIDE_PYTORCH_US
    make_cpu = CPU.get(block_format.name, lambda *_: None)
    cpu = make_cpu(block_format, threads, spin_us, pinned) or PyTorchExperts(block_format)
    if not on_gpu:
        return Kernels(cpu, None, cpu.apply)
    decode = None
    if cpu.finishes_alone:  # while the GPU waits for the CPU's threads, they must not need Python's
        decode = DECODE.get(block_format.name, lambda _: None)(block_format)
    else:
        _say_once(
            "decode will be slower: it needs the CPU kernel, at least two of its threads, and"
            " experts in bfloat16"
        )
    return Kernels(cpu, decode, partial(apply_blocks, block_format))


def _compiled(
    block_format: Encoding, threads: int, spin_us: int, pinned: bool
) -> CpuExperts | None:
    aligned = (
        block_format.hidden_size % ALIGNMENT == 0 and block_format.block_neurons % ALIGNMENT == 0
    )
    if not aligned or not compiled():
        return None
    return CompiledExperts(block_format, shared_pool(threads, spin_us, pinned))


def _triton(block_format: Encoding) -> object | None:
    if not find_spec("triton"):  # comes with PyTorch for CUDA on Linux
        return None
    from fiddler_run.kernels.gpu import DecodeKernels, supports

    if not supports(block_format):
        return None
    kernels = DecodeKernels(block_format)
    try:
        kernels.compile()
    except Exception as error:  # Triton needs a C compiler and Python's headers; it raises anything
        logging.getLogger("fiddler_run").warning(
            "the GPU kernels cannot be compiled, decode will be slower (%s)", reason(error)
        )
        return None
    return kernels


@cache
def _say_once(warning: str) -> None:
    logging.getLogger("fiddler_run").warning(warning)


CPU = {"bf16": _compiled}
DECODE = {"bf16": _triton}
