"""Runs one generation and measures it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessor,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from fiddler_run.engine.calls import Traffic
from fiddler_run.errors import FiddlerError
from fiddler_run.generation.lookup import LookupDecoding, require_lookup
from fiddler_run.generation.model import PlannedModel
from fiddler_run.generation.sampling import Options, sampling_arguments
from fiddler_run.generation.text import chat_text, token_ids
from fiddler_run.plan.schema import Plan


@dataclass(frozen=True)
class Measured:
    """Speeds, expert traffic and memory of one generation.

    `ttft_s` runs from the call to the first token. Tokens/s are those of all sequences together
    during decode, after the first token. `traffic_by_rank` is that of decode. `prompt_tokens` and
    `output_tokens` are those of one sequence.

    `passes` are those of decode, fewer than its tokens if prompt lookup proposed some.
    `reused_tokens` are those of the prompt that the cache still held. `peak_gpu_bytes` is the most
    that PyTorch's allocator held; the driver and libraries hold the plan's reserve in addition.
    """

    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    decode_tokens_per_s: float
    traffic_by_rank: list[Traffic]
    prefill_traffic_by_rank: list[Traffic]
    peak_gpu_bytes: int
    reused_tokens: int = 0
    passes: int = 0

    @property
    def traffic(self) -> Traffic:
        """The traffic of decode, of all ranks."""
        return sum(self.traffic_by_rank, Traffic())

    @property
    def prefill_traffic(self) -> Traffic:
        return sum(self.prefill_traffic_by_rank, Traffic())

    @property
    def all_traffic(self) -> Traffic:
        """The traffic of prefill and decode."""
        return self.prefill_traffic + self.traffic


class StepClock(StoppingCriteria):
    """Records the time of each step, and the expert traffic until the end of the first.

    Never stops a generation. It works with all of transformers' decoding methods.
    """

    def __init__(self, traffic: Callable[[], list[Traffic]]):
        self.times_s: list[float] = []
        self.first_traffic: list[Traffic] = []
        self._traffic = traffic

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.is_cuda:  # transformers does so right after this anyway
            torch.cuda.current_stream(input_ids.device).synchronize()
        self.times_s.append(time.perf_counter())
        self.first_traffic = self.first_traffic or self._traffic()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def check_lookup(model: PlannedModel, options: Options, batch_size: int = 1) -> None:
    """Checks that the model can decode by prompt lookup, if the options ask for it.

    Raises:
        FiddlerError: it cannot, or there are several sequences.
    """
    if not options.lookup:
        return
    if batch_size * options.num_beams > 1:
        raise FiddlerError(
            "--lookup: only for one sequence, without beams; remove the flag, or give --num-beams 1"
        )
    require_lookup(model)


def check_length(prompt_tokens: int, options: Options, plan: Plan, batch_size: int = 1) -> None:
    """Checks that the plan has room for a generation of `batch_size` sequences.

    Raises:
        FiddlerError: it has no room.
    """
    beams = options.num_beams
    workload = plan.workload
    if prompt_tokens >= workload.max_seq_len:
        raise FiddlerError(
            f"the prompt has {prompt_tokens} tokens and leaves no room for an answer in the"
            f" plan's context of {workload.max_seq_len}; shorten it, or plan again with a larger"
            " --max-seq-len"
        )
    too_many = {
        "num-beams": beams * batch_size > workload.sequences,
        "batch-size": batch_size > workload.batch_size,
    }
    for name, asked, planned in (
        ("batch-size", batch_size, workload.batch_size),
        ("num-beams", beams, workload.num_beams),
    ):
        if too_many[name] and plan.rank.device == "cuda" and plan.rank.gpu_memory_bytes.total > 0:
            raise FiddlerError(
                f"--{name} {asked} needs more GPU memory than the plan reserves for {planned};"
                f" plan again with --{name} {asked}"
            )
    if prompt_tokens + options.max_new_tokens > plan.workload.max_seq_len:
        raise FiddlerError(
            f"the prompt has {prompt_tokens} tokens and --max-new-tokens is"
            f" {options.max_new_tokens}, together more than the plan's context of"
            f" {plan.workload.max_seq_len}; reduce them, or plan again with a larger --max-seq-len"
        )


def room_for_answer(prompt_tokens: int, plan: Plan) -> int:
    """The default number of new tokens: the plan's number, or what fits its context."""
    return max(1, min(plan.workload.output_tokens, plan.workload.max_seq_len - prompt_tokens))


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool, plan: Plan, vocab_size: int
) -> torch.Tensor:
    """Encodes a prompt as token ids [1, n].

    Raises:
        FiddlerError: the prompt is empty, is not text, is far longer than the context, or has
            tokens that the model does not know; the tokenizer or its chat template fails; or
            `chat` is set without a chat template.
    """
    if not prompt.strip():
        raise FiddlerError("the prompt is empty")
    if chat:
        prompt = chat_text(tokenizer, [{"role": "user", "content": prompt}], "--chat")
    ids = token_ids(
        tokenizer, prompt, plan.workload.max_seq_len, vocab_size, special_tokens=not chat
    )
    return torch.tensor([ids])


