"""Records a forward pass as a tape: captures GPU work, and cuts it at the borders.

While it records, the recorder stands in for the cache's `update`, the attention functions and what
serves the experts modules.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fiddler_run.engine.cuda_graphs import Capture
from fiddler_run.generation.pieces import Border, Call, Piece, Step, UnrecordableError, kept
from fiddler_run.models.dispatched import DispatchedModel

ATTENTIONS = ("sdpa", "eager")


class Recorder:
    """Builds the pieces of a tape while a forward pass runs.

    With `captures_experts`, experts become part of the captured work.
    """

    def __init__(
        self, step: Step, make_capture: Callable[[], Capture], captures_experts: bool = False
    ):
        self._pieces: list[Piece] = []
        self._step = step
        self._make_capture = make_capture
        self._captures_experts = captures_experts
        self._thread = threading.get_ident()
        self._capture: Capture | None = None
        # the calls of the open piece, and how many layers of experts were recorded
        self._before: list[Call] = []
        self._after: list[Call] = []
        self._layers = 0
        self._watch = _Watch(self)
        # keys and values of the last update, here and in a replay
        self._states: tuple[Tensor, ...] = ()
        self._replayed: list[tuple[Tensor, ...]] = [()]

    @property
    def is_open(self) -> bool:
        return self._capture is not None

    def open(self) -> None:
        self._capture = self._make_capture()
        self._capture.begin()

    def close(self) -> None:
        """Ends the open piece, if there is one."""
        if self._capture is None:
            return
        piece = Piece(self._before, self._capture, self._after, [])
        self._before = []
        self._after = []
        for call in piece.before:
            call()
        self._capture.end()
        self._capture = None
        for call in piece.after:
            call()
        self._pieces.append(piece)

    def abort(self) -> None:
        """Ends a recording that failed. Frees its pieces."""
        self._watch.stop()
        if self._capture is not None:
            self._capture.abort()
            self._capture = None
        self.take_pieces()

    def take_pieces(self) -> list[Piece]:
        """Hands the pieces over: the recorder is part of a cycle, which would keep them alive."""
        pieces = self._pieces
        self._pieces = []
        return pieces

    def experts(self, module: nn.Module, serve: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """In place of what serves a layer's experts module."""
        if self._captures_experts:
            if self._before:  # the CPU takes few jobs at once
                self.close()
                self.open()
            self._layers += 1
            output, before, after = serve.record(self._layers, *tensors)
            self._before.append(before)
            self._after.append(after)
            return output
        self.close()
        output = kept(serve(*tensors))
        self._then(lambda _: output.copy_(module.planned(*tensors)))
        self.open()
        return output

    def rotary(self, real: Callable, *arguments: object, **named: object) -> tuple[Tensor, ...]:
        """In place of a rotary embedding that computes its frequencies in each step."""
        self.close()
        outputs = tuple(map(kept, real(*arguments, **named)))

        def again(_: Step) -> None:
            for output, result in zip(outputs, real(*arguments, **named), strict=True):
                output.copy_(result)

        self._then(again)
        self.open()
        return outputs

    def update(self, real: Callable, *states: object, **more: object) -> tuple[Tensor, ...]:
        """In place of the cache's `update`. The states of all tokens go to the attention alone."""
        self.close()
        replayed = self._replayed = [()]
        self._then(lambda step: replayed.__setitem__(0, step.cache.update(*states, **more)))
        self._states = real(*states, **more)
        self._watch.start(self._states)
        return self._states

    def expand(self, real: Callable, *states: Tensor) -> tuple[Tensor, ...]:
        """In place of what computes all keys and values from a latent cache, in each step."""
        self._require(states)
        self.close()
        replayed = self._replayed
        self._then(lambda _: replayed.__setitem__(0, real(*replayed[0])))
        self._states = real(*states)
        self._watch.start(self._states)
        return self._states

    def attend(
        self,
        real: Callable | None,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *more: object,
        **how: object,
    ) -> tuple[Tensor, None]:
        """In place of the attention function."""
        real = real or sys.modules[type(module).__module__].eager_attention_forward
        if threading.get_ident() != self._thread:
            return real(module, query, key, value, attention_mask, *more, **how)
        self._require((key, value))
        self.close()
        layer_type = _layer_type(module)

        def attended(step: Step, states: tuple[Tensor, ...]) -> Tensor:
            masks = step.masks
            mask = masks[layer_type] if isinstance(masks, dict) else masks
            return real(module, query, *states, mask, *more, **how)[0]

        replayed = self._replayed
        output = kept(attended(self._step, self._states))
        self._then(lambda step: output.copy_(attended(step, replayed[0])))
        self._states = ()
        self.open()
        return output, None

    def _then(self, border: Border) -> None:
        """Notes what follows the last piece."""
        self._pieces[-1].borders.append(border)

    def _require(self, states: tuple[Tensor, ...]) -> None:
        """Checks that these are the states of the last update."""
        self._watch.stop()
        pairs = zip(states, self._states, strict=True)
        if not self._states or any(given is not expected for given, expected in pairs):
            raise UnrecordableError("attention is not over the cache's keys and values")

    @contextmanager
    def installed(self, model: DispatchedModel, with_rotary: bool) -> Iterator[None]:
        """Puts this recorder's methods in the place of those that they stand for."""
        with ExitStack() as stack:
            cache = self._step.cache
            stack.enter_context(replaced(cache, "update", self.update))
            if hasattr(cache, "update_indexer"):
                stack.enter_context(replaced(cache, "update_indexer", _refuse_indexer))
            for module in model.modules():
                if with_rotary and type(module).__name__.endswith("RotaryEmbedding"):
                    stack.enter_context(replaced(module, "forward", self.rotary))
                if hasattr(module, "expand_kv"):
                    stack.enter_context(replaced(module, "expand_kv", self.expand))
            for module in model.experts_modules():
                serve = module.planned
                stack.callback(setattr, module, "planned", serve)
                module.planned = partial(self.experts, module, serve)
            for name in ATTENTIONS:
                real = ALL_ATTENTION_FUNCTIONS.get(name)  # None: each family has its own
                stack.callback(ALL_ATTENTION_FUNCTIONS._local_mapping.pop, name, None)
                ALL_ATTENTION_FUNCTIONS[name] = partial(self.attend, real)
            yield


