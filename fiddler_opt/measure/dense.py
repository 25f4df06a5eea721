"""Times a model's dense part: attention, router, norms and dispatch of a layer, and the head.

The timed layers include the runtime's own experts layers, with experts that have no blocks, because
work between two dense layers slows down both.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from statistics import median

import torch

from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.measure.stopwatch import BUSY_CYCLES, Stopwatch, difference
from fiddler_run.engine.engine import ExpertEngine
from fiddler_run.engine.layer import ExpertsLayer
from fiddler_run.generation.generate import never_stopping
from fiddler_run.generation.model import PlannedModel
from fiddler_run.generation.session import Session
from fiddler_run.loading.load import place_dense_weights
from fiddler_run.models.dispatched import skeleton
from fiddler_run.models.measured import first_expert_layer

LAYERS = 8  # a multiple of the period of most families whose layers differ
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer")  # names of the number of layers
STEPS = 16
PROMPT_TOKENS = 16
# up to this many tokens, a pass is a decode step of as many sequences; beyond, a prompt
MAX_SEQUENCES = 16


class DenseBench:
    """Two models without expert weights: one whose layers end before the first with experts, and
    one with a few more.

    The difference between them is the time of the layers.
    """

    def __init__(
        self, spec: ModelSpec, device: torch.device, stopwatch: Stopwatch, engine: ExpertEngine
    ):
        self.device = device
        self.stopwatch = stopwatch
        nothing = torch.empty((0, spec.block_bytes), dtype=torch.uint8)
        host = [nothing] * spec.shape.num_experts
        resident = [nothing.to(device)] * spec.shape.num_experts
        dtype = getattr(torch, spec.shape.dtype)
        first, total = first_expert_layer(skeleton(spec.config, dtype))
        sizes = (first, min(total, first + LAYERS))
        self.head, self.whole = (_random_model(spec, total, kept, device) for kept in sizes)
        for model in (self.head, self.whole):
            model.session = Session(model, engine.resources)
            model.set_layers(
                [
                    ExpertsLayer(number, resident, host, lambda _: 0.0, engine)
                    for number in range(len(model.experts_modules()))
                ]
            )
        self.num_layers = len(self.whole.layers)

    @torch.inference_mode()
    def time(self, tokens: int) -> dict[str, float]:
        """Microseconds by profile table for a pass of `tokens` tokens through `generate()`.

        The pass is a decode step of that many sequences or, above MAX_SEQUENCES, a prompt.
        """
        decodes = tokens <= MAX_SEQUENCES
        cache = (tokens, PROMPT_TOKENS + STEPS + 1) if decodes else (1, tokens + 1)
        for model in (self.head, self.whole):
            model.session.make_cache(*cache)
        head_us, whole_us = self._steps(tokens) if decodes else self._prompts(tokens)
        layer_us = difference(whole_us, head_us) / self.num_layers
        device_us = layer_us
        if self.device.type == "cuda":
            # a recorded step can be faster than the single calls that are timed behind experts
            device_us = min(layer_us, self._behind_experts(tokens, decodes))
        return {"dense_layer_us": layer_us, "dense_device_us": device_us, "head_us": head_us}

    def _steps(self, sequences: int) -> list[float]:
        """Times a decode step of each model."""
        calls = [
            _generation(model, sequences, PROMPT_TOKENS, new_tokens)
            for model in (self.head, self.whole)
            for new_tokens in (1, 1 + STEPS)
        ]
        first_head, head, first_whole, whole = self.stopwatch.time(*calls, calls_per_sample=1)
        return [difference(head, first_head) / STEPS, difference(whole, first_whole) / STEPS]

    def _prompts(self, tokens: int) -> list[float]:
        """Times a prompt through each model."""
        calls = [_generation(model, 1, tokens, 1) for model in (self.head, self.whole)]
        return self.stopwatch.time(*calls, calls_per_sample=1)

    def _behind_experts(self, tokens: int, decodes: bool) -> float:
        """Time of a layer between experts that keep the GPU busy, from end to start."""
        marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        count = self.num_layers

        def keep_busy(layer: ExpertsLayer) -> Callable:
            def run(*arguments: torch.Tensor) -> torch.Tensor:
                output = layer(*arguments)
                begun = torch.cuda.Event(enable_timing=True)
                ended = torch.cuda.Event(enable_timing=True)
                begun.record()
                torch.cuda._sleep(BUSY_CYCLES)
                ended.record()
                marks.append((begun, ended))
                return output

            return run

        generate = _generation(self.whole, 1, tokens, 1)
        if decodes:
            generate = _generation(self.whole, tokens, PROMPT_TOKENS, 1 + STEPS)

        def sample() -> list[float]:
            marks.clear()
            generate()
            torch.cuda.synchronize()
            asked_for = marks[count:] if decodes else marks  # without the prompt's marks
            passes = [asked_for[start:][:count] for start in range(0, len(asked_for), count)]
            neighbours = (pair for layers in passes for pair in pairwise(layers))
            return [
                median(ended.elapsed_time(begun) * 1e3 for (_, ended), (begun, _) in neighbours)
            ]

        for experts, layer in zip(self.whole.experts_modules(), self.whole.layers, strict=True):
            experts.planned = keep_busy(layer)
        (us,) = self.stopwatch.gather(sample)
        self.whole.set_layers(self.whole.layers)
        return us


def _random_model(
    spec: ModelSpec, num_layers: int, kept: int, device: torch.device
) -> PlannedModel:
    """The model with the first `kept` of its `num_layers` layers, and random weights."""
    config = replace(spec.config, raw=_cut(spec.config.raw, num_layers, kept))
    model = skeleton(config, getattr(torch, spec.shape.dtype), PlannedModel)
    return place_dense_weights(model, device).eval().requires_grad_(False)


def _cut(raw: dict, num_layers: int, kept: int) -> dict:
    """A config.json with fewer layers: their number, and every list with an entry for each."""
    cut = {}
    for key, value in raw.items():
        if isinstance(value, dict):
            cut[key] = _cut(value, num_layers, kept)
        elif isinstance(value, list) and len(value) == num_layers:
            cut[key] = value[:kept]
        else:
            cut[key] = kept if key in LAYER_COUNTS and value == num_layers else value
    return cut


def _generation(
    model: PlannedModel, sequences: int, prompt_tokens: int, new_tokens: int
) -> Callable[[], None]:
    ids = torch.zeros((sequences, prompt_tokens), dtype=torch.long, device=model.device)
    arguments = {"max_new_tokens": new_tokens, "do_sample": False, **never_stopping(model)}

    def generate() -> None:
        model.cache.reset()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=model.cache, **arguments
        )

    return generate
