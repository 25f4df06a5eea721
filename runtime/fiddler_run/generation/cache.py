"""The KV cache: memory for the plan's context, taken once and used by every generation.

transformers' own default grows by copying everything at each token, and needs room for both copies
meanwhile.
"""

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer


class KeyValueCache(DynamicCache):
    """A DynamicCache whose keys and values stay where they are. `reset()` it before each
    generation.
    """

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
        """There is room for so many `sequences` of `max_tokens`; more are kept as transformers
        does.
        """
        # One tensor: of many, PyTorch's allocator would leave gaps between. In inference mode it
        # could not be written to outside.
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
        """True if its memory holds so many sequences of so many tokens."""
        return sequences <= self._sequences and tokens <= self._max_tokens

    def bytes_for(self, sequences: int, tokens: int) -> int:
        """What the keys and values of so many sequences of so many tokens take."""
        return sequences * tokens * self._token_bytes

    def copy_sequences(self, copies: int) -> None:
        """Puts so many copies of each sequence in its place."""
        for layer in self.layers:
            states = (
                layer.keys.repeat_interleave(copies, dim=0),
                layer.values.repeat_interleave(copies, dim=0),
            )
            layer.reset()
            layer.update(*states)


class _Layer(DynamicLayer):
    """`keys` and `values` [sequences, heads, tokens so far, head_dim] are views of the memory, as
    long as that has room.
    """

    def __init__(self, *memory: torch.Tensor):
        super().__init__()
        self._memory = memory

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [sequences, heads, new tokens, head_dim]; all that there is so far."""
        sequences, _, tokens, _ = key_states.shape
        start = self.get_seq_length()
        room, _, stop_at, _ = self._memory[0].shape
        # since there was no room for some
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
        """Gives each sequence what the sequence of that index has."""
        for states in (self.keys, self.values):
            states.copy_(states.index_select(0, beam_idx.to(states.device)))

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
