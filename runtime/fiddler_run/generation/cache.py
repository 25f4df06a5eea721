"""The KV cache: allocated once for the plan's context, and reused by every generation.

transformers' default cache copies everything for each token, and needs memory for both copies.
"""

import os

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class KeyValueCache(DynamicCache):
    """A DynamicCache whose keys and values stay in place. Call `reset()` or `keep_prefix()` before
    each generation.

    `tokens` are those of the one sequence that the cache holds, if they are known. Layers that keep
    something else, such as a window or a recurrent state, are transformers' own.
    """

    def __init__(self, config: PreTrainedConfig, sequences: int, max_tokens: int):
        """Has room for `sequences` of `max_tokens`, allocated at the first use.

        Beyond that, the cache grows like DynamicCache.
        """
        super().__init__(config=config)
        self._config = config
        self._sequences = sequences
        self._max_tokens = max_tokens
        self.tokens: list[int] = []
        self.layers = [
            _Layer(sequences, max_tokens) if type(layer) is DynamicLayer else layer
            for layer in self.layers
        ]

    def reset(self, sequences: int | None = None) -> None:
        """Forgets all tokens. Prepares for this many sequences, if they are known."""
        self.tokens = []
        fresh = DynamicCache(config=self._config).layers
        for number, layer in enumerate(self.layers):
            states = _recurrent_states(layer)
            # a recurrent state stays where it is, unless it is of another number of sequences
            if isinstance(layer, _Layer) or (states and len(states[0]) == sequences):
                layer.reset()
            else:
                self.layers[number] = fresh[number]

    def keep_prefix(self, prompt: list[int]) -> int:
        """Keeps the tokens with which a prompt begins. Returns their number.

        At least the prompt's last token is left out, because its logits are needed. A window or a
        recurrent state cannot forget its last tokens: such a cache is kept only as a whole.
        """
        held = self.get_seq_length()
        kept = 0
        if len(self.tokens) == held:
            kept = len(os.path.commonprefix([self.tokens, prompt[:-1]]))
        if kept < held and not self.can_crop:
            kept = 0
        if kept == 0:
            self.reset(1)
        elif kept < held:
            self.crop(kept - held)
        self.tokens = []
        return kept

    @property
    def can_crop(self) -> bool:
        """True if the last tokens can be dropped: there are no windows and no recurrent states."""
        return all(type(layer) is _Layer for layer in self.layers)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replaces each sequence by the one with the given index. All states stay in place."""
        for layer in self.layers:
            before = _recurrent_states(layer)
            layer.reorder_cache(beam_idx)
            for old, new in zip(before, _recurrent_states(layer), strict=True):
                old.copy_(new)
            _set_recurrent_states(layer, before)

    def has_room(self, sequences: int, tokens: int) -> bool:
        """True if the memory holds `sequences` of `tokens`."""
        return sequences <= self._sequences and tokens <= self._max_tokens

    def bytes_for(self, sequences: int, tokens: int) -> int:
        """Bytes of the keys and values of `sequences` of `tokens`, once the cache was used."""
        held = sum(layer.nbytes for layer in self.layers if isinstance(layer, _Layer))
        return held * sequences * tokens // (self._sequences * self._max_tokens)


class CacheState:
    """What a step changes in a cache, so that the cache can return to it."""

    def __init__(self, cache: Cache):
        self._saved = []
        for layer in cache.layers:
            attributes = {name: _copied(value) for name, value in vars(layer).items()}
            states = [(tensor, tensor.clone()) for tensor in _recurrent_states(layer)]
            self._saved.append((layer, attributes, states))

    def restore(self) -> None:
        """Returns the cache to this state."""
        for layer, attributes, states in self._saved:
            vars(layer).clear()
            vars(layer).update({name: _copied(value) for name, value in attributes.items()})
            for tensor, saved in states:
                tensor.copy_(saved)


def fixed_addresses(cache: Cache) -> list[int]:
    """The addresses of the states that steps update in place."""
    return [state.data_ptr() for layer in cache.layers for state in _recurrent_states(layer)]


def _recurrent_states(layer: object) -> list[torch.Tensor]:
    """The states of a layer with linear attention or a convolution. Other layers have none."""
    groups = _state_groups(layer)
    return [state for states in groups for state in states.values() if state is not None]


def _set_recurrent_states(layer: object, found: list[torch.Tensor]) -> None:
    """Puts tensors in the place of the layer's states, in the order of `_recurrent_states`."""
    rest = iter(found)
    for states in _state_groups(layer):
        states.update({key: next(rest) for key, state in states.items() if state is not None})


def _state_groups(layer: object) -> list[dict[int, torch.Tensor | None]]:
    return [getattr(layer, name, {}) for name in ("conv_states", "recurrent_states")]


def _copied(value: object) -> object:
    return value.copy() if isinstance(value, dict | list) else value


class _Layer(DynamicLayer):
    """`keys` and `values` [sequences, heads, tokens so far, head_dim] are views of the memory.

    If that has no room, they are separate tensors.
    """

    def __init__(self, sequences: int, max_tokens: int):
        super().__init__()
        self._room = sequences, max_tokens
        self._memory: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for memory in self._memory)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [sequences, heads, new tokens, head_dim]. Returns all keys and values so far."""
        sequences, _, tokens, _ = key_states.shape
        start = self.get_seq_length()
        if not self._memory:
            self._allocate(key_states, value_states)
        room, stop_at = self._room
        # because there was no room before
        elsewhere = start > 0 and self.keys.data_ptr() != self._memory[0].data_ptr()
        if elsewhere or sequences > room or start + tokens > stop_at:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for memory, new in zip(self._memory, (key_states, value_states), strict=True):
            memory[:sequences, :, start : start + tokens] = new
        self.keys, self.values = (
            memory[:sequences, :, : start + tokens] for memory in self._memory
        )
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replaces each sequence by the one with the given index."""
        for states in (self.keys, self.values):
            states.copy_(states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Replaces each sequence by `repeats` copies of it."""
        if not self.is_initialized:
            return
        states = (
            self.keys.repeat_interleave(repeats, dim=0),
            self.values.repeat_interleave(repeats, dim=0),
        )
        self.reset()
        self.update(*states)

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False

    def _allocate(self, *states: torch.Tensor) -> None:
        # Tensors made in inference mode cannot be written to outside it.
        with torch.inference_mode(False):
            self._memory = [
                torch.empty(
                    (self._room[0], each.shape[1], self._room[1], each.shape[3]),
                    dtype=each.dtype,
                    device=each.device,
                )
                for each in states
            ]
