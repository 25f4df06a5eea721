"""A model's sizes, as its config.json gives them. Imports no torch."""

from dataclasses import dataclass

from fiddler_run.errors import FiddlerError
from fiddler_run.plan.shape import DTYPE_BYTES, Dtype, ModelShape

# Where neither config.json nor the weights say; nearly every such checkpoint is in it.
ASSUMED_DTYPE = "bfloat16"
SHAPE_KEYS = (
    "num_layers",
    "num_experts",
    "num_experts_per_tok",
    "hidden_size",
    "intermediate_size",
)


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a model of any family.

    `family` is its `model_type`. `dtype` is None where the file does not say. `keys`: the family's
    own names of SHAPE_KEYS. `for_transformers`: what its class in transformers is
    made from. `raw`: the file's keys, without nulls.
    """

    family: str
    num_layers: int
    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    sliding_window: int | None
    tie_word_embeddings: bool
    dtype: Dtype | None
    keys: dict[str, str]
    for_transformers: dict
    raw: dict

    def shape(self, name: str, dtype: Dtype) -> ModelShape:
        """The part of it that a plan holds."""
        sizes = {key: getattr(self, key) for key in SHAPE_KEYS}
        return ModelShape(name=name, dtype=dtype, **sizes)

    @property
    def dense_layer_elements(self) -> int:
        """Weights of attention, router and norms of one layer."""
        kv = self.num_key_value_heads * self.head_dim
        attention = 2 * self.hidden_size * (self.num_attention_heads * self.head_dim + kv)
        return attention + self.num_experts * self.hidden_size + 2 * self.hidden_size

    @property
    def embedding_elements(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def head_elements(self) -> int:
        """Weights of the embedding table, the final norm and the output head."""
        tables = 1 if self.tie_word_embeddings else 2
        return tables * self.embedding_elements + self.hidden_size

    @property
    def dense_elements(self) -> int:
        """All weights that belong to no expert."""
        return self.num_layers * self.dense_layer_elements + self.head_elements

    @property
    def kv_elements_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_key_value_heads * self.head_dim


def positive(config: dict, key: str, limit: int, origin: str, default: int | None = None) -> int:
    """The whole number from 1 to `limit` that a config.json holds for `key`.

    Raises:
        FiddlerError: it holds something else.
    """
    value = config.get(key, default)
    if type(value) is not int or value < 1:
        raise FiddlerError(
            f"{origin}: key {key!r} is {short(value)}, expected a positive whole number"
        )
    if value > limit:
        raise FiddlerError(
            f"{origin}: key {key!r} is {short(value)}, more than any model's {limit}; correct it"
        )
    return value


def dtype_of(config: dict, origin: str) -> Dtype | None:
    """The dtype that a config.json names.

    Raises:
        FiddlerError: it is not supported.
    """
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype is not None and (not isinstance(dtype, str) or dtype not in DTYPE_BYTES):
        known = ", ".join(DTYPE_BYTES)
        raise FiddlerError(f"{origin}: dtype {short(dtype)} is not supported; known are {known}")
    return dtype


def short(value: object) -> str:
    """A value as an error shows it."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number beyond reason"
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + " ..."
