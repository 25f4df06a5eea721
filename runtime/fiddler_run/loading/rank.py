"""A rank other than 0: joins rank 0, loads its share of the experts, and computes until the end."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan
from fiddler_run.ranks.connection import JOIN_S, STARTED_BY_RANK_0, Connection
from fiddler_run.ranks.joining import joined


def run_rank(
    address: tuple[str, int],
    rank: int,
    model: str | None = None,
    disk_folder: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Runs a rank until rank 0 ends it.

    Args:
        address: where rank 0 listens.
        model: the checkpoint's folder here. None: as on rank 0.
        disk_folder: for experts on disk; see `load_model`.
        tell: called with lines to show, if rank 0 has not started this process.

    Raises:
        FiddlerError: rank 0 cannot be reached or has gone, or the share cannot be loaded here.
        SystemExit: the same, if rank 0 has started this process: it tells the user.
    """
    started_here = STARTED_BY_RANK_0 in os.environ
    try:
        with joined(address, rank, 1 if started_here else JOIN_S) as (connection, task):
            if started_here:
                tell = _ignore
            tell(f"connected to rank 0 at {address[0]}:{address[1]}; loading")
            _work(connection, rank, task, model, disk_folder, tell)
    except FiddlerError:
        if started_here:
            sys.exit(1)
        raise


def _ignore(_: str) -> None:
    pass


def _work(
    connection: Connection,
    rank: int,
    task: dict,
    model: str | None,
    disk_folder: str | None,
    tell: Callable[[str], None],
) -> None:
    import torch

    from fiddler_run.loading.share import ShareLoader
    from fiddler_run.ranks.meet import join
    from fiddler_run.ranks.serve import serve
    from fiddler_run.ranks.share import share_of

    plan = Plan.parse(task["plan"], "the plan of rank 0")
    loader = ShareLoader(
        plan, rank, model or task["model"], task["load_format"], disk_folder or task["disk_folder"]
    )
    torch.set_num_threads(plan.ranks[rank].cpu_threads)
    with loader.on_own_cores():
        exchange = join(connection, rank, loader.device, loader.model_id)
        try:
            store = loader.load_store(lambda count: connection.send(loaded_bytes=count))
            share = share_of(plan, store, loader.device, rank)
            notes = [*loader.notes, *store.notes]
            connection.send(notes=notes)
            for note in notes:
                tell(f"note: {note}")
            size = f"{plan.ranks[rank].expert_bytes / 1e9:.2f} GB"
            tell(f"computes {size} of experts until rank 0 ends")
            serve(connection, exchange, share, plan)
        except BaseException:
            # in its own thread, because NCCL may wait; then `joined` ends this process
            threading.Thread(target=exchange.abort).start()
            raise
