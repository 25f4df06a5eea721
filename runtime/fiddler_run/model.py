"""A transformers Mixtral whose experts are dispatched by a plan.

transformers stays in charge of attention, cache, router, sampling and `generate()`; only the experts are ours: the stock
experts modules lose their parameters and hand each call to a `LayerDispatch`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import ExpertsInterface
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.utils import logging as transformers_logging

from fiddler_run.arena import TORCH_DTYPES, ExpertStore
from fiddler_run.cache import KeyValueCache
from fiddler_run.dispatch import LayerDispatch
from fiddler_run.errors import FiddlerError
from fiddler_run.executors import Executors
from fiddler_run.files import reason
from fiddler_run.generation_defaults import GenerationDefaults
from fiddler_run.model_config import ModelConfig
from fiddler_run.plan import Plan
from fiddler_run.process_settings import dense_threads
from fiddler_run.session import Session

EXPERTS_IMPLEMENTATION = "fiddler"


def _dispatch_experts(module, hidden_states, top_k_index, top_k_weights):
    return module.dispatch(hidden_states, top_k_index, top_k_weights)


ExpertsInterface.register(EXPERTS_IMPLEMENTATION, _dispatch_experts)


def _canonical_strides(_, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """A view of a prompt's last token [1, 1, hidden] keeps the stride of the whole prompt, on which PyTorch's CPU linear copies
    its weight first: 0.7 to 1.1 s for an output head of 262 MB. `contiguous()` sees nothing to do."""
    return (arguments[0].clone(memory_format=torch.contiguous_format),)


class DispatchedMixtral(MixtralForCausalLM):
    """MixtralForCausalLM without expert parameters; `attach_experts` connects them.

    `plan` is the plan it runs, `defaults` what its checkpoint recommends for sampling. `executors` compute its experts and count
    the blocks that calls needed; `session` lets one generation run at a time.
    """

    _can_compile_fullgraph = False

    def __init__(self, config):
        config._experts_implementation = EXPERTS_IMPLEMENTATION
        super().__init__(config)
        for experts in self.experts_modules():
            for name in list(experts._parameters):
                del experts._parameters[name]
        self.lm_head.register_forward_pre_hook(_canonical_strides)
        self.plan: Plan | None = None
        self.defaults = GenerationDefaults()
        self.session: Session | None = None

    @wraps(MixtralForCausalLM.forward)  # whose signature tells `generate()` what to pass
    def forward(self, *arguments, **named):
        if self.session is None:
            return super().forward(*arguments, **named)
        with self.session.turn():
            if not arguments and self.session.decode.serves(named):
                return self.session.decode(**named)
            return super().forward(*arguments, **named)

    def generate(self, inputs=None, generation_config=None, *more, **arguments):
        """As transformers': in chunks as the plan has memory for, and in its cache, unless the arguments ask for others.

        One generation runs at a time; a call from another thread waits for the one under way.
        """
        if self.session is None:
            return super().generate(inputs, generation_config, *more, **arguments)
        with self.session.turn(), self.session.generation(arguments, inputs, generation_config):
            return super().generate(inputs, generation_config, *more, **arguments)

    @property
    def cache(self) -> KeyValueCache:
        """The KV cache that generations use in turn."""
        return self.session.cache

    def _apply(self, function, *arguments, **named):
        if self.session is not None:
            self._refuse_conversion(function)
            self.session.forget_decode()  # it may hold on to weights that now move
        return super()._apply(function, *arguments, **named)

    def _refuse_conversion(self, function) -> None:
        """
        Raises:
            FiddlerError: `function` would give the model another dtype or device than its experts have.
        """
        converted = function(torch.zeros(1, dtype=self.dtype, device=self.device))
        if converted.dtype != self.dtype:
            raise FiddlerError(
                f"the experts are {self.plan.model.dtype} and stay so; for {converted.dtype}, make a plan of a model of that dtype"
            )
        if converted.device != self.device:
            raise FiddlerError("a loaded model stays where its plan has put it; make another plan with `fiddler-opt plan`")

    def resize_token_embeddings(self, *arguments, **named):
        if isinstance(self.model.embed_tokens, HostEmbedding):
            raise FiddlerError("the plan keeps the embedding in host memory, where it cannot be resized; resize the checkpoint's")
        return super().resize_token_embeddings(*arguments, **named)

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
        self.plan = plan
        self.store = store  # owns the arenas; the dispatches only hold views
        self.executors = make_executors(plan, self.device)
        for layer, experts in enumerate(self.experts_modules()):
            places = store.resident[layer], store.absent[layer], plan.stream_share_at, self.executors, store.on_disk[layer]
            experts.dispatch = LayerDispatch(layer, *places)
            if layer > 0:
                self.experts_modules()[layer - 1].dispatch.next = experts.dispatch
        layer_bytes = sum(parameter.nbytes for parameter in self.model.layers[0].parameters())
        self.session = Session(self, self.executors, dense_threads(plan.cpu_threads, layer_bytes))
        self.session.make_cache(plan.workload.sequences, plan.workload.max_seq_len)

    def move_embedding_to_host(self) -> None:
        """Leaves the embedding table in host memory, from which each step copies its rows."""
        self.model.embed_tokens = HostEmbedding(self.model.embed_tokens.weight)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class HostEmbedding(torch.nn.Module):
    """An embedding table in host memory, of which the rows that are asked for go where `weight` [vocabulary, hidden] was.

    The table is no parameter: transformers takes a model's first one for the place of all.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.device, self.table = weight.device, weight.detach().cpu()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids.cpu(), self.table).to(self.device)


def make_executors(plan: Plan, device: torch.device) -> Executors:
    """What the plan's experts are computed by: its CPU threads, its staging memory on `device`."""
    slots = plan.gpu_memory_bytes.staging // plan.block_bytes
    dtype = TORCH_DTYPES[plan.model.dtype]
    return Executors(dtype, plan.model.hidden_size, plan.block_neurons, plan.cpu_threads, slots, device, plan.cpu_pinned)


def skeleton(config: ModelConfig, config_file: Path) -> DispatchedMixtral:
    """The model of a config.json, without data.

    Raises:
        FiddlerError: transformers finds something wrong with it.
    """
    try:
        with torch.device("meta"), _quiet_transformers():
            return DispatchedMixtral(MixtralConfig(**config.for_transformers()))
    except Exception as error:  # whatever transformers finds wrong with a config.json, in whatever type
        raise FiddlerError(f"{config_file}: transformers cannot use it: {reason(error)}") from None


def dense_tensors(model: DispatchedMixtral) -> dict[str, list[int]]:
    """The names in a checkpoint of all weights outside the experts, and their shapes."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    return {checkpoint_name(name): shape for name, shape in shapes.items()}


def checkpoint_name(parameter: str) -> str:
    """The name that a parameter outside the experts has in a checkpoint."""
    return parameter.replace(".mlp.", ".block_sparse_moe.")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' warnings: what can go wrong is checked."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
