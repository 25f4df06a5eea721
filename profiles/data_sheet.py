"""Writes rtx4090.machine.yaml from data sheets, to plan for a machine without having it.

`python profiles/data_sheet.py` rewrites the file next to it. Each resource is a roofline: the time
of an expert is the longer of reading its weights at full bandwidth and computing at full speed. The
CPU and the link share the bandwidth of host memory.
"""

from pathlib import Path

from fiddler_opt.inputs.machine import (
    Cpu,
    Device,
    EncodedExperts,
    KernelLimits,
    Link,
    MachineProfile,
    MeasuredShape,
    Memory,
    ProfileProvenance,
)
from fiddler_opt.inputs.model import DEFAULT_MODEL, ModelSpec

GPU = "NVIDIA GeForce RTX 4090"
GPU_MEMORY_BYTES = 24_564 * 2**20
GPU_BYTES_PER_S = 1008e9
GPU_FLOPS = 165.2e12
# PCIe generation, lanes
LINK = (4, 16)
LINK_BYTES_PER_S = 31.5e9
# AVX-512 bf16: 64 operations per cycle and core
CPU = "AMD Ryzen 9 7950X"
CPU_CORES = 16
CPU_FLOPS = 16 * 4.5e9 * 64
HOST_MEMORY = "2 channels of DDR5-5200"
HOST_BYTES_PER_S = 83.2e9
HOST_MEMORY_BYTES = 128 * 2**30
# Not in data sheets; these are allowances.
DRIVER_BYTES = 600_000_000
DISPATCH_US = 100.0

TOKENS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def roofline_us(
    weight_bytes: int, tokens: int, bytes_per_s: float, flops: float, stored_bytes: int = 0
) -> float:
    """Microseconds for weights of two bytes, and two operations per token, each.

    `stored_bytes` are read instead of `weight_bytes`, if given.
    """
    read_s = (stored_bytes or weight_bytes) / bytes_per_s
    return round(1e6 * max(read_s, tokens * weight_bytes / flops), 1)


def host_expert(weight_bytes: int, stored_bytes: int, tokens: int) -> dict[float, float]:
    """Microseconds of a host expert by stream share, including the best share."""
    host_us = 1e6 * stored_bytes / HOST_BYTES_PER_S
    cpu_us = roofline_us(weight_bytes, tokens, HOST_BYTES_PER_S, CPU_FLOPS, stored_bytes)
    link_us = 1e6 * stored_bytes / LINK_BYTES_PER_S
    best_us = max(host_us, cpu_us * link_us / (cpu_us + link_us))
    shares = sorted(
        {*(tenth / 10 for tenth in range(11)), round(max(0.0, 1 - best_us / cpu_us), 5)}
    )
    return {
        share: round(max(host_us, (1 - share) * cpu_us, share * link_us), 1) for share in shares
    }


def experts(model: ModelSpec) -> EncodedExperts:
    """Times of experts in the model's encoding. Unpacking is assumed to be hidden by the reads."""
    weight_bytes = 6 * model.shape.hidden_size * model.shape.intermediate_size
    stored_bytes = model.expert_bytes
    return EncodedExperts(
        block_neurons=model.block_neurons,
        expert_bytes=stored_bytes,
        host_expert_us={
            tokens: host_expert(weight_bytes, stored_bytes, tokens) for tokens in TOKENS
        },
        resident_expert_us={
            tokens: roofline_us(weight_bytes, tokens, GPU_BYTES_PER_S, GPU_FLOPS, stored_bytes)
            for tokens in TOKENS
        },
    )


def data_sheet_profile() -> MachineProfile:
    model = ModelSpec.load(DEFAULT_MODEL)
    plain = experts(model)
    layer_bytes = model.dense_layer_bytes
    output_head_bytes = model.head_bytes // 2  # a step reads only one row of the embedding table
    dense_layer_us = {
        tokens: roofline_us(layer_bytes, tokens, GPU_BYTES_PER_S, GPU_FLOPS) + DISPATCH_US
        for tokens in TOKENS
    }
    return MachineProfile(
        version=5,
        source="data sheet",
        cpu=Cpu(
            name=f"{CPU}, {HOST_MEMORY}",
            cores=2 * CPU_CORES,
            physical_cores=CPU_CORES,
            kernel="avx512bf16",
            threads=CPU_CORES,
            pinned=False,
            threads_us={},
            pinned_threads_us={},
        ),
        memory=Memory(available_bytes=HOST_MEMORY_BYTES, timed_bytes=0, memlock_bytes=None),
        device=Device(
            kind="cuda",
            name=GPU,
            memory_bytes=GPU_MEMORY_BYTES,
            free_bytes=GPU_MEMORY_BYTES,
            context_bytes=DRIVER_BYTES,
        ),
        link=Link(
            generation=LINK[0],
            width=LINK[1],
            h2d_bytes_per_s=LINK_BYTES_PER_S,
            h2d_pageable_bytes_per_s=None,
            d2h_bytes_per_s=LINK_BYTES_PER_S,
            round_trip_us=None,
        ),
        disk_bytes_per_s=None,
        shape=MeasuredShape.of(model),
        kernels=KernelLimits.of_runtime(),
        host_expert_us=plain.host_expert_us,
        resident_expert_us=plain.resident_expert_us,
        dense_layer_us=dense_layer_us,
        dense_device_us=dense_layer_us,
        head_us=dict.fromkeys(
            TOKENS, roofline_us(output_head_bytes, 1, GPU_BYTES_PER_S, GPU_FLOPS)
        ),
        encodings={name: experts(model.in_encoding(name)) for name in model.encodings[1:]},
        provenance=ProfileProvenance(
            command="python profiles/data_sheet.py",
            created="2026-11-27",
            software="none: not measured",
        ),
    )


if __name__ == "__main__":
    data_sheet_profile().save(Path(__file__).with_name("rtx4090.machine.yaml"))
