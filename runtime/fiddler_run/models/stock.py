"""transformers' own classes for a config.json."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from fiddler_run.errors import FiddlerError
from fiddler_run.models.config import ModelConfig, short
from fiddler_run.system.files import reason

MAX_LAYERS = 1_000
UNLIMITED = 2**20  # tokens of a sequence, if the config has no limit
# Keys that do not describe the model: the plan, the flags and the code decide. An original remote
# implementation is replaced by transformers' own.
IGNORED = (
    "architectures",
    "attn_implementation",
    "_attn_implementation",
    "auto_map",
    "cache_config",
    "compile_config",
    "dtype",
    "experts_implementation",
    "_experts_implementation",
    "gradient_checkpointing",
    "_name_or_path",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "use_cache",
    "watermarking_config",
)
# These choose their frequencies by the length of the whole input beyond a limit. Within the limit,
# they do not depend on how a prompt is split into chunks.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def stock_config(config: ModelConfig) -> PreTrainedConfig:
    """transformers' config object of the language model.

    Raises:
        FiddlerError: transformers has no such model, or rejects the config.
    """
    if config.family not in CONFIG_MAPPING:
        raise FiddlerError(
            f"{config.origin}: model_type is {short(config.family)}, which this version of"
            " transformers does not know"
        )
    with naming(config.origin):
        # JSON has no infinity: transformers writes it as a mapping
        decoded = PreTrainedConfig._decode_special_floats(_relevant(config.raw))
        found = _described(CONFIG_MAPPING[config.family].from_dict(decoded))
    layers = getattr(found, "num_hidden_layers", None)
    if type(layers) is not int or not 0 <= layers <= MAX_LAYERS:
        raise FiddlerError(
            f"{config.origin}: key 'num_hidden_layers' is {short(layers)}, expected a number up"
            f" to {MAX_LAYERS}; correct it"
        )
    return found


def stock_class(config: PreTrainedConfig, origin: str) -> type[PreTrainedModel]:
    """transformers' class for causal language modelling.

    Raises:
        FiddlerError: there is none.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise FiddlerError(
            f"{origin}: model_type is {short(config.model_type)}, for which transformers has no"
            " causal language model"
        )
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def context_limit(config: PreTrainedConfig) -> int:
    """The most tokens of a sequence: those that the model was trained for, as far as is known."""
    limit = getattr(config, "max_position_embeddings", None)
    limit = UNLIMITED if limit is None else limit
    rope = getattr(config, "rope_parameters", None) or {}
    if isinstance(rope, dict) and rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
        limit = min(limit, rope.get("original_max_position_embeddings") or limit)
    return limit


@contextmanager
def naming(origin: str) -> Iterator[None]:
    """Puts `origin` before the errors of transformers for a wrong config.json, and before ours.

    Its warnings are silenced: our own checks cover what can go wrong.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except FiddlerError as error:
        raise FiddlerError(f"{origin}: {error}") from None
    except Exception as error:  # it raises many types
        raise FiddlerError(f"{origin}: transformers cannot use it: {reason(error)}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)


def _relevant(raw: dict) -> dict:
    parts = {key: _relevant(part) for key, part in raw.items() if isinstance(part, dict)}
    kept = {key: value for key, value in raw.items() if key not in IGNORED}
    return {**kept, **{key: part for key, part in parts.items() if key in kept}}


def _described(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config that the causal language model takes: of a larger model, its text part."""
    text = config.get_text_config()
    return text if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING else config