class _Watch(TorchDispatchMode):
    """While started, opens a piece at the first operation, which must not read certain tensors.

    Between a cache's update and the attention, most models do nothing.
    """

    def __init__(self, recorder: Recorder):
        super().__init__()
        self._recorder = recorder
        self._forbidden: set[int] = set()
        self._started = False

    def start(self, forbidden: tuple[Tensor, ...]) -> None:
        self._forbidden = {tensor.untyped_storage().data_ptr() for tensor in forbidden}
        self._started = True
        self.__enter__()

    def stop(self) -> None:
        if self._started:
            self._started = False
            self.__exit__(None, None, None)

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        for given in tree_leaves((arguments, named)):
            if isinstance(given, Tensor) and given.untyped_storage().data_ptr() in self._forbidden:
                raise UnrecordableError(f"{operation} reads the cache before the attention")
        if not self._recorder.is_open:
            self._recorder.open()
        return operation(*arguments, **(named or {}))


@contextmanager
def replaced(owner: object, name: str, replacement: Callable) -> Iterator[None]:
    """Replaces a method of one object by `replacement(method, ...)`."""
    setattr(owner, name, partial(replacement, getattr(owner, name)))
    try:
        yield
    finally:
        delattr(owner, name)


def _refuse_indexer(*_: object, **__: object) -> Tensor:
    raise UnrecordableError("the cache grows an index of its keys")


def _layer_type(module: nn.Module) -> str | None:
    types = getattr(module.config, "layer_types", None)
    return types[module.layer_idx] if types else None
