"""Finds a model's files by folder or by Hugging Face id. Imports no torch."""

import os
from pathlib import Path

from fiddler_run.errors import FiddlerError
from fiddler_run.models.table import BUNDLED_CONFIGS
from fiddler_run.system.files import exists, is_file, is_folder, reason
from fiddler_run.weights.tensor_files import INDEX, SINGLE_FILE, shard_names

# What a model needs besides its weights. Other files of a repository, such as a second copy of all
# weights, are not fetched.
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
    """True if a model's name in a plan is a folder (it begins with `.` or `/`) rather than a
    Hugging Face id.
    """
    return name.startswith((".", "/"))


def model_folder(name: str | Path, relative_to: Path = Path(), fetch: bool = True) -> Path:
    """The folder of all files of model `name`: a folder (relative to `relative_to`), or the cache
    of a Hugging Face id.

    Args:
        fetch: download what is not in the cache yet; otherwise files may be missing from the
            folder.

    Raises:
        FiddlerError: there is no such folder, and the hub has no such model or cannot be reached.
    """
    folder = local_folder(name, relative_to)
    if folder is not None:
        return folder
    folder = _snapshot(str(name), SMALL_FILES, fetch)
    weights = shard_names(folder) if is_file(folder / INDEX) else [SINGLE_FILE]
    return _snapshot(str(name), [*SMALL_FILES, *weights], fetch)


def model_config_file(name: str | Path, relative_to: Path = Path()) -> Path:
    """Where the config.json of model `name` is, without fetching its weights; Mixtral-8x7B's is at
    hand without the hub.

    Raises:
        FiddlerError: see `model_folder`.
    """
    if str(name) in BUNDLED_CONFIGS and not is_folder(relative_to / name):
        return BUNDLED_CONFIGS[str(name)]
    folder = local_folder(name, relative_to)
    if folder is not None:
        return folder / "config.json"
    return _snapshot(str(name), ["config.json"], fetch=True) / "config.json"


def name_in_plan(model: str | Path, plan_path: str | Path) -> str:
    """How a plan at `plan_path` names `model`: ids as they are, folders below the working directory
    relative, others absolute.
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
    """The folder that `name` names; None if it is no folder and may be a Hugging Face id.

    Raises:
        FiddlerError: it is a file, or a folder that does not exist.
    """
    folder = relative_to / name
    if is_folder(folder):
        try:
            str(folder).encode()
        except UnicodeEncodeError:
            raise FiddlerError(
                f"{folder}: the folder's name is not UTF-8, so that transformers cannot read it;"
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
    return None


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
    # the hub's client raises many unrelated types; all mean that the files are not here
    except Exception as error:
        raise FiddlerError(
            f"{name}: not a folder, and not to be had from the Hugging Face hub ({reason(error)});"
            " name a local folder with --model"
        ) from None
