"""Completes the workload that a plan is made for, where flags leave values open."""

from fiddler_opt.inputs.model import ModelSpec
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Workload

DEFAULTS = {
    "prompt_tokens": 512,
    "output_tokens": 128,
    "num_beams": 1,
    "batch_size": 1,
    "max_seq_len": 4096,
}


def plan_workload(given: dict[str, int | None], model: ModelSpec) -> Workload:
    """The workload with the given values, by the keys of DEFAULTS.

    Defaults adapt to the model's context. Given values must fit it.

    Raises:
        FiddlerError: the given values do not fit the model's context.
    """
    given = {key: value for key, value in given.items() if value is not None}
    if given.get("max_seq_len", 0) > model.max_position_embeddings:
        raise FiddlerError(
            f"--max-seq-len {given['max_seq_len']} is more than the model's"
            f" {model.max_position_embeddings}"
        )
    context = min(given.get("max_seq_len", DEFAULTS["max_seq_len"]), model.max_position_embeddings)
    half = max(1, context // 2)
    adapted = {key: min(DEFAULTS[key], half) for key in ("prompt_tokens", "output_tokens")}
    values = {**DEFAULTS, **adapted, **given, "max_seq_len": context}
    if values["prompt_tokens"] + values["output_tokens"] > context:
        raise FiddlerError(
            f"--prompt-tokens {values['prompt_tokens']} and --output-tokens"
            f" {values['output_tokens']} exceed --max-seq-len {context}; lower them or raise it"
        )
    return Workload(**values)


def shortened(workload: Workload) -> str | None:
    """A note if the default number of prompt tokens was reduced to fit the context, else None."""
    if workload.prompt_tokens == DEFAULTS["prompt_tokens"]:
        return None
    return (
        f"planned for prompts of {workload.prompt_tokens} tokens, half of the context of"
        f" {workload.max_seq_len}; choose another number with --prompt-tokens"
    )
