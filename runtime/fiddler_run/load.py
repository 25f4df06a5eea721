"""From a plan and a checkpoint to a model that runs: what can be found wrong is found before the long work begins."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer, MixtralConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from fiddler_run.arena import TORCH_DTYPES, ExpertStore
from fiddler_run.balance import balance
from fiddler_run.check import disk_problems, find_gpu, machine_problems, model_problems, refuse
from fiddler_run.checkpoint import Checkpoint, DummyWeights
from fiddler_run.errors import FiddlerError
from fiddler_run.generate import never_stopping
from fiddler_run.locate import model_config_file, model_folder, read_json, shipped_file
from fiddler_run.model import DispatchedMixtral
from fiddler_run.plan import MOST_ROUTED_TOKENS, Plan

LoadFormat = Literal["safetensors", "dummy"]
WARM_UP_TOKENS = (20, 40, MOST_ROUTED_TOKENS + 1)


def load_model(
    plan: Plan | str | Path,
    model: str | Path | None = None,
    load_format: LoadFormat = "safetensors",
    disk_folder: str | Path | None = None,
) -> tuple[DispatchedMixtral, PreTrainedTokenizerBase | None]:
    """Loads a model and its tokenizer as a plan says.

    The plan's GPU memory has room for prompts of `plan.prefill_chunk_tokens` at once; `generate()` cuts longer ones.

    Args:
        plan: a plan, or its file; `plans/demo.yaml` is found wherever the package is installed.
        model: the checkpoint's folder or Hugging Face id; None takes the plan's, relative to the plan's file.
        load_format: `dummy` takes random weights for those of a checkpoint; nothing but the model's config.json is read, and
            there may be no tokenizer.
        disk_folder: where experts lie that the plan leaves on disk; None: beside the checkpoint, or for random weights here.

    Raises:
        FiddlerError: the plan does not fit this model or this machine, or the checkpoint is incomplete.
    """
    loader = ModelLoader(plan, model, load_format, disk_folder)
    tokenizer = loader.tokenizer
    return loader.load(), tokenizer


class ModelLoader:
    """A plan and a checkpoint that were found to fit each other and this machine; `load()` does the long work.

    Takes the arguments of `load_model` and raises what it raises.
    """

    def __init__(
        self,
        plan: Plan | str | Path,
        model: str | Path | None = None,
        load_format: LoadFormat = "safetensors",
        disk_folder: str | Path | None = None,
    ):
        origin, relative_to = "plan", Path()
        if not isinstance(plan, Plan):
            path = shipped_file(plan)
            origin, plan = str(path), Plan.load(path)
            relative_to = path.resolve().parent if model is None else Path()
        self.plan, self.dtype = plan, TORCH_DTYPES[plan.model.dtype]
        name = plan.model.name if model is None else model
        if load_format == "dummy":
            config_file = model_config_file(name, relative_to)
        else:
            config_file = model_folder(name, relative_to) / "config.json"
        refuse(model_problems(plan, read_json(config_file), origin, config_file))
        self._folder, self._skeleton = config_file.parent, skeleton(config_file)
        if load_format == "dummy":
            self.weights = DummyWeights(plan.model, self.dtype)
        else:
            self.weights = Checkpoint(self._folder, plan.model)
            refuse(self.weights.files.problems(dense_tensors(self._skeleton), plan.model.dtype))
        beside = Path() if load_format == "dummy" else self._folder
        self._disk_folder = beside if disk_folder is None else Path(disk_folder)
        refuse(disk_problems(plan, self._disk_folder))
        self.device = prepare_device(plan, origin)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The checkpoint's; for random weights None where there is none.

        Raises:
            FiddlerError: the checkpoint has none that transformers can load.
        """
        if isinstance(self.weights, DummyWeights) and not any(self._folder.glob("tokenizer*")):
            return None
        return load_tokenizer(self._folder)

    @property
    def total_bytes(self) -> int:
        """Bytes of experts to place."""
        return self.plan.gpu_memory_bytes.experts + self.plan.host_memory_bytes.experts + self.plan.disk_bytes

    @torch.inference_mode(False)  # what is made in that mode cannot be written to outside of it
    def load(self, on_bytes: Callable[[int], None] = lambda count: None) -> DispatchedMixtral:
        """Places every weight; calls `on_bytes` with the bytes of experts placed since its last call."""
        if isinstance(self.weights, Checkpoint):
            with _quiet_transformers():
                model = DispatchedMixtral.from_pretrained(self.weights.folder, dtype=self.dtype).to(self.device)
        else:
            model = with_random_dense_weights(self._skeleton, self.dtype, self.device)
        model = model.eval().requires_grad_(False)
        if self.plan.host_memory_bytes.embedding:
            model.move_embedding_to_host()
        store = ExpertStore(self.plan, self.device, self._disk_folder)
        store.load(self.weights, on_bytes)
        model.attach_experts(self.plan, store)
        if self.device.type == "cuda":
            _warm_up(model)
            balance(model)
            model.executors.forget_traffic()
        return model


