"""Times experts in the runtime's own layers.

The experts fill most of host memory, and the experts of a layer are spread over all of it. Memory
far from the CPU is slower, on some machines by 20%, and a run reads from all of it.
"""

import random
import time
from collections.abc import Callable, Iterable
from itertools import cycle, pairwise, product

import torch

from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.measure.stopwatch import BUSY_CYCLES, CALLS_PER_SAMPLE, Stopwatch, difference
from fiddler_opt.solve.memory import staged_blocks
from fiddler_run.engine.device_part import computed_singly
from fiddler_run.engine.engine import ExpertEngine, make_engine
from fiddler_run.engine.layer import ExpertsLayer
from fiddler_run.engine.timeline import Work, whole_s
from fiddler_run.errors import FiddlerError
from fiddler_run.kernels.limits import MAX_DECODE_TOKENS
from fiddler_run.system.host import num_cores
from fiddler_run.weights.arena import Arena
from fiddler_run.weights.checkpoint import DummyWeights

GPU_WORKING_SET_BYTES = 1_500_000_000  # exceeds the GPU's caches
MANY_TOKENS = 64  # tokens of an expert above which calls take long and vary less
MAX_CHOICES = 4096  # tokens times experts in a timed call; one token's experts may exceed it


class ExpertBench:
    """Random experts of a model's shape, in host memory and, with a GPU, in GPU memory.

    `page_locked`: True if the GPU can read the experts in host memory.
    """

    def __init__(
        self, model: ModelSpec, host_bytes: int, stopwatch: Stopwatch, device: torch.device
    ):
        """Makes random experts.

        Args:
            host_bytes: host memory to fill, at most the size of the model's experts.
        """
        shape = model.shape
        self.model = model
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.stopwatch = stopwatch
        self.top_k = shape.num_experts_per_tok
        self.block_format = model.block_format
        self.blocks_per_expert = model.blocks_per_expert
        everything = shape.num_layers * shape.num_experts
        num_experts = min(everything, max(3, self.top_k, host_bytes // model.expert_bytes))
        self.layer_experts = min(shape.num_experts, num_experts)
        self.timed_bytes = num_experts * model.expert_bytes
        self.arena = Arena(
            num_experts * self.blocks_per_expert, self.block_format.block_bytes, torch.device("cpu")
        )
        host = list(self.arena.blocks.split(self.blocks_per_expert))
        weights = DummyWeights(shape, getattr(torch, shape.dtype)).expert(0, 0)
        self._referred = self.block_format.encode(host[0], *weights, first_neuron=0)
        for expert in host[1:]:
            expert.copy_(host[0])
        self.host = random.Random(0).sample(host, len(host))
        self.resident = self.host  # unused without a GPU
        self.page_locked = self.on_gpu and _page_locked(self.arena)
        if self.on_gpu:
            count = max(1, GPU_WORKING_SET_BYTES // model.expert_bytes)
            copies = [expert.to(device) for expert in host[:count]]
            self.resident = [copies[number % len(copies)] for number in range(num_experts)]
        self._threads: tuple[int, bool] | None = None
        self.use_threads(num_cores(), pinned=False)

    def use_threads(self, threads: int, pinned: bool) -> None:
        torch.set_num_threads(threads)
        if self._threads != (threads, pinned):
            self._threads = (threads, pinned)
            self.engine = engine_for(self.model, self.device, threads, pinned)

    @property
    def kernel(self) -> str:
        """Name of the kernel that computes experts on the CPU."""
        return self.engine.resources.kernels.cpu.variant

    def host_expert(self, tokens: int, shares: list[float]) -> dict[float, float]:
        """Microseconds of one host expert called by `tokens` tokens, by stream share."""
        if self.engine.decode.takes(self._batch(tokens)):
            works = (Work.BLOCKS, Work.IN_PLACE)
            times = self.stopwatch.gather(*(self._spans(tokens, 0, s, works) for s in shares))
            return dict(zip(shares, times, strict=True))
        # Calls of experts without blocks measure Python's time alone.
        blocks = self.blocks_per_expert
        calls = [self._call(tokens, 0, blocks, share) for share in shares]
        per_sample = max(1, CALLS_PER_SAMPLE // self._layers) if tokens <= MANY_TOKENS else 1
        empty, *filled = self.stopwatch.time(
            self._call(tokens, 0, 0, 0.0), *calls, calls_per_sample=per_sample
        )
        experts = self._called(tokens) * self._layers
        return {s: difference(us, empty) / experts for s, us in zip(shares, filled, strict=True)}

    def resident_expert(self, tokens: int) -> float:
        """Microseconds of one resident expert called by `tokens` tokens."""
        blocks = self.blocks_per_expert
        singly = self.engine.resources.kernels.decode is None or computed_singly(
            self.block_format, tokens * blocks
        )
        if self._is_prompt(tokens) and singly:
            return self.stopwatch.gather(self._prefill(tokens))[0]
        return self.stopwatch.gather(self._spans(tokens, blocks, 0.0, (Work.RESIDENT,)))[0]

    def _prefill(self, tokens: int) -> Callable[[], list[float]]:
        """Returns a sampler of a resident expert's computation on the prefill path, if it is large.

        A sample is one value in microseconds: the GPU's time, or Python's time to queue the work
        if that is longer.
        """
        experts = cycle(self.resident)
        dtype = self.engine.resources.dtype
        states = torch.randn(tokens, self.block_format.hidden_size, dtype=dtype, device=self.device)
        apply = self.engine.resources.kernels.apply

        def sample() -> list[float]:
            begun = torch.cuda.Event(enable_timing=True)
            ended = torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(BUSY_CYCLES)  # keeps the GPU from waiting for Python
            begun.record()
            started_s = time.perf_counter()
            apply(next(experts), states)
            queued_us = (time.perf_counter() - started_s) * 1e6
            ended.record()
            ended.synchronize()
            return [max(queued_us, begun.elapsed_time(ended) * 1e3)]

        return sample

    def _spans(
        self, tokens: int, resident: int, share: float, works: tuple[Work, ...]
    ) -> Callable[[], list[float]]:
        """Returns a sampler of microseconds per called expert, one value per layer.

        They are counted from the start of the first of `works` to the end of the last. The GPU is
        kept busy until Python has queued the work, as in a run.
        """
        call = self._call(tokens, resident, self.blocks_per_expert, share)
        timeline = self.engine.resources.timeline
        called = self._called(tokens)

        def sample() -> list[float]:
            with timeline.recording() as recorded:
                if self.device.type == "cuda":
                    torch.cuda._sleep(BUSY_CYCLES)
                call()
            spans = [span for span in recorded if span.name in works]
            layers = ([s for s in spans if s.call == number] for number in range(self._layers))
            return [whole_s(of_layer) * 1e6 / called for of_layer in layers]

        return sample

    def _batch(self, tokens: int) -> int:
        """Tokens of a batch in which each called expert is chosen by `tokens` tokens."""
        return tokens * self._called(tokens) // self.top_k

    def _is_prompt(self, tokens: int) -> bool:
        """True if `tokens` tokens per expert put the batch on the prefill path."""
        return tokens * self.layer_experts // self.top_k > MAX_DECODE_TOKENS

    def _called(self, tokens: int) -> int:
        """Experts called in each layer.

        They are as many as one token chooses or, in a prompt, as many as keep tokens times experts
        within MAX_CHOICES.
        """
        if not self._is_prompt(tokens):
            return self.top_k
        return max(self.top_k, min(self.layer_experts, MAX_CHOICES // tokens))

    @property
    def _layers(self) -> int:
        """Layers in a call. With two, the second is queued while the first is computed."""
        return 2 if self.on_gpu and len(self.host) >= 2 * self.layer_experts else 1

    def _call(self, tokens: int, first: int, stop: int, share: float) -> Callable[[], None]:
        """Returns a function that passes a batch through layers.

        Successive calls use different layers and experts. Blocks 0 to `first` of each expert are on
        the device, blocks `first` to `stop` in host memory.
        """
        layers = [
            ExpertsLayer(
                0,
                [self.resident[number][:first] for number in numbers],
                [self.host[number][first:stop] for number in numbers],
                lambda _: share,
                self.engine,
            )
            for numbers in _groups(range(len(self.host)), self.layer_experts)
        ]
        passes = _groups(layers, self._layers)
        for layer, following in (pair for group in passes for pair in pairwise(group)):
            layer.next = following
        batch = (self._batch(tokens), self.top_k)
        dtype = self.engine.resources.dtype
        states = torch.randn(
            batch[0], self.block_format.hidden_size, dtype=dtype, device=self.device
        )
        weights = torch.full(batch, 1 / self.top_k, device=self.device)
        called = self._called(tokens)
        choices = torch.arange(weights.numel(), device=self.device).view(batch) % called
        indices = [
            (choices + start) % self.layer_experts for start in range(0, self.layer_experts, called)
        ]
        turns = cycle(product(indices, passes))
        jobs = self.engine.resources.jobs

        def call() -> None:
            index, group = next(turns)
            for layer in group:
                layer(states, index, weights)
            jobs.finish()  # Python's thread helps with the CPU's work, as in a run

        return call


def engine_for(model: ModelSpec, device: torch.device, threads: int, pinned: bool) -> ExpertEngine:
    """An engine as a plan would use it: with the staging ring on a GPU, and `threads` CPU threads.

    `pinned`: each thread stays on its own core.
    """
    slots = staged_blocks(model) if device.type == "cuda" else 0
    return make_engine(model.block_format, device, threads, slots, pinned, model.shape.activation)


def _page_locked(arena: Arena) -> bool:
    """Page-locks the arena. False if the system refuses; WSL, for one, allows only a little."""
    try:
        arena.pin()
    except FiddlerError:
        return False
    return True


def _groups(things: Iterable, size: int) -> list[tuple]:
    """Consecutive groups of `size`. A smaller last group is dropped."""
    return list(zip(*[iter(things)] * size, strict=False))
