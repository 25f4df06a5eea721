"""The KV cache: memory for the plan's context, taken once, at the first token, and used by every generation.

transformers' own default grows by copying everything at each token, and needs room for both copies meanwhile.
"""

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer


class KeyValueCache(DynamicCache):
    """A DynamicCache whose layers stay where they are: they hand out views. `reset()` it before each generation."""

    def __init__(self, num_layers: int, max_tokens: int):
        """
        Args:
            num_layers: of the model.
            max_tokens: that a sequence can have.
        """
        Cache.__init__(self, layers=[_Layer(max_tokens) for _ in range(num_layers)])


class _Layer(DynamicLayer):
    """`keys` and `values` [sequences, heads, tokens so far, head_dim] are views of the memory."""

    def __init__(self, max_tokens: int):
        super().__init__()
        self._max_tokens = max_tokens
        self._memory: tuple[torch.Tensor, ...] = ()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        sequences, heads, _, head_dim = key_states.shape
        if not self._memory or len(self._memory[0]) < sequences:
            self._memory = ()  # before there are two
            with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside of it
                self._memory = tuple(
                    states.new_empty((sequences, heads, self._max_tokens, head_dim)) for states in (key_states, value_states)
                )
        self.keys, self.values = (memory[:sequences, :, :0] for memory in self._memory)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [sequences, heads, new tokens, head_dim]; all that there is so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        sequences, start = len(key_states), self.keys.shape[-2]
        stop = start + key_states.shape[-2]
        assert stop <= self._max_tokens, f"{stop} tokens in a cache for {self._max_tokens}: `check_length` lets none pass"
        for memory, new in zip(self._memory, (key_states, value_states), strict=True):
            memory[:sequences, :, start:stop] = new
        self.keys, self.values = (memory[:sequences, :, :stop] for memory in self._memory)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Gives each sequence what the sequence of that index has."""
        for states in (self.keys, self.values):
            states.copy_(states.index_select(0, beam_idx.to(states.device)))

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError("its sequences are fixed; use transformers' own cache")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise NotImplementedError("its sequences are fixed; use transformers' own cache")
