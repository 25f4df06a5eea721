"""What a device computes of many tokens: resident blocks where they lie, streamed ones in the ring, as they arrive."""

from collections.abc import Callable
from itertools import chain, islice

import torch

from fiddler_run.dispatch import ExpertCall
from fiddler_run.timeline import Timeline
from fiddler_run.transfer import StagingRing

Apply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of blocks [count, block_elements] to states [n, hidden]: their sum


class StagedBlocks:
    """The device's part of a layer.

    The link should never wait: streamed blocks are computed as they arrive, which makes room in the ring, and resident ones between
    two arrivals. What was copied ahead fills the ring until the first of it is computed, so that nothing else is done before.
    """

    def __init__(self, ring: StagingRing | None, apply: Apply, timeline: Timeline):
        """`ring` None: nothing is ever streamed."""
        self._ring, self._apply, self._timeline = ring, apply, timeline

    def compute(
        self, calls: list[ExpertCall], hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sums of the calls' resident and streamed blocks: [tokens, hidden] float32."""
        output = torch.zeros_like(hidden_states, dtype=torch.float32)
        calls = [call for call in calls if call.on_device]
        if not calls:
            return output
        pieces = [self._pieces(call) for call in calls]
        arriving = self._ring.stream(list(chain(*pieces)), self._timeline) if any(pieces) else iter(())
        # The same order that `expert_groups` finds on the host: choices of experts that do not exist come last.
        chosen = top_k_index.flatten()
        order = chosen.where(chosen >= 0, torch.iinfo(chosen.dtype).max).argsort(stable=True)
        rows, weights = order // top_k_index.shape[1], top_k_weights.flatten()[order].unsqueeze(1)
        states: dict[int, torch.Tensor] = {}  # of each call's tokens, by its first choice
        sums: dict[int, torch.Tensor] = {}

        def add(name: str, blocks: torch.Tensor, call: ExpertCall) -> None:
            if call.start not in states:
                states[call.start] = hidden_states[rows[call.start : call.start + len(call.rows)]]
            self._timeline.begin("GPU", name)
            part = self._apply(blocks, states[call.start])
            sums[call.start] = sums[call.start].add_(part) if call.start in sums else part
            self._timeline.end("GPU", name)

        resident = (("resident", call.expert.resident, call) for call in calls if call.expert.num_resident)
        for call in chain(*([call] * len(streamed) for call, streamed in zip(calls, pieces, strict=True))):
            with next(arriving) as blocks:
                add("streamed", blocks, call)
            for work in islice(resident, 1):
                add(*work)
        for work in resident:
            add(*work)
        for start, total in sums.items():
            tokens = slice(start, start + len(total))
            output.index_add_(0, rows[tokens], total * weights[tokens])
        return output

    def copy_ahead(self, calls: list[ExpertCall]) -> None:
        """Starts to copy what `compute` will probably be called with next."""
        if self._ring is not None and self._ring.copy_stream is not None:
            self._ring.stream_ahead(list(chain(*map(self._pieces, calls))), self._timeline)

    def _pieces(self, call: ExpertCall) -> tuple[torch.Tensor, ...]:
        """What the link carries for a call, in the order in which it does."""
        return call.expert.absent[: call.num_streamed].split(self._ring.at_once) if call.num_streamed else ()
