"""ModelSpec: the sizes of a model that the planner needs."""

from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from fiddler_opt.inputs.model_file import (
    ModelFile,
    ModelProvenance,
    config_sha256,
    short_name,
)
from fiddler_run.encodings.base import Encoding
from fiddler_run.encodings.table import ENCODINGS, encodings_of, plain_encoding
from fiddler_run.errors import FiddlerError
from fiddler_run.models.config import ASSUMED_DTYPE, ModelConfig
from fiddler_run.models.sizes import ModelSizes
from fiddler_run.plan.shape import ModelShape
from fiddler_run.weights.model_folder import model_config_file
from fiddler_run.weights.tensor_files import INDEX, SINGLE_FILE, TensorFiles

# 16 blocks for each rank split an expert to 3%; blocks of 1 MiB are copied at full link speed.
# Small experts do with fewer: all experts that a layer calls are together split to within half a
# block. On a CPU, blocks of 256 neurons are a tenth faster than of 96, but need not exceed 4 MiB
# for that.
FULL_SPEED_WEIGHTS = 2**19  # in 16 bits each
FAST_NEURONS = 256
FAST_WEIGHTS = 2**21
MAX_BLOCKS = 16  # for each rank
MIN_BLOCKS = 4  # smaller experts are toys: no block is too small for them
DEFAULT_MODEL = "mistralai/Mixtral-8x7B-v0.1"


@dataclass(frozen=True)
class ModelSpec:
    """A model's sizes, in elements and bytes.

    `config` is its config.json. `note` states an assumption that was made because the model's files
    leave something open. None if there is none. `chosen_encoding` None: the plain one of its dtype.
    `num_ranks`: the ranks over which the blocks of every expert are divided.
    """

    shape: ModelShape
    sizes: ModelSizes
    config: ModelConfig
    note: str | None = None
    chosen_encoding: str | None = None
    num_ranks: int = 1

    @classmethod
    def load(cls, name: str) -> "ModelSpec":
        """Loads the model in folder `name` or with that Hugging Face id.

        Raises:
            FiddlerError: the model does not exist, or the runtime cannot run it.
        """
        return cls.from_file(model_config_file(name), name)

    @classmethod
    def from_file(cls, config_file: Path, name: str) -> "ModelSpec":
        """The model of a config.json and the weights next to it. Raises as `load`."""
        config = ModelConfig.read(config_file)
        return cls._of(config, name, _stored_dtype(config_file.parent))

    @classmethod
    def from_config(cls, config: dict, name: str, origin: str) -> "ModelSpec":
        """The model of a config.json's content. `origin` names the file in errors."""
        return cls._of(ModelConfig.parse(config, origin), name, None)

    @classmethod
    def _of(cls, config: ModelConfig, name: str, stored_dtype: str | None) -> "ModelSpec":
        found = config.dtype or stored_dtype
        note = None if found else f"{config.origin} names no dtype: {ASSUMED_DTYPE} is assumed"
        dtype = found or ASSUMED_DTYPE
        known = ModelFile.find(name, config, dtype)
        if known is not None:
            shape = known.model.model_copy(update={"name": name})
            return cls(shape, known.sizes, config, note)
        from fiddler_run.models.measured import sizes_of  # imports torch and transformers

        shape, sizes = sizes_of(config, name, dtype)
        return cls(shape, sizes, config, note)

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
        """Neurons of a block: a multiple of 32 and of the encoding's `multiple`.

        The size that pads an expert least, from the least useful one to its double or to a fast
        one. If several do, the largest up to a fast one, else the smallest.
        """
        shape = self.shape
        neurons = shape.intermediate_size
        multiple = max(32, ENCODINGS[self.encoding].multiple)
        of_neuron = shape.expert_elements // neurons  # weights
        full_speed = -(-FULL_SPEED_WEIGHTS // of_neuron)
        most_blocks = MAX_BLOCKS * self.num_ranks
        least = -(-neurons // most_blocks)
        fast = 0
        if neurons >= MIN_BLOCKS * full_speed:
            least = max(least, full_speed)
            called = neurons * shape.num_experts_per_tok
            fast = min(FAST_NEURONS, FAST_WEIGHTS // of_neuron, called // most_blocks)
        least = -(-least // multiple) * multiple
        sizes = range(least, max(2 * least, fast) + 1, multiple)
        return min(sizes, key=lambda size: (-neurons % size, size > fast, abs(size - fast)))

    @property
    def encoding(self) -> str:
        """The encoding of the plan's blocks, a key of ENCODINGS."""
        return self.chosen_encoding or plain_encoding(self.shape.dtype)

    @property
    def encodings(self) -> list[str]:
        """The encodings that can store this model, the plain one first."""
        return encodings_of(self.shape.dtype, self.shape.hidden_size)

    def in_encoding(self, name: str) -> "ModelSpec":
        """The same model, stored in the encoding `name`.

        Raises:
            FiddlerError: the encoding cannot store this model.
        """
        if name not in self.encodings:
            raise FiddlerError(
                f"{name} cannot store the {self.shape.dtype} weights of {self.shape.name} in rows"
                f" of {self.shape.hidden_size}; choose from {', '.join(self.encodings)}"
            )
        return replace(self, chosen_encoding=name)

    def for_ranks(self, count: int) -> "ModelSpec":
        """The same model with blocks for this many ranks: up to MAX_BLOCKS for each, as far as
        blocks stay large enough.
        """
        return replace(self, num_ranks=count)

    @property
    def block_format(self) -> Encoding:
        """The encoding for blocks of this model's sizes."""
        shape = self.shape
        return ENCODINGS[self.encoding](
            shape.hidden_size, self.block_neurons, shape.activation.gated
        )

    @property
    def blocks_per_expert(self) -> int:
        return self.block_format.blocks_per_expert(self.shape.intermediate_size)

    @property
    def block_bytes(self) -> int:
        return self.block_format.block_bytes

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert, stored in blocks."""
        return self.block_format.expert_bytes(self.shape.intermediate_size)

    @property
    def dense_layer_bytes(self) -> int:
        """Bytes of the attention, router and norms of one layer."""
        return self.sizes.dense_layer_bytes

    @property
    def head_bytes(self) -> int:
        """Bytes of all that a step passes once: embedding, output head, layers before the first
        one with experts.
        """
        return self.non_expert_bytes - self.shape.num_layers * self.dense_layer_bytes

    @property
    def embedding_bytes(self) -> int:
        return self.sizes.embedding_bytes

    @property
    def non_expert_bytes(self) -> int:
        return self.sizes.dense_bytes

    @property
    def all_expert_bytes(self) -> int:
        """Bytes of all experts, stored in blocks."""
        return self.shape.num_layers * self.shape.num_experts * self.expert_bytes

    @property
    def short_name(self) -> str:
        return short_name(self.shape.name)


def model_file(model: ModelSpec, command: str) -> ModelFile:
    """The file that holds a model's sizes, made by `command`."""
    made = ModelProvenance(
        command=command,
        created=date.today().isoformat(),
        config_sha256=config_sha256(model.config),
    )
    return ModelFile(version=1, model=model.shape, sizes=model.sizes, provenance=made)


def _stored_dtype(folder: Path) -> str | None:
    """The dtype of the weights in a folder. None if the folder has no weights.

    Raises:
        FiddlerError: the weights are in a format that the runtime cannot run.
    """
    if not (folder / INDEX).is_file() and not (folder / SINGLE_FILE).is_file():
        return None
    files = TensorFiles(folder)
    problem = files.format_problem()
    if problem is not None:
        raise FiddlerError(problem)
    return files.dtype()
