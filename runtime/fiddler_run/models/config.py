"""ModelConfig: a model's sizes from its config.json. Imports no torch."""

from dataclasses import dataclass

from fiddler_run.errors import FiddlerError
from fiddler_run.plan.shape import DTYPE_BYTES, Dtype, ModelShape

# If neither config.json nor the weights name one; nearly every such checkpoint uses it.
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

    `family` is its `model_type`. `dtype` is None if the file does not name one. `keys` are the
    family's own names for SHAPE_KEYS. `for_transformers` holds the arguments of the transformers
    config class. `raw` holds the file's keys, without nulls.
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
        """The part of the sizes that a plan holds."""
        sizes = {key: getattr(self, key) for key in SHAPE_KEYS}
        return ModelShape(name=name, dtype=dtype, **sizes)

    @property
    def dense_layer_elements(self) -> int:
        """Number of weights in the attention, router and norms of one layer."""
        kv = self.num_key_value_heads * self.head_dim
        attention = 2 * self.hidden_size * (self.num_attention_heads * self.head_dim + kv)
        return attention + self.num_experts * self.hidden_size + 2 * self.hidden_size

    @property
    def embedding_elements(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def head_elements(self) -> int:
        """Number of weights in the embedding table, the final norm and the output head."""
        tables = 1 if self.tie_word_embeddings else 2
        return tables * self.embedding_elements + self.hidden_size

    @property
    def dense_elements(self) -> int:
        """Number of weights outside the experts."""
        return self.num_layers * self.dense_layer_elements + self.head_elements

    @property
    def kv_elements_per_token(self) -> int:
        """Number of elements of one token's keys and values in all layers."""
        return 2 * self.num_layers * self.num_key_value_heads * self.head_dim


def positive(config: dict, key: str, limit: int, origin: str, default: int | None = None) -> int:
    """The whole number from 1 to `limit` in a config.json's `key`.

    Raises:
        FiddlerError: the key holds something else.
    """
    value = config.get(key, default)
    if type(value) is not int or value < 1:
        raise FiddlerError(
            f"{origin}: key {key!r} is {short(value)}, expected a positive whole number"
        )
    if value > limit:
        raise FiddlerError(
            f"{origin}: key {key!r} is {short(value)}, above the limit of {limit}; correct it"
        )
    return value


def dtype_of(config: dict, origin: str) -> Dtype | None:
    """The dtype named by a config.json.

    Raises:
        FiddlerError: the dtype is not supported.
    """
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype is not None and (not isinstance(dtype, str) or dtype not in DTYPE_BYTES):
        known = ", ".join(DTYPE_BYTES)
        raise FiddlerError(
            f"{origin}: dtype {short(dtype)} is not supported; supported are {known}"
        )
    return dtype


def short(value: object) -> str:
    """Formats a value for an error message."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number out of range"
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + " ..."
