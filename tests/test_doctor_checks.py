"""Each of doctor's checks, on facts made by hand."""

import io

import pytest
from rich.console import Console

from fiddler_opt.inputs.facts import Driver, GpuUse, NumaNode, PcieLink
from fiddler_opt.inputs.model import DEFAULT_MODEL, ModelSpec
from fiddler_opt.insight import gpu_checks, host_checks
from fiddler_opt.insight.finding import Finding, print_findings, stops
from fiddler_opt.insight.torch_probe import ProbedGpu, Torch

MIXTRAL = ModelSpec.load(DEFAULT_MODEL)
GPU = "0000:41:00.0"


def test_bytes_in_ram_by_hand():
    """Without a GPU: all 46,702,792,704 parameters of 2 bytes.

    A GPU of 24 GB takes 24e9 - 3,211,272,192 - 2.5e9 bytes of the experts.
    """
    assert host_checks.bytes_in_ram(MIXTRAL, 0) == 93_405_585_408
    assert host_checks.bytes_in_ram(MIXTRAL, 24 * 10**9) == 90_194_313_216 - 18_288_727_808
    # too small for a GPU part
    assert host_checks.bytes_in_ram(MIXTRAL, 5 * 10**9) == 93_405_585_408
    assert host_checks.bytes_in_ram(MIXTRAL, 140 * 10**9) == 0


def torch_with(cuda: str | None, gpu_bytes: int | None = None, count: int = 1) -> Torch:
    gpu = gpu_bytes and ProbedGpu("RTX", GPU, gpu_bytes, True, None, True, count)
    return Torch(
        "2.8.0", cuda, ["avx2"], None if gpu else "The NVIDIA driver on your system is too old", gpu
    )


OLD_DRIVER = Driver("535.129.03", "12.2")
NODES = [NumaNode(0, [0, 1], 64 * 10**9), NumaNode(1, [2, 3], 96 * 10**9)]
X16 = PcieLink(4, 16, 4, 16)


