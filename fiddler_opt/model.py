"""ModelSpec: what the planner knows of a model."""

from dataclasses import dataclass
from pathlib import Path

from fiddler_run.errors import FiddlerError
from fiddler_run.locate import model_config_file
from fiddler_run.model_config import ASSUMED_DTYPE, ModelConfig
from fiddler_run.plan import DTYPE_BYTES, ModelShape
from fiddler_run.tensor_files import INDEX, SINGLE_FILE, TensorFiles

BLOCKS_PER_EXPERT = 16  # fine enough to split an expert to 3 % of a call, coarse enough to copy at the link's full speed
DEFAULT_MODEL = "mistralai/Mixtral-8x7B-v0.1"


@dataclass(frozen=True)
class ModelSpec:
    """Geometry of a Mixtral-style model.

    `note`: what was assumed of it because its files do not say; None if they say everything.
    """

    shape: ModelShape
    sizes: ModelConfig
    note: str | None = None

    @classmethod
    def load(cls, name: str) -> "ModelSpec":
        """The model in folder `name`, or of that Hugging Face id.

        Raises:
            FiddlerError: there is no such model, or the runtime could not run it.
        """
        return cls.from_file(model_config_file(name), name)

    @classmethod
    def from_file(cls, config_file: Path, name: str) -> "ModelSpec":
        """The model of a config.json and the weights beside it, under a name. Raises as `load`."""
        config = ModelConfig.read(config_file)
        return cls._of(config, name, _stored_dtype(config_file.parent), str(config_file))

    @classmethod
    def from_config(cls, config: dict, name: str, origin: str) -> "ModelSpec":
        """The model of a config.json's content, which came from `origin`."""
        return cls._of(ModelConfig.parse(config, origin), name, None, origin)

    @classmethod
    def _of(cls, config: ModelConfig, name: str, stored_dtype: str | None, origin: str) -> "ModelSpec":
        dtype = config.dtype or stored_dtype
        note = None if dtype else f"{origin} names no dtype: {ASSUMED_DTYPE} is assumed"
        return cls(config.shape(name, dtype or ASSUMED_DTYPE), config, note)

    @property
    def config(self) -> dict:
        """The keys of config.json from which transformers builds a model of this shape."""
        return self.sizes.for_transformers()

    @property
    def vocab_size(self) -> int:
        return self.sizes.vocab_size

    @property
    def max_position_embeddings(self) -> int:
        return self.sizes.max_position_embeddings

    @property
    def tie_word_embeddings(self) -> bool:
        return self.sizes.tie_word_embeddings

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
        return self.sizes.dense_layer_elements * self._weight_bytes

    @property
    def head_bytes(self) -> int:
        """Embedding table, final norm and output head."""
        return self.sizes.head_elements * self._weight_bytes

    @property
    def embedding_bytes(self) -> int:
        return self.sizes.embedding_elements * self._weight_bytes

    @property
    def non_expert_bytes(self) -> int:
        return self.sizes.dense_elements * self._weight_bytes

    @property
    def all_expert_bytes(self) -> int:
        """All experts as stored, in blocks."""
        return self.shape.num_layers * self.shape.num_experts * self.expert_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return self.sizes.kv_elements_per_token * self._weight_bytes

    @property
    def short_name(self) -> str:
        return Path(self.shape.name).name or "model"

    @property
    def _weight_bytes(self) -> int:
        return DTYPE_BYTES[self.shape.dtype]


def _stored_dtype(folder: Path) -> str | None:
    """The dtype of the weights in a folder; None if there are none.

    Raises:
        FiddlerError: they are in a format that the runtime cannot run.
    """
    if not (folder / INDEX).is_file() and not (folder / SINGLE_FILE).is_file():
        return None
    files = TensorFiles(folder)
    problem = files.format_problem()
    if problem is not None:
        raise FiddlerError(problem)
    return files.dtype()
