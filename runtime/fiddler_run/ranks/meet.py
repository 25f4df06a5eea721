"""Connects all ranks for the exchange of tensors."""

from __future__ import annotations

import torch
import torch.distributed as distributed

from fiddler_run.errors import FiddlerError
from fiddler_run.ranks.connection import Connection, listen
from fiddler_run.ranks.exchange import Exchange, GlooExchange, NcclExchange
from fiddler_run.ranks.peers import Peers


def meet(peers: Peers, device: torch.device, one_machine: bool, model: str) -> Exchange:
    """Connects rank 0 with the others, which call `join`.

    Args:
        device: of rank 0.
        one_machine: True if all ranks are on the same machine.
        model: identifies the files of its model.

    Raises:
        FiddlerError: another rank has failed, or has another model.
    """
    found = peers.replies()
    for rank, reply in enumerate(found, 1):
        if reply["model"] != model:
            peers.close()
            raise FiddlerError(
                f"rank {rank} has other files of the model than rank 0; copy the whole folder"
            )
    on_gpus = {device.type, *(reply["device"] for reply in found)} == {"cuda"}
    nccl = one_machine and on_gpus
    host = peers.own_address
    num_ranks = 1 + len(found)
    listening = listen(host, 0)
    store = distributed.TCPStore(
        host,
        listening.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    peers.tell(port=store.port, num_ranks=num_ranks, nccl=nccl)
    peers.has_gpu = any(reply["device"] == "cuda" for reply in found)
    with peers.connecting():
        peers.exchange = _exchange(nccl, 0, num_ranks, device, store, host)
    return peers.exchange


def join(connection: Connection, rank: int, device: torch.device, model: str) -> Exchange:
    """Connects a rank with rank 0, which calls `meet`.

    Raises:
        FiddlerError: rank 0 has gone.
    """
    connection.send(device=device.type, model=model)
    message = connection.receive()
    if message is None or "port" not in message:
        raise FiddlerError("rank 0 is gone")
    store = distributed.TCPStore(connection.address, message["port"], is_master=False)
    own_address = connection.own_address
    return _exchange(message["nccl"], rank, message["num_ranks"], device, store, own_address)


def _exchange(
    nccl: bool,
    rank: int,
    num_ranks: int,
    device: torch.device,
    store: distributed.Store,
    address: str,
) -> Exchange:
    if nccl:
        return NcclExchange(rank, num_ranks, device, store)
    return GlooExchange(rank, num_ranks, device, store, address)
