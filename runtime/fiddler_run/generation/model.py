"""A transformers model whose experts are run by a plan.

transformers remains in charge of attention, cache, router, sampling and `generate()`. Only the
experts are ours: the stock experts modules lose their parameters and pass each call to an
`ExpertsLayer`.
"""

import weakref

import torch

from fiddler_run.engine.calls import Traffic
from fiddler_run.engine.engine import ExpertEngine
from fiddler_run.engine.layer import ExpertsLayer
from fiddler_run.engine.tuning import Tuning
from fiddler_run.errors import FiddlerError
from fiddler_run.generation.cache import KeyValueCache
from fiddler_run.generation.defaults import GenerationDefaults
from fiddler_run.generation.host_embedding import HostEmbedding
from fiddler_run.generation.lookup_gate import LookupGate
from fiddler_run.generation.session import Session
from fiddler_run.models.dispatched import DispatchedModel
from fiddler_run.plan.schema import Plan
from fiddler_run.ranks.layer import SharedLayer
from fiddler_run.ranks.peers import Peers
from fiddler_run.ranks.share import share_of
from fiddler_run.system.process_settings import dense_threads
from fiddler_run.weights.store import ExpertStore


def _canonical_strides(_, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Copies the output head's input, to drop the strides of the prompt it is a view of.

    With these strides, PyTorch's CPU linear first copies its weight: 0.7 to 1.1 s for a head of 262
    MB. `contiguous()` does not notice them.
    """
    return (arguments[0].clone(memory_format=torch.contiguous_format),)


class PlannedModel(DispatchedModel):
    """What the runtime adds to a transformers causal language model.

    `plan` is the plan it runs and `defaults` the checkpoint's recommendations for sampling.
    `engine` computes the experts, served by `layers` with the split that `tuning` found; `peers`
    are the other ranks, if the plan has any. `session` runs one generation at a time. `lookup_gate`
    has measured this placement. All that concerns experts is None until `attach_experts`.
    """

    def __init__(self, config):
        super().__init__(config)
        self.get_output_embeddings().register_forward_pre_hook(_canonical_strides)
        self.plan: Plan | None = None
        self.defaults = GenerationDefaults()
        self.store: ExpertStore | None = None
        self.engine: ExpertEngine | None = None
        self.peers: Peers | None = None
        self.layers: list[ExpertsLayer] = []
        self.tuning = Tuning()
        self.session: Session | None = None
        self.lookup_gate = LookupGate()

    def forward(self, *arguments, **named):
        if self.session is None:
            return super().forward(*arguments, **named)
        with self.session.turn():
            decode = self.session.decode
            output = decode(**named) if not arguments and decode.serves(named) else None
            return super().forward(*arguments, **named) if output is None else output

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

    def traffic(self) -> Traffic:
        """The blocks that calls needed so far, of all ranks."""
        return sum(self.traffic_by_rank(), Traffic())

    def traffic_by_rank(self) -> list[Traffic]:
        own = self.engine.resources.traffic
        if self.peers is None:
            return [own]
        replies = self.peers.replies(self.peers.request(do="count"))
        return [own, *(Traffic(*reply["traffic"]) for reply in replies)]

    def forget_traffic(self) -> None:
        """Counts blocks anew, on all ranks."""
        self.engine.resources.forget_traffic()
        if self.peers is not None:
            self.peers.tell(do="forget")

    def attach_experts(self, plan: Plan, store: ExpertStore, peers: Peers | None = None) -> None:
        """Serves every layer's experts from `store`, and from the other ranks if there are any.

        The model must be on the store's device.
        """
        rank = plan.rank
        engine, layers = share_of(plan, store, self.device)
        self.plan = plan
        self.store = store  # owns the arenas; the layers only hold views
        self.engine = engine
        self.peers = peers
        self.tuning = Tuning()
        self.lookup_gate = LookupGate()
        self.set_layers(layers)
        dense_bytes = sum(parameter.nbytes for parameter in self.parameters())
        threads = dense_threads(
            rank.cpu_threads,
            dense_bytes // len(self.layers),
            on_gpu=self.device.type == "cuda",
            own_threads=engine.resources.kernels.cpu.finishes_alone,
        )
        self.session = Session(self, engine.resources, threads)
        self.session.make_cache(plan.workload.sequences, plan.workload.max_seq_len)
        if peers is not None:
            weakref.finalize(self, peers.close)
            engine.resources.check_others = peers.check_failure
            engine.resources.abandon_others = peers.abandon

    def set_layers(self, layers: list[ExpertsLayer]) -> None:
        """Lets these layers serve the experts modules, in order."""
        self.layers = layers
        if self.session is not None:
            self.session.forget_decode()  # tapes hold the previous layers
        for layer, following in zip(layers, layers[1:], strict=False):
            layer.next = following
        for experts, layer in zip(self.experts_modules(), layers, strict=True):
            experts.planned = layer if self.peers is None else SharedLayer(layer, self.peers)

    def move_embedding_to_host(self) -> None:
        """Keeps the embedding table in host memory. Each step copies the rows it needs."""
        self.set_input_embeddings(HostEmbedding(self.get_input_embeddings()))
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
        if isinstance(self.get_input_embeddings(), HostEmbedding):
            raise FiddlerError(
                "the plan keeps the embedding in host memory, where it cannot be resized; resize"
                " it in the checkpoint"
            )
        return super().resize_token_embeddings(*arguments, **named)
