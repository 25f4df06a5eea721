"""A layer's experts, computed by all ranks together: rank 0's side."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fiddler_run.engine.layer import ExpertsLayer, layer_inputs, require_no_gradients
from fiddler_run.engine.timeline import Lane, Work
from fiddler_run.ranks.exchange import Inputs
from fiddler_run.ranks.peers import Peers


class SharedLayer:
    """Serves the experts module of one layer, like `ExpertsLayer`.

    `local` computes this rank's share of each expert, in float32.
    """

    def __init__(self, local: ExpertsLayer, peers: Peers):
        self.local = local
        self._peers = peers

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' output; see `ExpertsLayer`."""
        if len(hidden_states) == 0:
            return torch.zeros_like(hidden_states)
        require_no_gradients(hidden_states, top_k_weights)
        self.local.check_dtype(hidden_states)
        inputs = Inputs(*layer_inputs(hidden_states, top_k_index, top_k_weights))
        with self.local.lock, self._peers.layer(self.local.number, inputs):
            self._peers.broadcast(inputs)
            partial = self.local(*inputs)
            timeline = self.local.timeline
            timeline.begin(Lane.GPU, Work.EXCHANGE)
            output = self._peers.reduce(partial, hidden_states.dtype)
            timeline.end(Lane.GPU, Work.EXCHANGE)
            timeline.begin(Lane.GPU, Work.DENSE)
            return output

    def can_record(self, tokens: int) -> bool:
        """True if a batch of this size can be captured in a CUDA graph."""
        return self._peers.exchange.can_record and self.local.can_record(tokens)

    def record(
        self, number: int, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> tuple[Tensor, Callable[[], None], Callable[[], None]]:
        """As a call, while a CUDA graph is captured; see `ExpertsLayer.record`."""
        inputs = Inputs(*layer_inputs(hidden_states, top_k_index, top_k_weights))
        self._peers.broadcast(inputs)
        partial, before, after = self.local.record(number, *inputs)
        output = self._peers.reduce(partial, hidden_states.dtype)

        def begin() -> None:
            self._peers.begin(self.local.number, inputs, recorded=True)
            before()

        def end() -> None:
            self._peers.end()
            after()

        return output, begin, end

    def begin_step(self) -> None:
        self.local.begin_step()

    def abandon(self) -> None:
        self.local.abandon()
