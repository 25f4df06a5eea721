"""The KV cache: allocated once for the plan's context, and reused by every generation.

transformers' default cache copies everything for each token, and needs memory for both copies.
"""

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer


class KeyValueCache(DynamicCache):
    """A DynamicCache whose keys and values stay in place. Call `reset()` before each generation."""

    def __init__(
        self,
        num_layers: int,
        sequences: int,
        num_heads: int,
        max_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """Allocates room for `sequences` of `max_tokens`. Beyond that, the cache grows like
        DynamicCache.
        """
        # One tensor, because PyTorch's allocator would leave gaps between many. Made outside
        # inference mode, because it could otherwise not be written to outside of it.
        with torch.inference_mode(False):
            memory = torch.empty(
                (num_layers, 2, sequences, num_heads, max_tokens, head_dim),
                dtype=dtype,
                device=device,
            )
        self._sequences = sequences
        self._max_tokens = max_tokens
        self._token_bytes = 2 * num_layers * num_heads * head_dim * dtype.itemsize
        Cache.__init__(self, layers=[_Layer(*of_layer) for of_layer in memory])

    def has_room(self, sequences: int, tokens: int) -> bool:
        """True if the memory holds `sequences` of `tokens`."""
        return sequences <= self._sequences and tokens <= self._max_tokens

    def bytes_for(self, sequences: int, tokens: int) -> int:
        """Bytes of the keys and values of `sequences` of `tokens`."""
        return sequences * tokens * self._token_bytes

    def copy_sequences(self, copies: int) -> None:
        """Replaces each sequence by `copies` copies of it."""
        for layer in self.layers:
            states = (
                layer.keys.repeat_interleave(copies, dim=0),
                layer.values.repeat_interleave(copies, dim=0),
            )
            layer.reset()
            layer.update(*states)


class _Layer(DynamicLayer):
    """`keys` and `values` [sequences, heads, tokens so far, head_dim] are views of the memory.

    If that has no room, they are separate tensors.
    """

    def __init__(self, *memory: torch.Tensor):
        super().__init__()
        self._memory = memory

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [sequences, heads, new tokens, head_dim]. Returns all keys and values so far."""
        sequences, _, tokens, _ = key_states.shape
        start = self.get_seq_length()
        room, _, stop_at, _ = self._memory[0].shape
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

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
