"""Measures a MachineProfile. Rule: it times the functions that the runtime calls, on weights of the model's own shape.

Experts are visited in turn over more memory than the last-level cache holds, as the runtime does.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from itertools import cycle

import torch

from fiddler_opt.bench_dense import time_dense
from fiddler_opt.bench_timing import medians_us, positive_us
from fiddler_opt.machine import Cpu, Device, MachineProfile, Made, MeasuredShape
from fiddler_opt.memory import STAGED_BLOCKS
from fiddler_opt.model import ModelSpec
from fiddler_run.arena import TORCH_DTYPES, Arena
from fiddler_run.dispatch import LayerDispatch
from fiddler_run.executors import Executors
from fiddler_run.host import available_memory_bytes, cpu_name, num_cores

WORKING_SET_BYTES = 16_000_000_000  # to meet memory as the runtime does, far from all caches
PART_OF_AVAILABLE_MEMORY = 0.25
GPU_WORKING_SET_BYTES = 1_500_000_000
CPU_TOKENS = (1, 2, 4, 8, 16, 32, 64)
GPU_TOKENS = (*CPU_TOKENS, 128, 256, 512, 1024)
AROUND_BALANCE = (-0.16, -0.08, -0.04, 0.0, 0.04, 0.08)  # shares tried, from the one that would keep CPU and link equally long busy


def measure_machine(model: ModelSpec, command: str, on_step: Callable[[str], None]) -> MachineProfile:
    """Times this machine on weights of `model`'s shape; `on_step` hears what is about to be timed."""
    bench = Bench(model)
    on_step("CPU threads")
    threads = bench.choose_threads()
    bench.use_threads(threads)
    on_step("experts on the CPU")
    cpu_us = {tokens: bench.expert_us(tokens, resident=0, share=0.0) for tokens in CPU_TOKENS}
    if bench.on_gpu:
        on_step("experts on the GPU")
        blocks = bench.blocks_per_expert
        device_us = {tokens: bench.expert_us(tokens, resident=blocks, share=0.0) for tokens in GPU_TOKENS}
        on_step("CPU and link together")
        absent_us, stream_share = bench.best_shares()
        h2d = bench.h2d_bytes_per_s()
    else:  # the same cores would compute a "resident" block at the same speed, and there is no link
        device_us, absent_us, stream_share, h2d = cpu_us, cpu_us, {1: 0.0}, None
    on_step("layers without experts")
    dispatch_us = {tokens: bench.dispatch_us(tokens) for tokens in bench.tokens}
    dense_layer_us, head_us = time_dense(model, bench.device)
    return MachineProfile(
        version=1,
        source="measured",
        cpu=Cpu(name=cpu_name(), cores=num_cores(), threads=threads),
        device=describe_device(bench.device),
        shape=MeasuredShape.of(model),
        h2d_bytes_per_s=h2d,
        cpu_expert_us=cpu_us,
        device_expert_us=device_us,
        absent_expert_us=absent_us,
        stream_share=stream_share,
        dispatch_us=dispatch_us,
        dense_layer_us=dense_layer_us,
        head_us=head_us,
        provenance=Made(command=command, created=date.today().isoformat(), software=f"PyTorch {torch.__version__}"),
    )