@torch.no_grad()
def generate_ids(
    model: PlannedModel,
    ids: torch.Tensor,
    options: Options,
    processors: Sequence[LogitsProcessor] = (),
    criteria: Sequence[StoppingCriteria] = (),
    reused_tokens: int = 0,
    **arguments: object,
) -> tuple[torch.Tensor, Measured]:
    """Continues token ids [sequences, n]. Returns ids [sequences, n + new] and measurements.

    Assumes that no sequence is padded unless an `attention_mask` is given.

    Args:
        processors: of logits, before sampling.
        criteria: for ending the generation early.
        reused_tokens: the first tokens of `ids` that the cache in `arguments` holds.
        arguments: for transformers' `generate()`.

    Raises:
        FiddlerError: see `check_lookup`.
    """
    ids = ids.to(model.device)
    check_lookup(model, options, len(ids))
    lookup = None
    if options.lookup:
        lookup = LookupDecoding(model.lookup_gate)
        arguments["custom_generate"] = lookup
    arguments.setdefault("attention_mask", torch.ones_like(ids))
    with model.session.turn():  # during all of it, so that only this generation is measured
        clock = StepClock(model.traffic_by_rank)
        before = model.traffic_by_rank()
        started = time.perf_counter()
        output = model.generate(
            ids,
            max_new_tokens=options.max_new_tokens,
            num_beams=options.num_beams,
            num_return_sequences=1,
            stopping_criteria=StoppingCriteriaList([clock, *criteria]),
            **sampling_arguments(model, options, processors),
            **arguments,
        )
        first_s = clock.times_s[0]
        last_s = clock.times_s[-1]
        steps = len(clock.times_s)
        on_gpu = model.device.type == "cuda"
        return output, Measured(
            prompt_tokens=ids.shape[1],
            output_tokens=steps,
            ttft_s=first_s - started,
            decode_tokens_per_s=len(ids) * (steps - 1) / (last_s - first_s) if steps > 1 else 0.0,
            traffic_by_rank=_since(clock.first_traffic, model.traffic_by_rank()),
            prefill_traffic_by_rank=_since(before, clock.first_traffic),
            peak_gpu_bytes=torch.cuda.max_memory_reserved(model.device) if on_gpu else 0,
            reused_tokens=reused_tokens,
            passes=steps - 1 if lookup is None else lookup.passes,
        )


def _since(before: list[Traffic], after: list[Traffic]) -> list[Traffic]:
    """What each rank has done in between."""
    return [later - earlier for earlier, later in zip(before, after, strict=True)]


def never_stopping(model: PlannedModel) -> dict[str, int]:
    """Arguments for `generate()` with which no token ends a sequence.

    `min_new_tokens` would have the same effect, but costs time in each step.
    """
    return {"eos_token_id": model.config.vocab_size, "pad_token_id": 0}
