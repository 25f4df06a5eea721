"""Checks whether a model's files can be run.

transformers is imported on demand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fiddler_run.errors import FiddlerError
from fiddler_run.generation.defaults import FILE as GENERATION_CONFIG
from fiddler_run.generation.defaults import GenerationDefaults
from fiddler_run.models.config import ModelConfig
from fiddler_run.plan.shape import ModelShape
from fiddler_run.system.files import exists, is_file
from fiddler_run.weights.model_folder import local_folder, model_config_file, model_folder
from fiddler_run.weights.packed import PackedFormat
from fiddler_run.weights.tensor_files import INDEX, SINGLE_FILE, TensorFiles, other_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fiddler_run.generation.model import PlannedModel
    from fiddler_run.models.sizes import ModelSizes
    from fiddler_run.models.tensor_map import TensorMap

LoadFormat = Literal["safetensors", "dummy"]
ADAPTER = "adapter_config.json"
NOT_HERE = "are missing or incomplete"


class ModelCheck:
    """Checks a model's files against what they are to be run with.

    `problems` prevent the model from running, one per line. `notes` say what could not be checked
    or is worth knowing. What was read is kept for loading, or None: `folder`, `files`, `skeleton`
    (the model without data), its `sizes`, `tensors` (where its parameters are in the files),
    `tokenizer`, `defaults`.
    """

    def __init__(
        self,
        shape: ModelShape,
        origin: str,
        name: str | Path,
        relative_to: Path = Path(),
        load_format: LoadFormat = "safetensors",
        fetch: bool = False,
    ):
        """Runs the checks.

        Args:
            shape: the expected model. `origin` says where it comes from.
            name: the checkpoint's folder, relative to `relative_to`, or its Hugging Face id.
            load_format: with `dummy`, only the model's config.json is checked.
            fetch: download missing files of a model of the Hugging Face hub.
        """
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.folder: Path | None = None
        self.files: TensorFiles | None = None
        self.skeleton: PlannedModel | None = None
        self.sizes: ModelSizes | None = None
        self.tensors: TensorMap | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.defaults: GenerationDefaults | None = None
        self._shape = shape
        self._origin = origin
        self._name = str(name)
        self._relative_to = relative_to
        self._dummy = load_format == "dummy"
        self._fetch = fetch
        self._try(self._look_at_model)

    @property
    def name_anywhere(self) -> str:
        """The model's name, or its folder as an absolute path."""
        folder = local_folder(self._name, self._relative_to)
        return self._name if folder is None else str(folder.resolve())

    def refuse(self) -> None:
        """Fails with the first problem, if there is any.

        Raises:
            FiddlerError: there is a problem.
        """
        refuse(self.problems)

    def _try(self, look: Callable[[], None]) -> None:
        """Runs a check. A file that cannot be read becomes a problem, and the checks go on."""
        try:
            look()
        except FiddlerError as error:
            self.problems.append(str(error))

    def _look_at_model(self) -> None:
        config_file = self._find()
        config = ModelConfig.read(config_file)
        self._try(lambda: self._build_skeleton(config))
        if self._dummy:
            self.defaults = GenerationDefaults.of_config(config.raw, config_file)
            has_tokenizer = any(config_file.parent.glob("tokenizer*"))
        else:
            self._try(self._look_at_weights)
            self._try(lambda: self._look_at_defaults(config))
            has_tokenizer = self.folder is not None
        if has_tokenizer and self.sizes is not None:
            self._try(lambda: self._look_at_tokenizer(config_file.parent, self.sizes.vocab_size))

    def _find(self) -> Path:
        """Finds config.json. Sets `folder` if the weights are present."""
        if self._dummy:
            config_file = model_config_file(self._name, self._relative_to)
            self.folder = config_file.parent
            return config_file
        if self._fetch:
            self.folder = model_folder(self._name, self._relative_to)
            return self.folder / "config.json"
        self.folder = self._weights_at_hand()
        if self.folder is not None:
            return self.folder / "config.json"
        self.notes.append(
            f"the weights of {self._name} {NOT_HERE}: only its config.json was checked"
        )
        return model_config_file(self._name, self._relative_to)

    def _weights_at_hand(self) -> Path | None:
        """The folder of the model's weights. None if they are missing or incomplete."""
        folder = local_folder(self._name, self._relative_to)
        if folder is not None:
            return folder if _holds_weights(folder) or other_weights(folder) else None
        try:
            folder = model_folder(self._name, fetch=False)
            return folder if _holds_weights(folder) and not TensorFiles(folder).missing else None
        except FiddlerError:
            return None

    def _build_skeleton(self, config: ModelConfig) -> None:
        from fiddler_run.generation.model import PlannedModel
        from fiddler_run.models.measured import described

        planned = self._shape
        model, found, sizes = described(config, planned.name, planned.dtype, PlannedModel)
        self.sizes = sizes
        problems = shape_problems(planned, found, self._origin, config.origin)
        self.problems += problems
        if not problems:
            self.skeleton = model

    def _look_at_weights(self) -> None:
        if self.folder is None:
            return
        if exists(self.folder / ADAPTER):
            raise FiddlerError(
                f"{self.folder / ADAPTER}: adapters are not applied; merge the adapter into the"
                " weights, or move the file"
            )
        self.files = TensorFiles(self.folder)
        single = self.folder / SINGLE_FILE
        if is_file(self.folder / INDEX) and is_file(single) and single not in self.files.paths:
            self.notes.append(f"{single}: not read, because {INDEX} names other files")
        self.problems += self._weight_problems(self.files)

    def _weight_problems(self, files: TensorFiles) -> list[str]:
        if self.skeleton is None:
            return files.problems({}, self._shape.dtype)
        from fiddler_run.models.tensor_map import TensorMap

        self.tensors = TensorMap(self.skeleton, files)
        packed = PackedFormat.of(files)
        if packed is None:
            expected = self.tensors.expected()
        else:
            problem = packed.shape_problem(self._shape)
            if problem is not None:
                raise FiddlerError(f"{files.folder}: {problem}")
            expected = self.tensors.expected(dense_only=True)
            expected |= packed.tensors(self._shape, files)
        dense = set(self.tensors.dense_names())
        problems = files.problems(expected, self._shape.dtype, cast=dense)
        if problems:
            return problems
        wider = files.wider(dense, self._shape.dtype)
        if wider:
            self.notes.append(
                f"{files.folder}: {wider} tensors outside the experts are stored in a wider dtype"
                f" than {self._shape.dtype}, and used as transformers uses them"
            )
        problem = self.tensors.conversion_problem(files.shape)
        return [f"{files.folder}: {problem}"] if problem else []

    def _look_at_defaults(self, config: ModelConfig) -> None:
        if self.folder is not None:
            self.defaults = GenerationDefaults.read(self.folder, config.raw)
            if self.defaults.unused:
                self.notes.append(
                    f"{self.folder / GENERATION_CONFIG}: not used:"
                    f" {', '.join(self.defaults.unused)}; flags decide"
                )

    def _look_at_tokenizer(self, folder: Path, vocab_size: int) -> None:
        from fiddler_run.generation.text import SAMPLE, chat_text, load_tokenizer, token_ids

        tokenizer = load_tokenizer(folder)
        try:
            token_ids(tokenizer, SAMPLE, len(SAMPLE), vocab_size)
        except FiddlerError as error:
            raise FiddlerError(
                f"{folder}: the tokenizer does not belong to this model: in a simple text, {error}"
            ) from None
        self.tokenizer = tokenizer
        if len(self.tokenizer) > vocab_size:
            self.notes.append(
                f"{folder}: the tokenizer has {len(self.tokenizer)} tokens, but the model"
                f" {vocab_size}; prompts with the others are refused"
            )
        if self.tokenizer.chat_template is not None:
            try:
                chat_text(self.tokenizer, [{"role": "user", "content": "Hello"}], "--chat")
            except FiddlerError as error:
                self.notes.append(f"{folder}: {error}")


def shape_problems(
    planned: ModelShape, found: ModelShape, origin: str, config_file: str
) -> list[str]:
    """The sizes in which a model differs from the one that a plan was made for."""
    remedy = "make a plan for this model with `fiddler-opt plan --model`"
    return [
        f"{origin}: model.{key} is {getattr(planned, key)}, but {config_file} implies"
        f" {getattr(found, key)}; {remedy}"
        for key in ModelShape.model_fields
        if getattr(planned, key) != getattr(found, key)
    ]


def refuse(problems: list[str]) -> None:
    """Fails with the first problem, if there is any.

    Raises:
        FiddlerError: there is a problem.
    """
    if problems:
        raise FiddlerError(problems[0])


def _holds_weights(folder: Path) -> bool:
    return is_file(folder / INDEX) or is_file(folder / SINGLE_FILE)
