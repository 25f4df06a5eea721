"""Asks a separate process about PyTorch on this machine.

Its effects on the GPU end with that process.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from fiddler_opt.inputs import facts
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.insight.finding import Finding

COPYING_S = 1.0  # until a copying GPU has raised its link speed


@dataclass(frozen=True)
class ProbedGpu:
    """The GPU that PyTorch uses, the first of `count`.

    `kernels_suit`: true if the GPU kernels support this model. `kernel_error`: why they cannot be
    compiled. `locks_freely`: true if memory can be page-locked regardless of `ulimit -l`.
    `h2d_bytes_per_s`: the rate of copies from page-locked memory.
    """

    name: str
    bus_id: str
    memory_bytes: int
    kernels_suit: bool
    kernel_error: str | None
    locks_freely: bool
    count: int = 1
    link: facts.PcieLink | None = None
    h2d_bytes_per_s: float | None = None


@dataclass(frozen=True)
class Torch:
    """PyTorch's version, its CUDA version, the usable variants of the CPU kernel, and its GPU.

    `refusal`: why PyTorch uses no GPU.
    """

    version: str
    cuda: str | None
    variants: list[str] | None
    refusal: str | None
    gpu: ProbedGpu | None


def ask_torch(model: ModelSpec) -> Torch | Finding:
    """Asks PyTorch about this machine. Returns a finding if PyTorch does not start.

    The state of the link is read while PyTorch copies.
    """
    blocks = [model.encoding, str(model.shape.hidden_size), str(model.block_neurons)]
    with tempfile.TemporaryFile("w+") as errors:
        pipe = subprocess.PIPE
        program = [sys.executable, "-P", "-m", "fiddler_opt.insight.probe", *blocks]
        with subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=errors, text=True) as probe:
            answer = json.loads(probe.stdout.readline() or "null")
            gpu = answer and answer["gpu"]
            link = None
            if gpu:
                time.sleep(COPYING_S)
                link = facts.pcie_link(gpu["bus_id"])
            rate, _ = probe.communicate()  # closing its stdin ends its copies
        errors.seek(0)
        reason = errors.read().strip().rpartition("\n")[2] or f"exit status {probe.returncode}"
    if answer is None:
        return Finding("stops", f"PyTorch does not start: {reason}", "install fiddler-opt again")
    if gpu:
        measured = {"link": link, "h2d_bytes_per_s": float(rate)} if rate else {}
        gpu["kernel_error"] = gpu["kernel_error"] and gpu["kernel_error"].splitlines()[0]
        answer["gpu"] = ProbedGpu(**gpu, **measured)
    answer["refusal"] = answer["refusal"] and answer["refusal"].split(". ")[0]
    return Torch(**answer)
