"""Reads a checkpoint's generation_config.json.

Only special tokens and sampling parameters are used. Flags and plan decide everything else.
"""

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fiddler_run.errors import FiddlerError
from fiddler_run.system.files import is_file
from fiddler_run.system.parsing import read_json_object

FILE = "generation_config.json"
MIN_TEMPERATURE = 1e-4  # dividing logits by less overflows
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
SAMPLING = {
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
}
TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}  # old files use -1 for none
NO_EFFECT = {
    "transformers_version",
    "_from_model_config",
    "max_length",
    "trust_remote_code",
    "use_cache",
}
Probability = Annotated[float, Field(gt=0, le=1)]


class GenerationDefaults(BaseModel):
    """A checkpoint's recommendations, by transformers' names. None if it has none.

    Other keys are left out.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=MIN_TEMPERATURE, le=1e4)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    top_p: Probability | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-4, le=1e4)] | None = None
    unused: list[str] = []  # other keys that would matter but are not used

    @classmethod
    def read(cls, folder: Path, config: dict) -> Self:
        """Reads the recommendations of the checkpoint in `folder`.

        Without a generation_config.json, only the token ids of config.json.

        Raises:
            FiddlerError: the file cannot be read, or a value has the wrong type.
        """
        path = folder / FILE
        if not is_file(path):
            return cls.of_config(config, folder / "config.json")
        return cls._of(read_json_object(path), path)

    @classmethod
    def of_config(cls, config: dict, path: Path) -> Self:
        """The token ids in a config.json at `path`. Raises as `read`."""
        return cls._of(
            {key: value for key, value in config.items() if key.endswith("_token_id")}, path
        )

    @classmethod
    def _of(cls, data: dict, path: Path) -> Self:
        known = {
            key: None if key in TOKENS and type(value) is int and value < 0 else value
            for key, value in data.items()
        }
        said = {key for key, value in data.items() if value is not None}
        known["unused"] = sorted(said - NO_EFFECT - TOKENS - SAMPLING)
        if not data.get("do_sample"):
            known.pop("temperature", None)  # the flag decides; some files set 0.0
        try:
            return cls.model_validate(known)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise FiddlerError(
                f"{path}: {first['loc'][0]}: {first['msg']}; correct it, or remove the key"
            ) from None

    def for_transformers(self, tokenizer) -> dict:
        """The keyword arguments of a GenerationConfig.

        Without `do_sample`, sampling parameters are left out, because transformers would warn that
        they have no effect.
        """
        sampling = SAMPLING if self.do_sample else {"repetition_penalty"}
        values = self.model_dump(
            include={"bos_token_id", "pad_token_id", *sampling}, exclude_none=True
        )
        ends = self.end_tokens(tokenizer)
        return {**values, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}

    def end_tokens(self, tokenizer) -> list[int]:
        """The tokens that end an answer: those given here and the tokenizer's own."""
        named = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        own = None if tokenizer is None else tokenizer.eos_token_id
        return sorted({token for token in (*named, own) if token is not None})