@torch.inference_mode()
def _warm_up(model: DispatchedMixtral) -> None:
    """Loads and compiles the GPU's kernels, which would otherwise delay the first token by half a second or more.

    Their variants depend on the number of tokens; a longer prompt takes a way of its own.
    """
    for tokens in WARM_UP_TOKENS:
        ids = torch.zeros((1, min(tokens, model.plan.workload.max_seq_len - 2)), dtype=torch.long, device=model.device)
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, **never_stopping(model))


def with_random_dense_weights(model: DispatchedMixtral, dtype: torch.dtype, device: torch.device) -> DispatchedMixtral:
    """The same model, so far without data, with seeded random weights in all but its experts."""
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=model.config.initializer_range, generator=generator)
    model.tie_weights()
    rotary = model.model.rotary_emb  # its buffers are computed from the config, not loaded
    with device:
        model.model.rotary_emb = type(rotary)(config=model.config)
    return model


def skeleton(config_file: Path) -> DispatchedMixtral:
    """The model of a config.json, without data.

    Raises:
        FiddlerError: transformers finds something wrong with it.
    """
    try:
        with torch.device("meta"), _quiet_transformers():
            return DispatchedMixtral(MixtralConfig.from_json_file(config_file))
    except Exception as error:  # whatever transformers finds wrong with a config.json, in whatever type
        raise FiddlerError(f"{config_file}: transformers cannot use it: {' '.join(str(error).split())}") from None


def dense_tensors(model: DispatchedMixtral) -> dict[str, list[int]]:
    """The names in a checkpoint of all that transformers will load, and their shapes; it would only warn of what is not there."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    return {name.replace(".mlp.", ".block_sparse_moe."): shape for name, shape in shapes.items()}


def prepare_device(plan: Plan, origin: str = "plan") -> torch.device:
    """The device for the plan's GPU part, with the plan's thread count set and its GPU memory capped.

    Raises:
        FiddlerError: the machine lacks what the plan needs; see `machine_problems`.
    """
    gpu = find_gpu(plan)
    refuse(machine_problems(plan, gpu, origin))
    torch.set_num_threads(plan.cpu_threads)
    if gpu is None:
        return torch.device("cpu")
    memory, device = plan.gpu_memory_bytes, torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_per_process_memory_fraction((memory.total - memory.reserve) / gpu.total_bytes, device)
    return device


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, padding on the left as generation needs.

    Raises:
        FiddlerError: the folder has none that transformers can load.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    except (OSError, ValueError) as error:
        raise FiddlerError(f"{folder}: no tokenizer ({str(error).splitlines()[0]}); download the checkpoint again") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def _quiet_transformers():
    """Without transformers' progress bars and warnings: what can go wrong has been checked."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
