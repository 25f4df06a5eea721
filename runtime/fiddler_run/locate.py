"""Finds what a user names: plans that ship with the package, and models by folder or by Hugging Face id. Imports no torch."""

import json
import os
import site
import sys
from pathlib import Path

from fiddler_run.errors import FiddlerError, first_line

_INSTALLED = [Path(prefix) / "share" / "fiddler-opt" for prefix in (sys.prefix, site.getuserbase())]
SHIPPED_FOLDERS = [Path(__file__).parents[2], *_INSTALLED]  # the first is the root of a source checkout
BUNDLED_CONFIGS = dict.fromkeys(
    ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
    Path(__file__).parent / "model_configs" / "Mixtral-8x7B.json",
)
CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]


def shipped_file(path: str | Path) -> Path:
    """`path` itself if it exists, else the file of that name that comes with the package, such as plans/demo.yaml."""
    if Path(path).exists():
        return Path(path)
    candidates = (folder / path for folder in SHIPPED_FOLDERS)
    return next((candidate for candidate in candidates if candidate.is_file()), Path(path))


def is_local_name(name: str) -> bool:
    """Whether a model's name in a plan is a folder (it begins with `.` or `/`) rather than a Hugging Face id."""
    return name.startswith((".", "/"))


def model_folder(name: str | Path, relative_to: Path = Path(), files: list[str] = CHECKPOINT_FILES) -> Path:
    """The folder of model `name`: a folder (relative to `relative_to`), or that of a Hugging Face id, whose `files` are fetched.

    Raises:
        FiddlerError: there is no such folder, and the hub has no such model or cannot be reached.
    """
    folder = relative_to / name
    if folder.is_dir():
        return folder
    if is_local_name(str(name)):
        raise FiddlerError(f"{folder}: no such folder; name the checkpoint's folder with --model")
    return _download(str(name), files)


def model_config_file(name: str | Path, relative_to: Path = Path()) -> Path:
    """Where the config.json of model `name` is, without fetching its weights; Mixtral-8x7B's is at hand without the hub.

    Raises:
        FiddlerError: see `model_folder`.
    """
    if str(name) in BUNDLED_CONFIGS and not (relative_to / name).is_dir():
        return BUNDLED_CONFIGS[str(name)]
    return model_folder(name, relative_to, files=["config.json"]) / "config.json"


def require_mixtral(config: dict, origin: str | Path) -> None:
    """Whether a config.json, read from `origin`, describes a model of the supported kind.

    Raises:
        FiddlerError: it does not.
    """
    for key, supported, default in (("model_type", "mixtral", None), ("hidden_act", "silu", "silu")):
        if config.get(key, default) != supported:
            raise FiddlerError(f"{origin}: {key} is {config.get(key)!r}; only {supported!r} is supported")


def read_json(path: Path) -> dict:
    """A JSON object in a file of a checkpoint.

    Raises:
        FiddlerError: the file is missing or holds no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FiddlerError(f"{path}: missing; --model names a checkpoint folder in Hugging Face format") from None
    except (OSError, ValueError) as error:
        raise FiddlerError(f"{path}: cannot read: {error}") from None
    if not isinstance(data, dict):
        raise FiddlerError(f"{path}: expected a JSON object, found {type(data).__name__}; download the checkpoint again")
    return data


def name_in_plan(model: str | Path, plan_path: str | Path) -> str:
    """How a plan at `plan_path` names `model`: ids as they are, folders below the working directory relative, others absolute."""
    folder = Path(model)
    if not folder.is_dir():
        return str(model)
    folder = folder.resolve()
    if not folder.is_relative_to(Path.cwd()):
        return str(folder)
    relative = os.path.relpath(folder, Path(plan_path).resolve().parent)
    return relative if relative.startswith(".") else f"./{relative}"


def _download(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError:
        raise FiddlerError(f"{name}: neither a folder nor a Hugging Face model id; name the model with --model") from None
    except Exception as error:  # the hub's client raises many unrelated types; all mean that the files are not here
        reason = first_line(error)
        raise FiddlerError(
            f"{name}: not a folder, and not to be had from the Hugging Face hub ({reason}); name a local folder with --model"
        ) from None
