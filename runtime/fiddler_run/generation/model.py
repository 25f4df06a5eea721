"""A transformers model whose experts are run by a plan.

transformers remains in charge of attention, cache, router, sampling and `generate()`. Only the
experts are ours: the stock experts modules lose their parameters and pass each call to an
`ExpertsLayer`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface
from transformers.utils import logging as transformers_logging

from fiddler_run.engine.engine import ExpertEngine, make_engine
from fiddler_run.engine.layer import ExpertsLayer
from fiddler_run.engine.tuning import Tuning
from fiddler_run.errors import FiddlerError
from fiddler_run.generation.cache import KeyValueCache
from fiddler_run.generation.defaults import GenerationDefaults
from fiddler_run.generation.host_embedding import HostEmbedding
from fiddler_run.generation.session import Session
from fiddler_run.models.config import ModelConfig
from fiddler_run.models.family import Family
from fiddler_run.models.table import FAMILIES
from fiddler_run.plan.schema import Plan
from fiddler_run.system.files import reason
from fiddler_run.system.process_settings import dense_threads
from fiddler_run.weights.store import ExpertStore

EXPERTS_IMPLEMENTATION = "fiddler"


def _run_experts(module, hidden_states, top_k_index, top_k_weights):
    return module.planned(hidden_states, top_k_index, top_k_weights)


ExpertsInterface.register(EXPERTS_IMPLEMENTATION, _run_experts)


def _canonical_strides(_, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Copies the output head's input, to drop the strides of the prompt it is a view of.

    With these strides, PyTorch's CPU linear first copies its weight: 0.7 to 1.1 s for a head of 262
    MB. `contiguous()` does not notice them.
    """
    return (arguments[0].clone(memory_format=torch.contiguous_format),)


