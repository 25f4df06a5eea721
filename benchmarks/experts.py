"""Benchmarks one expert of Mixtral-8x7B on each resource, compared with the hardware's own speed.

    python benchmarks/experts.py [--json FILE] [--threads N] [--only SECTION ...]

- cpu: the kernel, and reading the same bytes with the same threads, in turn
- pytorch: PyTorch on the CPU, for the same expert
- numerics: two experts per token against float64; results must be reproducible bit for bit
- joint (with a GPU): one host expert by CPU and link, by share, and plain copies and reads
- gpu (with a GPU): one resident expert, by the kernels that read blocks in place and by cuBLAS

Experts fill more memory than the caches. Figures are medians; ratios are medians of paired ratios.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from fiddler_run.encodings.base import Encoding
from fiddler_run.encodings.plain import Bf16
from fiddler_run.engine.engine import ExpertEngine, make_engine
from fiddler_run.engine.layer import ExpertsLayer
from fiddler_run.kernels.cpu import CompiledExperts
from fiddler_run.kernels.library import supported_variants
from fiddler_run.kernels.pool import Pool
from fiddler_run.kernels.pytorch import apply_blocks
from fiddler_run.kernels.table import kernels_for
from fiddler_run.system.host import num_cores
from fiddler_run.weights.arena import Arena

HIDDEN = 4096
INTERMEDIATE = 14336
NEURONS = 896
ENCODING = Bf16(HIDDEN, NEURONS)
ONE_BLOCK = Bf16(HIDDEN, INTERMEDIATE)  # the same bytes as a single block
BLOCKS = ENCODING.blocks_per_expert(INTERMEDIATE)
EXPERT_BYTES = ENCODING.expert_bytes(INTERMEDIATE)
EXPERTS = 10
SLOTS = 8
CPU_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
REPETITIONS = 15
WARM_UP = 2
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
Experts = list[torch.Tensor]  # uint8 [BLOCKS, block_bytes] each


def main() -> None:
    sections = {"cpu": cpu, "pytorch": pytorch, "numerics": numerics}
    if CUDA:
        sections |= {"joint": joint, "gpu": gpu}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--only", choices=sections, nargs="+", default=list(sections))
    flags = parser.parse_args()
    experts = random_experts()
    results = {name: sections[name](experts, flags.threads) for name in flags.only}
    if flags.json:
        flags.json.write_text(json.dumps(results, indent=1))


def random_experts(encoding: Encoding = ENCODING) -> Experts:
    """Experts with equal weights at separate addresses, page-locked for a GPU."""
    host = Arena(EXPERTS * BLOCKS, encoding.block_bytes, torch.device("cpu"))
    experts = list(host.blocks.split(BLOCKS))
    torch.manual_seed(0)
    shapes = [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)]
    weights = (torch.randn(shape).mul_(0.02).bfloat16() for shape in shapes)
    assert encoding.encode(experts[0], *weights, first_neuron=0) == []
    for expert in experts[1:]:
        expert.copy_(experts[0])
    if CUDA:
        host.pin()
    return experts


def cpu(experts: Experts, threads: int) -> list[dict]:
    rows = []
    for variant in supported_variants():
        if variant == "portable":
            continue
        kernel = CompiledExperts(ENCODING, Pool(threads, spin_us=1000, variant=variant))
        for tokens in CPU_TOKENS:
            states = torch.randn(tokens, HIDDEN).bfloat16()
            read, own = paired(
                lambda e, pool=kernel.pool: pool.read(experts[e]),
                lambda e, kernel=kernel, states=states: kernel.apply(experts[e], states),
            )
            rates = {"read_gb_s": gb_s(read), "kernel_gb_s": gb_s(own)}
            of_read = median(a / b for a, b in zip(read, own, strict=True))
            ms = 1e3 * median(own)
            rows.append(show(variant=variant, tokens=tokens, **rates, of_read=of_read, ms=ms))
    return rows


def pytorch(experts: Experts, threads: int) -> list[dict]:
    """Runs after the others, because PyTorch's threads keep spinning after a call and slow what
    follows.
    """
    torch.set_num_threads(threads)
    rows = []
    for tokens in CPU_TOKENS:
        states = torch.randn(tokens, HIDDEN).bfloat16()
        (taken,) = paired(
            lambda e, states=states: apply_blocks(ONE_BLOCK, experts[e].view(1, -1), states)
        )
        rows.append(show(pytorch=True, tokens=tokens, gb_s=gb_s(taken), ms=1e3 * median(taken)))
    return rows


def numerics(experts: Experts, threads: int) -> list[dict]:
    """Two experts per token: 0 to 16 resident blocks in steps of 4, shares in steps of a
    quarter.
    """
    engine = make_engine(ENCODING, DEVICE, threads, SLOTS)
    rows = []
    for tokens in (1, 8, 96):
        states = torch.randn(tokens, HIDDEN).bfloat16()
        index = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
        weights = torch.rand(tokens, 2).softmax(dim=1)
        expected = exact_layer(experts[0], states, weights)
        inputs = [tensor.to(DEVICE) for tensor in (states, index, weights)]
        errors = []
        repeated = True
        for resident in range(0, BLOCKS + 1, 4):
            on_device = [expert[:resident].to(DEVICE) for expert in experts[:4]]
            host = [expert[resident:] for expert in experts[:4]]
            for share in (0.0, 0.25, 0.5, 0.75, 1.0):
                layer = layer_of(on_device, host, share, engine)
                first = layer(*inputs)
                repeated &= torch.equal(first, layer(*inputs))
                errors.append(((first.double().cpu() - expected).norm() / expected.norm()).item())
        found = {"worst_relative_error": max(errors), "same_bits_twice": repeated}
        rows.append(show(tokens=tokens, splits=len(errors), **found))
    return rows


def joint(experts: Experts, threads: int) -> list[dict]:
    in_place, staged = both_paths(threads)
    pool = in_place.resources.kernels.cpu.pool
    landing = torch.empty_like(experts[0], device=DEVICE)
    side = torch.cuda.Stream()
    nothing = [expert[:0].to(DEVICE) for expert in experts]

    def bare(e: int, blocks: int) -> None:
        with torch.cuda.stream(side):
            for slot, block in zip(landing[:blocks], experts[e][:blocks], strict=True):
                slot.copy_(block, non_blocking=True)
        if blocks < BLOCKS:
            pool.read(experts[e][blocks:])
        side.synchronize()

    rows = []
    for tokens in (1, 8):
        for blocks in (0, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16):
            share = blocks / BLOCKS
            times = paired(
                lambda e, blocks=blocks: bare(e, blocks),
                calls_of(layer_of(nothing, experts, share, in_place), tokens),
                calls_of(layer_of(nothing, experts, share, staged), tokens),
            )
            names = ("bare_gb_s", "in_place_gb_s", "staged_gb_s")
            rates = dict(zip(names, map(gb_s, times), strict=True))
            rows.append(show(tokens=tokens, share=share, **rates))
    return rows


def gpu(experts: Experts, threads: int) -> list[dict]:
    in_place, cublas = both_paths(threads)
    resident = [experts[0].to(DEVICE) for _ in range(EXPERTS)]
    without = [expert[:0] for expert in resident]
    nothing = [expert[:0] for expert in experts]
    rows = []
    for tokens in (1, 4, 8, 16, 32, 64):
        times = paired(
            calls_of(layer_of(resident, nothing, 0.0, in_place), tokens),
            calls_of(layer_of(resident, nothing, 0.0, cublas), tokens),
            calls_of(layer_of(without, nothing, 0.0, in_place), tokens),
        )
        here, product, empty = (1e6 * median(taken) for taken in times)
        rows.append(show(tokens=tokens, in_place_us=here, cublas_us=product, empty_layer_us=empty))
    return rows


def both_paths(threads: int) -> tuple[ExpertEngine, ExpertEngine]:
    """An engine that takes the decode path for small batches, and one without that path."""
    kernels = kernels_for(ENCODING, DEVICE, threads)
    return (
        ExpertEngine(ENCODING, kernels, DEVICE, SLOTS),
        ExpertEngine(ENCODING, replace(kernels, decode=None), DEVICE, SLOTS),
    )


def layer_of(resident: Experts, host: Experts, share: float, engine: ExpertEngine) -> ExpertsLayer:
    return ExpertsLayer(0, resident, host, lambda _: share, engine)


def calls_of(layer: ExpertsLayer, tokens: int) -> Callable[[int], object]:
    """Calls one expert with `tokens` tokens."""
    states = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    chosen = [torch.full((tokens, 1), e, device=DEVICE) for e in range(EXPERTS)]
    ones = torch.ones(tokens, 1, device=DEVICE)
    return lambda e: layer(states, chosen[e], ones)


def paired(*calls: Callable[[int], object]) -> list[list[float]]:
    """Seconds of each call, taken in turn. Each call uses another expert than the one before."""
    finish = torch.cuda.synchronize if CUDA else lambda: None
    taken = [[] for _ in calls]
    for repetition in range(REPETITIONS + WARM_UP):
        for number, call in enumerate(calls):
            finish()
            started_s = time.perf_counter()
            call((repetition * len(calls) + number) * 3 % EXPERTS)
            finish()
            taken[number].append(time.perf_counter() - started_s)
    return [each[WARM_UP:] for each in taken]


def exact_layer(expert: torch.Tensor, states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The layer's output in float64. All its experts have equal weights."""
    x = states.double()
    total = torch.zeros_like(x)
    for gate_up, down in zip(*ENCODING.decode(expert), strict=True):
        gate, up = (x @ gate_up.double().T).chunk(2, dim=1)
        total += (torch.nn.functional.silu(gate) * up) @ down.double().T
    return total * weights.double().sum(dim=1, keepdim=True)


def gb_s(seconds: list[float]) -> float:
    return EXPERT_BYTES / median(seconds) / 1e9


def show(**row) -> dict:
    values = (
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
    )
    print("  ".join(values), flush=True)
    return row


if __name__ == "__main__":
    main()
