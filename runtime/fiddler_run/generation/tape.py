"""A tape: a decode step of a transformers model, as pieces of GPU work and calls between them.

The stock forward pass runs once. Its work on the GPU is captured, except at two borders where it
cannot be: the update of a layer's cache with the attention over it, and the experts. There the
capture pauses, and the call runs as always:

    [norm, q k v, rotary]  attention  [o, norm, router]  experts  [norm, ...]  ...  [output head]

Later steps replay the captured pieces and repeat the calls. Recurrent states are updated in place
by the pieces.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch import Tensor

from fiddler_run.engine.cuda_graphs import Capture, no_garbage_collection
from fiddler_run.engine.layer import ExpertsLayer
from fiddler_run.generation.pieces import Piece, Step, kept
from fiddler_run.generation.recorder import Recorder
from fiddler_run.models.dispatched import DispatchedModel
from fiddler_run.ranks.layer import SharedLayer

# attention functions are replaced for the whole process while one thread records
RECORDING = threading.Lock()


class Tape:
    """A recorded step.

    `states` [sequences, 1, hidden], the embedded tokens, and `positions` [sequences, 1] are its
    inputs, to be filled before a replay.
    """

    def __init__(self, states: Tensor, positions: Tensor):
        self.states = kept(states)
        self.positions = kept(positions)
        self._pieces: list[Piece] = []
        self._begin: Callable[[], None] = lambda: None
        self._logits: Tensor | None = None

    def record(
        self,
        model: DispatchedModel,
        step: Step,
        make_capture: Callable[[], Capture],
        captures_all: bool = True,
    ) -> Tensor:
        """Runs a step and records it. Returns its logits.

        Some models make masks if they are given none, or rotary frequencies in each step, in a way
        that cannot be captured. Without `captures_all`, they are given masks, and their rotary
        embedding runs as always.

        Raises:
            Exception: of many types, if it cannot be recorded.
        """
        served = [module.planned for module in model.experts_modules()]
        layers = [each for each in served if isinstance(each, ExpertsLayer | SharedLayer)]
        captures_experts = bool(layers) and len(layers) == len(served)
        captures_experts &= all(layer.can_record(len(self.states)) for layer in layers)
        recorder = Recorder(step, make_capture, captures_experts)
        if captures_experts:
            self._begin = layers[0].begin_step
        self._begin()
        with RECORDING, no_garbage_collection(), recorder.installed(model, not captures_all):
            try:
                recorder.open()
                self._logits = DispatchedModel.forward(
                    model,
                    inputs_embeds=self.states,
                    position_ids=self.positions,
                    attention_mask=None if captures_all else step.masks,
                    past_key_values=step.cache,
                    use_cache=True,
                ).logits
                recorder.close()
            except BaseException:
                recorder.abort()
                for layer in layers[:1]:
                    layer.abandon()  # the jobs of all layers
                raise
        self._pieces = recorder.take_pieces()
        return self._logits.clone()

    def replay(self, step: Step) -> Tensor:
        """Runs the step again, with the current inputs. Returns its logits."""
        self._begin()
        for piece in self._pieces:
            piece.replay(step)
        # a caller may keep its logits, which the next replay would overwrite
        return self._logits.clone()
