"""What one layer does with its experts: every called expert's blocks split over three executors, summed in float32.

    [0 ... resident) device, in place  |  [resident ... streamed) over the link, then device  |  [streamed ... end) CPU, in place

Blocks on disk are mapped and come last: the CPU reads them as if they were in host memory.

Any split gives the same result up to the order of addition, because an expert is a sum over its neurons. CPU, link and device
work at the same time.

Who divides: for few tokens on a GPU, as in decode, the CPU's threads themselves once the GPU has sent them the router's choice, so
that Python is always a layer ahead (`Executors.run_routed`). In all other cases Python, which waits for that choice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from fiddler_run.errors import FiddlerError
from fiddler_run.kernels.routed import RoutedLayer, favoured
from fiddler_run.plan import MOST_ROUTED_TOKENS

if TYPE_CHECKING:
    from fiddler_run.executors import Executors


@dataclass(frozen=True)
class Traffic:
    """Expert blocks that calls needed, by where they were computed."""

    resident_blocks: int = 0
    streamed_blocks: int = 0
    cpu_blocks: int = 0

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(*(getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self)))

    @property
    def needed_blocks(self) -> int:
        return self.resident_blocks + self.streamed_blocks + self.cpu_blocks

    @property
    def hit_rate(self) -> float:
        return self.resident_blocks / self.needed_blocks if self.needed_blocks else 0.0


class Expert:
    """One expert's blocks [count, block_elements] in device memory, in host memory, mapped from disk."""

    def __init__(self, resident: torch.Tensor, absent: torch.Tensor, on_disk: torch.Tensor):
        self.resident, self.absent, self.on_disk = resident, absent, on_disk
        self.num_resident, self.num_absent, self.num_on_disk = len(resident), len(absent), len(on_disk)
        self.num_blocks = max(1, self.num_resident + self.num_absent + self.num_on_disk)


@dataclass(frozen=True)
class ExpertCall:
    """The tokens that chose one expert, and how many of its absent blocks are streamed; the CPU computes all that are left.

    Its tokens are choices `start` to `start + len(rows)` of the layer's choices sorted by expert: `rows` [n] int64 into the
    layer's tokens, the router's `weights` [n] float32.
    """

    expert: Expert
    start: int
    rows: np.ndarray
    weights: np.ndarray
    num_streamed: int

    @property
    def num_on_cpu(self) -> int:
        return self.expert.num_absent - self.num_streamed + self.expert.num_on_disk

    @property
    def on_device(self) -> bool:
        return self.expert.num_resident > 0 or self.num_streamed > 0


