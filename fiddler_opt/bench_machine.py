"""Measures a MachineProfile, part by part. Rule: it times the functions that the runtime calls, on weights of the model's shape."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import torch

from fiddler_opt import facts
from fiddler_opt.bench_dense import DenseBench
from fiddler_opt.bench_device import describe_device
from fiddler_opt.bench_experts import MAX_CPU_TOKENS, ExpertBench
from fiddler_opt.bench_probe import bus_id
from fiddler_opt.bench_rounds import drift_between_rounds, merged_rounds
from fiddler_opt.bench_timing import Stopwatch, Timing
from fiddler_opt.machine import Cpu, Device, Link, MachineProfile, Made, MeasuredShape, Memory
from fiddler_opt.memory import STAGED_BLOCKS
from fiddler_opt.model import ModelSpec
from fiddler_opt.unfinished import Unfinished
from fiddler_run.arena import TORCH_DTYPES
from fiddler_run.errors import FiddlerError
from fiddler_run.executors import Executors
from fiddler_run.host import OtherProcesses, available_memory_bytes, cpu_name, num_cores, num_physical_cores
from fiddler_run.plan import FEW_TOKENS
from fiddler_run.process_settings import dense_threads


@dataclass(frozen=True)
class Effort:
    """How thorough: token counts, how many rounds, for each figure of one about how many seconds, the part of free host memory to
    time in, and its limit. Rounds lie half a minute or more apart: what slows a machine for a while meets one or two."""

    tokens: tuple[int, ...]
    dense_tokens: tuple[int, ...]
    rounds: int
    seconds: float
    part_of_memory: float
    max_host_bytes: int


THOROUGH = Effort((1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048), (1, 16, 128, 512, 2048), 3, 0.2, 0.75, 10**15)
METHOD = 2  # of timing: parts that were timed in another way are not mixed with new ones
EXPERTS, LAYERS = "experts", "layers without experts"
QUICK = Effort((1, 4, 16, 64, 256, 1024), (1, 128, 512), 1, 0.1, 0.25, 8 * 10**9)


class MachineBench:
    """The parts of a machine profile: plain values by name, each measured by one call. What they need is made when first used.

    `timed`: names of the parts that time something for a number of tokens: what, and that number.
    """

    def __init__(self, model: ModelSpec, effort: Effort, folder: Path | None):
        """`folder`: of the checkpoint, whose disk is timed too."""
        self.found: dict[str, dict] = {}  # parts measured so far, which later ones depend on
        self.model, self.effort, self._folder = model, effort, folder
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self._stopwatch = Stopwatch(self.device, effort.seconds)
        most = min(MAX_CPU_TOKENS if self.device.type == "cpu" else 10**6, model.max_position_embeddings - 1)
        figures = [
            (what, n) for what, counts in ((EXPERTS, effort.tokens), (LAYERS, effort.dense_tokens)) for n in counts if n <= most
        ]
        few, many = ([figure for figure in figures if (figure[1] <= FEW_TOKENS) == is_few] for is_few in (True, False))
        # What decode meets is soon timed and set by memory, whose speed changes within seconds on some machines: twice a round.
        middle, again = len(many) // 2, few if effort.rounds > 1 else []
        in_turn = few + many[:middle] + again + many[middle:]
        self.timed: dict[str, tuple[str, int]] = {}
        times = Counter()
        for _, (what, tokens) in product(range(effort.rounds), in_turn):
            times[what, tokens] += 1
            self.timed[f"{what}, {tokens} tokens, round {times[what, tokens]}"] = what, tokens

    @property
    def parts(self) -> dict[str, Callable[[], dict]]:
        """Made when asked for: kept, they would keep this object, and the gigabytes that it times in, alive after it."""
        timed = {EXPERTS: self._time_experts, LAYERS: self._time_dense}
        parts = {"host": self._host, "device": lambda: describe_device(self.device), "threads": self._choose_threads}
        parts |= {name: partial(timed[what], tokens) for name, (what, tokens) in self.timed.items()}
        return parts | ({"link": self._link} if self.device.type == "cuda" else {})

    @property
    def identity(self) -> dict:
        """What the parts depend on besides the state the machine is in."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        shape = {**self.model.shape.model_dump(), "name": None}
        return {
            "method": METHOD,
            "shape": shape,
            "cpu": cpu_name(),
            "cores": num_cores(),
            "device": device,
            "torch": str(torch.__version__),
            "parts": list(self.parts),
            "seconds": self.effort.seconds,
        }

    @property
    def _threads(self) -> tuple[int, bool]:
        """The choice that the part `threads` made holds for all parts after it."""
        return self.found["threads"]["threads"], self.found["threads"]["pinned"]

    @cached_property
    def _experts(self) -> ExpertBench:
        host_bytes = min(self.effort.max_host_bytes, int(self.effort.part_of_memory * available_memory_bytes()))
        return ExpertBench(self.model, host_bytes, self._stopwatch, self.device)

    @cached_property
    def _dense(self) -> DenseBench:
        shape, threads = self.model.shape, self._threads
        slots = STAGED_BLOCKS if self.device.type == "cuda" else 0
        sizes = TORCH_DTYPES[shape.dtype], shape.hidden_size, self.model.block_neurons
        executors = Executors(*sizes, threads[0], slots, self.device, threads[1])
        return DenseBench(self.model, self.device, self._stopwatch, executors)

    def _host(self) -> dict:
        disk = facts.disk_bytes_per_s(self._folder) if self._folder else None
        return {"available_bytes": available_memory_bytes(), "disk_bytes_per_s": disk and round(disk)}

    def _choose_threads(self) -> dict:
        bench = self._experts
        return {**bench.threads(), "kernel": bench.kernel, "timed_bytes": bench.timed_bytes, "page_locked": bench.page_locked}

    def _time_experts(self, tokens: int) -> dict:
        bench = self._experts
        if bench.page_locked != self.found["threads"]["page_locked"]:
            now = "can be page-locked now, but could not before" if bench.page_locked else "could be page-locked, but cannot be now"
            raise FiddlerError(f"host memory {now}: delete the .unfinished file beside the profile, and begin anew")
        bench.use_threads(*self._threads)
        first = self.found.get(f"{EXPERTS}, {tokens} tokens, round 1")  # whose shares are timed again
        shares = bench.shares(tokens, first and first["times"]["absent_expert_us"])
        best = min(shares.values(), key=lambda timing: timing.us)
        # Without a GPU the same cores compute a "resident" expert at the same speed.
        resident = bench.resident_expert(tokens) if bench.on_gpu else best
        by_share = {share: round(shares[share].us, 1) for share in sorted(shares)}
        return {
            "times": {"absent_expert_us": by_share, "device_expert_us": round(resident.us, 1)},
            "spread": _spreads({"absent_expert_us": best, "device_expert_us": resident}),
        }

    def _time_dense(self, tokens: int) -> dict:
        torch.set_num_threads(dense_threads(self._threads[0], self.model.dense_layer_bytes))
        times = self._dense.time(tokens)
        named = {"dense_layer_us": times.layer, "dense_device_us": times.device, "head_us": times.head}
        if times.host_embedding is not None:
            named["host_embedding_us"] = times.host_embedding
        return {"times": {name: round(timing.us, 1) for name, timing in named.items()}, "spread": _spreads(named)}

    def _link(self) -> dict:
        copies = self._experts.copies()
        link = facts.pcie_link(
            bus_id(torch.cuda.get_device_properties(self.device))
        )  # right after the copies: an idle GPU lowers its link's speed
        return {"generation": link and link.generation, "width": link and link.width, **copies}


