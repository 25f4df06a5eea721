"""Runs one token of each sequence through a model from tapes, with less Python than its forward.

A tape is recorded at the first step with a number of sequences. It must agree with the stock
forward pass; otherwise that runs all steps.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from transformers import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from fiddler_run.engine.cuda_graphs import Capture, Graphs, on_capture_stream
from fiddler_run.generation.cache import CacheState, KeyValueCache, fixed_addresses
from fiddler_run.generation.pieces import Step
from fiddler_run.generation.tape import Tape
from fiddler_run.models.dispatched import DispatchedModel
from fiddler_run.system.files import reason

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
TOLERANCE = 1e-2  # of a replay, relative; other algorithms round differently
WARM_UP_STEPS = 2  # libraries initialise themselves in the first
MAX_TAPES = 4  # recordings take memory, some of it from the driver


class DecodeStep:
    """The decode step of one model."""

    def __init__(self, model: DispatchedModel, make_capture: Callable[[], Capture] | None = None):
        """Prepares a step.

        Args:
            make_capture: how to capture. None: as CUDA graphs or, without a GPU, not at all.
        """
        # A strong reference would form a cycle: 90 GB would wait for the garbage collector.
        self._to_model = weakref.ref(model)
        self._make_capture = make_capture
        if make_capture is None and model.device.type == "cuda":
            self._make_capture = Graphs()
        self._tapes: dict[tuple[int, int, bool], tuple[Tape, list[int]]] = {}
        self._weights = _weights(model)
        # Neither a tape nor a recording would call hooks that were put on these.
        self._hookable = [*model.base_model.modules()]

    def is_current(self, model: nn.Module) -> bool:
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
        cache = arguments.get("past_key_values")
        model = self._to_model()
        return (
            self._make_capture is not None
            and ids is not None
            and ids.shape[1] == 1
            and cache is not None
            # another cache would move recurrent states
            and (isinstance(cache, KeyValueCache) or not fixed_addresses(cache))
            and model._supports_default_dynamic_cache()
            and arguments.get("return_dict") is not False
            and isinstance(arguments.get("logits_to_keep", 0), int)
            and not any(_asked(arguments[name]) for name in arguments.keys() - HANDLED)
            and not any(_asked(getattr(model.config, name, None)) for name in MORE_OUTPUTS)
            and not model.training
            and not any(
                module._forward_hooks or module._forward_pre_hooks for module in self._hookable
            )
            and not (torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks)
        )

    def __call__(
        self,
        input_ids: Tensor,
        past_key_values: Cache,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_,
    ) -> MoeCausalLMOutputWithPast | None:
        """The next token's logits [sequences, 1, vocabulary] for input_ids [sequences, 1].

        The tokens are added to the cache. None, with an unchanged cache, if the step cannot run
        from a tape.
        """
        model = self._to_model()
        cache = past_key_values
        states = model.get_input_embeddings()(input_ids)
        if position_ids is None:
            position_ids = (input_ids.new_zeros(1) + cache.get_seq_length()).unsqueeze(0)
        positions = position_ids.expand(len(input_ids), 1)
        masks = create_masks_for_generate(
            model.config, states, attention_mask, cache, position_ids=position_ids
        )
        if isinstance(masks, Tensor) and masks.dim() != 4:  # the model makes masks of its own
            return None
        step = Step(cache, masks)
        # transformers changes the number of layers to exit early; timed work is recorded apart
        timed = model.session is not None and model.session.is_timed
        key = len(input_ids), model.config.num_hidden_layers, timed
        if key in self._tapes and self._tapes[key][1] != fixed_addresses(cache):
            del self._tapes[key]
        if key not in self._tapes:
            if len(self._tapes) == MAX_TAPES:
                return None
            logits = self._record(model, key, step, Tape(states, positions), attention_mask)
        else:
            tape, _ = self._tapes[key]
            tape.states.copy_(states)
            tape.positions.copy_(positions)
            logits = tape.replay(step)
        if logits is None:
            return None
        return MoeCausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _record(
        self,
        model: DispatchedModel,
        key: tuple[int, int, bool],
        step: Step,
        tape: Tape,
        attention_mask: Tensor | None,
    ) -> Tensor | None:
        """Records a step, and checks it. None, with the cache as before, if it is unusable."""
        before = CacheState(step.cache)
        try:
            with on_capture_stream(model.device):
                expected = _warm_up(model, step.cache, tape, attention_mask, before)
                addresses = fixed_addresses(step.cache)
                try:
                    found = tape.record(model, step, self._make_capture)
                except Exception:  # transformers' models raise many types
                    before.restore()
                    found = tape.record(model, step, self._make_capture, captures_all=False)
                before.restore()
                again = tape.replay(step)
            for logits in (found, again):
                if not (logits - expected).norm() <= TOLERANCE * expected.norm():
                    raise RuntimeError("a replay differs from the forward pass")
        except Exception as error:  # transformers' models raise many types
            before.restore()
            self._make_capture = None
            logging.getLogger("fiddler_run").warning(
                "no CUDA graphs; decode will be slower (%s)", reason(error)
            )
            return None
        self._tapes[key] = tape, addresses
        return again


def _warm_up(
    model: DispatchedModel, cache: Cache, tape: Tape, mask: Tensor | None, before: CacheState
) -> Tensor:
    """The logits of the stock forward pass. Leaves the cache as it was."""
    for _ in range(WARM_UP_STEPS):
        logits = DispatchedModel.forward(
            model,
            inputs_embeds=tape.states,
            position_ids=tape.positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).logits
        before.restore()
    return logits


def _weights(model: nn.Module) -> list[tuple[nn.Module, type, object, list[int]]]:
    """Every module inside a model, its class, what serves it, and the addresses of its weights.

    The model itself is left out: it owns the decode step, so a reference would form a cycle.
    """
    return [
        (
            module,
            type(module),
            getattr(module, "planned", None),
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
