"""What limits a machine: each check by hand-made facts, the facts by made-up system files and a stand-in for nvidia-smi."""

import io
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import DEMO, ROOT
from rich.console import Console

import fiddler_run.kernels
from fiddler_opt import bench_device, doctor, facts
from fiddler_opt.bench_probe import kernels
from fiddler_opt.doctor import Finding, Gpu, Torch
from fiddler_opt.facts import Driver, GpuUse, NumaNode, PcieLink
from fiddler_opt.model import DEFAULT_MODEL, ModelSpec
from fiddler_run import host

MIXTRAL = ModelSpec.load(DEFAULT_MODEL)
GPU = "0000:41:00.0"
SLOT = "sys/devices/pci0000:40/0000:40:01.1"


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
    """A program that answers by the first argument, and fails for others."""
    cases = "".join(f"'{argument}') echo '{answer}' ;;\n" for argument, answer in answers.items())
    write(root, {"bin/nvidia-smi": f'#!/bin/sh\ncase "$1" in\n{cases}*) exit 6 ;;\nesac'})
    (root / "bin/nvidia-smi").chmod(0o755)


def link_files(end: str, max_speed: str, max_width: str) -> dict[str, str]:
    return {f"{end}/max_link_speed": max_speed, f"{end}/max_link_width": max_width}


@pytest.fixture
def gpu_kernels():
    """Where there is no Triton, the kernels' module with a stand-in for it: all but the kernels themselves is plain Python."""
    if find_spec("triton"):
        yield
        return
    language = SimpleNamespace(constexpr=object)
    triton = SimpleNamespace(jit=lambda function=None, **_: function or (lambda decorated: decorated), language=language)
    with patch.dict(sys.modules, {"triton": triton, "triton.language": language}):  # and without what the test imports
        yield
    del fiddler_run.kernels.gpu


def test_the_kernels_are_asked_whether_they_suit(gpu_kernels):
    for dtype, neurons in ((torch.float32, 896), (torch.float16, 896), (torch.bfloat16, 900)):
        assert kernels(dtype, 4096, neurons) == {"kernels_suit": False, "kernel_error": None}
    found = kernels(torch.bfloat16, 4096, 896)
    assert found["kernels_suit"]
    assert (found["kernel_error"] is None) == torch.cuda.is_available()


def test_link_is_held_to_what_card_and_slot_can(system):
    write(system, link_files(f"{SLOT}/{GPU}", "32.0 GT/s PCIe", "16") | link_files(SLOT, "16.0 GT/s PCIe", "16"))
    write(system, {f"{SLOT}/{GPU}/current_link_speed": "8.0 GT/s PCIe", f"{SLOT}/{GPU}/current_link_width": "8"})
    write(system, {f"{SLOT}/{GPU}/numa_node": "1"})
    (system / "sys/bus/pci/devices").mkdir(parents=True)
    (system / "sys/bus/pci/devices" / GPU).symlink_to(system / SLOT / GPU)
    link = facts.pcie_link("00000000:41:00.0")
    assert link == PcieLink(generation=3, width=8, max_generation=4, max_width=16)
    assert (link.bytes_per_s, link.max_bytes_per_s) == (7.88e9, 31.504e9)
    assert facts.gpu_numa_node(GPU) == 1
    write(system, {f"{SLOT}/{GPU}/current_link_speed": "Unknown"})
    assert facts.pcie_link(GPU) is None


def test_nvidia_smi_is_the_other_source(system, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 11)
    install_nvidia_smi(
        system,
        {
            "": "| NVIDIA-SMI 535.129.03    Driver Version: 535.129.03    CUDA Version: 12.2 |",
            "--query-gpu=pcie.link.gen.current,pcie.link.width.current,pcie.link.gen.max,pcie.link.width.max": "1, 16, 4, 16",
            "--query-gpu=pci.bus_id,utilization.gpu": "00000000:41:00.0, 37\n00000000:C1:00.0, [N/A]",
            "--query-compute-apps=gpu_bus_id,pid,used_memory": "00000000:41:00.0, 11, 512\n00000000:41:00.0, 12, 1024",
        },
    )
    assert facts.pcie_link(GPU) == PcieLink(generation=1, width=16, max_generation=4, max_width=16)
    assert facts.nvidia_driver() == Driver(version="535.129.03", cuda="12.2")
    assert facts.gpu_use() == {GPU: GpuUse(0.37, {12: 2**30}), "0000:c1:00.0": GpuUse(None)}


def test_a_system_that_tells_nothing(system):
    told = facts.numa_nodes(), facts.governor(), facts.transparent_huge_pages(), facts.nvidia_driver(), facts.pcie_link(GPU)
    assert told == (None,) * 5
    assert facts.gpu_numa_node(GPU) is None
    assert host.OtherProcesses().cores() is None
    assert (facts.gpu_use(), facts.busiest(0.0)) == ({}, [])
    assert not facts.has_nvidia_gpu()


