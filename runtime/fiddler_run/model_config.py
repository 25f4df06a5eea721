"""config.json of a Mixtral: its keys, transformers' defaults, and what the runtime cannot run. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from fiddler_run.errors import FiddlerError
from fiddler_run.files import read_json_object
from fiddler_run.plan import DTYPE_BYTES, Dtype, ModelShape

SUPPORTED = {"model_type": "mixtral", "hidden_act": "silu"}
# The largest value that is taken for a model's, by key. These keys have no default.
REQUIRED = {
    "num_hidden_layers": 1_000,
    "num_local_experts": 4_096,
    "num_experts_per_tok": 4_096,
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
    "num_attention_heads": 2**16,
    "vocab_size": 2**24,
}
# transformers' defaults, for keys that a config.json may leave out.
DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131_072}
# Keys that go on to transformers. All others are left out: the plan and the flags decide what is done.
PASSED_ON = (
    *SUPPORTED,
    *REQUIRED,
    *DEFAULTS,
    "head_dim",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "sliding_window",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
PLAN_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_experts": "num_local_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
}
ASSUMED_DTYPE = "bfloat16"  # where neither config.json nor the weights say; nearly every checkpoint of such a model is in it
# These compute the frequencies from the length of all that is passed at once, which depends on how a prompt is cut into chunks.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class ModelConfig:
    """A model's sizes, as its config.json gives them. `dtype` is None where it does not say."""

    num_hidden_layers: int
    num_local_experts: int
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
    raw: dict

    @classmethod
    def read(cls, path: Path) -> "ModelConfig":
        """The model of a config.json.

        Raises:
            FiddlerError: the file cannot be read, or describes no model that the runtime can run.
        """
        return cls.parse(read_json_object(path, "--model names a checkpoint folder in Hugging Face format"), str(path))

    @classmethod
    def parse(cls, config: dict, origin: str) -> "ModelConfig":
        """The same for the content of a config.json that came from `origin`."""
        _refuse_other_models(config, origin)
        config = {key: value for key, value in config.items() if value is not None or key == "num_key_value_heads"}
        sizes = {key: _count(config, key, largest, origin) for key, largest in REQUIRED.items()}
        heads = sizes["num_attention_heads"]
        kv_heads = _count(config, "num_key_value_heads", heads, origin)
        if sizes["num_experts_per_tok"] > sizes["num_local_experts"]:
            raise FiddlerError(f"{origin}: num_experts_per_tok is more than num_local_experts; correct it")
        if heads % kv_heads:
            raise FiddlerError(f"{origin}: {heads} attention heads cannot share {kv_heads} num_key_value_heads; correct it")
        head_dim = _count(config, "head_dim", 2**16, origin) if "head_dim" in config else sizes["hidden_size"] // heads
        if head_dim < 2 or head_dim % 2:
            raise FiddlerError(f"{origin}: head_dim is {head_dim}, expected an even number; correct it")
        window = _count(config, "sliding_window", 2**31 - 1, origin) if "sliding_window" in config else None
        tied = config.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise FiddlerError(f"{origin}: key 'tie_word_embeddings' is {tied!r}, expected true or false")
        return cls(
            **sizes,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=_count(config, "max_position_embeddings", 2**31 - 1, origin),
            sliding_window=window,
            tie_word_embeddings=tied,
            dtype=_dtype(config, origin),
            raw=config,
        )

    def shape(self, name: str, dtype: Dtype) -> ModelShape:
        """The part of it that a plan holds."""
        sizes = {ours: getattr(self, theirs) for ours, theirs in PLAN_KEYS.items()}
        return ModelShape(name=name, dtype=dtype, **sizes)

    def for_transformers(self) -> dict:
        """The keys of config.json that decide what the model computes."""
        return {key: self.raw[key] for key in PASSED_ON if key in self.raw}

    @property
    def dense_layer_elements(self) -> int:
        """Weights of attention, router and norms of one layer."""
        kv = self.num_key_value_heads * self.head_dim
        attention = 2 * self.hidden_size * (self.num_attention_heads * self.head_dim + kv)
        return attention + self.num_local_experts * self.hidden_size + 2 * self.hidden_size

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
        return self.num_hidden_layers * self.dense_layer_elements + self.head_elements

    @property
    def kv_elements_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


def _refuse_other_models(config: dict, origin: str) -> None:
    defaults = {"hidden_act": "silu"}
    for key, supported in SUPPORTED.items():
        if config.get(key, defaults.get(key)) != supported:
            raise FiddlerError(f"{origin}: {key} is {_short(config.get(key))}; only {supported!r} is supported")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise FiddlerError(
            f"{origin}: quantization_config says that the weights are quantised ({_short(method)}); name the original, unquantised "
            "checkpoint (or, if these weights are not quantised, remove quantization_config)"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = (rope.get("rope_type") or rope.get("type")) if isinstance(rope, dict) else None
    if rope_type in LENGTH_DEPENDENT_ROPE:
        raise FiddlerError(
            f"{origin}: rope_type {rope_type!r} depends on the length of a whole prompt, which runs in chunks; it is not supported"
        )


def _count(config: dict, key: str, largest: int, origin: str) -> int:
    value = config.get(key, DEFAULTS.get(key))
    if type(value) is not int or value < 1:
        raise FiddlerError(f"{origin}: key {key!r} is {_short(value)}, expected a positive whole number")
    if value > largest:
        raise FiddlerError(f"{origin}: key {key!r} is {_short(value)}, more than any model's {largest}; correct it")
    return value


def _dtype(config: dict, origin: str) -> Dtype | None:
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype is not None and (not isinstance(dtype, str) or dtype not in DTYPE_BYTES):
        raise FiddlerError(f"{origin}: dtype {_short(dtype)} is not supported; known are {', '.join(DTYPE_BYTES)}")
    return dtype


def _short(value: object) -> str:
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number beyond reason"
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + " ..."
