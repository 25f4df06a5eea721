"""ModelFile: the sizes of a model, so that planning needs neither transformers nor torch."""

import hashlib
import json
from pathlib import Path
from typing import ClassVar, Literal

from fiddler_run.models.config import BUNDLED_CONFIGS, ModelConfig
from fiddler_run.models.sizes import ModelSizes
from fiddler_run.plan.shape import ModelShape
from fiddler_run.plan.yaml_file import Section, YamlFile
from fiddler_run.system.files import is_file
from fiddler_run.system.locate import shipped_file


class ModelProvenance(Section):
    """How the file was made. `config_sha256` is that of the content of config.json."""

    command: str
    created: str
    config_sha256: str


class ModelFile(YamlFile):
    kind: ClassVar[str] = "model file"
    made_by: ClassVar[str] = "fiddler-opt profile"

    version: Literal[1]
    model: ModelShape
    sizes: ModelSizes
    provenance: ModelProvenance

    header: ClassVar[str] = "The sizes of a model, written by `fiddler-opt profile`."
    key_comments: ClassVar[dict[str, str]] = {
        "num_layers": "those with experts",
        "dense_bytes": "all weights outside the experts",
        "dense_layer_bytes": "of them in each layer with experts",
        "kv_bytes_per_token": "what a token adds to the KV cache",
        "state_bytes": "what the cache takes for each sequence besides",
        "attended_elements": "of a token's keys and values in one layer, for all heads",
        "score_heads": "whose attention scores a GPU keeps in memory; 0 with a fused kernel",
    }

    @classmethod
    def find(cls, name: str, config: ModelConfig, dtype: str) -> "ModelFile | None":
        """The file in `profiles` of the model `name` with this config.json and dtype, if any.

        Raises:
            FiddlerError: the file is damaged.
        """
        path = shipped_file(Path("profiles") / file_name(name))
        if not is_file(path):
            return None
        found = cls.load(path)
        matches = found.provenance.config_sha256 == config_sha256(config)
        return found if matches and found.model.dtype == dtype else None


def file_name(model: str) -> str:
    """The name of the file for a model with this name."""
    bundled = BUNDLED_CONFIGS.get(model)
    return f"{short_name(model) if bundled is None else bundled.stem}.model.yaml"


def short_name(model: str) -> str:
    """The last part of a model's name, which its profiles are named after."""
    return Path(model).name or "model"


def config_sha256(config: ModelConfig) -> str:
    content = json.dumps(config.raw, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
