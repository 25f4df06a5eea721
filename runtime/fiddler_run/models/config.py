"""ModelConfig: a model's config.json. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from fiddler_run.errors import FiddlerError
from fiddler_run.plan.shape import DTYPE_BYTES, Dtype
from fiddler_run.system.parsing import read_json_object

# If neither config.json nor the weights name one; nearly every such checkpoint uses it.
ASSUMED_DTYPE = "bfloat16"
CONFIGS = Path(__file__).parent / "configs"
# Models whose config.json is included in this package, by Hugging Face id.
BUNDLED_CONFIGS = {
    name: CONFIGS / f"{stem}.json"
    for name, stem in {
        "mistralai/Mixtral-8x7B-v0.1": "Mixtral-8x7B",
        "mistralai/Mixtral-8x7B-Instruct-v0.1": "Mixtral-8x7B",
        "mistralai/Mixtral-8x22B-v0.1": "Mixtral-8x22B-v0.1",
        "Qwen/Qwen2-57B-A14B": "Qwen2-57B-A14B",
        "Qwen/Qwen3-30B-A3B": "Qwen3-30B-A3B",
        "Qwen/Qwen3-Next-80B-A3B-Instruct": "Qwen3-Next-80B-A3B-Instruct",
        "Qwen/Qwen3.5-35B-A3B": "Qwen3.5-35B-A3B",
        "zai-org/GLM-4.5-Air": "GLM-4.5-Air",
        "zai-org/GLM-4.7-Flash": "GLM-4.7-Flash",
        "deepseek-ai/DeepSeek-V2-Lite-Chat": "DeepSeek-V2-Lite-Chat",
        "moonshotai/Kimi-Linear-48B-A3B-Instruct": "Kimi-Linear-48B-A3B-Instruct",
        "LiquidAI/LFM2-8B-A1B": "LFM2-8B-A1B",
    }.items()
}


@dataclass(frozen=True)
class ModelConfig:
    """The content of a config.json.

    `origin` names the file in errors. `family` is its `model_type`. `dtype` is None if the file
    does not name one. `raw` holds the file's keys.
    """

    origin: str
    family: str
    dtype: Dtype | None
    raw: dict

    @classmethod
    def read(cls, path: Path) -> "ModelConfig":
        """Reads a config.json.

        Raises:
            FiddlerError: the file cannot be read, or its weights cannot be run.
        """
        advice = "--model names a checkpoint folder in Hugging Face format"
        return cls.parse(read_json_object(path, advice), str(path))

    @classmethod
    def parse(cls, raw: dict, origin: str) -> "ModelConfig":
        """Parses the content of a config.json that came from `origin`. Raises as `read`."""
        family = raw.get("model_type")
        if not isinstance(family, str):
            raise FiddlerError(
                f"{origin}: model_type is {short(family)}, expected the name of a family of models"
            )
        for part in (raw, _text_part(raw)):
            _refuse_quantised(part, origin)
        dtype = _dtype_of(raw, origin) or _dtype_of(_text_part(raw), origin)
        return cls(origin, family, dtype, raw)


def _text_part(raw: dict) -> dict:
    """The part of a config.json that describes the language model beside, say, a vision model."""
    part = raw.get("text_config")
    return part if isinstance(part, dict) else {}


def _dtype_of(config: dict, origin: str) -> Dtype | None:
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype is not None and (not isinstance(dtype, str) or dtype not in DTYPE_BYTES):
        known = ", ".join(DTYPE_BYTES)
        raise FiddlerError(
            f"{origin}: dtype {short(dtype)} is not supported; supported are {known}"
        )
    return dtype


def _refuse_quantised(config: dict, origin: str) -> None:
    quantization = config.get("quantization_config")
    if not quantization:
        return
    method = (
        quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
    )
    raise FiddlerError(
        f"{origin}: quantization_config says that the weights are quantised ({short(method)});"
        " name the original, unquantised checkpoint (or, if these weights are not quantised,"
        " remove quantization_config)"
    )


def short(value: object) -> str:
    """Formats a value for an error message."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number out of range"
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + " ..."
