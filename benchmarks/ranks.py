"""Runs a model with one rank and with several, and compares both with their predictions.

    python benchmarks/ranks.py --machine one.machine.yaml --ranks two.machine.yaml \\
        --gpu-mem 24GB,24GB --encodings bf16 lossless12 -o FOLDER

`one.machine.yaml` is the profile of a single rank, `two.machine.yaml` that of several (`fiddler-opt
profile --ranks 2`), on the same machine. Plans are made for the longest prompt; decode is timed
after the first of `--prompts`. Writes ranks.json and ranks.md.

With --delay 0.2ms,1GB/s, rank 0 waits as long as such a network would take for what it sends and
receives, in addition to the real exchange by gloo. With GPUs, hide them (CUDA_VISIBLE_DEVICES=).
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from runs import PROVENANCE, arguments_parser, first_token_s, load, repeated
from table import markdown

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.machine_parts import Network
from fiddler_opt.inputs.machine_ranks import network_of
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.routing import Routing
from fiddler_opt.inputs.workload import plan_workload
from fiddler_opt.solve.compiler import compile_plan
from fiddler_opt.solve.placement import placement_of
from fiddler_opt.solve.problem import Problem
from fiddler_opt.units import parse_sizes
from fiddler_run.command import exit_status
from fiddler_run.plan.schema import Budget, Plan, Workload
from fiddler_run.ranks import meet
from fiddler_run.ranks.exchange import GlooExchange, Inputs
from fiddler_run.system.files import write_whole

COLUMNS = ("ranks", "experts", "decode, tokens/s", "predicted", "", "hit rate", "loading, s")


@dataclass(frozen=True)
class Row:
    """One plan, measured and predicted. `ttft_s` and `predicted_ttft_s` are by prompt tokens."""

    ranks: int
    encoding: str
    tokens_per_s: float
    predicted_tokens_per_s: float
    ttft_s: dict[int, float]
    predicted_ttft_s: dict[int, float]
    hit_rate: float
    load_s: float

    @property
    def cells(self) -> tuple[str, ...]:
        off = self.tokens_per_s / self.predicted_tokens_per_s - 1
        first = (
            f"{each[tokens]:.3f}"
            for tokens in self.ttft_s
            for each in (self.ttft_s, self.predicted_ttft_s)
        )
        return (
            *(str(self.ranks), self.encoding),
            *(f"{self.tokens_per_s:.2f}", f"{self.predicted_tokens_per_s:.2f}", f"{off:+.0%}"),
            *(f"{self.hit_rate:.1%}", f"{self.load_s:.0f}"),
            *first,
        )


class DelayedExchange(GlooExchange):
    """Takes the time of a slower network, too. `network` is the one to imitate."""

    network: Network

    def broadcast(self, inputs: Inputs) -> None:
        self._wait(sum(each.nbytes for each in inputs))
        super().broadcast(inputs)

    def reduce(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        total = super().reduce(partial, dtype)
        self._wait(partial.nbytes)
        return total

    def _wait(self, num_bytes: int) -> None:
        others = self.num_ranks - 1
        seconds = self.network.round_trip_us * 5e-7 + others * num_bytes / self.network.bytes_per_s
        until_s = time.perf_counter() + seconds
        while time.perf_counter() < until_s:
            time.sleep(0)


def main() -> None:
    flags = parse_arguments()
    folder = Path(flags.output)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = parse_sizes(flags.gpu_mem, "--gpu-mem")
    alone = MachineProfile.load(flags.machine)
    shared = MachineProfile.load(flags.ranks)
    if flags.delay is not None:
        DelayedExchange.network = network_of(flags.delay)
        shared = delayed(shared, DelayedExchange.network)
        meet.GlooExchange = DelayedExchange
    rows = []
    for encoding in flags.encodings:
        for machine, budget in (
            (alone, Budget(gpu_bytes=sizes[0])),
            (shared, Budget(gpu_bytes=sizes[0], other_gpu_bytes=sizes[1:])),
        ):
            rows.append(measured(flags, machine, budget, encoding))
            print(*rows[-1].cells, file=sys.stderr)
            found = json.dumps([asdict(row) for row in rows], indent=1)
            write_whole(folder / "ranks.json", found)
    first = [f"{text}{n}, s" for n in flags.prompts for text in ("first of ", "predicted, ")]
    write_whole(folder / "ranks.md", markdown([*COLUMNS, *first], [row.cells for row in rows]))


def delayed(machine: MachineProfile, more: Network) -> MachineProfile:
    """The profile of ranks on machines of their own, whose network takes `more` time."""
    network = Network(
        round_trip_us=machine.network.round_trip_us + more.round_trip_us,
        bytes_per_s=1 / (1 / machine.network.bytes_per_s + 1 / more.bytes_per_s),
    )
    return machine.model_copy(update={"network": network})


def measured(
    flags: argparse.Namespace, machine: MachineProfile, budget: Budget, encoding: str
) -> Row:
    model = ModelSpec.load(flags.model).in_encoding(encoding)
    routing = Routing.uniform(model)
    workload = plan_workload({"prompt_tokens": max(flags.prompts)}, model)
    plan = compile_plan(model, machine, routing, workload, budget, PROVENANCE)
    started_s = time.perf_counter()
    loaded = load(plan, flags)
    load_s = time.perf_counter() - started_s
    prompts = flags.prompts
    runs = repeated(loaded, prompts[0], flags.tokens)
    row = Row(
        len(plan.ranks),
        plan.encoding,
        median(run.decode_tokens_per_s for run in runs),
        plan.predicted.decode_tokens_per_s,
        {tokens: first_token_s(loaded, tokens) for tokens in prompts},
        {tokens: predicted_s(plan, model, machine, routing, tokens) for tokens in prompts},
        runs[-1].traffic.hit_rate,
        load_s,
    )
    if loaded.peers is not None:
        loaded.peers.close()
    return row


def predicted_s(
    plan: Plan, model: ModelSpec, machine: MachineProfile, routing: Routing, prompt: int
) -> float:
    values = plan.workload.model_dump() | {"prompt_tokens": prompt, "output_tokens": 2}
    changed = plan.model_copy(update={"workload": Workload(**values)})
    return Problem.of(changed, model, machine).cost(routing).ttft_s(placement_of(plan))


def parse_arguments() -> argparse.Namespace:
    parser = arguments_parser(__doc__)
    parser.add_argument("--ranks", required=True, metavar="FILE", help="profile of several ranks")
    parser.add_argument("--gpu-mem", default="24GB,24GB", metavar="SIZES")
    parser.add_argument("--encodings", nargs="+", default=["bf16", "lossless12"])
    parser.add_argument("--prompts", nargs="+", type=int, default=[512, 2048], metavar="N")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    parser.add_argument("--delay", metavar="TIME,RATE", help="of the network to imitate")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_status(main, "ranks.py"))