class LayerDispatch:
    """Serves one layer's experts module: (hidden_states, top_k_index, top_k_weights) -> hidden_states."""

    def __init__(
        self,
        layer: int,
        resident: list[torch.Tensor],
        absent: list[torch.Tensor],
        stream_share: Callable[[int], float],
        executors: Executors,
        on_disk: list[torch.Tensor] | None = None,
    ):
        """
        Args:
            layer: its number.
            resident: for each expert, its blocks in device memory, [count, block_elements].
            absent: for each expert, its blocks in host memory.
            stream_share: tokens of a call -> the share of its expert's absent blocks that goes over the link.
            executors: what computes them; shared by all layers.
            on_disk: for each expert, its blocks that are mapped from disk; None: there are none.
        """
        on_disk = on_disk or [blocks[:0] for blocks in absent]
        self.layer, self.experts = layer, [Expert(*blocks) for blocks in zip(resident, absent, on_disk, strict=True)]
        self.stream_share, self.executors = stream_share, executors
        self.prompts_favour_link = 1.0  # with long ones it has so many times the blocks of `stream_share`, for each of the CPU's
        self.next: LayerDispatch | None = None

    @cached_property
    def routed(self) -> RoutedLayer | None:
        """For few tokens; None: there are blocks on disk, which only Python asks for in time."""
        if any(expert.num_on_disk for expert in self.experts):
            return None
        places = [expert.resident for expert in self.experts], [expert.absent for expert in self.experts]
        return RoutedLayer(*places, self.stream_share)

    def __call__(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """hidden_states [tokens, hidden], top_k_index [tokens, k] and top_k_weights [tokens, k] on the device: [tokens, hidden]."""
        if len(hidden_states) == 0:
            return torch.zeros_like(hidden_states)
        if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
            raise FiddlerError(
                "experts in blocks compute no gradients; call the model inside torch.no_grad(), or train the stock one"
            )
        on_device = torch.cuda.device(hidden_states.device) if hidden_states.is_cuda else nullcontext()
        with on_device, self.executors.lock:
            return self._run(hidden_states.contiguous(), top_k_index.long().contiguous(), top_k_weights.float().contiguous())

    def _run(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        executors, timeline = self.executors, self.executors.timeline
        timeline.end("GPU", "dense")  # what lies between two layers' experts
        timeline.enter(self.layer)
        if executors.routes(len(hidden_states)) and self.routed is not None:
            output = executors.run_routed(self.routed, hidden_states, top_k_index, top_k_weights)
        else:
            timeline.begin("host", "wait for the router")
            host_states, index, weights = executors.receive(hidden_states, top_k_index, top_k_weights)
            timeline.end("host", "wait for the router")
            groups = expert_groups(index.numpy(), weights.numpy(), len(self.experts))
            is_prompt = len(hidden_states) > MOST_ROUTED_TOKENS
            calls = self._split(groups, self.prompts_favour_link if is_prompt else 1.0)
            output = executors.run(calls, host_states, hidden_states, top_k_index, top_k_weights)
            if self.next is not None and is_prompt:  # then it calls nearly all experts
                executors.stream_ahead(self.next._expected_calls(index.numel()))
        timeline.begin("GPU", "dense")
        return output

    def _expected_calls(self, choices: int) -> list[ExpertCall]:
        """If every expert is chosen as often as any other."""
        each = np.zeros(max(1, choices // len(self.experts)), dtype=np.int64)
        return self._split([(number, each, each) for number in range(len(self.experts))], self.prompts_favour_link)

    def _split(self, groups: list[tuple[int, np.ndarray, np.ndarray]], favour_link: float = 1.0) -> list[ExpertCall]:
        """Divides the blocks of each called expert. What rounding to whole blocks gives the link too much or too little with
        one expert is made up for with the next. The same rule as in kernels/route.h, where the shares are themselves changed."""
        calls, start, owed = [], 0, 0.0
        for number, rows, weights in groups:
            expert = self.experts[number]
            owed += favoured(self.stream_share(len(rows)), favour_link) * expert.num_absent
            streamed = min(expert.num_absent, max(0, int(owed + 0.5)))
            owed -= streamed
            calls.append(ExpertCall(expert, start, rows, weights, streamed))
            start += len(rows)
        return calls


def expert_groups(top_k_index: np.ndarray, top_k_weights: np.ndarray, num_experts: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Groups the router's choices [tokens, k] by expert, leaving out experts that no token chose: of each its number, rows [n]
    int64 and weights [n] float32, contiguous.

    Choices of experts that do not exist are left out; transformers marks by `num_experts` those that other processes compute.
    """
    chosen = top_k_index.ravel()
    chosen = np.where((chosen >= 0) & (chosen < num_experts), chosen, num_experts)
    order = chosen.argsort(kind="stable")
    rows, weights = order // top_k_index.shape[1], top_k_weights.ravel()[order]
    stops = np.bincount(chosen, minlength=num_experts)[:num_experts].cumsum().tolist()
    groups, start = [], 0
    for expert, stop in enumerate(stops):
        if stop > start:
            groups.append((expert, rows[start:stop], weights[start:stop]))
        start = stop
    return groups
