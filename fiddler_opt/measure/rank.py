"""Another rank of `fiddler-opt profile --ranks`: times what rank 0 says, when it says so."""

import argparse
import sys
from functools import partial

from fiddler_run.command import exit_status
from fiddler_run.errors import FiddlerError
from fiddler_run.flag_types import address, positive
from fiddler_run.ranks.connection import Connection
from fiddler_run.ranks.joining import joined


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--join", type=address, required=True)
    parser.add_argument("--rank", type=positive, required=True)
    flags = parser.parse_args()
    return exit_status(lambda: run(flags.join, flags.rank), "fiddler-opt profile")


def run(host_and_port: tuple[str, int], rank: int) -> None:
    try:
        with joined(host_and_port, rank, patience_s=1) as (connection, task):
            _work(connection, rank, task)
    except FiddlerError:
        sys.exit(1)  # rank 0 tells the user


def _work(connection: Connection, rank: int, task: dict) -> None:
    import torch

    from fiddler_run.ranks.cores import on_own_cores
    from fiddler_run.system.gpu import gpu_numa_nodes, num_gpus

    if num_gpus():
        if num_gpus() < task["count"]:
            raise FiddlerError(
                f"--ranks {task['count']}: each needs a GPU of its own, and there are {num_gpus()}"
            )
        torch.cuda.set_device(rank)
    with on_own_cores([1] * task["count"], rank, gpu_numa_nodes()):
        _measure(connection, rank, task)


def _measure(connection: Connection, rank: int, task: dict) -> None:
    import torch
    import yaml

    from fiddler_opt.inputs.model import ModelSpec
    from fiddler_opt.measure.machine import MachineBench
    from fiddler_opt.measure.ranks import free_bytes, timed_sizes
    from fiddler_opt.measure.settings import profile_settings
    from fiddler_run.ranks.meet import join

    model = ModelSpec.load(task["model"])
    bench = MachineBench(model, profile_settings(task["quick"], task["count"]), None)
    bench.agree = partial(agree, connection)
    connection.send(ready=True)
    while (message := connection.receive()) is not None:
        match message["do"]:
            case "remember" if message["rank"] == rank:
                bench.found = yaml.safe_load(message["parts"])
            case "time":
                values = bench.parts[message["part"]]()
                bench.found[message["part"]] = values
                connection.send(values=yaml.safe_dump(values))
            case "exchange":
                before = free_bytes(bench.device)
                exchange = join(connection, rank, bench.device, "")
                for sizes in timed_sizes(model):
                    states = exchange.receive(sizes).states
                    exchange.send(torch.zeros_like(states, dtype=torch.float32))
                connection.send(exchange_bytes=before - free_bytes(bench.device))
            case "end":
                return


def agree(connection: Connection, shares: list[float]) -> list[float]:
    """As `ranks.agreed` of rank 0, which answers.

    Raises:
        FiddlerError: rank 0 has gone.
    """
    connection.send(shares=shares)
    answer = connection.receive()
    if answer is None:
        raise FiddlerError("rank 0 is gone")
    return answer["shares"]


if __name__ == "__main__":
    sys.exit(main())
