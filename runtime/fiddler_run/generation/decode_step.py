"""Runs one token of each sequence through a model, with less Python than the stock forward.

The step is split at what cannot be captured: attention over a growing cache, and the experts.
Between them are segments of transformers' own modules. On a GPU, each is recorded once as a CUDA
graph and then replayed:

    [norm, q k v, rotary]  attention  [o, norm, router]  experts  ...  norm, output head
"""

from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fiddler_run.generation.cuda_graphs import Recorder
from fiddler_run.models.mixtral_layer import segments_of, sum_parts

HANDLED = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "return_dict",
}
MORE_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")


class DecodeStep:
    """The decode step of one model."""

    def __init__(self, model: PreTrainedModel):
        self._model = model.base_model
        self._head = model.get_output_embeddings()
        self._config = model.config
        self._weights = _weights(model)
        recorder = Recorder(model.device)
        layers = self._model.layers
        # A layer of an unknown class is run by transformers' own forward.
        segments = [segments_of(layer) for layer in layers]
        self._is_stock = None not in segments
        if not self._is_stock:
            return
        self._layers = [
            each._replace(before=recorder.segment(each.before), after=recorder.segment(each.after))
            for each in segments
        ]
        fixed = self._model.rotary_emb.rope_type == "default"  # others depend on the positions
        self._rotary = recorder.segment(self._model.rotary_emb) if fixed else self._model.rotary_emb
        # Neither the step nor a recording would call hooks that were put on these.
        self._hookable = [self._model, *(part for layer in layers for part in layer.modules())]

    def is_current(self, model: PreTrainedModel) -> bool:
        """False if a module or parameter of the model was replaced or moved since the step was
        made.

        Checks every module: 0.05 ms a layer, once per generation.
        """
        now = _weights(model)
        return len(now) == len(self._weights) and all(
            old[0] is new[0] and old[1:] == new[1:]
            for old, new in zip(self._weights, now, strict=True)
        )

    def serves(self, arguments: dict) -> bool:
        """True if these arguments of `forward` ask for a decode step and for its logits alone."""
        ids = arguments.get("input_ids")
        return (
            self._is_stock
            and ids is not None
            and ids.shape[1] == 1
            and arguments.get("past_key_values") is not None
            and arguments.get("return_dict") is not False
            and isinstance(arguments.get("logits_to_keep", 0), int)
            and not any(_asked(arguments[name]) for name in arguments.keys() - HANDLED)
            and not any(_asked(getattr(self._config, name, None)) for name in MORE_OUTPUTS)
            and not self._model.training
            and not any(
                module._forward_hooks or module._forward_pre_hooks for module in self._hookable
            )
            and not (torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks)
        )

    def __call__(
        self,
        input_ids: Tensor,
        past_key_values,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_,
    ) -> MoeCausalLMOutputWithPast:
        """The next token's logits [sequences, 1, vocabulary] for input_ids [sequences, 1].

        The tokens are added to the cache.
        """
        config = self._config
        cache = past_key_values
        states = self._model.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = (input_ids.new_zeros(1) + cache.get_seq_length()).unsqueeze(0)
        make_mask = (
            create_causal_mask
            if config.sliding_window is None
            else create_sliding_window_causal_mask
        )
        mask = make_mask(
            config=config,
            inputs_embeds=states,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )
        rotary = self._rotary(states, position_ids)
        parts = (states,)  # addends of the residual stream
        for layer in self._layers[: config.num_hidden_layers]:  # fewer if transformers exits early
            attention = layer.attention
            residual, query, key, value = layer.before(*rotary, *parts)
            key, value = cache.update(key, value, attention.layer_idx)
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(
                config._attn_implementation, layer.eager_attention
            )
            attended, _ = attend(
                attention,
                query,
                key,
                value,
                mask,
                scaling=attention.scaling,
                sliding_window=config.sliding_window,
            )
            residual, normed, index, weights = layer.after(residual, attended)
            parts = (residual, layer.experts(normed, index, weights))
        # Not recorded: a caller may keep its logits, which the next replay would overwrite.
        return MoeCausalLMOutputWithPast(
            logits=self._head(self._model.norm(sum_parts(parts))), past_key_values=cache
        )


def _weights(model: nn.Module) -> list[tuple[nn.Module, type, list[int]]]:
    """Every module inside a model, its class, and the addresses of its parameters and buffers.

    The model itself is left out: it owns the decode step, so a reference would form a cycle.
    """
    return [
        (
            module,
            type(module),
            [
                tensor.data_ptr()
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
            ],
        )
        for module in model.modules()
        if module is not model
    ]


def _asked(value: object) -> bool:
    return value is not None and value is not False