def test_settings_of_the_system(system, monkeypatch):
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


def test_others_are_all_that_is_neither_idle_nor_ours(system, monkeypatch):
    """On CPUs 1 and 2, in 10 s: 6 s of user time, 1 of nice, 2 of system, 4 of interrupts, 3 stolen; 5 s of it our own."""
    clock = iter([100.0, 110.0])
    own = iter([(1.0, 1.0, 1.0, 1.0, 50.0), (3.0, 2.0, 2.0, 2.0, 60.0)])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2}, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    monkeypatch.setattr(os, "times", lambda: next(own))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    idle = "cpu 9 9 9 9 9 9 9 9 9 9\ncpu0 7 0 0 0 0 0 0 0 0 0\ncpu1 5 0 0 0 0 0 0 0 0 0\ncpu2 0 0 0 0 0 0 0 0 0 0"
    busy = "cpu0 900 0 0 0 0 0 0 0 0 0\ncpu1 305 0 200 800 600 0 400 0 0 0\ncpu2 300 100 0 900 0 0 0 300 300 0"
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


def test_weights_in_ram():
    """All 46,702,792,704 parameters of 2 bytes without a GPU; beside 24 GB 24e9 - 3,211,272,192 - 2.5e9 bytes of experts less."""
    assert doctor.bytes_in_ram(MIXTRAL, 0) == 93_405_585_408
    assert doctor.bytes_in_ram(MIXTRAL, 24 * 10**9) == 90_194_313_216 - 18_288_727_808
    assert doctor.bytes_in_ram(MIXTRAL, 5 * 10**9) == 93_405_585_408  # too small for a GPU part
    assert doctor.bytes_in_ram(MIXTRAL, 140 * 10**9) == 0


def torch_with(cuda: str | None, gpu_bytes: int | None = None) -> Torch:
    gpu = gpu_bytes and Gpu("RTX", GPU, gpu_bytes, True, None, True)
    return Torch("2.8.0", cuda, ["avx2"], None if gpu else "The NVIDIA driver on your system is too old", gpu)


OLD_DRIVER = Driver("535.129.03", "12.2")
NODES = [NumaNode(0, [0, 1], 64 * 10**9), NumaNode(1, [2, 3], 96 * 10**9)]
X16 = PcieLink(4, 16, 4, 16)


