"""What this machine's host side offers this process: cores, memory, the CPU's name. Rule: a limit
set from outside counts.

Where a file of the system is missing (other systems, some containers) it sets no limit, and every
CPU is a core of its own.
"""

import os
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")  # of proc and sys


def num_cores() -> int:
    """Cores that this process may use: its CPUs, or the whole cores of time that its control groups
    grant, if those are fewer.
    """
    return max(1, min([len(allowed_cpus()), *map(_quota_cores, _control_groups("cpu"))]))


def num_physical_cores() -> int:
    """Cores among the CPUs that this process may use, where `num_cores` counts each of a core's
    threads.
    """
    cpus = allowed_cpus()
    return sum(_place(cpu, cpus)[0] == 0 for cpu in cpus)


def core_order() -> list[int]:
    """The CPUs that this process may use: first one of each core, those of a NUMA node together,
    then the cores' other threads.
    """
    cpus = allowed_cpus()
    return sorted(cpus, key=lambda cpu: _place(cpu, cpus))


def allowed_cpus() -> set[int]:
    """The numbers of the CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def available_memory_bytes() -> int:
    """Host memory that can be taken without swapping and within the limits of this process's
    control groups.
    """
    lines = read("proc/meminfo").splitlines()
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    if not available:
        available = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    return max(0, min([*available, *map(_group_memory_bytes, _control_groups("memory"))]))


def cpu_name() -> str:
    lines = read("proc/cpuinfo").splitlines()
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def read(path: str | Path) -> str:
    """The text of a file below ROOT, stripped; empty where there is none, or where it cannot be
    read.
    """
    try:
        return (ROOT / path).read_text(errors="replace").strip()
    except OSError:
        return ""


def cpu_list(text: str) -> list[int]:
    """The numbers in the kernel's form of a list: `0-3,8` is 0, 1, 2, 3, 8."""
    bounds = (part.split("-") for part in text.split(",") if part)
    return [number for bound in bounds for number in range(int(bound[0]), int(bound[-1]) + 1)]


def numa_node(cpu: int) -> int:
    """The NUMA node of a CPU; 0 where the system knows none."""
    nodes = (ROOT / f"sys/devices/system/cpu/cpu{cpu}").glob("node[0-9]*")
    return next((int(node.name.removeprefix("node")) for node in nodes), 0)


class OtherProcesses:
    """CPU time that others take, on the CPUs that this process may use, from the making of this
    object on.
    """

    def __init__(self):
        allowed = allowed_cpus()
        # A control group that grants only some of their time leaves the rest to others, who disturb
        # nobody.
        self._cpus = allowed if num_cores() >= len(allowed) else []
        self._start = self._now()

    def cores(self) -> float | None:
        """Cores' worth of it until now: what was not idle, and what other virtual machines took,
        less what this process and its finished children used.
        """
        (start_s, start_busy, start_own) = self._start
        (now_s, now_busy, now_own) = self._now()
        if start_busy is None or now_busy is None or now_s <= start_s:
            return None
        return max(0.0, (now_busy - start_busy - (now_own - start_own)) / (now_s - start_s))

    def _now(self) -> tuple[float, float | None, float]:
        """Seconds on the clock, of these CPUs' work, and of our own."""
        ticks = 0
        for name, *counts in (line.split() for line in read("proc/stat").splitlines()):
            if re.fullmatch(r"cpu\d+", name) and int(name[3:]) in self._cpus:
                # guests' time is in user
                user, nice, system, _idle, _iowait, *interrupts_and_steal = map(int, counts[:8])
                ticks += user + nice + system + sum(interrupts_and_steal)
        return (
            time.monotonic(),
            ticks / os.sysconf("SC_CLK_TCK") if ticks else None,
            sum(os.times()[:4]),
        )


def _place(cpu: int, cpus: set[int]) -> tuple[int, int, int]:
    """Where a CPU comes in the order of cores: which thread of its core it is among `cpus`, the
    node, the core's first thread.
    """
    siblings = cpu_list(read(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
    threads = sorted({cpu, *siblings} & cpus)
    return threads.index(cpu), numa_node(cpu), threads[0]


def _control_groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups that limit this process, from its own to the outermost that can
    be seen from here.

    The process's path may be one outside of a container, whose own group is then the root: groups
    that do not exist limit nothing.
    """
    for line in read("proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2; beside version 1 it lies in a folder of its own
            mounts = ["", "unified"]
        elif controller in controllers.split(","):
            mounts = [controller]
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        yield from (
            Path("sys/fs/cgroup", mount, part)
            for mount in mounts
            for part in (group, *group.parents)
        )


def _quota_cores(group: Path) -> float:
    """Whole cores of time that a control group grants; infinite without a limit."""
    version_1 = f"{read(group / 'cpu.cfs_quota_us')} {read(group / 'cpu.cfs_period_us')}"
    quota, _, period = (read(group / "cpu.max") or version_1).partition(" ")
    return int(quota) // int(period) if quota.isdigit() and period.isdigit() else float("inf")


def _group_memory_bytes(group: Path) -> float:
    """Memory that a control group still grants; infinite without a limit. Cached files not used
    lately give way, so they count.
    """
    limit = read(group / "memory.max") or read(group / "memory.limit_in_bytes")
    used = read(group / "memory.current") or read(group / "memory.usage_in_bytes")
    if not limit.isdigit() or not used.isdigit():
        return float("inf")
    statistics = dict(line.split() for line in read(group / "memory.stat").splitlines())
    inactive = statistics.get("total_inactive_file") or statistics.get("inactive_file") or 0
    return int(limit) - int(used) + int(inactive)
