"""Times several ranks of this machine at once, because they share its memory.

Each other rank is a process of its own (`rank.py`). All start each measurement together.
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
from fiddler_opt.solve.cost import exchanged_bytes
from fiddler_run.ranks.cores import on_own_cores
from fiddler_run.ranks.exchange import Exchange, Sizes
from fiddler_run.ranks.launch import start_ranks
from fiddler_run.ranks.meet import meet
from fiddler_run.ranks.peers import Peers
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
        self._peers = start_ranks([0] * count, None, task, module="fiddler_opt.measure.rank")
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

    def agree(self, shares: list[float]) -> list[float]:
        """See `agreed`."""
        return agreed(self._peers, shares)

    def network(self, model: ModelSpec, device: torch.device) -> dict[str, float]:
        """The keys of `machine_parts.Network`, and `exchange_bytes`: the GPU memory it takes."""
        before = free_bytes(device)
        self._peers.tell(do="exchange")
        exchange = meet(self._peers, device, one_machine=True, model="")
        one_s, many_s = (_exchange_s(exchange, sizes) for sizes in _timed(model))
        carried = (self.count - 1) * MANY_TOKENS * exchanged_bytes(model)
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


def agreed(peers: Peers, shares: list[float]) -> list[float]:
    """All shares that any rank wants to time next, sorted.

    All ranks time the same list at the same moment: one that went on alone would have the memory
    for itself, and seem faster than it is.

    Args:
        shares: those that this rank wants to time.

    Raises:
        FiddlerError: a rank has failed.
    """
    wanted = sorted(set(shares).union(*(reply["shares"] for reply in peers.replies())))
    peers.tell(shares=wanted)
    return wanted


def prefix(rank: int) -> str:
    """Before the names of another rank's parts."""
    return f"rank {rank}, "


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU. 0 for a CPU."""
    if device.type == "cpu":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.mem_get_info(device)[0]


def _timed(model: ModelSpec) -> list[Sizes]:
    shape = model.shape
    dtype = getattr(torch, shape.dtype)
    k = shape.num_experts_per_tok
    return [Sizes(tokens, k, shape.hidden_size, dtype) for tokens in (1, MANY_TOKENS)]


def timed_sizes(model: ModelSpec) -> list[Sizes]:
    """The sizes of each exchange that is timed, in order."""
    return [sizes for sizes in _timed(model) for _ in range(REPEATS * EXCHANGES)]


def _exchange_s(exchange: Exchange, sizes: Sizes) -> float:
    """Seconds of a layer's exchange, if all ranks have queued it."""
    device = exchange.device
    inputs = sizes.message(device)[1]
    partial = torch.zeros_like(inputs.states, dtype=torch.float32)
    found = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda._sleep(BUSY_CYCLES)  # until all are queued
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
        started_s = time.perf_counter()
        for _ in range(EXCHANGES):
            exchange.broadcast(inputs)
            exchange.reduce(partial, sizes.dtype)
        elapsed_s = time.perf_counter() - started_s
        if device.type == "cuda":
            ended.record()
            ended.synchronize()
            elapsed_s = begun.elapsed_time(ended) * 1e-3
        found.append(elapsed_s / EXCHANGES)
    return median(found)
