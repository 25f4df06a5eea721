"""The families by `model_type`. To add one, add a file to this folder and a line here."""

from pathlib import Path

from fiddler_run.errors import FiddlerError
from fiddler_run.models.config import ModelConfig, short
from fiddler_run.models.family import Family
from fiddler_run.models.mixtral import Mixtral
from fiddler_run.system.parsing import read_json_object

FAMILIES: dict[str, Family] = {each.model_type: each for each in (Mixtral(),)}
# Models whose config.json is included in this package.
BUNDLED_CONFIGS = {
    name: Path(__file__).parent / "configs" / "Mixtral-8x7B.json"
    for name in ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1")
}


def read_config(path: Path) -> ModelConfig:
    """Reads a config.json.

    Raises:
        FiddlerError: the file cannot be read, or the runtime cannot run such a model.
    """
    advice = "--model names a checkpoint folder in Hugging Face format"
    return parse_config(read_json_object(path, advice), str(path))


def parse_config(raw: dict, origin: str) -> ModelConfig:
    """Parses the content of a config.json that came from `origin`. Raises as `read_config`."""
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join(map(repr, FAMILIES))
        raise FiddlerError(f"{origin}: model_type is {short(family)}; only {known} is supported")
    return FAMILIES[family].config(raw, origin)
