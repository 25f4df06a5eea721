"""ModelSpec: what the planner knows of a model. Rule: the only place in the planner that knows Hugging Face's key names."""

from dataclasses import dataclass
from pathlib import Path

from fiddler_run.errors import FiddlerError
from fiddler_run.locate import model_config_file, read_json, require_mixtral
from fiddler_run.plan import DTYPE_BYTES, ModelShape

BLOCKS_PER_EXPERT = 16  # fine enough to split an expert to 3 % of a call, coarse enough to copy at the link's full speed
DEFAULT_MODEL = "mistralai/Mixtral-8x7B-v0.1"


@dataclass(frozen=True)
class ModelSpec:
    """Geometry of a Mixtral-style model. `config` is its config.json, for building a model of this shape."""

    shape: ModelShape
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    config: dict

    @classmethod
    def load(cls, name: str) -> "ModelSpec":
        """The model in folder `name`, or of that Hugging Face id.

        Raises:
            FiddlerError: no such model, or not a Mixtral.
        """
        config_file = model_config_file(name)
        return cls.from_config(read_json(config_file), name, str(config_file))

    @classmethod
    def from_config(cls, config: dict, name: str, origin: str) -> "ModelSpec":
        require_mixtral(config, origin)
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        if dtype not in DTYPE_BYTES:
            raise FiddlerError(f"{origin}: dtype {dtype!r} is not supported; known are {', '.join(DTYPE_BYTES)}")

        def count(key: str, default: int | None = None) -> int:
            value = config.get(key) or default
            if type(value) is not int or value < 1:
                raise FiddlerError(f"{origin}: key {key!r} is {config.get(key)!r}, expected a positive whole number")
            return value

        heads = count("num_attention_heads")
        shape = ModelShape(
            name=name,
            num_layers=count("num_hidden_layers"),
            num_experts=count("num_local_experts"),
            num_experts_per_tok=count("num_experts_per_tok"),
            hidden_size=count("hidden_size"),
            intermediate_size=count("intermediate_size"),
            dtype=dtype,
        )
        return cls(
            shape=shape,
            num_attention_heads=heads,
            num_key_value_heads=count("num_key_value_heads", heads),
            head_dim=count("head_dim", shape.hidden_size // heads),
            vocab_size=count("vocab_size"),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=count("max_position_embeddings", 32768),
            config=config,
        )

    @property
    def block_neurons(self) -> int:
        """Neurons of a block: an expert in about BLOCKS_PER_EXPERT blocks of a multiple of 32 neurons."""
        return max(32, -(-self.shape.intermediate_size // BLOCKS_PER_EXPERT // 32) * 32)

    @property
    def block_elements(self) -> int:
        """Weights of a block: gate rows, up rows and down columns of its neurons."""
        return 3 * self.block_neurons * self.shape.hidden_size

    @property
    def block_bytes(self) -> int:
        return self.shape.block_bytes(self.block_neurons)

    @property
    def expert_bytes(self) -> int:
        """One expert as stored, in blocks."""
        return self.shape.expert_bytes(self.block_neurons)

    @property
    def dense_layer_bytes(self) -> int:
        """Attention, router and norms of one layer."""
        hidden, kv = self.shape.hidden_size, self.num_key_value_heads * self.head_dim
        attention = 2 * hidden * self.num_attention_heads * self.head_dim + 2 * hidden * kv
        return (attention + self.shape.num_experts * hidden + 2 * hidden) * DTYPE_BYTES[self.shape.dtype]

    @property
    def head_bytes(self) -> int:
        """Embedding table, final norm and output head."""
        tables = 1 if self.tie_word_embeddings else 2
        return (tables * self.vocab_size * self.shape.hidden_size + self.shape.hidden_size) * DTYPE_BYTES[self.shape.dtype]

    @property
    def embedding_bytes(self) -> int:
        return self.vocab_size * self.shape.hidden_size * DTYPE_BYTES[self.shape.dtype]

    @property
    def non_expert_bytes(self) -> int:
        return self.shape.num_layers * self.dense_layer_bytes + self.head_bytes

    @property
    def all_expert_bytes(self) -> int:
        """All experts as stored, in blocks."""
        return self.shape.num_layers * self.shape.num_experts * self.expert_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.shape.num_layers * self.num_key_value_heads * self.head_dim * DTYPE_BYTES[self.shape.dtype]

    @property
    def short_name(self) -> str:
        return Path(self.shape.name).name or "model"
