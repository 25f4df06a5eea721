"""Runs another program, and observes how much memory the machine then uses."""

import os
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SAMPLE_S = 0.2
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # settings of OpenMP


class Failed(Exception):
    """The reason why a program gave no result."""


@dataclass
class Finished:
    """What a program printed, and the largest numbers of bytes in use meanwhile.

    `gpu_bytes`: of the first GPU, by all programs. `host_bytes`: more than
    before, without what the system caches.
    """

    stdout: str
    gpu_bytes: int
    host_bytes: int


def run(command: list[str], log: Path, timeout_s: float | None = None) -> Finished:
    """Runs a program, which sees one GPU. Writes its stderr to `log`.

    How OpenMP's threads wait is not passed on: threads that sleep at once suit some programs, and
    slow others down.

    Raises:
        Failed: its exit status is not 0, it takes longer than `timeout_s`, or memory cannot be
            observed.
    """
    before = host_bytes_used()
    # in nvidia-smi's order, which is not CUDA's
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    own = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment = {**own, **order, "CUDA_VISIBLE_DEVICES": first_gpu()}
    over = threading.Event()

    def peaks() -> tuple[int, int]:
        gpu = host = 0
        while not over.wait(SAMPLE_S):
            gpu = max(gpu, gpu_bytes("memory.used"))
            host = max(host, host_bytes_used() - before)
        return gpu, host

    with ThreadPoolExecutor(1) as threads, log.open("w") as errors:
        sampled = threads.submit(peaks)
        try:
            done = subprocess.run(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                check=False,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"no result within {timeout_s:g} s, see {log}") from None
        finally:
            over.set()
    if done.returncode != 0:
        raise Failed(f"failed, see {log}")
    try:
        return Finished(done.stdout, *sampled.result())
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise Failed(f"its memory could not be observed: {error}") from error


def host_bytes_used() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (e.partition(":") for e in lines)}
    return (kilobytes["MemTotal"] - kilobytes["MemAvailable"]) * 1024


def gpu_bytes(what: str) -> int:
    """`memory.used` or `memory.total` of the first GPU. 0 if it is hidden or there is none."""
    if shutil.which("nvidia-smi") is None or not first_gpu().isdigit():
        return 0
    command = [
        "nvidia-smi",
        "-i",
        first_gpu(),
        f"--query-gpu={what}",
        "--format=csv,noheader,nounits",
    ]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 2**20


def first_gpu() -> str:
    """The number of the first GPU that this process may use."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
