"""`fiddler-opt profile --ranks`: several processes time the same part at the same moment."""

import os
import threading
from functools import partial

import pytest
from command_line import run
from conftest import DEMO
from planning import small_model

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.machine_parts import MeasuredShape
from fiddler_opt.measure import rank
from fiddler_opt.measure.assemble import ranks_profile
from fiddler_opt.measure.ranks import agreed
from fiddler_opt.measure.shares import Agree, sweep_shares
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan
from fiddler_run.ranks.connection import Connection, connect, listen
from fiddler_run.ranks.peer import Peer
from fiddler_run.ranks.peers import Peers

pytestmark = pytest.mark.xdist_group("profile")  # tests that time this machine
NETWORK = {"round_trip_us": 30.0, "bytes_per_s": 10**9, "exchange_bytes": 5}


def parts_of(kind: str, us: float) -> dict[str, dict]:
    """The parts that a rank has timed."""
    device = {"kind": kind, "name": kind, "memory_bytes": 100, "free_bytes": 90}
    return {
        "host": {"available_bytes": 10**9, "disk_bytes_per_s": None},
        "device": {**device, "context_bytes": 7},
        "threads": {
            "threads": 1,
            "pinned": False,
            "threads_us": {1: us},
            "pinned_threads_us": {1: us},
            "kernel": "avx2",
            "timed_bytes": 10,
            "page_locked": False,
        },
        "experts, 1 tokens, round 1": {
            "host_expert_us": {0.0: us},
            "resident_expert_us": us / 2,
        },
    }


def test_parts_of_all_ranks_make_one_profile():
    model = small_model()
    layers = {"dense_layer_us": 3.0, "dense_device_us": 2.0, "head_us": 1.0}
    parts = {
        **parts_of("cpu", 10.0),
        "layers, 1 tokens, round 1": layers,
        **{f"rank 1, {name}": values for name, values in parts_of("cpu", 20.0).items()},
    }
    timed = {
        "experts, 1 tokens, round 1": ("experts", 1),
        "layers, 1 tokens, round 1": ("layers without experts", 1),
    }
    profile = ranks_profile(parts, timed, {"experts": model}, "by hand", 2, NETWORK)
    assert profile.problems() == []
    assert MachineProfile.parse(profile.dump(), "dump") == profile
    assert profile.shape == MeasuredShape.of(model)
    assert profile.num_ranks == 2
    (other,) = profile.other_ranks
    assert (profile.host_expert_us, other.host_expert_us) == ({1: {0.0: 10.0}}, {1: {0.0: 20.0}})
    assert (profile.resident_expert_us, other.resident_expert_us) == ({1: 5.0}, {1: 10.0})
    # the exchange's buffers are in GPU memory that PyTorch does not count
    assert profile.device.context_bytes == other.device.context_bytes == 7 + 5
    assert (profile.network.round_trip_us, profile.network.bytes_per_s) == (30.0, 10**9)


def test_ranks_time_the_same_shares():
    """Their best shares differ: on its own, each would time other shares."""
    asked = {0: [], 1: []}
    found = {}

    def sweep(number: int, best: float, agree: Agree) -> None:
        def measure(shares: list[float]) -> dict[float, float]:
            asked[number].append(shares)
            alone = {0.0: 2000.0, 1.0: 2000.0}
            return {share: alone.get(share, 1000 * abs(share - best)) for share in shares}

        found[number] = sweep_shares(measure, [0.0, 1.0], 1 / 32, agree)

    with listen("127.0.0.1", 0) as listening:
        other = connect(*listening.getsockname(), patience_s=5)
        peers = Peers([Peer(1, Connection(listening.accept()[0]))])
    arguments = (1, 0.8, partial(rank.agree, other))
    thread = threading.Thread(target=sweep, args=arguments, daemon=True)
    thread.start()
    try:
        sweep(0, 0.2, partial(agreed, peers))
        thread.join(timeout=10)
    finally:
        other.close()
        peers.close()
    assert asked[0] == asked[1]
    assert len(asked[0]) > 2
    for number, best in ((0, 0.2), (1, 0.8)):
        fastest = min(found[number], key=found[number].get)
        assert abs(fastest - best) <= 1 / 32


def test_a_rank_notices_that_rank_0_is_gone():
    with listen("127.0.0.1", 0) as listening:
        other = connect(*listening.getsockname(), patience_s=5)
        Connection(listening.accept()[0]).close()
    with pytest.raises(FiddlerError, match="rank 0 is gone"):
        rank.agree(other, [0.5])


@pytest.mark.slow
def test_profile_plan_and_run_two_ranks(tmp_path):
    flags = ("--model", DEMO, "--profiles", "here")
    timed = run(
        "fiddler-opt",
        *("profile", *flags, "--quick", "--force", "--only", "machine", "--ranks", 2),
        cwd=tmp_path,
    )
    assert timed.returncode == 0, timed.stderr
    profile = MachineProfile.load(tmp_path / "here/local.machine.yaml")
    assert profile.num_ranks == 2
    cores = len(os.sched_getaffinity(0))
    assert profile.cpu.cores + profile.other_ranks[0].cpu.cores <= max(2, cores)
    assert list(profile.other_ranks[0].host_expert_us) == list(profile.host_expert_us)
    context = ("--prompt-tokens", 16, "--output-tokens", 20, "--max-seq-len", 64)
    made = run(
        "fiddler-opt",
        *("plan", *flags, "--gpu-mem", "0GB,0GB", *context, "-o", "two.yaml"),
        cwd=tmp_path,
    )
    assert made.returncode == 0, made.stderr
    assert len(Plan.load(tmp_path / "two.yaml").ranks) == 2
    told = run("fiddler-run", "--plan", "two.yaml", "Once upon a time", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith(" there was a")
