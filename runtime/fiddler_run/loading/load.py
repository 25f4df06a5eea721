"""Loads a model from a plan and a checkpoint. All checks precede the long work."""

import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fiddler_run.engine.tuning import RouterSizes, Tuning, tune
from fiddler_run.generation.defaults import GenerationDefaults
from fiddler_run.generation.generate import never_stopping
from fiddler_run.generation.model import PlannedModel
from fiddler_run.kernels.limits import MAX_DECODE_TOKENS
from fiddler_run.loading.model_check import LoadFormat
from fiddler_run.loading.share import ShareLoader
from fiddler_run.plan.schema import Plan
from fiddler_run.ranks.launch import start_ranks
from fiddler_run.ranks.meet import meet
from fiddler_run.ranks.peers import Peers
from fiddler_run.system.locate import shipped_file
from fiddler_run.weights.checkpoint import Checkpoint
from fiddler_run.weights.store import ExpertStore

# A pass with a tile of 32 tokens, one with a tile of 64, and one on the prefill path. The decode
# steps that follow use a tile of 16.
WARM_UP_TOKENS = (20, 40, MAX_DECODE_TOKENS + 1)


def load_model(
    plan: Plan | str | Path,
    model: str | Path | None = None,
    load_format: LoadFormat = "safetensors",
    disk_folder: str | Path | None = None,
) -> tuple[PlannedModel, PreTrainedTokenizerBase | None]:
    """Loads a model and its tokenizer as a plan says.

    The plan's GPU memory has room for `plan.prefill_chunk_tokens` of a prompt at once. `generate()`
    splits longer prompts.

    Args:
        plan: a plan, or its file. `plans/demo.yaml` is found wherever the package is installed.
        model: the checkpoint's folder or Hugging Face id. None: the plan's model, relative to the
            plan's file.
        load_format: `dummy` uses random weights. Only config.json is read, and the tokenizer may be
            None.
        disk_folder: holds the experts that the plan leaves on disk. None: the checkpoint's folder
            or, for random weights, the working directory.

    Raises:
        FiddlerError: the plan does not fit this model or this machine, or the checkpoint is
            incomplete.
    """
    loader = ModelLoader(plan, model, load_format, disk_folder)
    return loader.load(), loader.tokenizer


class ModelLoader(ShareLoader):
    """A plan and a checkpoint that passed all checks. `load()` does the long work.

    Takes the arguments of `load_model` and raises the same errors. `plan_file` is the file of a
    plan that is passed as an object. The plan's other ranks are started; they run their checks
    meanwhile, and `load()` raises what they find.
    `late_notes` are known once the weights are loaded.
    """

    def __init__(
        self,
        plan: Plan | str | Path,
        model: str | Path | None = None,
        load_format: LoadFormat = "safetensors",
        disk_folder: str | Path | None = None,
        plan_file: Path | None = None,
        listen: tuple[str, int] | None = None,
        on_waiting: Callable[[str], None] = lambda _: None,
    ):
        if not isinstance(plan, Plan):
            plan_file = shipped_file(plan)
            plan = Plan.load(plan_file)
        super().__init__(plan, 0, model, load_format, disk_folder, plan_file)
        self.tokenizer = self._checked.tokenizer
        self.late_notes: list[str] = []
        self.peers: Peers | None = None
        if len(plan.ranks) > 1:
            task = {
                "plan": plan.dump(),
                "model": self._checked.name_anywhere,
                "load_format": load_format,
                "disk_folder": str(self._checked.disk_folder.resolve()),
            }
            machines = [rank.machine for rank in plan.ranks]
            self.peers = start_ranks(machines, listen, task, waiting=on_waiting)
            self._end_ranks = weakref.finalize(self, self.peers.close)

    @property
    def skeleton(self) -> PlannedModel:
        """The model without its weights."""
        return self._checked.skeleton

    @property
    def short_name(self) -> str:
        """The model's Hugging Face id, or the name of its folder."""
        path = Path(self._checked.name_anywhere)
        return path.name if path.is_absolute() else str(path)

    @property
    def vocab_size(self) -> int:
        return self.skeleton.config.vocab_size

    @property
    def defaults(self) -> GenerationDefaults:
        """The checkpoint's recommendations."""
        return self._checked.defaults or GenerationDefaults()

    @torch.inference_mode(False)  # tensors made in inference mode cannot be written to outside it
    def load(self, on_bytes: Callable[[int], None] = lambda count: None) -> PlannedModel:
        """Loads every weight. Calls `on_bytes` with the bytes of experts loaded since its last
        call.
        """
        if self.device.type == "cuda":
            # small tensors would otherwise split the cached memory for good
            torch.cuda.empty_cache()
        checkpoint = self.weights if isinstance(self.weights, Checkpoint) else None
        model = place_dense_weights(self._checked.skeleton, self.device, checkpoint)
        model.defaults = self.defaults
        model.generation_config = GenerationConfig(
            **model.defaults.for_transformers(self.tokenizer)
        )
        model = model.eval().requires_grad_(False)
        if self.plan.rank.host_memory_bytes.embedding:
            model.move_embedding_to_host()
        with self.on_own_cores():
            model.attach_experts(self.plan, self._load_experts(on_bytes), self.peers)
        if self.peers is not None:
            self._end_ranks.detach()  # from here on, they end with the model
        if self.device.type == "cuda" or (self.peers is not None and self.peers.has_gpu):
            with model.session.turn():
                _warm_up(model)
                model.tuning = _tune(model)
                model.forget_traffic()
        return model

    def _load_experts(self, on_bytes: Callable[[int], None]) -> ExpertStore:
        """Loads the experts, on all ranks at once."""
        peers = self.peers
        if peers is None:
            store = self.load_store(on_bytes)
            self.late_notes += store.notes
            return store
        one_machine = len(self.plan.ranks_beside(0)) == len(self.plan.ranks)
        meet(peers, self.device, one_machine, self.model_id)

        counted = 0  # of the bytes that others have loaded

        def count(num_bytes: int = 0) -> None:
            nonlocal counted
            peers.check_failure()
            of_others = peers.loaded_bytes - counted
            counted += of_others
            on_bytes(num_bytes + of_others)

        store = self.load_store(count)
        self.late_notes += store.notes
        for rank, reply in enumerate(peers.replies(meanwhile=count), 1):
            of_rank = (note for note in reply["notes"] if note not in self.notes)
            self.late_notes += [f"rank {rank}: {note}" for note in of_rank]
        count()
        return store


