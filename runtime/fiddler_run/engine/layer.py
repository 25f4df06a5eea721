"""One layer's experts: splits the blocks of every called expert over device, link and CPU.

    resident blocks    |  streamed blocks               |  other host blocks, blocks on disk
    device, in place   |  over the link, then device    |  CPU, in place

An expert is a sum over its neurons, so every split gives the same result up to the order of
addition. The sums are float32. Blocks on disk are mapped and come last; the CPU reads them as if
they were in host memory.

On the decode path, one of the CPU's threads applies the split as soon as the GPU has sent the
router's choice, so that Python stays a layer ahead. On the prefill path, Python waits for the
choice and applies the split.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property

import numpy as np
import torch

from fiddler_run.engine.calls import (
    Choices,
    Expert,
    ExpertCalls,
    LayerExperts,
    Runs,
    sorted_choices,
)
from fiddler_run.engine.engine import ExpertEngine
from fiddler_run.engine.timeline import Lane, Timeline, Work
from fiddler_run.errors import FiddlerError
from fiddler_run.kernels.decode_layer import DecodeLayer
from fiddler_run.kernels.limits import MAX_DECODE_TOKENS
from fiddler_run.plan.split import scale_odds, split


class ExpertsLayer:
    """Serves the experts module of one layer.

    `prefill_odds` scales the odds, the ratio of streamed blocks to the CPU's, during prefill.
    `next` is the following layer, whose first blocks are prefetched.
    """

    def __init__(
        self,
        number: int,
        resident: list[torch.Tensor],
        host: list[torch.Tensor],
        stream_share: Callable[[int], float],
        engine: ExpertEngine,
        on_disk: list[torch.Tensor] | None = None,
    ):
        """Prepares one layer.

        Args:
            number: the layer's number.
            resident: for each expert, its blocks in device memory, uint8 [count, block_bytes].
            host: for each expert, its blocks in host memory.
            stream_share: maps the tokens of a call to the share of its expert's host blocks to
                stream.
            engine: computes the blocks; shared by all layers.
            on_disk: for each expert, its blocks mapped from disk. None: there are none.
        """
        on_disk = on_disk or [blocks[:0] for blocks in host]
        self.number = number
        self.experts = [Expert(*places) for places in zip(resident, host, on_disk, strict=True)]
        self.stream_share = stream_share
        self.prefill_odds = 1.0
        self.next: ExpertsLayer | None = None
        self._engine = engine
        self._calls = np.zeros(len(self.experts), dtype=np.int64)  # on the prefill path
        self._shares: dict[tuple[int, float], float] = {}  # by tokens and odds
        self._expected: dict[tuple[int, float], Runs] = {}  # by choices and odds

    @cached_property
    def places(self) -> LayerExperts:
        """The places of the experts' blocks."""
        return LayerExperts(self.experts)

    @cached_property
    def decode(self) -> DecodeLayer | None:
        """The layer on the decode path. None with blocks on disk, which only prefill can read."""
        if any(expert.num_on_disk for expert in self.experts):
            return None
        resident = [expert.resident for expert in self.experts]
        host = [expert.host for expert in self.experts]
        return DecodeLayer(resident, host, self.stream_share)

    @property
    def lock(self) -> threading.RLock:
        """Held while a layer of this engine is computed, and during a generation."""
        return self._engine.resources.lock

    @property
    def timeline(self) -> Timeline:
        """The timeline of the engine."""
        return self._engine.resources.timeline

    @property
    def calls(self) -> np.ndarray:
        """How many tokens each expert has computed so far, [num_experts] int64."""
        return self._calls if self.decode is None else self._calls + self.decode.calls

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The experts' output [tokens, hidden].

        Args:
            hidden_states: [tokens, hidden], on the device.
            top_k_index, top_k_weights: [tokens, k], the router's choice.
        """
        if len(hidden_states) == 0:
            return torch.zeros_like(hidden_states)
        require_no_gradients(hidden_states, top_k_weights)
        on_gpu = hidden_states.is_cuda
        current = torch.cuda.device(hidden_states.device) if on_gpu else nullcontext()
        with current, self.lock:
            timeline = self.timeline
            timeline.end(Lane.GPU, Work.DENSE)  # ends the time between the experts of two layers
            timeline.enter(self.number)
            output = self._run(*layer_inputs(hidden_states, top_k_index, top_k_weights))
            timeline.begin(Lane.GPU, Work.DENSE)
            return output

    def check_dtype(self, hidden_states: torch.Tensor) -> None:
        """Checks that the experts take these states; see `Resources.check_dtype`."""
        self._engine.resources.check_dtype(hidden_states)

    def can_record(self, tokens: int) -> bool:
        """True if a batch of this size takes the decode path and no work is timed."""
        takes = self._engine.decode.takes(tokens) and self.decode is not None
        return takes and not self.timeline.on

    def record(
        self,
        number: int,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> tuple[torch.Tensor, Callable[[], None], Callable[[], None]]:
        """As a call, while a CUDA graph is captured; see `DecodePath.record`.

        All layers of a step must be recorded: `number` counts them, from 1.
        """
        inputs = layer_inputs(hidden_states, top_k_index, top_k_weights)
        return self._engine.decode.record(self.decode, number, *inputs)

    def begin_step(self) -> None:
        """Call this before a step whose layers were recorded."""
        self._engine.decode.begin_step()

    def abandon(self) -> None:
        """Ends all unfinished work of the CPU, after an error."""
        self._engine.resources.abandon()

    def _run(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        engine = self._engine
        tensors = (hidden_states, top_k_index, top_k_weights)
        if engine.decode.takes(len(hidden_states)) and self.decode is not None:
            return engine.decode.run(self.decode, *tensors)
        timeline = self.timeline
        timeline.begin(Lane.PYTHON, Work.ROUTER)
        host_states, index, weights = engine.prefill.receive(*tensors)
        timeline.end(Lane.PYTHON, Work.ROUTER)
        choices = sorted_choices(index.numpy(), weights.numpy(), len(self.experts))
        self._calls[choices.experts] += choices.tokens
        is_prompt = len(hidden_states) > MAX_DECODE_TOKENS
        calls = self.split(choices, self.prefill_odds if is_prompt else 1.0)
        next_runs = None
        if self.next is not None and is_prompt:
            next_runs = self.next.expected_runs(index.numel())
        return engine.prefill.run(calls, host_states, *tensors, next_runs=next_runs)

    def split(self, choices: Choices, odds: float = 1.0) -> ExpertCalls:
        """Splits the blocks of each called expert, with the plan's odds scaled by `odds`."""
        streamed = self._split(choices.experts, choices.tokens, odds)
        return ExpertCalls(self.places, choices, streamed)

    def expected_runs(self, choices: int) -> Runs:
        """The blocks that a long prompt streams if every expert is chosen equally often."""
        key = (choices, self.prefill_odds)
        if key not in self._expected:
            experts = np.arange(len(self.experts))
            tokens = np.full(len(experts), max(1, choices // len(experts)))
            streamed = self._split(experts, tokens, self.prefill_odds)
            self._expected = {key: Runs.of(self.places, experts, streamed)}
        return self._expected[key]

    def _split(self, experts: np.ndarray, tokens: np.ndarray, odds: float) -> np.ndarray:
        """The number of host blocks to stream, [c] int64, of experts [c] that `tokens` call."""
        numbers, which = np.unique(tokens, return_inverse=True)
        shares = np.array([self._share(number, odds) for number in numbers.tolist()])
        counts = self.places.host.count[experts]
        of_each = zip(shares[which].tolist(), counts.tolist(), strict=True)
        return np.fromiter(split(of_each), np.int64, len(experts))

    def _share(self, tokens: int, odds: float) -> float:
        """The share of the host blocks to stream of an expert that `tokens` tokens call."""
        key = (tokens, odds)
        if key not in self._shares:
            self._shares[key] = scale_odds(self.stream_share(tokens), odds)
        return self._shares[key]


def require_no_gradients(*tensors: torch.Tensor) -> None:
    """Checks that no gradients are wanted.

    Raises:
        FiddlerError: they are.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise FiddlerError(
            "the experts do not support gradients; call the model inside torch.no_grad(), or"
            " train the stock model"
        )


def layer_inputs(
    hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs in the types and the layout that the kernels read."""
    return (
        hidden_states.contiguous(),
        top_k_index.long().contiguous(),
        top_k_weights.float().contiguous(),
    )
