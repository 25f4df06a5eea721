"""Checks the GPU and its link: facts in, findings out."""

from fiddler_opt.inputs import facts
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.insight.finding import Finding
from fiddler_opt.insight.torch_probe import Torch
from fiddler_opt.units import format_bytes

# The rest of a plan for 4096 tokens on the GPU: KV cache, buffers and driver.
BESIDES_WEIGHTS_BYTES = 2_500_000_000


def check_gpu(
    torch: Torch,
    model: ModelSpec,
    driver: facts.Driver | None,
    has_nvidia_gpu: bool,
    visible: str | None,
) -> Finding:
    """Checks whether PyTorch can use the GPU, and why not.

    Args:
        visible: the value of CUDA_VISIBLE_DEVICES.
    """
    if torch.gpu:
        size = f"{torch.gpu.name}, {format_bytes(torch.gpu.memory_bytes)}"
        if torch.gpu.memory_bytes < model.non_expert_bytes + BESIDES_WEIGHTS_BYTES:
            needs = format_bytes(model.non_expert_bytes + BESIDES_WEIGHTS_BYTES)
            return Finding(
                "slow",
                f"{size}: too little for a GPU part, which needs about {needs} before any expert",
                "plan with --gpu-mem 0GB",
            )
        if torch.gpu.count > 1:
            size += (
                f", one of {torch.gpu.count} GPUs; `fiddler-opt profile --ranks {torch.gpu.count}`"
                " lets plans use all of them"
            )
        return Finding("ok", size)
    if not has_nvidia_gpu:
        return Finding(
            "slow", "no NVIDIA GPU: everything runs on the CPU", "plan with --gpu-mem 0GB"
        )
    if torch.cuda is None:
        supports = f", for CUDA {driver.cuda} or older" if driver and driver.cuda else ""
        what = f"there is an NVIDIA GPU, but PyTorch {torch.version} was built without CUDA"
        return Finding(
            "slow",
            what,
            f"install PyTorch for CUDA{supports} (https://pytorch.org/get-started/locally)",
        )
    if visible is not None and visible.strip() in ("", "-1"):
        return Finding("slow", f"CUDA_VISIBLE_DEVICES={visible} hides the GPU", "unset it")
    built = (
        f"PyTorch {torch.version}, built for CUDA {torch.cuda}, cannot use the GPU"
        f" ({torch.refusal})"
    )
    if driver is None:
        return Finding(
            "slow",
            f"{built}; no driver answers",
            "install NVIDIA's driver, restart; in a container, pass --gpus all",
        )
    known = f"driver {driver.version or 'unknown'}" + (
        f" supports CUDA up to {driver.cuda}" if driver.cuda else ""
    )
    older = (
        f"PyTorch for CUDA {driver.cuda} or older" if driver.cuda else "PyTorch for an older CUDA"
    )
    return Finding(
        "slow", f"{built}; {known}", f"update the driver and restart, or install {older}"
    )


def check_gpu_kernels(suit: bool, error: str | None, dtype: str) -> Finding:
    if not suit and dtype != "bfloat16":
        return Finding(
            "slow",
            f"the GPU kernels do not support {dtype}; decode will be slower",
            "use a bfloat16 checkpoint",
        )
    if not suit:
        return Finding(
            "slow",
            "the GPU kernels do not support this model's sizes; decode will be slower",
        )
    if error is None:
        return Finding("ok", "the GPU kernels compile")
    remedy = (
        "install a C compiler and Python's headers (gcc, python3-dev), and Triton, which comes with"
        " PyTorch for CUDA"
    )
    return Finding(
        "slow", f"the GPU kernels cannot be compiled; decode will be slower ({error})", remedy
    )


def check_link(link: facts.PcieLink | None, h2d_bytes_per_s: float | None) -> Finding | None:
    reach = (
        f"copies to the GPU reach {format_bytes(h2d_bytes_per_s)}/s" if h2d_bytes_per_s else None
    )
    # virtual machines may report the link wrongly
    if link is None or (h2d_bytes_per_s or 0) > link.bytes_per_s:
        return Finding("ok", reach) if reach else None
    now = f"PCIe {link.generation}.0 x{link.width}"
    if link.bytes_per_s < link.max_bytes_per_s:
        times = link.max_bytes_per_s / link.bytes_per_s
        what = (
            f"the GPU's link is {now}, card and slot can do {link.max_generation}.0"
            f" x{link.max_width}: {times:.1f} times as fast"
        )
        return Finding(
            "slow",
            what,
            "reseat the card, without a riser; free slots that share its lanes; check the BIOS",
        )
    carries = f"{now} carries {format_bytes(link.bytes_per_s)}/s"
    if h2d_bytes_per_s and h2d_bytes_per_s < 0.6 * link.bytes_per_s:
        return Finding(
            "slow", f"{reach}, but {carries}", "stop other copies; try the kernel option iommu=pt"
        )
    return Finding("ok", f"{carries}" + (f", {reach}" if reach else ""))


def check_memlock(
    limit_bytes: int | None, needed_bytes: int, locks_freely: bool, wsl: bool
) -> Finding:
    alone = "plans from this machine's profile leave experts that cannot be page-locked to the CPU"
    if wsl and needed_bytes:
        return Finding(
            "slow",
            f"WSL lets little host memory be page-locked: {alone}",
            "use native Linux for fast prompts",
        )
    if limit_bytes is None or limit_bytes >= needed_bytes or locks_freely:
        return Finding("ok", "host memory can be page-locked for copies to the GPU")
    what = (
        f"only {format_bytes(limit_bytes)} of host memory may be page-locked, experts need"
        f" {format_bytes(needed_bytes)}"
    )
    return Finding(
        "slow",
        f"{what}: {alone}",
        "`ulimit -l unlimited`, or memlock in /etc/security/limits.conf; docker: --ulimit"
        " memlock=-1",
    )


def check_numa(
    gpu_node: int | None, own_nodes: set[int], nodes: list[facts.NumaNode] | None, needed_bytes: int
) -> Finding | None:
    near = next((node for node in nodes or [] if node.number == gpu_node and node.cpus), None)
    if near is None or gpu_node in own_nodes:
        return None
    bind = "--membind" if near.memory_bytes >= needed_bytes else "--preferred"
    here = ", ".join(map(str, sorted(own_nodes)))
    what = (
        f"the GPU is attached to NUMA node {gpu_node}, this process may use CPUs of node {here}"
        " only"
    )
    return Finding(
        "slow", what, f"start it with `numactl --cpunodebind={gpu_node} {bind}={gpu_node}`"
    )


def check_gpu_use(use: facts.GpuUse | None) -> Finding | None:
    if use is None or (not use.processes and (use.utilisation or 0) < 0.1):
        return None
    taken = format_bytes(sum(size or 0 for size in use.processes.values()))
    busy = "" if use.utilisation is None else f", {use.utilisation:.0%} busy"
    what = (
        f"the GPU is in use: {len(use.processes)} other processes with {taken} of its memory{busy}"
    )
    return Finding(
        "slow",
        what,
        "stop them (`nvidia-smi` lists them), or plan with a --gpu-mem that leaves them room",
    )