@pytest.mark.parametrize(
    ("finding", "kind", "words"),
    [
        (doctor.check_gpu(torch_with("12.8", 24 * 10**9), MIXTRAL, None, True, None), "ok", "RTX, 24.00 GB"),
        (doctor.check_gpu(torch_with("12.8", 4 * 10**9), MIXTRAL, None, True, None), "slow", "5.71 GB"),
        (doctor.check_gpu(torch_with(None), MIXTRAL, None, False, None), "slow", "no NVIDIA GPU"),
        (doctor.check_gpu(torch_with(None), MIXTRAL, OLD_DRIVER, True, None), "slow", "for CUDA 12.2 or older"),
        (doctor.check_gpu(torch_with("12.8"), MIXTRAL, OLD_DRIVER, True, None), "slow", "CUDA up to 12.2; update the driver"),
        (doctor.check_gpu(torch_with("12.8"), MIXTRAL, None, True, None), "slow", "install NVIDIA's driver"),
        (doctor.check_gpu(torch_with("12.8"), MIXTRAL, OLD_DRIVER, True, ""), "slow", "unset"),
        (doctor.check_gpu_kernels(True, None, "bfloat16"), "ok", ""),
        (doctor.check_gpu_kernels(False, None, "float32"), "slow", "not for float32"),
        (doctor.check_gpu_kernels(False, None, "float16"), "slow", "not for float16"),
        (doctor.check_gpu_kernels(False, None, "bfloat16"), "slow", "this model's sizes"),
        (doctor.check_gpu_kernels(True, "no C compiler", "bfloat16"), "slow", "(no C compiler); install"),
        (doctor.check_link(X16, 26e9), "ok", "4.0 x16 carries 31.50 GB/s, copies to the GPU reach 26.00 GB/s"),
        (doctor.check_link(X16, 6.5e9), "slow", "6.50 GB/s"),
        (doctor.check_link(PcieLink(3, 8, 4, 16), 6.5e9), "slow", "3.0 x8, card and slot can do 4.0 x16: 4.0 times"),
        (doctor.check_link(PcieLink(1, 1, 5, 16), 54e9), "ok", "reach 54.00 GB/s"),  # a virtual machine's link
        (doctor.check_link(None, 54e9), "ok", "reach 54.00 GB/s"),
        (doctor.check_link(None, None), None, ""),
        (doctor.check_memlock(None, 72 * 10**9, False, False), "ok", ""),
        (doctor.check_memlock(8_388_608, 72 * 10**9, True, False), "ok", ""),
        (doctor.check_memlock(8_388_608, 72 * 10**9, False, False), "slow", "8.39 MB"),
        (doctor.check_memlock(None, 72 * 10**9, True, True), "slow", "WSL lets little host memory be page-locked"),
        (doctor.check_numa(1, {0}, NODES, 72 * 10**9), "slow", "--cpunodebind=1 --membind=1"),
        (doctor.check_numa(0, {1}, NODES, 72 * 10**9), "slow", "--cpunodebind=0 --preferred=0"),
        (doctor.check_numa(1, {0, 1}, NODES, 72 * 10**9), None, ""),
        (doctor.check_numa(None, {0}, NODES, 72 * 10**9), None, ""),
        (doctor.check_gpu_use(GpuUse(0.02)), None, ""),
        (doctor.check_gpu_use(GpuUse(None, {12: 3 * 10**9, 13: None})), "slow", "2 other processes with 3.00 GB"),
        (doctor.check_gpu_use(GpuUse(0.9)), "slow", "90% busy"),
        (doctor.check_ram(MIXTRAL, 72 * 10**9, 78 * 10**9), "ok", "6.00 GB to load"),
        (doctor.check_ram(MIXTRAL, 72 * 10**9, 77 * 10**9), "stops", "77.00 GB are available; add memory"),
        (doctor.check_cpu_kernel(None, "bfloat16"), "slow", "g++"),
        (doctor.check_cpu_kernel(["amx", "avx2"], "bfloat16"), "ok", "amx"),
        (doctor.check_cpu_kernel(["amx", "avx2"], "float32"), "slow", "float32"),
        (doctor.check_cpu_kernel(["avx2", "portable"], "bfloat16"), "slow", "no AVX-512"),
        (doctor.check_cpu_kernel(["portable"], "bfloat16"), "slow", "no AVX2"),
        (doctor.check_cores(cpus=32, physical=16, usable=32), "ok", "16 cores with 32 threads"),
        (doctor.check_cores(cpus=32, physical=16, usable=4), "slow", "--cpus"),
        (doctor.check_busy(1.3, [("firefox", 1.04)], 16), "slow", "1.3 of 16 cores (firefox 1.0); close"),
        (doctor.check_busy(0.7, [("firefox", 0.6)], 16), None, ""),
        (doctor.check_busy(None, [], 16), None, ""),
        (doctor.check_governor("powersave"), "slow", "cpupower"),
        (doctor.check_governor(None), None, ""),
        (doctor.check_huge_pages("never"), "slow", "madvise"),
        (doctor.check_huge_pages("madvise"), None, ""),
        (doctor.check_profile(("Xeon", "H100"), ("Xeon", "H100")), None, ""),
        (doctor.check_profile(("Xeon", "H100"), ("Xeon", None)), "slow", "of Xeon with H100, this is Xeon with no GPU; run"),
    ],
    ids=str,
)
def test_check(finding, kind, words):
    assert (finding and finding.kind) == kind
    assert words in printed([finding] if finding else [])


def printed(findings: list[Finding]) -> str:
    console = Console(file=io.StringIO(), width=40)
    doctor.print_findings(console, findings)
    return console.file.getvalue()


def test_a_line_each_the_worst_first():
    findings = [Finding("ok", "a [b]"), Finding("stops", "c", "d"), Finding("slow", "e" * 100)]
    assert printed(findings).splitlines() == ["stops  c; d", f"slow   {'e' * 100}", "ok     a [b]"]
    assert doctor.stops(findings)
    assert not doctor.stops(findings[:1])


def test_the_demo_model_runs_on_this_machine(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "runtime")]))
    findings = doctor.examine(ModelSpec.load(str(DEMO)), None)
    assert not doctor.stops(findings), printed(findings)
    assert "tiny-mixtral needs" in printed(findings)


def test_a_torch_in_the_working_directory_is_not_run(tmp_path):
    (tmp_path / "torch.py").write_text("open('it-ran', 'w')\n")
    path = os.pathsep.join([str(ROOT), str(ROOT / "runtime")])
    command = [sys.executable, "-P", "-m", "fiddler_opt.cli", "doctor", "--model", str(DEMO)]
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "PyTorch does not start" not in result.stdout
    assert not (tmp_path / "it-ran").exists()


def test_nor_where_a_gpu_is_described(tmp_path, monkeypatch):
    """The process that takes GPU memory for the profile; only its Python is looked at here."""
    (tmp_path / "torch.py").write_text("found = 'the wrong one'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_device.torch.cuda, "mem_get_info", lambda _: (0, 0))
    real, seen = subprocess.Popen, []

    def popen(command, **pipes):
        program = command.index("-c") + 1
        look = "import torch; print(len(getattr(torch, 'found', '')), flush=True)"
        seen.append(real([*command[:program], look, *command[program + 1 :]], **pipes))
        return seen[0]

    monkeypatch.setattr(bench_device.subprocess, "Popen", popen)
    assert bench_device.context_bytes(bench_device.torch.device("cuda", 0)) == 0
    assert seen[0].args[1] == "-P"
