"""Benchmarks one expert of Mixtral-8x7B in lossless12 and in bf16, in turn.

    python benchmarks/lossless12.py [--json FILE] [--threads N]

On the CPU, each kernel computes it; with a GPU, it is also resident, or in host memory with a
share of it streamed. Figures are medians; ratios are medians of paired ratios.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from statistics import median

import torch
from experts import (
    CPU_TOKENS,
    CUDA,
    DEVICE,
    ENCODING,
    HIDDEN,
    NEURONS,
    SLOTS,
    Experts,
    calls_of,
    layer_of,
    paired,
    random_experts,
    show,
)

from fiddler_run.encodings.base import Encoding
from fiddler_run.encodings.lossless12 import Lossless12
from fiddler_run.engine.engine import make_engine
from fiddler_run.kernels.cpu import CompiledExperts
from fiddler_run.kernels.library import supported_variants
from fiddler_run.kernels.pool import Pool
from fiddler_run.system.host import num_cores

GPU_TOKENS = (1, 8, 64, 512)  # the last on the prefill path
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
Stored = list[tuple[Encoding, Experts]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--threads", type=int, default=num_cores())
    flags = parser.parse_args()
    stored = [(each, random_experts(each)) for each in (ENCODING, Lossless12(HIDDEN, NEURONS))]
    rows = cpu(stored, flags.threads)
    if CUDA:
        rows += gpu(stored, flags.threads)
    if flags.json:
        flags.json.write_text(json.dumps(rows, indent=1))


def cpu(stored: Stored, threads: int) -> list[dict]:
    rows = []
    for variant in supported_variants():
        if variant == "portable":
            continue
        pool = Pool(threads, spin_us=1000, variant=variant)
        kernels = [(CompiledExperts(encoding, pool), experts) for encoding, experts in stored]
        for tokens in CPU_TOKENS:
            states = torch.randn(tokens, HIDDEN).bfloat16()
            taken = paired(
                *(
                    lambda e, of=of, kernel=kernel, states=states: kernel.apply(of[e], states)
                    for kernel, of in kernels
                )
            )
            rows.append(show(variant=variant, tokens=tokens, **compared(*taken)))
    return rows


def gpu(stored: Stored, threads: int) -> list[dict]:
    engines = [make_engine(encoding, DEVICE, threads, SLOTS) for encoding, _ in stored]
    empty = [[expert[:0] for expert in experts] for _, experts in stored]
    resident = [[experts[0].to(DEVICE) for _ in experts] for _, experts in stored]
    rows = []
    for tokens in GPU_TOKENS:
        layers = map(layer_of, resident, empty, (0.0, 0.0), engines)
        taken = paired(*(calls_of(layer, tokens) for layer in layers))
        rows.append(show(place="resident", tokens=tokens, **compared(*taken)))
    nothing = [[expert.to(DEVICE) for expert in of] for of in empty]
    host = [experts for _, experts in stored]
    for share, tokens in product(SHARES, GPU_TOKENS):
        layers = map(layer_of, nothing, host, (share, share), engines)
        taken = paired(*(calls_of(layer, tokens) for layer in layers))
        rows.append(show(place="host", share=share, tokens=tokens, **compared(*taken)))
    return rows


def compared(plain: list[float], packed: list[float]) -> dict[str, float]:
    times = {"bf16_us": 1e6 * median(plain), "lossless12_us": 1e6 * median(packed)}
    return times | {"times_as_fast": median(a / b for a, b in zip(plain, packed, strict=True))}


if __name__ == "__main__":
    main()
