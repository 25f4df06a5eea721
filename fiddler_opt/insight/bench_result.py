"""The part of a `fiddler-run --bench --json` result that calibration needs."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fiddler_run.errors import FiddlerError
from fiddler_run.plan.prediction import Provenance
from fiddler_run.plan.schema import Plan
from fiddler_run.plan.yaml_file import Count, Milliseconds, Rate, Seconds
from fiddler_run.system.files import read_text

Average = Annotated[float, Field(ge=1e-6, le=2**31)]


class _Lenient(BaseModel):
    """A section that ignores unknown keys."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class MeasuredPhase(_Lenient):
    """Prefill or decode: milliseconds and rates by part, averaged over its passes."""

    ms: dict[str, Milliseconds]
    bytes_per_s: dict[str, Rate]
    passes: Average
    tokens_per_pass: Average
    tokens_per_expert: Average


class MeasuredSpeeds(_Lenient):
    prompt_tokens: Count
    output_tokens: Count
    ttft_s: Seconds
    decode_tokens_per_s: Rate


class MeasuredMachine(_Lenient):
    gpu: str | None


class Result(_Lenient):
    """The result of a run."""

    machine: MeasuredMachine
    plan: Provenance
    num_beams: Count
    batch_size: Count
    measured: MeasuredSpeeds
    prefill: MeasuredPhase
    decode: MeasuredPhase

    @classmethod
    def load(cls, path: str | Path, plan: Plan) -> "Result":
        """Reads the result of a run of `plan`.

        Raises:
            FiddlerError: the file cannot be read, is not a result, or belongs to another plan.
        """
        try:
            result = cls.model_validate_json(read_text(path))
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            what = f"{where}: {error.errors()[0]['msg']}" if where else "no JSON object"
            raise FiddlerError(
                f"{path}: not a result of `fiddler-run --bench --json` ({what})"
            ) from None
        if result.plan != plan.provenance:
            raise FiddlerError(
                f"{path}: the result of another plan; measure this one with `fiddler-run --plan ..."
                " --bench --json`"
            )
        return result