class Bench:
    """Random experts of a model's shape, in host memory and, where there is a GPU, in its memory; timed dispatches over them."""

    def __init__(self, model: ModelSpec):
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.on_gpu else "cpu")
        self.tokens = GPU_TOKENS if self.on_gpu else CPU_TOKENS
        self.top_k = model.shape.num_experts_per_tok
        self.hidden_size, self.dtype = model.shape.hidden_size, TORCH_DTYPES[model.shape.dtype]
        self.block_neurons, self.block_elements = model.block_neurons, 3 * model.block_neurons * self.hidden_size
        self.blocks_per_expert = model.shape.blocks_per_expert(model.block_neurons)
        self.expert_bytes = model.expert_bytes
        everything = model.shape.num_layers * model.shape.num_experts
        working_set = min(WORKING_SET_BYTES, int(PART_OF_AVAILABLE_MEMORY * available_memory_bytes()))
        self.num_experts = min(everything, max(3, self.top_k, working_set // self.expert_bytes))
        self.host = Arena(self.num_experts * self.blocks_per_expert, self.block_elements, self.dtype, torch.device("cpu"))
        self.absent = list(self.host.blocks.split(self.blocks_per_expert))
        self.absent[0].normal_(std=0.02, generator=torch.Generator().manual_seed(0))
        for expert in self.absent[1:]:
            expert.copy_(self.absent[0])
        if self.on_gpu:
            self.host.pin()
            # As many as exceed the GPU's caches; some stand for several.
            on_gpu = [expert.to(self.device) for expert in self.absent[: max(1, GPU_WORKING_SET_BYTES // self.expert_bytes)]]
            self.resident = [on_gpu[number % len(on_gpu)] for number in range(self.num_experts)]
        else:
            self.resident = self.absent
        self.use_threads(num_cores())

    def use_threads(self, threads: int) -> None:
        torch.set_num_threads(threads)
        slots = STAGED_BLOCKS if self.on_gpu else 0
        self.executors = Executors(self.dtype, self.hidden_size, self.block_neurons, threads, slots, self.device)

    def expert_us(self, tokens: int, resident: int, share: float) -> float:
        """Microseconds that one expert adds to a dispatch in which every token chooses the same experts, as many as the model's
        tokens choose, with `resident` of each one's blocks on the device."""
        whole = self._dispatch(self._rows(resident, self.blocks_per_expert), tokens, share)
        empty = self._dispatch(self._rows(0, 0), tokens, share)
        with_experts, without = medians_us([whole, empty], self.device)
        return positive_us((with_experts - without) / self.top_k)

    def dispatch_us(self, tokens: int) -> float:
        """Microseconds of a dispatch whose experts have no blocks: grouping tokens, waiting for the router, adding up."""
        (median,) = medians_us([self._dispatch(self._rows(0, 0), tokens, 0.0)], self.device)
        return positive_us(median)

    def best_shares(self) -> tuple[dict[int, float], dict[int, float]]:
        """For each token count: microseconds of one absent expert at the best share, and that share."""
        times, shares = {}, {}
        for tokens in self.tokens:
            by_share = {share: self.expert_us(tokens, 0, share) for share in (0.0, 1.0)}
            balance = by_share[0.0] / (by_share[0.0] + by_share[1.0])
            for share in {min(1.0, max(0.0, round(balance + step, 2))) for step in AROUND_BALANCE}:
                by_share[share] = self.expert_us(tokens, 0, share)
            shares[tokens] = min(by_share, key=by_share.get)
            times[tokens] = by_share[shares[tokens]]
        return times, shares

    def choose_threads(self) -> int:
        """The thread count with the fastest expert for one token, among one, half the cores and all: the fewest within 5 %."""
        cores = num_cores()
        times = {}
        for threads in sorted({1, max(1, cores // 2), cores}):
            self.use_threads(threads)
            times[threads] = self.expert_us(1, resident=0, share=0.0)
        return min(threads for threads, us in times.items() if us <= 1.05 * min(times.values()))

    def h2d_bytes_per_s(self) -> float:
        """Rate of copies from page-locked host memory, block by block as the runtime makes them for prompts."""
        target = torch.empty_like(self.host.blocks[: self.blocks_per_expert], device=self.device)
        experts = cycle(self.absent)

        def copy():
            for slot, block in zip(target, next(experts), strict=True):
                slot.copy_(block, non_blocking=True)

        (median,) = medians_us([copy], self.device)
        return round(self.expert_bytes / (median * 1e-6))

    def _rows(self, resident: int, stop: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(on[:resident], off[resident:stop]) for on, off in zip(self.resident, self.absent, strict=True)]

    def _dispatch(self, rows: list, tokens: int, share: float) -> Callable[[], object]:
        """A call that dispatches `tokens` tokens to the same experts, to other ones each time."""
        resident, absent = zip(*rows, strict=True)
        dispatch = LayerDispatch(0, list(resident), list(absent), lambda _: share, self.executors)
        states = torch.randn(tokens, self.hidden_size, dtype=self.dtype, device=self.device)
        weights = torch.full((tokens, self.top_k), 1 / self.top_k, device=self.device)
        choices = [
            torch.tensor([[(first + k) % self.num_experts for k in range(self.top_k)]] * tokens, device=self.device)
            for first in range(0, self.num_experts * self.top_k, self.top_k)
        ]
        in_turn = cycle(choices)
        return lambda: dispatch(states, next(in_turn), weights)


def describe_device(device: torch.device) -> Device:
    if device.type == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device(kind="host", name="the CPU (no CUDA device)", memory_bytes=memory, context_bytes=0)
    _, total = torch.cuda.mem_get_info(device)
    return Device(kind="cuda", name=torch.cuda.get_device_name(device), memory_bytes=total, context_bytes=context_bytes(device))


def context_bytes(device: torch.device) -> int:
    """GPU memory that one process takes besides PyTorch's allocator: seen from here while another process starts to use it."""
    program = (
        "import sys, torch; torch.cuda.set_device(int(sys.argv[1])); x = torch.ones(64, 64, device='cuda', dtype=torch.bfloat16); "
        "torch.nn.functional.silu(x @ x).sum().item(); print(torch.cuda.memory_reserved(), flush=True); sys.stdin.read()"
    )
    index = device.index if device.index is not None else torch.cuda.current_device()
    before, _ = torch.cuda.mem_get_info(device)
    with subprocess.Popen(
        [sys.executable, "-c", program, str(index)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        allocated = int(other.stdout.readline())
        after, _ = torch.cuda.mem_get_info(device)
        other.stdin.close()
    return max(0, before - after - allocated)
