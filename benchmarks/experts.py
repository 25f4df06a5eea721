"""One expert of Mixtral-8x7B, everywhere it can be computed, beside what the hardware gives to a plain loop.

    python benchmarks/experts.py [--json FILE] [--threads N]

- cpu: the kernel against reading the same bytes with the same threads, call by call in turn, and against PyTorch.
- joint (with a GPU): one absent expert, CPU and link together, by share; beside a bare copy and a bare read of the same shares.
- gpu (with a GPU): one resident expert, by the kernels that read blocks in place and by cuBLAS.
- numerics: two experts a token against float64, resident blocks and shares in steps of a quarter, and the same bits twice.

Experts are visited in turn over more memory than caches hold. Figures are medians; ratios are medians of paired ratios.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fiddler_run.arena import Arena
from fiddler_run.dispatch import LayerDispatch
from fiddler_run.executors import Executors
from fiddler_run.host import num_cores
from fiddler_run.kernels.cpu import CompiledExperts, supported_variants
from fiddler_run.kernels.pytorch import apply_blocks, block_views

HIDDEN, INTERMEDIATE, NEURONS = 4096, 14336, 896
BLOCKS, ELEMENTS = INTERMEDIATE // NEURONS, 3 * NEURONS * HIDDEN
EXPERT_BYTES = BLOCKS * ELEMENTS * 2
EXPERTS, REPETITIONS = 10, 15
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--only", choices=["cpu", "pytorch", "numerics", "joint", "gpu"], nargs="+")
    flags = parser.parse_args()
    host = Arena(EXPERTS * BLOCKS, ELEMENTS, torch.bfloat16, torch.device("cpu"))
    experts = list(host.blocks.split(BLOCKS))
    experts[0].normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    for expert in experts[1:]:
        expert.copy_(experts[0])
    if CUDA:
        host.pin()
    sections = {"cpu": cpu, "pytorch": pytorch, "numerics": numerics}
    if CUDA:
        sections |= {"joint": joint, "gpu": gpu}
    results = {name: run(experts, flags.threads) for name, run in sections.items() if flags.only is None or name in flags.only}
    if flags.json:
        flags.json.write_text(json.dumps(results, indent=1))


def cpu(experts: list[torch.Tensor], threads: int) -> list[dict]:
    rows = []
    for variant in supported_variants():
        if variant == "portable":
            continue
        kernel = CompiledExperts(threads, spin_us=1000, variant=variant)
        for tokens in (1, 2, 4, 8, 16, 32, 64, 128):
            states = torch.randn(tokens, HIDDEN).bfloat16()
            read, own = paired(
                [lambda e, k=kernel: k.read(experts[e]), lambda e, k=kernel, x=states: k.apply(experts[e], x)],
            )
            ratios = [a / b for a, b in zip(read, own, strict=True)]
            rows.append(
                show(
                    variant=variant,
                    tokens=tokens,
                    read_gb_s=gb_s(read),
                    kernel_gb_s=gb_s(own),
                    of_read=statistics.median(ratios),
                    ms=1e3 * statistics.median(own),
                )
            )
    return rows


def pytorch(experts: list[torch.Tensor], threads: int) -> list[dict]:
    """Apart from the rest: threads of PyTorch keep spinning after a call and slow what follows. The expert is one whole block."""
    torch.set_num_threads(threads)
    rows = []
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128):
        states = torch.randn(tokens, HIDDEN).bfloat16()
        (taken,) = paired([lambda e, x=states: apply_blocks(experts[e].view(1, -1), x)])
        rows.append(show(pytorch=True, tokens=tokens, gb_s=gb_s(taken), ms=1e3 * statistics.median(taken)))
    return rows


def numerics(experts: list[torch.Tensor], threads: int) -> list[dict]:
    """Two experts a token, every split of 0 to 16 resident blocks in steps of 4 and shares of 0 to 1 in steps of a quarter."""
    executors = Executors(torch.bfloat16, HIDDEN, NEURONS, threads, 8, DEVICE)
    rows = []
    for tokens in (1, 8, 96):
        states = torch.randn(tokens, HIDDEN).bfloat16()
        index = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
        weights = torch.rand(tokens, 2).softmax(dim=1)
        expected = exact_layer(experts[0], states, weights)
        errors, repeated = [], True
        for resident in range(0, BLOCKS + 1, 4):
            placed = [expert[:resident].to(DEVICE) for expert in experts[:4]], [expert[resident:] for expert in experts[:4]]
            for share in (0.0, 0.25, 0.5, 0.75, 1.0):
                dispatch = LayerDispatch(0, *placed, lambda _, s=share: s, executors)
                first, second = (dispatch(states.to(DEVICE), index.to(DEVICE), weights.to(DEVICE)) for _ in range(2))
                repeated &= torch.equal(first, second)
                errors.append(((first.double().cpu() - expected).norm() / expected.norm()).item())
        rows.append(show(tokens=tokens, splits=len(errors), worst_relative_error=max(errors), same_bits_twice=repeated))
    return rows


def joint(experts: list[torch.Tensor], threads: int) -> list[dict]:
    rows = []
    executors = Executors(torch.bfloat16, HIDDEN, NEURONS, threads, 8, DEVICE)
    gpu_kernels = executors.kernels
    landing, side = torch.empty_like(experts[0], device=DEVICE), torch.cuda.Stream()
    nothing = [expert[:0].to(DEVICE) for expert in experts]

    def bare(e: int, blocks: int) -> None:
        with torch.cuda.stream(side):
            for slot, block in zip(landing[:blocks], experts[e][:blocks], strict=True):
                slot.copy_(block, non_blocking=True)
        if blocks < BLOCKS:
            executors.cpu.read(experts[e][blocks:])
        side.synchronize()

    for tokens in (1, 8):
        states = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, device=DEVICE)
        chosen = [torch.full((tokens, 1), e, device=DEVICE) for e in range(EXPERTS)]
        ones = torch.ones(tokens, 1, device=DEVICE)
        for blocks in (0, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16):
            dispatch = LayerDispatch(0, nothing, experts, lambda _, s=blocks / BLOCKS: s, executors)

            def dispatched(e: int, in_place: bool, dispatch=dispatch, states=states, chosen=chosen, ones=ones) -> None:
                executors.kernels = gpu_kernels if in_place else None
                dispatch(states, chosen[e], ones)

            times = paired(
                [
                    lambda e, n=blocks: bare(e, n),
                    lambda e: dispatched(e, True),
                    lambda e: dispatched(e, False),
                ]
            )
            rows.append(
                show(
                    tokens=tokens,
                    share=blocks / BLOCKS,
                    bare_gb_s=gb_s(times[0]),
                    in_place_gb_s=gb_s(times[1]),
                    staged_gb_s=gb_s(times[2]),
                )
            )
    return rows


def gpu(experts: list[torch.Tensor], threads: int) -> list[dict]:
    executors = Executors(torch.bfloat16, HIDDEN, NEURONS, threads, 8, DEVICE)
    gpu_kernels = executors.kernels
    resident = [experts[0].to(DEVICE) for _ in range(EXPERTS)]
    nothing = [expert[:0] for expert in experts]
    rows = []
    for tokens in (1, 4, 8, 16, 32, 64):
        states = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, device=DEVICE)
        chosen = [torch.full((tokens, 1), e, device=DEVICE) for e in range(EXPERTS)]
        ones = torch.ones(tokens, 1, device=DEVICE)
        dispatch = LayerDispatch(0, resident, nothing, lambda _: 0.0, executors)
        empty = LayerDispatch(0, [e[:0] for e in resident], nothing, lambda _: 0.0, executors)

        def dispatched(e: int, in_place: bool, dispatch=dispatch, states=states, chosen=chosen, ones=ones) -> None:
            executors.kernels = gpu_kernels if in_place else None
            dispatch(states, chosen[e], ones)

        times = paired(
            [
                lambda e: dispatched(e, True),
                lambda e: dispatched(e, False),
                lambda e, d=empty: dispatched(e, True, d),
            ]
        )
        in_place, cublas, none = (1e6 * statistics.median(taken) for taken in times)
        rows.append(show(tokens=tokens, in_place_us=in_place, cublas_us=cublas, empty_dispatch_us=none))
    return rows


def paired(calls: list[Callable[[int], object]]) -> list[list[float]]:
    """Seconds of each call, taken in turn, each on another expert than the one before."""
    taken = [[] for _ in calls]
    for repetition in range(REPETITIONS + 2):
        for number, call in enumerate(calls):
            if CUDA:
                torch.cuda.synchronize()
            started = time.perf_counter()
            call((repetition * len(calls) + number) * 3 % EXPERTS)
            if CUDA:
                torch.cuda.synchronize()
            taken[number].append(time.perf_counter() - started)
    return [each[2:] for each in taken]


def exact_layer(expert: torch.Tensor, states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """All experts hold the same weights here, so a token's result is that of one expert times the sum of its weights."""
    total, x = torch.zeros(states.shape, dtype=torch.float64), states.double()
    for gate_up, down in zip(*block_views(expert, HIDDEN), strict=True):
        gate, up = (x @ gate_up.double().T).chunk(2, dim=1)
        total += (torch.nn.functional.silu(gate) * up) @ down.double().T
    return total * weights.double().sum(dim=1, keepdim=True)


def gb_s(seconds: list[float]) -> float:
    return EXPERT_BYTES / statistics.median(seconds) / 1e9


def show(**row) -> dict:
    print(
        "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()), flush=True
    )
    return row


if __name__ == "__main__":
    main()