class PlannedModel(PreTrainedModel):
    """What the runtime adds to a transformers causal language model; see `planned_class`.

    `plan` is the plan it runs and `defaults` the checkpoint's recommendations for sampling.
    `engine` computes the experts, served by `layers` with the split that `tuning` found. `session`
    runs one generation at a time. All that concerns experts is None until `attach_experts`.
    """

    _can_compile_fullgraph = False
    family: Family

    def __init__(self, config):
        config._experts_implementation = EXPERTS_IMPLEMENTATION
        super().__init__(config)
        for experts in self.family.experts_modules(self):
            for name in list(experts._parameters):
                del experts._parameters[name]
        self.lm_head.register_forward_pre_hook(_canonical_strides)
        self.plan: Plan | None = None
        self.defaults = GenerationDefaults()
        self.store: ExpertStore | None = None
        self.engine: ExpertEngine | None = None
        self.layers: list[ExpertsLayer] = []
        self.tuning = Tuning()
        self.session: Session | None = None

    def forward(self, *arguments, **named):
        if self.session is None:
            return super().forward(*arguments, **named)
        with self.session.turn():
            if not arguments and self.session.decode.serves(named):
                return self.session.decode(**named)
            return super().forward(*arguments, **named)

    def generate(self, inputs=None, generation_config=None, *more, **arguments):
        """Like transformers', but in the plan's chunks and KV cache unless the arguments say
        otherwise.

        One generation runs at a time. A call from another thread waits for the current one.
        """
        if self.session is None:
            return super().generate(inputs, generation_config, *more, **arguments)
        with self.session.turn(), self.session.generation(arguments, inputs, generation_config):
            return super().generate(inputs, generation_config, *more, **arguments)

    @property
    def cache(self) -> KeyValueCache:
        """The KV cache, used by one generation at a time."""
        return self.session.cache

    def attach_experts(self, plan: Plan, store: ExpertStore) -> None:
        """Serves every layer's experts from `store`. The model must be on the store's device."""
        rank = plan.rank
        slots = rank.gpu_memory_bytes.staging // plan.block_bytes
        engine = make_engine(
            plan.block_format,
            self.device,
            rank.cpu_threads,
            slots,
            rank.cpu_pinned,
            plan.model.activation,
        )
        self.plan = plan
        self.store = store  # owns the arenas; the layers only hold views
        self.engine = engine
        self.tuning = Tuning()
        places = zip(store.resident, store.host, store.on_disk, strict=True)
        self.set_layers(
            [
                ExpertsLayer(number, resident, host, rank.stream_share_at, engine, on_disk)
                for number, (resident, host, on_disk) in enumerate(places)
            ]
        )
        layer_bytes = sum(parameter.nbytes for parameter in self.model.layers[0].parameters())
        threads = dense_threads(rank.cpu_threads, layer_bytes)
        self.session = Session(self, engine.resources, threads)
        self.session.make_cache(plan.workload.sequences, plan.workload.max_seq_len)

    def set_layers(self, layers: list[ExpertsLayer]) -> None:
        """Lets these layers serve the experts modules, in order."""
        self.layers = layers
        for layer, following in zip(layers, layers[1:], strict=False):
            layer.next = following
        for experts, layer in zip(self.experts_modules(), layers, strict=True):
            experts.planned = layer

    def experts_modules(self) -> list[nn.Module]:
        return self.family.experts_modules(self)

    def move_embedding_to_host(self) -> None:
        """Keeps the embedding table in host memory. Each step copies the rows it needs."""
        self.model.embed_tokens = HostEmbedding(self.model.embed_tokens.weight)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _apply(self, function, *arguments, **named):
        if self.session is not None:
            self._refuse_conversion(function)
            self.session.forget_decode()  # it may hold weights that move now
        return super()._apply(function, *arguments, **named)

    def _refuse_conversion(self, function) -> None:
        """Refuses a conversion to another dtype or device.

        Raises:
            FiddlerError: `function` would convert or move the model.
        """
        converted = function(torch.zeros(1, dtype=self.dtype, device=self.device))
        if converted.dtype != self.dtype:
            raise FiddlerError(
                f"the experts are {self.plan.model.dtype} and cannot be converted; for"
                f" {converted.dtype}, plan for a model of that dtype"
            )
        if converted.device != self.device:
            raise FiddlerError(
                "a loaded model cannot be moved; make another plan with `fiddler-opt plan`"
            )

    def resize_token_embeddings(self, *arguments, **named):
        if isinstance(self.model.embed_tokens, HostEmbedding):
            raise FiddlerError(
                "the plan keeps the embedding in host memory, where it cannot be resized; resize"
                " it in the checkpoint"
            )
        return super().resize_token_embeddings(*arguments, **named)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers' own check looks for a decorator in this file's source
        return True

    def _valid_auto_compile_criteria(self, *args, **kwargs) -> bool:
        # the prefill path reads the router's choice on the host, which cannot be captured
        return False

    def save_pretrained(self, *args, **kwargs):
        raise NotImplementedError(
            "the experts are not part of this module; copy the checkpoint it was loaded from"
        )


@cache
def planned_class(model_type: str) -> type[PlannedModel]:
    """A subclass of a family's stock class whose experts are run by a plan."""
    family = FAMILIES[model_type]
    stock = family.stock_class()

    @wraps(stock.forward)  # `generate()` reads its signature
    def forward(self, *arguments, **named):
        return PlannedModel.forward(self, *arguments, **named)

    members = {"family": family, "forward": forward, "__module__": __name__}
    return type(f"Planned{stock.__name__}", (PlannedModel, stock), members)


def skeleton(config: ModelConfig, config_file: Path) -> PlannedModel:
    """The model of a config.json, without data.

    Raises:
        FiddlerError: transformers rejects the config.
    """
    try:
        with torch.device("meta"), _quiet_transformers():
            stock_config = FAMILIES[config.family].stock_config(config)
            return planned_class(config.family)(stock_config)
    except Exception as error:  # transformers raises many types for a wrong config.json
        raise FiddlerError(f"{config_file}: transformers cannot use it: {reason(error)}") from None


def dense_tensors(model: PlannedModel) -> dict[str, list[int]]:
    """The checkpoint names and shapes of all weights outside the experts."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    shapes = {
        name: list(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied
    }
    return {model.family.dense_name(name): shape for name, shape in shapes.items()}


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silences transformers' warnings. Our own checks cover what can go wrong."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
