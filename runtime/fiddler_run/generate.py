"""One generation and what was measured during it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextStreamer

from fiddler_run.dispatch import Traffic
from fiddler_run.errors import FiddlerError
from fiddler_run.executors import Executors
from fiddler_run.model import DispatchedMixtral
from fiddler_run.plan import Plan


@dataclass(frozen=True)
class Options:
    """How to generate. `temperature` 0 is greedy."""

    max_new_tokens: int
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    chat: bool = False


@dataclass(frozen=True)
class Measured:
    """`ttft_s` from the call to the first token; tokens/s, of all sequences together, and the expert traffic are those of decode,
    after the first token; `prefill_traffic` is that of before. `prompt_tokens` and `output_tokens` are one sequence's.

    `peak_gpu_bytes` is what PyTorch's allocator held at most; driver and libraries hold the plan's reserve besides.
    """

    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    decode_tokens_per_s: float
    traffic: Traffic
    prefill_traffic: Traffic
    peak_gpu_bytes: int


class StepClock(StoppingCriteria):
    """Never stops; notes the time and the expert traffic after each step of any of transformers' decoding methods."""

    def __init__(self, executors: Executors):
        self._executors = executors
        self.steps: list[tuple[float, Traffic]] = []

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.is_cuda:  # as transformers does right after this
            torch.cuda.current_stream(input_ids.device).synchronize()
        self.steps.append((time.perf_counter(), self._executors.traffic))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _CallbackStreamer(TextStreamer):
    """Hands each finished piece of text to a function instead of printing it."""

    def __init__(self, tokenizer, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)


def check_length(prompt_tokens: int, options: Options, plan: Plan, batch_size: int = 1) -> None:
    """Whether the plan has room for such a generation of so many sequences.

    Raises:
        FiddlerError: it has not.
    """
    beams, workload = options.num_beams, plan.workload
    too_many = {"num-beams": beams * batch_size > workload.sequences, "batch-size": batch_size > workload.batch_size}
    for name, asked, planned in (
        ("batch-size", batch_size, workload.batch_size),
        ("num-beams", beams, workload.num_beams),
    ):
        if too_many[name] and plan.device == "cuda" and plan.gpu_memory_bytes.total > 0:
            raise FiddlerError(
                f"--{name} {asked} needs more GPU memory than the plan gives to {planned}; plan again with --{name} {asked}"
            )
    if prompt_tokens + options.max_new_tokens > plan.workload.max_seq_len:
        raise FiddlerError(
            f"the prompt has {prompt_tokens} tokens and --max-new-tokens is {options.max_new_tokens}, together more than "
            f"the plan's context of {plan.workload.max_seq_len}; shorten them, or plan again with a larger --max-seq-len"
        )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, options: Options, plan: Plan) -> torch.Tensor:
    """Token ids [1, n] of a prompt that the plan has room for.

    Raises:
        FiddlerError: the prompt is empty or no text; it or the beams exceed the plan; `chat` without a chat template.
    """
    if not prompt.strip():
        raise FiddlerError("the prompt is empty")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of another encoding, which Python carries as lone surrogates
        raise FiddlerError("the prompt is not UTF-8 text") from None
    if options.chat:
        if tokenizer.chat_template is None:
            raise FiddlerError("--chat: this model's tokenizer has no chat template; leave the flag out")
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not options.chat)["input_ids"]
    check_length(ids.shape[1], options, plan)
    return ids


def generate(
    model: DispatchedMixtral,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    options: Options,
    on_text: Callable[[str], None],
) -> Measured:
    """Generates from a prompt; hands the text to `on_text` as it comes (with beams: at the end).

    Raises:
        FiddlerError: the prompt does not fit, see `encode_prompt`.
    """
    ids = encode_prompt(tokenizer, prompt, options, model.plan)
    streamer = _CallbackStreamer(tokenizer, on_text) if options.num_beams == 1 else None
    output, measured = generate_ids(model, ids, options, streamer=streamer, pad_token_id=tokenizer.pad_token_id)
    if streamer is None:
        on_text(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return measured


@torch.inference_mode()
def generate_ids(model: DispatchedMixtral, ids: torch.Tensor, options: Options, **arguments) -> tuple[torch.Tensor, Measured]:
    """Continues token ids [sequences, n]: ids [sequences, n + new], and what was measured. `arguments` go to transformers'
    `generate()`; the sequences are not padded, unless they hold an `attention_mask`."""
    ids = ids.to(model.device)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    clock = StepClock(model.executors)
    sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    arguments.setdefault("attention_mask", torch.ones_like(ids))
    before, started = model.executors.traffic, time.perf_counter()
    output = model.generate(
        ids,
        max_new_tokens=options.max_new_tokens,
        num_beams=options.num_beams,
        stopping_criteria=StoppingCriteriaList([clock]),
        **(sampling if options.temperature > 0 else {"do_sample": False}),
        **arguments,
    )
    return output, _measure(clock, before, started, ids, model.device)


def never_stopping(model: DispatchedMixtral) -> dict[str, int]:
    """Arguments for `generate()` with which no token ends a sequence. (`min_new_tokens` would do more at each step.)"""
    return {"eos_token_id": model.config.vocab_size, "pad_token_id": 0}


def _measure(clock: StepClock, before: Traffic, started: float, ids: torch.Tensor, device: torch.device) -> Measured:
    (first_s, first_traffic), (last_s, last_traffic) = clock.steps[0], clock.steps[-1]
    steps = len(clock.steps)
    return Measured(
        prompt_tokens=ids.shape[1],
        output_tokens=steps,
        ttft_s=first_s - started,
        decode_tokens_per_s=len(ids) * (steps - 1) / (last_s - first_s) if steps > 1 else 0.0,
        traffic=last_traffic - first_traffic,
        prefill_traffic=first_traffic - before,
        peak_gpu_bytes=torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0,
    )
