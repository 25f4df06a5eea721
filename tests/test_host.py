"""Cores and memory read from system files, which these tests write below another root."""

import os

import pytest

from fiddler_run.system import host

GB = 10**9


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Simulates a machine with these files (path: text), where this process may use `cpus`."""

    def make(files: dict[str, str], cpus: set[int]) -> None:
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        monkeypatch.setattr(host, "ROOT", tmp_path)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: cpus, raising=False)

    return make


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 16),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 16),
        # The tightest quota counts, in whole cores.
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/b/cpu.max": "800000 100000",
                "sys/fs/cgroup/a/cpu.max": "390000 100000",
            },
            3,
        ),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        # cgroup v1 in a container: the path is the host's, the container's group is the root.
        (
            {
                "proc/self/cgroup": "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            16,
        ),
    ],
    ids=[
        "no files",
        "no quota",
        "the parent's quota",
        "half a core",
        "cgroup v1",
        "cgroup v1 without quota",
    ],
)
def test_cores_respect_cgroup_quotas(machine, files, cores):
    machine(files, set(range(16)))
    assert host.num_cores() == cores


def test_memory_respects_cgroup_limits(machine):
    machine({"proc/meminfo": f"MemTotal: 1\nMemAvailable: {64 * GB // 1024} kB"}, {0})
    assert host.available_memory_bytes() == 64 * GB
    machine(
        {
            "proc/self/cgroup": "0::/job",
            "sys/fs/cgroup/job/memory.max": str(40 * GB),
            "sys/fs/cgroup/job/memory.current": str(30 * GB),
            "sys/fs/cgroup/job/memory.stat": f"anon 1\nactive_file 2\ninactive_file {25 * GB}",
        },
        {0},
    )
    assert host.available_memory_bytes() == 35 * GB
    machine({"sys/fs/cgroup/job/memory.max": "max"}, {0})
    assert host.available_memory_bytes() == 64 * GB
    machine(
        {
            "proc/self/cgroup": "4:memory:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(20 * GB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(21 * GB),
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {2 * GB}",
        },
        {0},
    )
    assert host.available_memory_bytes() == 1 * GB


def test_memory_is_found_without_proc(machine):
    machine({}, {0})
    assert host.available_memory_bytes() > 0


def test_one_thread_of_each_core_comes_first(machine):
    """Four cores of two threads, interleaved nodes; CPU 2 is not allowed, so CPU 6 replaces it."""
    cpu = "sys/devices/system/cpu/cpu{}/{}".format
    siblings = {cpu(n, "topology/thread_siblings_list"): f"{n % 4},{n % 4 + 4}\n" for n in range(8)}
    nodes = {cpu(n, f"node{n % 2}/cpulist"): "" for n in range(8)}
    machine(siblings | nodes, {0, 1, 3, 4, 5, 6, 7})
    assert host.core_order() == [0, 6, 1, 3, 4, 5, 7]
    assert host.num_physical_cores() == 4
    assert host.num_cores() == 7


def test_every_cpu_is_a_core_without_topology_files(machine):
    machine({}, {5, 2, 9})
    assert host.core_order() == [2, 5, 9]
    assert host.num_physical_cores() == 3


def test_cpu_lists_are_parsed():
    assert host.cpu_list("0-3,8,10-11") == [0, 1, 2, 3, 8, 10, 11]
    assert host.cpu_list("") == []
