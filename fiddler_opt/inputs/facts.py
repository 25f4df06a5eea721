"""Reads facts about this machine from the system.

Unless stated otherwise, None means that the system does not tell. Nothing is judged here.
"""

import os
import platform
import re
import resource
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from fiddler_run.system import host
from fiddler_run.system.host import read

GENERATIONS = {"2.5": 1, "5": 2, "8": 3, "16": 4, "32": 5, "64": 6}  # PCIe generation by GT/s
# By PCIe generation, after line encoding.
LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
DISK_SAMPLE_BYTES = 512_000_000
DISK_MINIMUM_BYTES = 64_000_000
DISK_READ_BYTES = 4_194_304
DISK_THREADS = 8


@dataclass(frozen=True)
class NumaNode:
    number: int
    cpus: list[int]
    memory_bytes: int


@dataclass(frozen=True)
class PcieLink:
    """The current state of a GPU's link, and the maximum that card and slot support.

    Widths are in lanes.
    """

    generation: int
    width: int
    max_generation: int
    max_width: int

    @property
    def bytes_per_s(self) -> float:
        """The link's current rate in one direction, before packet overhead."""
        return self.width * LANE_BYTES_PER_S[self.generation]

    @property
    def max_bytes_per_s(self) -> float:
        return self.max_width * LANE_BYTES_PER_S[self.max_generation]


@dataclass
class GpuUse:
    """How busy a GPU is, from 0 to 1, and the bytes that each process holds. None: unknown."""

    utilisation: float | None
    processes: dict[int, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver: its version, and the newest CUDA version it supports."""

    version: str | None
    cuda: str | None


def memlock_limit_bytes() -> int | None:
    """The amount of memory that this process may lock. None: unlimited."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def is_wsl() -> bool:
    """True if this Linux system runs under WSL."""
    return "microsoft" in platform.release().lower()


def numa_nodes() -> list[NumaNode] | None:
    folders = (host.ROOT / "sys/devices/system/node").glob("node[0-9]*")
    nodes = []
    for folder in sorted(folders, key=lambda folder: int(folder.name[4:])):
        memory = re.search(r"MemTotal:\s+(\d+) kB", read(folder / "meminfo"))
        cpus = host.cpu_list(read(folder / "cpulist"))
        nodes.append(NumaNode(int(folder.name[4:]), cpus, int(memory[1]) * 1024 if memory else 0))
    return nodes or None


def governor() -> str | None:
    """The frequency governor of the first usable CPU: `performance`, `powersave`, ..."""
    return (
        read(f"sys/devices/system/cpu/cpu{min(host.allowed_cpus())}/cpufreq/scaling_governor")
        or None
    )


def transparent_huge_pages() -> str | None:
    """The setting of transparent huge pages: `always`, `madvise` or `never`."""
    chosen = re.search(r"\[(\w+)\]", read("sys/kernel/mm/transparent_hugepage/enabled"))
    return chosen[1] if chosen else None


def has_nvidia_gpu() -> bool:
    """True if an NVIDIA GPU is present, with or without a driver."""
    devices = list((host.ROOT / "sys/bus/pci/devices").glob("*"))
    display = any(
        read(device / "vendor") == "0x10de" and read(device / "class").startswith("0x03")
        for device in devices
    )
    return display or bool(read("proc/driver/nvidia/version")) or bool(_nvidia_smi("-L"))


def nvidia_driver() -> Driver | None:
    summary = _nvidia_smi() or ""
    version = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", read("proc/driver/nvidia/version") or summary)
    cuda = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d+\.\d+)", summary)
    return Driver(version and version[0], cuda and cuda[1]) if version or cuda else None


def pcie_link(bus_id: str) -> PcieLink | None:
    """The link of the GPU at `bus_id`, such as `0000:01:00.0`.

    An idle GPU lowers its link speed, so call this during a copy.
    """
    for ask in (_link_by_sysfs, _link_by_nvidia_smi):
        link = ask(_sysfs_name(bus_id))
        # virtual machines report 0, 63 or 255
        if link and 0 < link.width <= 32 and 0 < link.max_width <= 32:
            return link
    return None


