"""PyTorch on this machine, asked in a process of its own.

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

COPYING_S = 1.0  # until a GPU that copies has raised its link's speed


@dataclass(frozen=True)
class ProbedGpu:
    """The GPU that PyTorch uses.

    `kernels_suit`: true if the GPU kernels support this model. `kernel_error`: why they cannot be
    compiled. `locks_freely`: true if memory can be page-locked whatever `ulimit -l` says.
    `h2d_bytes_per_s`: the rate of copies from page-locked memory.
    """

    name: str
    bus_id: str
    memory_bytes: int
    kernels_suit: bool
    kernel_error: str | None
    locks_freely: bool
    link: facts.PcieLink | None = None
    h2d_bytes_per_s: float | None = None


@dataclass(frozen=True)
class Torch:
    """PyTorch: its version, its CUDA version, the CPU kernel's variants that run here, its GPU.

    `refusal`: why it uses no GPU.
    """

    version: str
    cuda: str | None
    variants: list[str] | None
    refusal: str | None
    gpu: ProbedGpu | None


def ask_torch(model: ModelSpec) -> Torch | Finding:
    """PyTorch's view of this machine; a finding if PyTorch does not start.

    The GPU's link is read while PyTorch copies to it.
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
            rate, _ = probe.communicate()  # the end of its input ends its copies
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
