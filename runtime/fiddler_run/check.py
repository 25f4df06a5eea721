"""Whether a plan suits its model and this machine. Rule: each condition is stated once, as a function that lists what breaks it.

Loading refuses by the first line of such a list, `check_plan` gives them all. PyTorch is imported when it is needed.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from fiddler_run.errors import FiddlerError
from fiddler_run.host import available_memory_bytes, num_cores
from fiddler_run.locate import is_local_name, model_config_file, read_json, require_mixtral, shipped_file
from fiddler_run.plan import GpuMemory, Plan
from fiddler_run.yaml_file import read_text

CONFIG_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_experts": "num_local_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
}


@dataclass(frozen=True)
class Gpu:
    """A GPU; `free_bytes` of its memory can still be taken by this process."""

    name: str
    free_bytes: int
    total_bytes: int


def refuse(problems: list[str]) -> None:
    """
    Raises:
        FiddlerError: there is a problem; it says the first.
    """
    if problems:
        raise FiddlerError(problems[0])


def check_plan(path: str | Path, model: str | None = None) -> tuple[list[str], list[str]]:
    """Holds the plan in a file against everything that running it needs; takes little memory and fetches no weights.

    Args:
        path: the plan's file; `plans/demo.yaml` is found wherever the package is installed.
        model: the checkpoint's folder or Hugging Face id; None takes the plan's, relative to the plan's file.

    Returns:
        Everything that is wrong, a line each, and notes on what could not be checked or is good to know.
    """
    path = shipped_file(path)
    try:
        plan, problems = Plan.examine(read_text(path), str(path))
    except FiddlerError as error:
        plan, problems = None, [str(error)]
    if plan is None:
        return problems, ["the model and this machine were not looked at: that needs a plan that can be read"]
    of_model, notes = _look_at_model(plan, str(path), model or plan.model.name, Path() if model else path.resolve().parent)
    gpu = find_gpu(plan)
    note = device_note(plan, on_gpu=gpu is not None)
    return [*problems, *of_model, *machine_problems(plan, gpu, str(path))], [*notes, *([note] if note else [])]


def model_problems(plan: Plan, config: dict, origin: str, config_file: Path) -> list[str]:
    """Whether a config.json describes the model that a plan was made for: one for each number that differs."""
    try:
        require_mixtral(config, config_file)
    except FiddlerError as error:
        return [str(error)]
    remedy = "make a plan for this model with `fiddler-opt plan --model`"
    return [
        f"{origin}: model.{ours} is {getattr(plan.model, ours)}, but {theirs} is {config.get(theirs)} in {config_file}; {remedy}"
        for ours, theirs in CONFIG_KEYS.items()
        if getattr(plan.model, ours) != config.get(theirs)
    ]


def machine_problems(plan: Plan, gpu: Gpu | None, origin: str) -> list[str]:
    """What this machine lacks of what a plan needs. `gpu` None: the plan's GPU part is to lie in host memory."""
    from fiddler_run.arena import LOADING_THREADS

    host = plan.host_memory_bytes
    what = "experts and embedding" if host.embedding else "experts"
    held = host.experts + host.embedding + (0 if gpu else plan.gpu_memory_bytes.experts)
    loading = LOADING_THREADS * plan.model.expert_bytes(plan.block_neurons)
    problems = [
        core_problem(plan.cpu_threads, num_cores()),
        host_memory_problem(what, held, loading, available_memory_bytes()),
        gpu and gpu_memory_problem(plan.gpu_memory_bytes, gpu),
    ]
    return [f"{origin}: {problem}" for problem in problems if problem]


def disk_problems(plan: Plan, folder: Path) -> list[str]:
    """Whether the folder has room for what the plan leaves on disk."""
    free = shutil.disk_usage(folder).free if plan.disk_bytes and folder.is_dir() else 0
    if plan.disk_bytes <= free:
        return []
    return [
        f"{folder}: {plan.disk_bytes / 1e9:.2f} GB of experts are to lie on disk, but {free / 1e9:.2f} GB are free there; "
        "name another folder with --disk-folder, or plan with more --host-mem"
    ]


