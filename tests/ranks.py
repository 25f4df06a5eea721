"""Plans of several ranks, and models that run them with the other ranks in threads."""

import random
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from conftest import random_plan
from models import open_checkpoint

from fiddler_run.errors import FiddlerError
from fiddler_run.generation.model import PlannedModel
from fiddler_run.plan.rank import HostMemory
from fiddler_run.plan.schema import Plan
from fiddler_run.ranks.connection import Connection, connect, listen
from fiddler_run.ranks.meet import join, meet
from fiddler_run.ranks.peer import Peer
from fiddler_run.ranks.peers import Peers
from fiddler_run.ranks.serve import serve
from fiddler_run.ranks.share import share_of
from fiddler_run.weights.store import ExpertStore

CPU = torch.device("cpu")


def shared_plan(
    plan: Plan, num_ranks: int, rng: random.Random, machines: Sequence[int] | None = None
) -> Plan:
    """The plan for ranks that share every expert at random. Some may have no block of an expert."""
    shape = plan.model
    places = 2 * num_ranks  # resident and host, of each rank
    rows = [{} for _ in range(places)]
    for layer in range(shape.num_layers):
        of_layer = [_cut(plan.blocks_per_expert, places, rng) for _ in range(shape.num_experts)]
        for row, counts in zip(rows, zip(*of_layer, strict=True), strict=True):
            row[layer] = list(counts)
    ranks = []
    for number in range(num_ranks):
        resident, host = rows[2 * number : 2 * number + 2]
        resident_bytes, host_bytes = (
            sum(map(sum, each.values())) * plan.block_bytes for each in (resident, host)
        )
        gpu = plan.rank.gpu_memory_bytes.model_copy(update={"experts": resident_bytes})
        update = {
            "machine": machines[number] if machines else 0,
            "gpu_memory_bytes": gpu,
            "host_memory_bytes": HostMemory(experts=host_bytes, embedding=0),
            "disk_bytes": 0,
            "cpu_threads": 1,
            "cpu_pinned": False,
            "resident_blocks": resident,
            "host_blocks": host,
            "disk_blocks": {},
        }
        ranks.append(plan.rank.model_copy(update=update))
    return Plan.model_validate(
        {**plan.model_dump(), "ranks": [each.model_dump() for each in ranks]}
    )


def random_shared_plan(shape, seed: int, num_ranks: int, block_neurons: int = 32) -> Plan:
    rng = random.Random(seed)
    return shared_plan(random_plan(shape, rng, block_neurons), num_ranks, rng)


def _cut(blocks: int, parts: int, rng: random.Random) -> list[int]:
    ends = sorted(rng.randint(0, blocks) for _ in range(parts - 1))
    return [end - start for start, end in zip([0, *ends], [*ends, blocks], strict=True)]


@contextmanager
def in_ranks(model: PlannedModel, plan: Plan, folder: Path) -> Iterator[PlannedModel]:
    """Lets a loaded model run a plan whose other ranks are threads; experts are in `folder`."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # a thread that has received a message should not wait for another
    torch.set_num_threads(1)  # MKL's number of threads is that of the process
    weights = open_checkpoint(folder)
    num_ranks = len(plan.ranks)

    def run(rank: int, address: tuple[str, int]) -> None:
        with connect(*address, patience_s=5) as connection:
            connection.send(rank=rank)
            exchange = join(connection, rank, CPU, str(folder))
            store = ExpertStore(plan, CPU, folder, rank)
            store.load(weights)
            connection.send(notes=[])
            with suppress(RuntimeError, FiddlerError):  # rank 0 may break a layer off
                serve(connection, exchange, share_of(plan, store, CPU, rank), plan)

    with listen("127.0.0.1", 0) as listening:
        address = listening.getsockname()[:2]
        threads = [
            threading.Thread(target=run, args=(rank, address)) for rank in range(1, num_ranks)
        ]
        for thread in threads:
            thread.start()
        connections = [Connection(listening.accept()[0]) for _ in threads]
    ranks = {connection.receive()["rank"]: connection for connection in connections}
    peers = Peers([Peer(rank, ranks[rank]) for rank in sorted(ranks)])
    try:
        meet(peers, model.device, True, str(folder))
        store = ExpertStore(plan, model.device, folder)
        store.load(weights)
        peers.replies()
        model.attach_experts(plan, store, peers)
        yield model
    finally:
        peers.close()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(before)
