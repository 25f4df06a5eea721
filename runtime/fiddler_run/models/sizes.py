"""ModelSizes: what a model needs besides its experts. Imports no torch."""

from fiddler_run.plan.yaml_file import Bytes, BytesOrZero, Count, CountOrZero, Section


class ModelSizes(Section):
    """The sizes of a model outside its experts.

    `dense_bytes` are all weights outside the experts, in memory. `dense_layer_bytes` of them are in
    each layer with experts, on average, including layers without experts that follow it.
    `kv_bytes_per_token` is the growth of the KV cache by a token, `state_bytes` what it takes for a
    sequence besides. `attended_elements` are the elements of one token's keys and values in one
    layer, expanded to all heads. `score_heads` are the heads whose attention scores a GPU keeps in
    memory at once; 0 if a fused kernel computes attention.
    """

    family: str
    vocab_size: Count
    max_position_embeddings: Count
    tie_word_embeddings: bool
    dense_bytes: Bytes
    dense_layer_bytes: BytesOrZero
    embedding_bytes: Bytes
    kv_bytes_per_token: BytesOrZero
    state_bytes: BytesOrZero
    attended_elements: Count
    score_heads: CountOrZero

    def cache_bytes(self, sequences: int, tokens: int) -> int:
        """Bytes of the KV cache of `sequences` of `tokens`."""
        return sequences * (self.state_bytes + tokens * self.kv_bytes_per_token)
