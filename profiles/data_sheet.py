"""Writes rtx4090.machine.yaml from data sheets: what a machine could do at most, for planning before it is at hand.

`python profiles/data_sheet.py` rewrites the file beside it. Each executor is a roofline: an expert takes the longer of reading
its weights at full bandwidth and computing at full speed. The CPU and the link share the host memory's bandwidth.
"""

from pathlib import Path

from fiddler_opt.machine import Cpu, Device, Link, MachineProfile, Made, MeasuredShape, Memory
from fiddler_opt.model import DEFAULT_MODEL, ModelSpec

GPU, GPU_MEMORY_BYTES, GPU_BYTES_PER_S, GPU_FLOPS = "NVIDIA GeForce RTX 4090", 24_564 * 2**20, 1008e9, 165.2e12
LINK, LINK_BYTES_PER_S = (4, 16), 31.5e9  # PCIe generation, lanes
CPU, CPU_CORES, CPU_FLOPS = "AMD Ryzen 9 7950X", 16, 16 * 4.5e9 * 64  # AVX-512 bf16: 64 operations a cycle and core
HOST_MEMORY, HOST_BYTES_PER_S, HOST_MEMORY_BYTES = "2 channels of DDR5-5200", 83.2e9, 128 * 2**30
# No data sheet states these three; they are allowances.
DRIVER_BYTES, DISPATCH_US, HOST_EMBEDDING_US = 600_000_000, 100.0, 50.0

TOKENS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def roofline_us(weight_bytes: int, tokens: int, bytes_per_s: float, flops: float) -> float:
    """bf16 weights: two bytes and two operations each, so a token costs as many operations as there are bytes."""
    return round(1e6 * max(weight_bytes / bytes_per_s, tokens * weight_bytes / flops), 1)


def absent_expert(expert_bytes: int, tokens: int) -> dict[float, float]:
    """Microseconds of an expert in host memory by the share sent over the link: from none to all, with the best between."""
    host_us = 1e6 * expert_bytes / HOST_BYTES_PER_S
    cpu_us = roofline_us(expert_bytes, tokens, HOST_BYTES_PER_S, CPU_FLOPS)
    link_us = 1e6 * expert_bytes / LINK_BYTES_PER_S
    best_us = max(host_us, cpu_us * link_us / (cpu_us + link_us))
    shares = sorted({*(tenth / 10 for tenth in range(11)), round(max(0.0, 1 - best_us / cpu_us), 5)})
    return {share: round(max(host_us, (1 - share) * cpu_us, share * link_us), 1) for share in shares}


def data_sheet_profile() -> MachineProfile:
    model = ModelSpec.load(DEFAULT_MODEL)
    expert_bytes, layer_bytes = model.expert_bytes, model.dense_layer_bytes
    output_head_bytes = model.head_bytes // 2  # of the embedding table, a step reads one row
    dense_layer_us = {tokens: roofline_us(layer_bytes, tokens, GPU_BYTES_PER_S, GPU_FLOPS) + DISPATCH_US for tokens in TOKENS}
    return MachineProfile(
        version=2,
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
            kind="cuda", name=GPU, memory_bytes=GPU_MEMORY_BYTES, free_bytes=GPU_MEMORY_BYTES, context_bytes=DRIVER_BYTES
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
        absent_expert_us={tokens: absent_expert(expert_bytes, tokens) for tokens in TOKENS},
        device_expert_us={tokens: roofline_us(expert_bytes, tokens, GPU_BYTES_PER_S, GPU_FLOPS) for tokens in TOKENS},
        dense_layer_us=dense_layer_us,
        dense_device_us=dense_layer_us,
        head_us=dict.fromkeys(TOKENS, roofline_us(output_head_bytes, 1, GPU_BYTES_PER_S, GPU_FLOPS)),
        host_embedding_us=dict.fromkeys(TOKENS, HOST_EMBEDDING_US),
        spread={},
        provenance=Made(command="python profiles/data_sheet.py", created="2026-11-23", software="none: not measured"),
    )


if __name__ == "__main__":
    data_sheet_profile().save(Path(__file__).with_name("rtx4090.machine.yaml"))
