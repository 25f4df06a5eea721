"""Measures a MachineProfile, part by part.

It times the functions that the runtime calls, on weights of the model's shape.
"""

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import torch

from fiddler_opt.inputs import facts
from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.measure.assemble import EXPERTS, machine_profile, ranks_profile
from fiddler_opt.measure.dense import DenseBench
from fiddler_opt.measure.device import describe_device
from fiddler_opt.measure.experts import ExpertBench, engine_for
from fiddler_opt.measure.link import time_copies
from fiddler_opt.measure.quiet import undisturbed
from fiddler_opt.measure.ranks import OtherRanks
from fiddler_opt.measure.rounds import Us
from fiddler_opt.measure.settings import ProfileSettings
from fiddler_opt.measure.shares import Agree, alone, sweep_shares
from fiddler_opt.measure.stopwatch import Stopwatch
from fiddler_opt.measure.threads import choose_threads
from fiddler_opt.measure.unfinished import Unfinished
from fiddler_run.errors import FiddlerError
from fiddler_run.kernels.table import has_kernels
from fiddler_run.system.gpu import current_gpu
from fiddler_run.system.host import available_memory_bytes, cpu_name, num_cores
from fiddler_run.system.process_settings import dense_threads

METHOD = 6  # version of the timing method; parts timed by another version are discarded
MAX_CPU_TOKENS = 512  # tokens of an expert above which a CPU alone is never the fastest
LAYERS = "layers without experts"


