"""Layers whose speeds the test sets."""

from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import torch

from fiddler_run.engine.timeline import Lane, Span, Work
from fiddler_run.engine.tuning import RouterSizes
from fiddler_run.kernels.decode_layer import DecodeLayer
from fiddler_run.plan.split import scale_odds

EXPERTS = 8
BLOCKS = 16
TOP_K = 2
ROUTER = RouterSizes(EXPERTS, TOP_K, hidden_size=4)
LONG = 4096  # tokens of a long prompt


class Resources:
    """Stands in for the engine's resources; its timeline holds only times that layers report."""

    def __init__(self, decode: object | None = "kernels"):
        self.kernels = SimpleNamespace(decode=decode)
        self.timeline = self.jobs = self
        self.device = torch.device("cpu")
        self.dtype = None
        self.spans = []
        self.calls = 0

    def finish(self) -> None:
        pass

    @contextmanager
    def recording(self):
        self.spans = []
        self.calls = 0
        yield self.spans


class Layer:
    """A layer whose expert blocks are all in host memory.

    `cpu_s` and `link_s`: seconds per block. `delay_s`: added to the CPU's time once.
    """

    def __init__(
        self,
        resources: Resources,
        share: float,
        cpu_s: float,
        link_s: float,
        delay_s: float = 0.0,
        number: int = 0,
    ):
        nothing = [torch.empty(0, 6)] * EXPERTS
        blocks = [torch.empty(BLOCKS, 6)] * EXPERTS
        self.number = number
        self.stream_share: Callable[[int], float] = lambda _: share
        self.decode = DecodeLayer(nothing, blocks, self.stream_share)
        self.experts = [SimpleNamespace(num_host=BLOCKS)] * EXPERTS
        self.resources = resources
        self.share = share
        self.cpu_s = cpu_s
        self.link_s = link_s
        self.delay_s = delay_s
        self.prompt_delay_s = 0.0
        self.prefill_odds = 1.0
        self.prompts = []

    def __call__(self, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        if len(states) > 1:
            self.compute_prompt(states, index, weights)
            return
        assert index.shape == weights.shape == (1, TOP_K)
        assert index.max() < EXPERTS
        streamed = int(self.decode.shares[1] * TOP_K * BLOCKS + 0.5)
        cpu_s = (TOP_K * BLOCKS - streamed) * self.cpu_s + self.delay_s
        self.delay_s = 0.0
        call = self.resources.calls
        self.resources.spans += [
            Span(Lane.CPU, Work.ROUTER, 0, call, 0.0, 9.0),
            Span(Lane.CPU, Work.BLOCKS, 0, call, 9.0, 9.0 + cpu_s),
            Span(Lane.LINK, Work.IN_PLACE, 0, call, 9.0, 9.0 + streamed * self.link_s),
        ]
        self.resources.calls += 1

    def compute_prompt(
        self, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> None:
        assert index.shape == weights.shape == (len(states), TOP_K)
        assert index.flatten().bincount(minlength=EXPERTS).min() > 0
        self.prompts.append(len(states))
        share = scale_odds(self.share, self.prefill_odds)
        cpu_s = (1 - share) * self.cpu_s + self.prompt_delay_s
        self.prompt_delay_s = 0.0
        copy_s = share * self.link_s / 2
        call = self.resources.calls
        self.resources.spans += [
            Span(Lane.CPU, Work.BLOCKS, 0, call, 1.0, 1.0 + cpu_s),
            Span(Lane.LINK, Work.COPY, 0, call, 0.0, copy_s),
            Span(Lane.LINK, Work.COPY, 0, call, 9.0, 9.0 + copy_s),
            Span(Lane.GPU, Work.STREAMED, 0, call, 0.0, 99.0),
        ]
        self.resources.calls += 1
