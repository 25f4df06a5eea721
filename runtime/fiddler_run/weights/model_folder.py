"""Finds a model's files by folder or by Hugging Face id. Imports no torch."""

import os
from pathlib import Path

from fiddler_run.errors import FiddlerError
from fiddler_run.models.config import BUNDLED_CONFIGS
from fiddler_run.system.files import exists, is_file, is_folder, reason
from fiddler_run.system.locate import shipped_model
from fiddler_run.weights.tensor_files import INDEX, SINGLE_FILE, shard_names

# The files of a model besides its weights. Other files of a repository, such as a second copy of
# the weights, are not downloaded.
SMALL_FILES = [
    "config.json",
    "generation_config.json",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
]


def is_local_name(name: str) -> bool:
    """True if a model's name in a plan is a folder, which starts with `.` or `/`.

    Otherwise it is a Hugging Face id.
    """
    return name.startswith((".", "/"))


def model_folder(name: str | Path, relative_to: Path = Path(), fetch: bool = True) -> Path:
    """The folder that contains the files of model `name`.

    Args:
        name: a folder, relative to `relative_to`, or a Hugging Face id.
        fetch: download missing files to the Hugging Face cache. If False, the folder may lack
            files.

    Raises:
        FiddlerError: the folder does not exist, and the hub has no such model or is unreachable.
    """
    folder = local_folder(name, relative_to)
    if folder is not None:
        return folder
    folder = _snapshot(str(name), SMALL_FILES, fetch)
    weights = shard_names(folder) if is_file(folder / INDEX) else [SINGLE_FILE]
    return _snapshot(str(name), [*SMALL_FILES, *weights], fetch)


def model_config_file(name: str | Path, relative_to: Path = Path()) -> Path:
    """The config.json of model `name`. Weights are not downloaded.

    Mixtral-8x7B's is included in this package.

    Raises:
        FiddlerError: as `model_folder`.
    """
    if str(name) in BUNDLED_CONFIGS and not is_folder(relative_to / name):
        return BUNDLED_CONFIGS[str(name)]
    folder = local_folder(name, relative_to)
    if folder is not None:
        return folder / "config.json"
    return _snapshot(str(name), ["config.json"], fetch=True) / "config.json"


def name_in_plan(model: str | Path, plan_path: str | Path) -> str:
    """The name of `model` in a plan at `plan_path`.

    Ids stay unchanged. Folders below the working directory become relative, others absolute.
    """
    folder = Path(model)
    if not is_folder(folder):
        return str(model)
    folder = folder.resolve()
    if not folder.is_relative_to(Path.cwd()):
        return str(folder)
    relative = os.path.relpath(folder, Path(plan_path).resolve().parent)
    return relative if relative.startswith(".") else f"./{relative}"


def local_folder(name: str | Path, relative_to: Path) -> Path | None:
    """The folder named `name`, or the model of that name included in the package.

    None if neither exists and `name` may be a Hugging Face id.

    Raises:
        FiddlerError: `name` is a file, or a folder that does not exist.
    """
    folder = relative_to / name
    if is_folder(folder):
        try:
            str(folder).encode()
        except UnicodeEncodeError:
            raise FiddlerError(
                f"{folder}: the folder's name is not UTF-8, so transformers cannot read it;"
                " rename it"
            ) from None
        return folder
    if folder.suffix == ".gguf":
        raise FiddlerError(
            f"{folder}: a GGUF file; --model takes a checkpoint folder in Hugging Face format, with"
            " safetensors"
        )
    if exists(folder):
        raise FiddlerError(
            f"{folder}: a file; --model takes a checkpoint folder in Hugging Face format"
        )
    if is_local_name(str(name)):
        raise FiddlerError(f"{folder}: no such folder; name the checkpoint's folder with --model")
    return shipped_model(name)


def _snapshot(name: str, patterns: list[str], fetch: bool) -> Path:
    """The folder of a Hugging Face model's files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=not fetch))
    except HFValidationError:
        raise FiddlerError(
            f"{name}: neither a folder nor a Hugging Face model id; name the model with --model"
        ) from None
    # the hub's client raises many unrelated types; all mean that the files are unavailable
    except Exception as error:
        raise FiddlerError(
            f"{name}: neither a folder nor available from the Hugging Face hub ({reason(error)});"
            " name a local folder with --model"
        ) from None