def _link_by_sysfs(name: str) -> PcieLink | None:
    device = (host.ROOT / "sys/bus/pci/devices" / name).resolve()  # the parent is the slot's bridge

    def generation(file: Path) -> int | None:
        speed = re.match(r"(\d+(?:\.\d+)?) GT/s", read(file))
        return speed and GENERATIONS.get(speed[1].removesuffix(".0"))

    def width(file: Path) -> int | None:
        return int(read(file)) if read(file).isdigit() else None

    now = generation(device / "current_link_speed"), width(device / "current_link_width")
    card, slot = (
        (generation(end / "max_link_speed"), width(end / "max_link_width"))
        for end in (device, device.parent)
    )
    if None in (*now, *card):
        return None
    return PcieLink(
        *now,
        *(min(of_card, of_slot or of_card) for of_card, of_slot in zip(card, slot, strict=True)),
    )


def _link_by_nvidia_smi(bus_id: str) -> PcieLink | None:
    keys = "pcie.link.gen.current,pcie.link.width.current,pcie.link.gen.max,pcie.link.width.max"
    fields = next(iter(_query(f"--query-gpu={keys}", "-i", bus_id)), [])
    known = len(fields) == 4 and all(field.isdigit() for field in fields)
    link = PcieLink(*map(int, fields)) if known else None
    return (
        link if link and {link.generation, link.max_generation} <= LANE_BYTES_PER_S.keys() else None
    )


def gpu_numa_node(bus_id: str) -> int | None:
    node = read(f"sys/bus/pci/devices/{_sysfs_name(bus_id)}/numa_node")
    return int(node) if node.isdigit() else None  # -1: the firmware does not report a node


def gpu_use() -> dict[str, GpuUse]:
    """The use of each GPU by other processes, by bus id such as `0000:01:00.0`.

    A container may hide other processes.
    """
    use = {
        _sysfs_name(bus_id): GpuUse(int(percent) / 100 if percent.isdigit() else None)
        for bus_id, percent in _query("--query-gpu=pci.bus_id,utilization.gpu")
    }
    for bus_id, pid, mebibytes in _query("--query-compute-apps=gpu_bus_id,pid,used_memory"):
        if pid.isdigit() and int(pid) != os.getpid() and _sysfs_name(bus_id) in use:
            use[_sysfs_name(bus_id)].processes[int(pid)] = (
                int(mebibytes) * 2**20 if mebibytes.isdigit() else None
            )
    return use


def _sysfs_name(bus_id: str) -> str:
    """The bus id in sysfs's form: `0000:01:00.0` for nvidia-smi's `00000000:01:00.0`."""
    domain, _, rest = bus_id.partition(":")
    return f"{int(domain, 16):04x}:{rest.lower()}"


def _query(*arguments: str) -> list[list[str]]:
    """Runs nvidia-smi and returns its rows, each a list of fields."""
    answer = _nvidia_smi(*arguments, "--format=csv,noheader,nounits") or ""
    return [
        [field.strip() for field in line.split(",")] for line in answer.splitlines() if line.strip()
    ]


def _nvidia_smi(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def disk_bytes_per_s(folder: str | Path) -> float | None:
    """Read speed of the largest file in a checkpoint's folder, using several threads.

    Drops the file's cached pages first. Where the system ignores that request, the result is the
    speed of the page cache. None if the file is smaller than 64 MB.
    """
    files = [path for path in Path(folder).glob("*") if path.is_file() and os.access(path, os.R_OK)]
    largest = max(files, key=lambda path: path.stat().st_size, default=None)
    if largest is None or largest.stat().st_size < DISK_MINIMUM_BYTES:
        return None
    size = min(largest.stat().st_size, DISK_SAMPLE_BYTES)
    with largest.open("rb", buffering=0) as file, ThreadPoolExecutor(DISK_THREADS) as threads:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
        start_s = time.perf_counter()
        pieces = range(0, size, DISK_READ_BYTES)
        read_bytes = sum(
            threads.map(
                lambda offset: os.preadv(file.fileno(), [bytearray(DISK_READ_BYTES)], offset),
                pieces,
            )
        )
        return read_bytes / (time.perf_counter() - start_s)