@pytest.mark.parametrize(
    ("finding", "kind", "words"),
    [
        (
            gpu_checks.check_gpu(torch_with("12.8", 24 * 10**9), MIXTRAL, None, True, None),
            "ok",
            "RTX, 24.00 GB",
        ),
        (
            gpu_checks.check_gpu(torch_with("12.8", 24 * 10**9, 2), MIXTRAL, None, True, None),
            "ok",
            "RTX, 24.00 GB, one of 2 GPUs; `fiddler-opt profile --ranks 2` lets plans use all",
        ),
        (
            gpu_checks.check_gpu(torch_with("12.8", 4 * 10**9), MIXTRAL, None, True, None),
            "slow",
            "5.71 GB",
        ),
        (
            gpu_checks.check_gpu(torch_with(None), MIXTRAL, None, False, None),
            "slow",
            "no NVIDIA GPU",
        ),
        (
            gpu_checks.check_gpu(torch_with(None), MIXTRAL, OLD_DRIVER, True, None),
            "slow",
            "for CUDA 12.2 or older",
        ),
        (
            gpu_checks.check_gpu(torch_with("12.8"), MIXTRAL, OLD_DRIVER, True, None),
            "slow",
            "CUDA up to 12.2; update the driver",
        ),
        (
            gpu_checks.check_gpu(torch_with("12.8"), MIXTRAL, None, True, None),
            "slow",
            "install NVIDIA's driver",
        ),
        (gpu_checks.check_gpu(torch_with("12.8"), MIXTRAL, OLD_DRIVER, True, ""), "slow", "unset"),
        (gpu_checks.check_gpu_kernels(True, None, "bfloat16"), "ok", ""),
        (gpu_checks.check_gpu_kernels(False, None, "float32"), "slow", "do not support float32"),
        (gpu_checks.check_gpu_kernels(False, None, "float16"), "slow", "do not support float16"),
        (gpu_checks.check_gpu_kernels(False, None, "bfloat16"), "slow", "this model's sizes"),
        (
            gpu_checks.check_gpu_kernels(True, "no C compiler", "bfloat16"),
            "slow",
            "(no C compiler); install",
        ),
        (
            gpu_checks.check_link(X16, 26e9),
            "ok",
            "4.0 x16 carries 31.50 GB/s, copies to the GPU reach 26.00 GB/s",
        ),
        (gpu_checks.check_link(X16, 6.5e9), "slow", "6.50 GB/s"),
        (
            gpu_checks.check_link(PcieLink(3, 8, 4, 16), 6.5e9),
            "slow",
            "3.0 x8, card and slot can do 4.0 x16: 4.0 times",
        ),
        # as a virtual machine may report it: slower than measured
        (
            gpu_checks.check_link(PcieLink(1, 1, 5, 16), 54e9),
            "ok",
            "reach 54.00 GB/s",
        ),
        (gpu_checks.check_link(None, 54e9), "ok", "reach 54.00 GB/s"),
        (gpu_checks.check_link(None, None), None, ""),
        (gpu_checks.check_memlock(None, 72 * 10**9, False, False), "ok", ""),
        (gpu_checks.check_memlock(8_388_608, 72 * 10**9, True, False), "ok", ""),
        (gpu_checks.check_memlock(8_388_608, 72 * 10**9, False, False), "slow", "8.39 MB"),
        (
            gpu_checks.check_memlock(None, 72 * 10**9, True, True),
            "slow",
            "WSL lets little host memory be page-locked",
        ),
        (gpu_checks.check_numa(1, {0}, NODES, 75 * 10**9), "slow", "--cpunodebind=1 --membind=1"),
        (gpu_checks.check_numa(0, {1}, NODES, 75 * 10**9), "slow", "--cpunodebind=0 --preferred=0"),
        (gpu_checks.check_numa(1, {0, 1}, NODES, 72 * 10**9), None, ""),
        (gpu_checks.check_numa(None, {0}, NODES, 72 * 10**9), None, ""),
        (gpu_checks.check_gpu_use(GpuUse(0.02)), None, ""),
        (
            gpu_checks.check_gpu_use(GpuUse(None, {12: 3 * 10**9, 13: None})),
            "slow",
            "2 other processes with 3.00 GB",
        ),
        (gpu_checks.check_gpu_use(GpuUse(0.9)), "slow", "90% busy"),
        (host_checks.check_ram(MIXTRAL, 72 * 10**9, 75 * 10**9), "ok", "2.82 GB to load"),
        (
            host_checks.check_ram(MIXTRAL, 72 * 10**9, 74 * 10**9),
            "stops",
            "of the 74.00 GB available; add memory",
        ),
        (host_checks.check_cpu_kernel(None, "bfloat16"), "slow", "g++"),
        (host_checks.check_cpu_kernel(["amx", "avx2"], "bfloat16"), "ok", "amx"),
        (host_checks.check_cpu_kernel(["amx", "avx2"], "float32"), "slow", "float32"),
        (host_checks.check_cpu_kernel(["avx2", "portable"], "bfloat16"), "slow", "no AVX-512"),
        (host_checks.check_cpu_kernel(["portable"], "bfloat16"), "slow", "no AVX2"),
        (
            host_checks.check_cores(cpus=32, physical=16, usable=32),
            "ok",
            "16 cores with 32 threads",
        ),
        (host_checks.check_cores(cpus=32, physical=16, usable=4), "slow", "--cpus"),
        (
            host_checks.check_busy(1.3, [("firefox", 1.04)], 16),
            "slow",
            "1.3 of 16 cores (firefox 1.0); close",
        ),
        (host_checks.check_busy(0.7, [("firefox", 0.6)], 16), None, ""),
        (host_checks.check_busy(None, [], 16), None, ""),
        (host_checks.check_governor("powersave"), "slow", "cpupower"),
        (host_checks.check_governor(None), None, ""),
        (host_checks.check_huge_pages("never"), "slow", "madvise"),
        (host_checks.check_huge_pages("madvise"), None, ""),
        (host_checks.check_profile(("Xeon", "H100"), ("Xeon", "H100")), None, ""),
        (
            host_checks.check_profile(("Xeon", "H100"), ("Xeon", None)),
            "slow",
            "on Xeon with H100; this machine is Xeon with no GPU; run",
        ),
    ],
    ids=str,
)
def test_checks_report_kind_and_advice(finding, kind, words):
    assert (finding and finding.kind) == kind
    assert words in printed([finding] if finding else [])


def printed(findings: list[Finding]) -> str:
    console = Console(file=io.StringIO(), width=40)
    print_findings(console, findings)
    return console.file.getvalue()


def test_findings_are_printed_one_per_line_worst_first():
    findings = [Finding("ok", "a [b]"), Finding("stops", "c", "d"), Finding("slow", "e" * 100)]
    assert printed(findings).splitlines() == ["stops  c; d", f"slow   {'e' * 100}", "ok     a [b]"]
    assert stops(findings)
    assert not stops(findings[:1])
