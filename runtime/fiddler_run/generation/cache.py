"""The KV cache: allocated once for the plan's context, and reused by every generation.

transformers' default cache copies everything for each token, and needs memory for both copies.
"""

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class KeyValueCache(DynamicCache):
    """A DynamicCache whose keys and values stay in place. Call `reset()` before each generation.

    Layers that keep something else, such as a window or a recurrent state, are transformers' own.
    """

    def __init__(self, config: PreTrainedConfig, sequences: int, max_tokens: int):
        """Has room for `sequences` of `max_tokens`, allocated at the first use.

        Beyond that, the cache grows like DynamicCache.
        """
        super().__init__(config=config)
        self._config = config
        self._sequences = sequences
        self._max_tokens = max_tokens
        self.layers = [
            _Layer(sequences, max_tokens) if type(layer) is DynamicLayer else layer
            for layer in self.layers
        ]

    def reset(self) -> None:
        fresh = DynamicCache(config=self._config).layers
        for number, layer in enumerate(self.layers):
            if isinstance(layer, _Layer):
                layer.reset()
            else:  # its state may be of another number of sequences
                self.layers[number] = fresh[number]

    def has_room(self, sequences: int, tokens: int) -> bool:
        """True if the memory holds `sequences` of `tokens`."""
        return sequences <= self._sequences and tokens <= self._max_tokens

    def bytes_for(self, sequences: int, tokens: int) -> int:
        """Bytes of the keys and values of `sequences` of `tokens`, once the cache was used."""
        held = sum(layer.nbytes for layer in self.layers if isinstance(layer, _Layer))
        return held * sequences * tokens // (self._sequences * self._max_tokens)

    def copy_sequences(self, copies: int) -> None:
        """Replaces each sequence by `copies` copies of it."""
        self.batch_repeat_interleave(copies)


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
