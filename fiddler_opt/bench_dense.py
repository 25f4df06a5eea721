"""Times all of a model but its experts: attention, router, norms and dispatch of a layer, and a step outside the layers.

Rule: the layers run the runtime's own dispatch, to experts that have no blocks, since what runs between two layers slows both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch
from transformers import MixtralConfig

from fiddler_opt.bench_timing import BUSY_CYCLES, Stopwatch, Timing
from fiddler_opt.model import ModelSpec
from fiddler_run.arena import TORCH_DTYPES
from fiddler_run.dispatch import LayerDispatch
from fiddler_run.executors import Executors
from fiddler_run.generate import never_stopping
from fiddler_run.model import DispatchedMixtral, HostEmbedding
from fiddler_run.session import Session

LAYERS, STEPS, PROMPT = 5, 16, 16
MOST_SEQUENCES = 16  # so many tokens are one of each sequence, more a prompt


@dataclass(frozen=True)
class DenseTimes:
    """`layer`: one layer without experts. `device`: what it adds to experts that keep the device busy. `head`: a step's rest.

    `host_embedding`: what the embedding takes longer from host memory; None without a GPU.
    """

    layer: Timing
    device: Timing
    head: Timing
    host_embedding: Timing | None


class DenseBench:
    """Two models, of no layer and of some, without experts: what one takes longer than the other is the layers'."""

    def __init__(self, spec: ModelSpec, device: torch.device, stopwatch: Stopwatch, executors: Executors):
        self.device, self.stopwatch = device, stopwatch
        self.models = [_model_without_experts(spec, layers, device) for layers in (0, LAYERS)]
        for model in self.models:
            model.session = Session(model, executors)
        nothing = [torch.empty((0, spec.block_elements), dtype=TORCH_DTYPES[spec.shape.dtype])] * spec.shape.num_experts
        on_device = [blocks.to(device) for blocks in nothing]
        self.dispatch = LayerDispatch(0, on_device, nothing, lambda _: 0.0, executors)
        self._set_experts(self.dispatch)

    @torch.inference_mode()
    def time(self, tokens: int) -> DenseTimes:
        """One pass with so many tokens, through `generate()`: a decode step of that many sequences, or, from 17 on, a prompt."""
        for model in self.models:
            model.session.make_cache(*((tokens, PROMPT + STEPS + 1) if tokens <= MOST_SEQUENCES else (1, tokens + 1)))
        head, whole = self._passes(tokens)
        layer = (whole - head) / LAYERS
        if self.device.type == "cpu":
            return DenseTimes(layer, layer, head, None)
        return DenseTimes(layer, self._behind_experts(tokens), head, self._host_embedding(tokens))

    def _host_embedding(self, tokens: int) -> Timing:
        ids = torch.zeros((1, tokens), dtype=torch.long, device=self.device)
        on_device = self.models[0].model.embed_tokens
        in_host = HostEmbedding(on_device.weight)
        device, host = self.stopwatch.time(lambda: on_device(ids), lambda: in_host(ids))
        return host - device

    def _behind_experts(self, tokens: int) -> Timing:
        """A layer's time between experts that keep the device busy: from the end of some to the start of the next ones."""
        marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

        def busy(*arguments):
            output = self.dispatch(*arguments)
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            torch.cuda._sleep(BUSY_CYCLES)
            ended.record()
            marks.append((begun, ended))
            return output

        steps = STEPS if tokens <= MOST_SEQUENCES else 0
        generation = _decode(self.models[1], tokens, 1 + steps) if steps else _generation(self.models[1], 1, tokens, 1)

        def between() -> list[float]:
            marks.clear()
            generation()
            torch.cuda.synchronize()
            asked_for = marks[LAYERS:] if steps else marks  # not the prompt's
            passes = [asked_for[first : first + LAYERS] for first in range(0, len(asked_for), LAYERS)]
            return [median(ended.elapsed_time(begun) * 1e3 for each in passes for (_, ended), (begun, _) in pairwise(each))]

        self._set_experts(busy)
        (timing,) = self.stopwatch.gather(between)
        self._set_experts(self.dispatch)
        return timing

    def _passes(self, tokens: int) -> list[Timing]:
        """One pass of the model of no layer, and of the other."""
        if tokens > MOST_SEQUENCES:
            return self.stopwatch.time(*(_generation(each, 1, tokens, 1) for each in self.models), calls_per_sample=1)
        calls = [_decode(each, tokens, new) for each in self.models for new in (1, 1 + STEPS)]
        times = self.stopwatch.time(*calls, calls_per_sample=1)
        return [(times[1] - times[0]) / STEPS, (times[3] - times[2]) / STEPS]

    def _set_experts(self, dispatch: Callable) -> None:
        for model in self.models:
            for experts in model.experts_modules():
                experts.dispatch = dispatch


def _model_without_experts(spec: ModelSpec, num_layers: int, device: torch.device) -> DispatchedMixtral:
    config = MixtralConfig(**{**spec.config, "num_hidden_layers": num_layers})
    with torch.device("meta"):
        model = DispatchedMixtral(config)
    model = model.to(TORCH_DTYPES[spec.shape.dtype]).to_empty(device=device).eval().requires_grad_(False)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.uniform_(-0.02, 0.02)
    return model


def _decode(model: DispatchedMixtral, sequences: int, new_tokens: int) -> Callable[[], object]:
    return _generation(model, sequences, PROMPT, new_tokens)


def _generation(model: DispatchedMixtral, sequences: int, prompt_tokens: int, new_tokens: int) -> Callable[[], object]:
    ids = torch.zeros((sequences, prompt_tokens), dtype=torch.long, device=model.device)
    arguments = {"max_new_tokens": new_tokens, "do_sample": False, **never_stopping(model)}

    def generate() -> None:
        model.cache.reset()
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=model.cache, **arguments)

    return generate
