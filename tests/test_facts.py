"""Facts about a machine, by simulated system files and a stand-in for nvidia-smi."""

import os
import time
from pathlib import Path

import pytest

from fiddler_opt.inputs import facts
from fiddler_opt.inputs.facts import Driver, GpuUse, NumaNode, PcieLink
from fiddler_opt.inputs.processes import busiest
from fiddler_run.system import host

GPU = "0000:41:00.0"
SLOT = "sys/devices/pci0000:40/0000:40:01.1"
LINK_KEYS = "pcie.link.gen.current,pcie.link.width.current,pcie.link.gen.max,pcie.link.width.max"


@pytest.fixture
def system(tmp_path, monkeypatch) -> Path:
    """An empty root for the system's files, on a machine without nvidia-smi."""
    monkeypatch.setattr(host, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n")


def install_nvidia_smi(root: Path, answers: dict[str, str]) -> None:
    """Installs a stand-in that answers by its first argument and fails for others."""
    cases = "".join(f"'{argument}') echo '{answer}' ;;\n" for argument, answer in answers.items())
    write(root, {"bin/nvidia-smi": f'#!/bin/sh\ncase "$1" in\n{cases}*) exit 6 ;;\nesac'})
    (root / "bin/nvidia-smi").chmod(0o755)


def link_files(end: str, max_speed: str, max_width: str) -> dict[str, str]:
    return {f"{end}/max_link_speed": max_speed, f"{end}/max_link_width": max_width}


def test_link_is_limited_by_card_and_slot(system):
    write(
        system,
        link_files(f"{SLOT}/{GPU}", "32.0 GT/s PCIe", "16")
        | link_files(SLOT, "16.0 GT/s PCIe", "16"),
    )
    write(
        system,
        {
            f"{SLOT}/{GPU}/current_link_speed": "8.0 GT/s PCIe",
            f"{SLOT}/{GPU}/current_link_width": "8",
        },
    )
    write(system, {f"{SLOT}/{GPU}/numa_node": "1"})
    (system / "sys/bus/pci/devices").mkdir(parents=True)
    (system / "sys/bus/pci/devices" / GPU).symlink_to(system / SLOT / GPU)
    link = facts.pcie_link("00000000:41:00.0")
    assert link == PcieLink(generation=3, width=8, max_generation=4, max_width=16)
    assert (link.bytes_per_s, link.max_bytes_per_s) == (7.88e9, 31.504e9)
    assert facts.gpu_numa_node(GPU) == 1
    write(system, {f"{SLOT}/{GPU}/current_link_speed": "Unknown"})
    assert facts.pcie_link(GPU) is None


def test_nvidia_smi_is_the_second_source(system, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 11)
    install_nvidia_smi(
        system,
        {
            "": "| NVIDIA-SMI 535.129.03    Driver Version: 535.129.03    CUDA Version: 12.2 |",
            f"--query-gpu={LINK_KEYS}": "1, 16, 4, 16",
            "--query-gpu=pci.bus_id,utilization.gpu": (
                "00000000:41:00.0, 37\n00000000:C1:00.0, [N/A]"
            ),
            "--query-compute-apps=gpu_bus_id,pid,used_memory": (
                "00000000:41:00.0, 11, 512\n00000000:41:00.0, 12, 1024"
            ),
        },
    )
    assert facts.pcie_link(GPU) == PcieLink(generation=1, width=16, max_generation=4, max_width=16)
    assert facts.nvidia_driver() == Driver(version="535.129.03", cuda="12.2")
    assert facts.gpu_use() == {GPU: GpuUse(0.37, {12: 2**30}), "0000:c1:00.0": GpuUse(None)}


def test_missing_system_files_give_no_facts(system):
    found = (
        facts.numa_nodes(),
        facts.governor(),
        facts.transparent_huge_pages(),
        facts.nvidia_driver(),
        facts.pcie_link(GPU),
    )
    assert found == (None,) * 5
    assert facts.gpu_numa_node(GPU) is None
    assert host.OtherProcesses().cores() is None
    assert (facts.gpu_use(), busiest(0.0)) == ({}, [])
    assert not facts.has_nvidia_gpu()


def test_system_settings_are_read(system, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 2}, raising=False)
    node = "sys/devices/system/node/node{}/{}".format
    write(
        system,
        {
            "sys/devices/system/cpu/cpu2/cpufreq/scaling_governor": "powersave",
            "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]",
            "sys/bus/pci/devices/0000:02:00.0/vendor": "0x10de",
            "sys/bus/pci/devices/0000:02:00.0/class": "0x030000",
            node(10, "cpulist"): "",
            node(10, "meminfo"): "Node 10 MemTotal:   2000 kB",
            node(2, "cpulist"): "0-1,4",
            node(2, "meminfo"): "Node 2 MemTotal:   1000 kB\nNode 2 MemFree: 7 kB",
        },
    )
    assert facts.governor() == "powersave"
    assert facts.transparent_huge_pages() == "never"
    assert facts.has_nvidia_gpu()
    assert facts.numa_nodes() == [NumaNode(2, [0, 1, 4], 1_024_000), NumaNode(10, [], 2_048_000)]


def test_time_of_others_is_neither_idle_nor_our_own(system, monkeypatch):
    """On CPUs 1 and 2, in 10 s: 6 s user, 1 nice, 2 system, 4 interrupts, 3 stolen; 5 are ours."""
    clock = iter([100.0, 110.0])
    own = iter([(1.0, 1.0, 1.0, 1.0, 50.0), (3.0, 2.0, 2.0, 2.0, 60.0)])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2}, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    monkeypatch.setattr(os, "times", lambda: next(own))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    idle = (
        "cpu 9 9 9 9 9 9 9 9 9 9\ncpu0 7 0 0 0 0 0 0 0 0 0\ncpu1 5 0 0 0 0 0 0 0 0 0\ncpu2 0 0 0 0"
        " 0 0 0 0 0 0"
    )
    busy = (
        "cpu0 900 0 0 0 0 0 0 0 0 0\ncpu1 305 0 200 800 600 0 400 0 0 0\ncpu2 300 100 0 900 0 0 0"
        " 300 300 0"
    )
    write(system, {"proc/stat": idle})
    others = host.OtherProcesses()
    write(system, {"proc/stat": busy})
    assert others.cores() == pytest.approx((6 + 1 + 2 + 4 + 3 - 5) / 10)


def test_disk_speed_needs_a_large_file(tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(63_000_000)
        assert facts.disk_bytes_per_s(tmp_path) is None
        file.truncate(64_000_000)
    assert facts.disk_bytes_per_s(tmp_path) > 0