def measure_machine(
    bench: MachineBench, unfinished: Unfinished, command: str, force: bool, on_part: Callable[[str, int], None]
) -> MachineProfile:
    """Times this machine: those parts that are not in `unfinished` yet.

    Args:
        force: also while others use the machine.
        on_part: hears what is timed next, and how many parts are finished.

    Raises:
        FiddlerError: others use the machine while a part is timed; the parts before it are kept.
    """
    bench.found = parts = unfinished.parts
    for finished, (name, measure) in enumerate(bench.parts.items()):
        on_part(name, finished)
        unfinished.part(name, measure if force else lambda name=name, measure=measure: undisturbed(name, measure))
    threads, host = parts["threads"], parts["host"]
    tables, spread = merged_rounds(parts, bench.timed)
    return MachineProfile(
        version=2,
        source="measured",
        cpu=Cpu(
            name=cpu_name(),
            cores=num_cores(),
            physical_cores=num_physical_cores(),
            **{key: threads[key] for key in ("kernel", "threads", "pinned", "threads_us", "pinned_threads_us")},
        ),
        memory=Memory(
            available_bytes=host["available_bytes"], timed_bytes=threads["timed_bytes"], memlock_bytes=facts.memlock_limit_bytes()
        ),
        device=Device(**parts["device"]),
        link=Link(**parts["link"]) if "link" in parts else None,
        disk_bytes_per_s=host["disk_bytes_per_s"],
        shape=MeasuredShape.of(bench.model),
        **{"host_embedding_us": None, **tables},
        spread=spread,
        drift=drift_between_rounds(parts, bench.timed),
        provenance=Made(command=command, created=date.today().isoformat(), software=f"PyTorch {torch.__version__}"),
    )


def release_gpu_memory() -> None:
    """Gives back what PyTorch keeps of it for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def undisturbed(name: str, measure: Callable[[], dict]) -> dict:
    """What `measure` returns, if other programs left the machine to it.

    Raises:
        FiddlerError: they did not.
    """
    others, cores, started = OtherProcesses(), num_cores(), time.monotonic()
    measured = measure()
    taken = others.cores() or 0.0
    long_enough = time.monotonic() - started > 0.5  # for the clock ticks in which the system counts
    if long_enough and taken > 0.5 + 0.05 * cores:
        raise FiddlerError(
            f"the machine is busy: other programs took {taken:.1f} of {cores} cores while it was timed ({name}); "
            "close them and run this again, which goes on from here, or time it all the same with --force"
        )
    return measured


def _spreads(times: dict[str, Timing]) -> dict[str, float]:
    return {name: round(timing.spread, 3) for name, timing in times.items()}
