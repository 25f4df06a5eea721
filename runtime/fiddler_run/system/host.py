"""The host resources available to this process: cores, memory, the CPU's name.

CPU affinity and control-group limits are respected. A missing system file (other systems, some
containers) means no limit, and every CPU counts as a core.
"""

import os
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")  # parent of proc and sys


def num_cores() -> int:
    """The number of usable cores: allowed CPUs, or whole cores granted by control groups if
    fewer.
    """
    return max(1, min([len(allowed_cpus()), *map(_quota_cores, _control_groups("cpu"))]))


def num_physical_cores() -> int:
    """The number of physical cores among the allowed CPUs. `num_cores` also counts SMT siblings."""
    cpus = allowed_cpus()
    return sum(_place(cpu, cpus)[0] == 0 for cpu in cpus)


def core_order() -> list[int]:
    """The allowed CPUs: one of each core first, ordered by NUMA node, then their SMT siblings."""
    cpus = allowed_cpus()
    return sorted(cpus, key=lambda cpu: _place(cpu, cpus))


def core_siblings() -> list[list[int]]:
    """The allowed CPUs of each physical core, ordered by NUMA node."""
    cores: dict[tuple[int, int], list[int]] = {}
    cpus = allowed_cpus()
    for cpu in sorted(cpus):
        _, node, first = _place(cpu, cpus)
        cores.setdefault((node, first), []).append(cpu)
    return [cores[key] for key in sorted(cores)]


def allowed_cpus() -> set[int]:
    """The numbers of the CPUs on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def available_memory_bytes() -> int:
    """Host memory that is available without swapping, within this process's control groups."""
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
    """The stripped text of a file below ROOT. Empty if the file is missing or unreadable."""
    try:
        return (ROOT / path).read_text(errors="replace").strip()
    except OSError:
        return ""


def cpu_list(text: str) -> list[int]:
    """Parses the kernel's list format: `0-3,8` is 0, 1, 2, 3, 8."""
    bounds = (part.split("-") for part in text.split(",") if part)
    return [number for bound in bounds for number in range(int(bound[0]), int(bound[-1]) + 1)]


def numa_node(cpu: int) -> int:
    """The NUMA node of a CPU. 0 if unknown."""
    nodes = (ROOT / f"sys/devices/system/cpu/cpu{cpu}").glob("node[0-9]*")
    return next((int(node.name.removeprefix("node")) for node in nodes), 0)


class OtherProcesses:
    """CPU time of other processes on the allowed CPUs, from the creation of this object on."""

    def __init__(self):
        allowed = allowed_cpus()
        # Under a control group's quota, the remaining time belongs to others, who disturb nobody.
        self._cpus = allowed if num_cores() >= len(allowed) else []
        self._start = self._now()

    def cores(self) -> float | None:
        """The number of cores that others used: all time that was not idle, including time stolen
        by other virtual machines, minus the time of this process and its finished children.
        """
        (start_s, start_busy, start_own) = self._start
        (now_s, now_busy, now_own) = self._now()
        if start_busy is None or now_busy is None or now_s <= start_s:
            return None
        return max(0.0, (now_busy - start_busy - (now_own - start_own)) / (now_s - start_s))

    def _now(self) -> tuple[float, float | None, float]:
        """Seconds of the clock, of these CPUs' work, and of this process's work."""
        ticks = 0
        for name, *counts in (line.split() for line in read("proc/stat").splitlines()):
            if re.fullmatch(r"cpu\d+", name) and int(name[3:]) in self._cpus:
                # guest time is included in user
                user, nice, system, _idle, _iowait, *interrupts_and_steal = map(int, counts[:8])
                ticks += user + nice + system + sum(interrupts_and_steal)
        return (
            time.monotonic(),
            ticks / os.sysconf("SC_CLK_TCK") if ticks else None,
            sum(os.times()[:4]),
        )


def _place(cpu: int, cpus: set[int]) -> tuple[int, int, int]:
    """The sort key of a CPU: its rank among its core's siblings, its node, the core's first
    sibling.
    """
    siblings = cpu_list(read(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
    threads = sorted({cpu, *siblings} & cpus)
    return threads.index(cpu), numa_node(cpu), threads[0]


def _control_groups(controller: str) -> Iterator[Path]:
    """The folders of the control groups that limit this process, from its own to the outermost.

    In a container, the process's path may be the one outside, and the container's own group is the
    root. Groups that do not exist set no limit.
    """
    for line in read("proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2; together with version 1, it is in a separate folder
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
    """Whole cores of CPU time granted by a control group. Infinite without a limit."""
    version_1 = f"{read(group / 'cpu.cfs_quota_us')} {read(group / 'cpu.cfs_period_us')}"
    quota, _, period = (read(group / "cpu.max") or version_1).partition(" ")
    return int(quota) // int(period) if quota.isdigit() and period.isdigit() else float("inf")


def _group_memory_bytes(group: Path) -> float:
    """Memory still available in a control group. Infinite without a limit.

    Inactive cached files count as available, because the kernel reclaims them.
    """
    limit = read(group / "memory.max") or read(group / "memory.limit_in_bytes")
    used = read(group / "memory.current") or read(group / "memory.usage_in_bytes")
    if not limit.isdigit() or not used.isdigit():
        return float("inf")
    statistics = dict(line.split() for line in read(group / "memory.stat").splitlines())
    inactive = statistics.get("total_inactive_file") or statistics.get("inactive_file") or 0
    return int(limit) - int(used) + int(inactive)
