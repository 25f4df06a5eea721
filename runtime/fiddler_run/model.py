"""A transformers Mixtral whose experts are dispatched by a plan, and its loading.

transformers stays in charge of attention, cache, router, sampling and `generate()`; only the experts are ours: the stock
experts modules lose their parameters and hand each call to a `LayerDispatch`.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer, MixtralForCausalLM, PreTrainedTokenizerBase
from transformers.integrations.moe import ExpertsInterface
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.utils import logging as transformers_logging

from fiddler_run.arena import TORCH_DTYPES, ExpertStore
from fiddler_run.checkpoint import Checkpoint, check_model, read_json
from fiddler_run.dispatch import LayerDispatch, StagingRing, Traffic
from fiddler_run.errors import FiddlerError
from fiddler_run.locate import model_folder
from fiddler_run.plan import Plan

EXPERTS_IMPLEMENTATION = "fiddler"


def _dispatch_experts(module, hidden_states, top_k_index, top_k_weights):
    return module.dispatch(hidden_states, top_k_index, top_k_weights)


ExpertsInterface.register(EXPERTS_IMPLEMENTATION, _dispatch_experts)


class DispatchedMixtral(MixtralForCausalLM):
    """MixtralForCausalLM without expert parameters; `attach_experts` connects them.

    `plan` is the plan it runs, `traffic` counts the blocks its calls needed.
    """

    _can_compile_fullgraph = False
    _keys_to_ignore_on_load_unexpected = [r"\.experts\."]

    def __init__(self, config):
        config._experts_implementation = EXPERTS_IMPLEMENTATION
        super().__init__(config)
        for experts in self.experts_modules():
            for name in list(experts._parameters):
                del experts._parameters[name]
            experts._is_hf_initialized = True  # nothing left to initialise

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers' own check reads this file's source for a decorator that only its modules carry

    def _valid_auto_compile_criteria(self, *args, **kwargs) -> bool:
        return False  # the dispatch reads the router's result on the host, which torch.compile cannot capture

    def save_pretrained(self, *args, **kwargs):
        raise NotImplementedError("the experts are not part of this module; copy the checkpoint it was loaded from")

    def experts_modules(self) -> list[MixtralExperts]:
        return [layer.mlp.experts for layer in self.model.layers]

    def attach_experts(self, plan: Plan, store: ExpertStore) -> None:
        """Serves every layer's experts from `store`; the model must be where `store`'s device arena is."""
        self.plan, self.traffic = plan, Traffic()
        self.store = store  # owns the arenas; the dispatches only hold views
        ring = _staging_ring(plan, store, self.device)
        for experts, resident, absent in zip(self.experts_modules(), store.resident, store.absent, strict=True):
            experts.dispatch = LayerDispatch(resident, absent, plan.streamed_blocks, ring, self.traffic)


def load_model(
    plan: Plan | str | Path,
    model: str | Path | None = None,
    on_checked: Callable[[PreTrainedTokenizerBase, int], None] = lambda tokenizer, total_bytes: None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> tuple[DispatchedMixtral, PreTrainedTokenizerBase]:
    """Loads a model and its tokenizer as a plan says.

    The plan's GPU memory has room for prompts of `plan.prefill_chunk_tokens` at once; give longer ones to `generate()` with
    `prefill_chunk_size=plan.prefill_chunk_tokens`.

    Args:
        plan: a plan or its file.
        model: the checkpoint's folder or Hugging Face id; None takes the plan's, relative to the plan's file.
        on_checked: called once, when everything has been checked and before the long work, with the tokenizer and the bytes
            of experts that will be placed. What it raises ends the loading.
        on_bytes: called with the bytes placed since its last call.

    Raises:
        FiddlerError: the plan does not fit this model or this machine, or the checkpoint is incomplete.
    """
    origin, relative_to = "plan", Path()
    if not isinstance(plan, Plan):
        origin, relative_to = str(plan), Path(plan).resolve().parent
        plan = Plan.load(plan)
    folder = model_folder(model) if model is not None else model_folder(plan.model.name, relative_to)
    check_model(plan, read_json(folder / "config.json"), origin, folder / "config.json")
    checkpoint = Checkpoint(folder, plan.model)
    device = prepare_device(plan, origin)
    tokenizer = load_tokenizer(folder)

    on_checked(tokenizer, plan.gpu_memory_bytes.experts + plan.host_memory_bytes.experts)
    dispatched = _load_dense(folder, plan, device)
    store = ExpertStore(plan, device)
    store.load(checkpoint, on_bytes)
    dispatched.attach_experts(plan, store)
    return dispatched, tokenizer


def prepare_device(plan: Plan, origin: str = "plan") -> torch.device:
    """The device for the plan's GPU part, with the plan's thread count set and its GPU memory capped.

    Without CUDA that is host memory, in which a plan's three ranges run the same way.

    Raises:
        FiddlerError: the machine has fewer cores than the plan's threads, or less free GPU memory than the plan's total.
    """
    cores = len(os.sched_getaffinity(0))
    if plan.cpu_threads > cores:
        raise FiddlerError(
            f"{origin}: cpu_threads is {plan.cpu_threads}, but {cores} cores are available here; "
            "profile this machine with `fiddler-opt profile` and plan again"
        )
    torch.set_num_threads(plan.cpu_threads)
    gpu = plan.gpu_memory_bytes
    if gpu.total == 0 or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    if gpu.total - gpu.reserve > free + own:
        name = torch.cuda.get_device_name(device)
        raise FiddlerError(
            f"{origin}: gpu_memory_bytes.total is {gpu.total / 1e9:.2f} GB, but {name} has {free / 1e9:.2f} GB free; "
            "free GPU memory, or plan again with a smaller --gpu-mem"
        )
    torch.cuda.set_per_process_memory_fraction((gpu.total - gpu.reserve) / total, device)
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


def _load_dense(folder: Path, plan: Plan, device: torch.device) -> DispatchedMixtral:
    """Everything but the experts, on `device`, through transformers' own loader, which never reads an expert's bytes."""
    bar_was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, report = DispatchedMixtral.from_pretrained(folder, dtype=TORCH_DTYPES[plan.model.dtype], output_loading_info=True)
    finally:
        if bar_was_on:
            transformers_logging.enable_progress_bar()
    missing = sorted(report["missing_keys"])
    if missing:
        raise FiddlerError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} in all); download the checkpoint again")
    return model.to(device).eval().requires_grad_(False)


def _staging_ring(plan: Plan, store: ExpertStore, device: torch.device) -> StagingRing | None:
    slots = plan.gpu_memory_bytes.staging // plan.block_bytes
    blocks = store.arenas[0].blocks
    return StagingRing(slots, blocks.shape[1], blocks.dtype, device) if slots else None