@torch.no_grad()
def _warm_up(model: PlannedModel) -> None:
    """Loads and compiles the GPU's kernels, which would otherwise delay the first token.

    That takes 0.5 s or more. The variants depend on the number of tokens, and a longer prompt takes
    another path.
    """
    for tokens in WARM_UP_TOKENS:
        count = max(1, min(tokens, model.plan.workload.max_seq_len - 2))
        ids = torch.zeros((1, count), dtype=torch.long, device=model.device)
        mask = torch.ones_like(ids)
        model.generate(
            ids, attention_mask=mask, max_new_tokens=2, do_sample=False, **never_stopping(model)
        )


def _tune(model: PlannedModel) -> Tuning:
    """Finds the split between CPU and link for this model and applies it to its layers."""
    plan = model.plan
    chunk = min(plan.prefill_chunk_tokens, plan.workload.max_seq_len)
    router = RouterSizes.of(plan.model)
    prompt_tokens = chunk * plan.workload.batch_size
    if model.peers is None:
        return tune(model.layers, model.engine.resources, router, prompt_tokens)
    # all ranks at once, because they share the memory of their machine
    request = model.peers.request(do="tune", prompt_tokens=prompt_tokens)
    tuning = tune(model.layers, model.engine.resources, router, prompt_tokens)
    model.peers.replies(request)
    return tuning


def place_dense_weights(
    model: PlannedModel, device: torch.device, weights: Checkpoint | None = None
) -> PlannedModel:
    """Allocates and fills the weights outside the experts, on `device`, of a model without storage.

    They come from the checkpoint. transformers initialises what it does not hold: buffers that
    follow from the config and, without a checkpoint, all weights, by seeded random numbers.
    """
    model = model.to_empty(device=device)
    model.tie_weights()  # first, because a tied head has no tensor in a checkpoint
    with torch.no_grad():
        if weights is not None:
            for target in weights.tensors.dense_targets():
                for name, tensor in weights.dense(target).items():
                    place = model.get_parameter_or_buffer(name)
                    place.copy_(tensor)
                    place._is_hf_initialized = True
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            model.initialize_weights()
            if weights is None:
                # Otherwise, all tokens would choose the same experts after some layers.
                model.get_input_embeddings().weight.normal_(std=10.0)
    return model