def core_problem(threads: int, cores: int) -> str | None:
    if threads <= cores:
        return None
    return (
        f"cpu_threads is {threads}, but {cores} cores are available here; "
        "profile this machine with `fiddler-opt profile` and plan again"
    )


def host_memory_problem(what: str, held_bytes: int, loading_bytes: int, available_bytes: int) -> str | None:
    """Rather refused than killed by the kernel half-way through the loading."""
    if held_bytes + loading_bytes <= available_bytes:
        return None
    return (
        f"its {what} need {held_bytes / 1e9:.2f} GB of host memory, and loading them {loading_bytes / 1e9:.2f}, "
        f"but {available_bytes / 1e9:.2f} GB are available; close other programs, add memory, or plan with more --gpu-mem"
    )


def gpu_memory_problem(memory: GpuMemory, gpu: Gpu) -> str | None:
    """The reserve is what driver and libraries take, and have taken already."""
    needed = memory.total - memory.reserve
    if needed <= gpu.free_bytes:
        return None
    return (
        f"gpu_memory_bytes.total is {memory.total / 1e9:.2f} GB, but {gpu.name} has {gpu.free_bytes / 1e9:.2f} GB free, "
        f"and {needed / 1e9:.2f} are needed besides the reserve; free GPU memory, or plan again with a smaller --gpu-mem"
    )


def find_gpu(plan: Plan) -> Gpu | None:
    """The GPU for a plan's GPU part; None where it is to lie in host memory, in which a plan runs the same way.

    That is where the plan is for a machine without CUDA, or has no GPU part, or there is no CUDA device here.
    """
    import torch

    if plan.device == "host" or plan.gpu_memory_bytes.total == 0 or not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return Gpu(torch.cuda.get_device_name(), free + cached, total)


def device_note(plan: Plan, on_gpu: bool) -> str | None:
    """Why a plan's GPU part does not lie in GPU memory, where it does not."""
    if on_gpu or plan.gpu_memory_bytes.total == 0:
        return None
    reason = "the plan is for a machine without CUDA" if plan.device == "host" else "no CUDA device here"
    return f"{reason}: its GPU part is held in host memory and computed by the CPU"


def _look_at_model(plan: Plan, origin: str, name: str, relative_to: Path) -> tuple[list[str], list[str]]:
    """Problems and notes."""
    from fiddler_run.checkpoint import TensorFiles, expert_tensors
    from fiddler_run.load import dense_tensors, skeleton

    problems, notes = [], []
    try:
        folder = _weights_at_hand(name, relative_to)
        config_file = folder / "config.json" if folder else model_config_file(name, relative_to)
        problems += model_problems(plan, read_json(config_file), origin, config_file)
        expected = {} if problems else {**expert_tensors(plan.model), **dense_tensors(skeleton(config_file))}
        if folder:
            problems += TensorFiles(folder).problems(expected, plan.model.dtype)
            problems += disk_problems(plan, folder)
        else:
            notes.append(f"the weights of {name} are not here, or not all of them: only its config.json was checked")
    except FiddlerError as error:  # of a file without which there is nothing more to look at
        problems.append(str(error))
    return problems, notes


def _weights_at_hand(name: str, relative_to: Path) -> Path | None:
    """The folder of a model's weights, if they are here: in a folder of that name, or all of a Hugging Face id's in its cache."""
    from fiddler_run.checkpoint import TensorFiles

    folder = relative_to / name
    if folder.is_dir():
        return folder if any(folder.glob("*.safetensors*")) else None
    if is_local_name(name):
        return None
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        return None if TensorFiles(folder).missing else folder
    except Exception:  # the hub's client raises many unrelated types; all mean that the weights are not here
        return None
