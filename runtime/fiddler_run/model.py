"""A transformers Mixtral whose experts are dispatched by a plan.

transformers stays in charge of attention, cache, router, sampling and `generate()`; only the experts are ours: the stock
experts modules lose their parameters and hand each call to a `LayerDispatch`.
"""

from functools import wraps

import torch
from transformers import MixtralForCausalLM
from transformers.integrations.moe import ExpertsInterface
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from fiddler_run.arena import TORCH_DTYPES, ExpertStore
from fiddler_run.cache import KeyValueCache
from fiddler_run.decode import DecodeStep
from fiddler_run.dispatch import LayerDispatch
from fiddler_run.executors import Executors
from fiddler_run.plan import Plan

EXPERTS_IMPLEMENTATION = "fiddler"

# With cuDNN's attention, which PyTorch prefers on some GPUs, each token at a new length of the cache took 0.05 to 0.14 s more on
# an H100; it is known to plan anew for each shape.
torch.backends.cuda.enable_cudnn_sdp(False)


def _dispatch_experts(module, hidden_states, top_k_index, top_k_weights):
    return module.dispatch(hidden_states, top_k_index, top_k_weights)


ExpertsInterface.register(EXPERTS_IMPLEMENTATION, _dispatch_experts)


def _canonical_strides(_, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """A view of a prompt's last token [1, 1, hidden] keeps the stride of the whole prompt, on which PyTorch's CPU linear copies
    its weight first: 0.7 to 1.1 s for an output head of 262 MB. `contiguous()` sees nothing to do."""
    return (arguments[0].clone(memory_format=torch.contiguous_format),)


class DispatchedMixtral(MixtralForCausalLM):
    """MixtralForCausalLM without expert parameters; `attach_experts` connects them.

    `plan` is the plan it runs; `executors` compute its experts and count the blocks that calls needed; `cache` has room for the
    plan's context.
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
        self.lm_head.register_forward_pre_hook(_canonical_strides)
        self.plan: Plan | None = None
        self.cache: KeyValueCache | None = None
        self._decode_step: DecodeStep | None = None

    @wraps(MixtralForCausalLM.forward)  # whose signature tells `generate()` what to pass
    def forward(self, *arguments, **named):
        if not arguments and self.decode_step.serves(named):
            return self.decode_step(**named)
        return super().forward(*arguments, **named)

    def generate(self, inputs=None, generation_config=None, *more, **arguments):
        """As transformers': in chunks as the plan has memory for, and in its cache, unless the arguments ask for others."""
        if self.plan is not None:
            self._follow_plan(arguments, inputs, generation_config)
        return super().generate(inputs, generation_config, *more, **arguments)

    def _follow_plan(self, arguments: dict, inputs: torch.Tensor | None, config) -> None:
        """Adds to the arguments of `generate()`."""

        def asked(name: str):
            given = arguments.get(name, getattr(config, name, None))
            return getattr(self.generation_config, name, None) if given is None else given

        if asked("use_cache") is False:
            return
        other_cache = arguments.get("past_key_values") is not None or asked("cache_implementation")
        # One that is handed out must not be overwritten by the next generation; of a window, transformers keeps no more.
        own_cache = not other_cache and not asked("return_dict_in_generate") and self.config.sliding_window is None
        if own_cache:
            self.cache.reset()
            arguments["past_key_values"] = self.cache
        ids, mask = arguments.get("input_ids", inputs), arguments.get("attention_mask")
        if ids is None:
            return
        copies = max(asked("num_beams") or 1, asked("num_return_sequences") or 1)
        usual = mask is not None and mask.dim() == 2 and not any(name in arguments for name in ("inputs_embeds", "position_ids"))
        shared = copies > 1 and own_cache and usual and ids.shape[1] > 1
        at_once = self.plan.prefill_chunk_tokens * self.plan.workload.batch_size
        chunk = asked("prefill_chunk_size") or max(1, at_once // (len(ids) * (1 if shared else copies)))
        if shared:
            self._prefill_once(ids, mask, copies, chunk)
        elif ids.shape[1] > chunk:
            arguments["prefill_chunk_size"] = chunk

    @torch.no_grad()
    def _prefill_once(self, ids: torch.Tensor, mask: torch.Tensor, copies: int, chunk: int) -> None:
        """Takes all but the last token of each prompt [sequences, tokens] into the cache, for so many continuations of each.
        transformers would run the same prompt for every one of them."""
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        for start in range(0, ids.shape[1] - 1, chunk):
            stop = min(start + chunk, ids.shape[1] - 1)
            of_chunk = {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop]}
            self.model(**of_chunk, attention_mask=mask[:, :stop], past_key_values=self.cache, use_cache=True)
        self.cache.copy_sequences(copies)

    @property
    def decode_step(self) -> DecodeStep:
        if self._decode_step is None:
            self._decode_step = DecodeStep(self)
        return self._decode_step

    def _apply(self, *arguments, **named):
        self._decode_step = None  # it may hold on to weights that now move
        return super()._apply(*arguments, **named)

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
        self.make_cache(plan.workload.sequences, plan.workload.max_seq_len)

    def make_cache(self, sequences: int, max_tokens: int) -> None:
        config = self.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = config.num_key_value_heads
        self.cache = KeyValueCache(
            config.num_hidden_layers, sequences, heads, max_tokens, head_dim, dtype=self.dtype, device=self.device
        )

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
