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
from fiddler_run.models.config import SHAPE_KEYS, ModelConfig
from fiddler_run.models.table import FAMILIES, read_config
from fiddler_run.plan.shape import ModelShape
from fiddler_run.system.files import exists, is_file
from fiddler_run.weights.model_folder import local_folder, model_config_file, model_folder
from fiddler_run.weights.packed import expert_tensors
from fiddler_run.weights.tensor_files import INDEX, SINGLE_FILE, TensorFiles, other_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fiddler_run.generation.model import PlannedModel

LoadFormat = Literal["safetensors", "dummy"]
ADAPTER = "adapter_config.json"
NOT_HERE = "are missing or incomplete"


class ModelCheck:
    """Checks a model's files against what they are to be run with.

    `problems` prevent the model from running, one per line. `notes` say what could not be checked
    or is worth knowing. What was read is kept for loading, or None: `folder`, `files`, `skeleton`
    (the model without data), `tokenizer`, `defaults`.
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
        self.config: ModelConfig | None = None
        self.skeleton: PlannedModel | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.defaults: GenerationDefaults | None = None
        self._shape = shape
        self._origin = origin
        self._name = str(name)
        self._relative_to = relative_to
        self._dummy = load_format == "dummy"
        self._fetch = fetch
        self._try(self._look_at_model)

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
        config = read_config(config_file)
        self.problems += shape_problems(self._shape, config, self._origin, config_file)
        if not self.problems:
            self.config = config
            self._try(lambda: self._build_skeleton(config, config_file))
        if self._dummy:
            self.defaults = GenerationDefaults.of_config(config.raw, config_file)
            has_tokenizer = any(config_file.parent.glob("tokenizer*"))
        else:
            self._try(self._look_at_weights)
            self._try(lambda: self._look_at_defaults(config))
            has_tokenizer = self.folder is not None
        # the tokenizer's class depends on the config
        if has_tokenizer and (self.config is None or self.skeleton is not None):
            self._try(lambda: self._look_at_tokenizer(config_file.parent, config))

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

    def _build_skeleton(self, config: ModelConfig, config_file: Path) -> None:
        from fiddler_run.generation.model import skeleton

        self.skeleton = skeleton(config, config_file)

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
        expected = {}
        if self.skeleton is not None:
            from fiddler_run.generation.model import dense_tensors

            expected = {
                **expert_tensors(self.files, FAMILIES[self.config.family], self._shape),
                **dense_tensors(self.skeleton),
            }
        self.problems += self.files.problems(expected, self._shape.dtype)

    def _look_at_defaults(self, config: ModelConfig) -> None:
        if self.folder is not None:
            self.defaults = GenerationDefaults.read(self.folder, config.raw)
            if self.defaults.unused:
                self.notes.append(
                    f"{self.folder / GENERATION_CONFIG}: not used:"
                    f" {', '.join(self.defaults.unused)}; flags decide"
                )

    def _look_at_tokenizer(self, folder: Path, config: ModelConfig) -> None:
        from fiddler_run.generation.text import SAMPLE, chat_text, load_tokenizer, token_ids

        tokenizer = load_tokenizer(folder)
        try:
            token_ids(tokenizer, SAMPLE, len(SAMPLE), config.vocab_size)
        except FiddlerError as error:
            raise FiddlerError(
                f"{folder}: the tokenizer does not belong to this model: in a simple text, {error}"
            ) from None
        self.tokenizer = tokenizer
        if len(self.tokenizer) > config.vocab_size:
            self.notes.append(
                f"{folder}: the tokenizer has {len(self.tokenizer)} tokens, but the model"
                f" {config.vocab_size}; prompts with the others are refused"
            )
        if self.tokenizer.chat_template is not None:
            try:
                chat_text(self.tokenizer, [{"role": "user", "content": "Hello"}], "--chat")
            except FiddlerError as error:
                self.notes.append(f"{folder}: {error}")


def shape_problems(
    shape: ModelShape, config: ModelConfig, origin: str, config_file: Path
) -> list[str]:
    """The sizes in which a model differs from the one that a plan was made for."""
    remedy = "make a plan for this model with `fiddler-opt plan --model`"
    return [
        f"{origin}: model.{key} is {getattr(shape, key)}, but {config.keys[key]} is"
        f" {getattr(config, key)} in {config_file}; {remedy}"
        for key in SHAPE_KEYS
        if getattr(shape, key) != getattr(config, key)
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