class MachineBench:
    """The parts of a machine profile. Each is measured by one call that returns plain values.

    `found` holds the parts measured so far, which later ones depend on. `timed` lists by name the
    parts that depend on a number of tokens. `agree`: see `sweep_shares`; with one
    rank, nothing is to agree on. Weights are made when the first part needs them.
    """

    def __init__(self, model: ModelSpec, settings: ProfileSettings, folder: Path | None):
        """Prepares the parts without timing anything.

        Args:
            folder: the checkpoint's folder, whose disk is timed too. None: no disk is timed.
        """
        self.found: dict[str, dict] = {}
        self.agree: Agree = alone
        self.model = model
        self.settings = settings
        self.folder = folder
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._stopwatch = Stopwatch(self.device, settings.seconds)
        longest = model.max_position_embeddings - 1
        if self.device.type == "cpu":
            longest = min(longest, MAX_CPU_TOKENS)
        self.models = {_kind(each): each for each in encoded_models(model, self.device)}
        counts = dict.fromkeys(self.models, settings.tokens) | {LAYERS: settings.dense_tokens}
        self.timed = {
            f"{kind}, {tokens} tokens, round {number}": (kind, tokens)
            for number in range(1, settings.rounds + 1)
            for kind in counts
            for tokens in counts[kind]
            if tokens <= longest
        }

    @property
    def parts(self) -> dict[str, Callable[[], dict]]:
        """The functions that measure the parts, in order.

        They are made for each call: stored functions would refer to the bench, and keep its weights
        in memory after its last use.
        """
        times = {kind: partial(self._time_experts, kind) for kind in self.models}
        times[LAYERS] = self._time_dense
        parts = {
            "host": self._host,
            "device": lambda: describe_device(self.device),
            "threads": self._choose_threads,
        }
        parts |= {name: partial(times[kind], tokens) for name, (kind, tokens) in self.timed.items()}
        return parts | ({"link": self._link} if self.device.type == "cuda" else {})

    @property
    def identity(self) -> dict:
        """What the parts depend on. An interrupted profile is only resumed if this is equal."""
        on_gpu = self.device.type == "cuda"
        return {
            "method": METHOD,
            "shape": {**self.model.shape.model_dump(), "name": None},
            "cpu": cpu_name(),
            "cores": num_cores(),
            "device": torch.cuda.get_device_name(self.device) if on_gpu else None,
            "torch": str(torch.__version__),
            "parts": list(self.parts),
            "seconds": self.settings.seconds,
        }

    @property
    def _threads(self) -> tuple[int, bool]:
        """The choice made by the part `threads`, used by all later parts."""
        return self.found["threads"]["threads"], self.found["threads"]["pinned"]

    @cached_property
    def _experts(self) -> dict[str, ExpertBench]:
        """By kind, the experts in one encoding. They share the memory equally."""
        host_bytes = int(self.settings.memory_fraction * available_memory_bytes())
        return {
            kind: ExpertBench(model, host_bytes // len(self.models), self._stopwatch, self.device)
            for kind, model in self.models.items()
        }

    @cached_property
    def _dense(self) -> DenseBench:
        engine = engine_for(self.model, self.device, *self._threads)
        return DenseBench(self.model, self.device, self._stopwatch, engine)

    def _host(self) -> dict:
        disk = facts.disk_bytes_per_s(self.folder) if self.folder else None
        return {
            "available_bytes": available_memory_bytes(),
            "disk_bytes_per_s": disk and round(disk),
        }

    def _choose_threads(self) -> dict:
        bench = self._experts[EXPERTS]
        return {
            **choose_threads(bench),
            "kernel": bench.kernel,
            "timed_bytes": sum(each.timed_bytes for each in self._experts.values()),
            "page_locked": self._page_locked,
        }

    def _time_experts(self, kind: str, tokens: int) -> dict[str, Us]:
        bench = self._experts[kind]
        self._require_same_memory()
        bench.use_threads(*self._threads)
        first = self.found.get(f"{kind}, {tokens} tokens, round 1")

        def measure(shares: list[float]) -> dict[float, float]:
            return bench.host_expert(tokens, shares if bench.page_locked else [0.0])

        if first is not None:
            times = measure(list(first["host_expert_us"]))
        else:
            ends = [0.0] if tokens <= MAX_CPU_TOKENS or not bench.page_locked else []
            ends += [1.0] if bench.page_locked else []
            block = 1 / (bench.top_k * bench.blocks_per_expert)
            times = sweep_shares(measure, ends, block, self.agree)
        # Without a GPU, the same cores compute a "resident" expert at the same speed.
        resident_us = bench.resident_expert(tokens) if bench.on_gpu else min(times.values())
        return {
            "host_expert_us": {share: round(us, 1) for share, us in times.items()},
            "resident_expert_us": round(resident_us, 1),
        }

    @property
    def _page_locked(self) -> bool:
        return all(each.page_locked for each in self._experts.values())

    def _require_same_memory(self) -> None:
        """Refuses to mix parts timed with and without page-locked memory.

        Raises:
            FiddlerError: page-locking has changed since the part `threads`.
        """
        if self._page_locked != self.found["threads"]["page_locked"]:
            change = "could be page-locked before, but cannot be now"
            if self._page_locked:
                change = "can be page-locked now, but could not before"
            raise FiddlerError(
                f"host memory {change}: delete the .unfinished file next to the profile and run"
                " `fiddler-opt profile` again"
            )

    def _time_dense(self, tokens: int) -> dict[str, Us]:
        threads = dense_threads(
            self._threads[0],
            self.model.dense_layer_bytes,
            on_gpu=self.device.type == "cuda",
            own_threads=self._experts[EXPERTS].engine.resources.kernels.cpu.finishes_alone,
        )
        torch.set_num_threads(threads)
        return {name: round(us, 1) for name, us in self._dense.time(tokens).items()}

    def _link(self) -> dict:
        copies = time_copies(self._experts[EXPERTS])
        # Right after the copies: an idle GPU lowers its link speed.
        link = facts.pcie_link(current_gpu().bus_id)
        return {"generation": link and link.generation, "width": link and link.width, **copies}


def encoded_models(model: ModelSpec, device: torch.device) -> list[ModelSpec]:
    """The model in its plain encoding, and in every other that has kernels for `device`."""
    others = map(model.in_encoding, model.encodings[1:])
    return [model, *(each for each in others if has_kernels(each.block_format, device))]


def _kind(model: ModelSpec) -> str:
    return f"{EXPERTS} in {model.chosen_encoding}" if model.chosen_encoding else EXPERTS


def measure_machine(
    bench: MachineBench,
    unfinished: Unfinished,
    command: str,
    force: bool,
    on_part: Callable[[str, int], None],
    others: OtherRanks | None = None,
) -> MachineProfile:
    """Times the parts that are not in `unfinished` yet.

    Args:
        force: measure even while other programs use the machine.
        on_part: called with the name of the next part and the number of finished parts.
        others: ranks to time at the same moments.

    Raises:
        FiddlerError: other programs used the machine. Earlier parts are kept.
    """
    bench.found = unfinished.parts
    if others is not None:
        bench.agree = others.agree
        others.remember(bench.found)
    for finished, (name, measure) in enumerate(bench.parts.items()):
        on_part(name, finished)
        if not force:
            measure = partial(undisturbed, name, measure)
        kind, _ = bench.timed.get(name, (None, 0))
        if others is not None and kind != LAYERS:  # the first rank alone has layers
            measure = partial(others.time, name, measure, bench.found)
        unfinished.part(name, measure)
    if others is None:
        return machine_profile(bench.found, bench.timed, bench.models, command)
    network = unfinished.part("network", partial(others.network, bench.model, bench.device))
    return ranks_profile(bench.found, bench.timed, bench.models, command, others.count, network)


def release_gpu_memory() -> None:
    """Returns PyTorch's cached memory to the GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
