"""Times several ranks of this machine at once, because they share its memory.

Each other rank is a process of its own (`rank.py`). All time the same part at the same moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median

import torch
import yaml

from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.measure.stopwatch import BUSY_CYCLES
from fiddler_run.plan.shape import DTYPE_BYTES
from fiddler_run.ranks.cores import on_own_cores
from fiddler_run.ranks.exchange import Exchange, Inputs
from fiddler_run.ranks.launch import gather
from fiddler_run.ranks.meet import meet
from fiddler_run.system.gpu import gpu_numa_nodes

EXCHANGES = 20  # timed at once, because a GPU takes less time for one than Python
REPEATS = 5
MANY_TOKENS = 2048


class OtherRanks:
    """The other ranks. `count` includes this one."""

    def __init__(self, count: int, model: str, quick: bool):
        """Starts them, and binds this thread to its part of the cores.

        Args:
            model: the checkpoint's folder or Hugging Face id.

        Raises:
            FiddlerError: they cannot be started.
        """
        self.count = count
        task = {"model": model, "quick": quick, "count": count}
        self._peers = gather([0] * count, None, task, module="fiddler_opt.measure.rank")
        self._peers.replies()  # they have imported PyTorch, and found their GPU
        self._on_own_cores = ExitStack()
        self._on_own_cores.enter_context(on_own_cores([1] * count, 0, gpu_numa_nodes()))

    def remember(self, found: dict[str, dict]) -> None:
        """Gives each of them the parts that it has timed before."""
        for rank in range(1, self.count):
            parts = {
                name.removeprefix(prefix(rank)): values
                for name, values in found.items()
                if name.startswith(prefix(rank))
            }
            self._peers.tell(do="remember", rank=rank, parts=yaml.safe_dump(parts))

    def time(self, name: str, measure: Callable[[], dict], found: dict[str, dict]) -> dict:
        """Times a part on all ranks. Returns what `measure` does here; `found` gets the others'."""
        self._peers.tell(do="time", part=name)
        own = measure()
        for rank, reply in enumerate(self._peers.replies(), 1):
            found[prefix(rank) + name] = yaml.safe_load(reply["values"])
        return own

    def network(self, model: ModelSpec, device: torch.device) -> dict[str, float]:
        """The keys of `machine_parts.Network`, and `exchange_bytes`: the GPU memory it takes."""
        before = free_bytes(device)
        self._peers.tell(do="exchange", hidden=model.shape.hidden_size, dtype=model.shape.dtype)
        exchange = meet(self._peers, device, one_machine=True, model="")
        one_s, many_s = (_exchange_s(exchange, model, n) for n in (1, MANY_TOKENS))
        shape = model.shape
        per_token = shape.hidden_size * (DTYPE_BYTES[shape.dtype] + 4)
        per_token += 12 * shape.num_experts_per_tok
        carried = (self.count - 1) * MANY_TOKENS * per_token
        return {
            "round_trip_us": round(one_s * 1e6, 1),
            "bytes_per_s": round(carried / many_s),
            "exchange_bytes": before - free_bytes(device),
        }

    def __enter__(self) -> OtherRanks:
        return self

    def __exit__(self, *_: object) -> None:
        self._on_own_cores.close()
        self._peers.close()


def prefix(rank: int) -> str:
    """Before the names of another rank's parts."""
    return f"rank {rank}, "


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU. 0 for a CPU."""
    if device.type == "cpu":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.mem_get_info(device)[0]


def timed_sizes(model: ModelSpec) -> list[tuple[int, int]]:
    """Tokens and choices of each exchange that is timed, in order."""
    choices = model.shape.num_experts_per_tok
    return [(n, choices) for n in (1, MANY_TOKENS) for _ in range(REPEATS * EXCHANGES)]


def _exchange_s(exchange: Exchange, model: ModelSpec, tokens: int) -> float:
    """Seconds of a layer's exchange, if all ranks have queued it."""
    shape = model.shape
    device = exchange.device
    dtype = getattr(torch, shape.dtype)
    choices = (tokens, shape.num_experts_per_tok)
    inputs = Inputs(
        torch.zeros(tokens, shape.hidden_size, dtype=dtype, device=device),
        torch.zeros(choices, dtype=torch.int64, device=device),
        torch.zeros(choices, device=device),
    )
    partial = torch.zeros(tokens, shape.hidden_size, device=device)
    found = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda._sleep(BUSY_CYCLES)  # until all are queued
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
        started_s = time.perf_counter()
        for _ in range(EXCHANGES):
            exchange.give(inputs)
            exchange.add(partial, dtype)
        elapsed_s = time.perf_counter() - started_s
        if device.type == "cuda":
            ended.record()
            ended.synchronize()
            elapsed_s = begun.elapsed_time(ended) * 1e-3
        found.append(elapsed_s / EXCHANGES)
    return median(found)
